"""Options of the framework itself in a config, each with its type, default and description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from transfer.config.option_schema import Block

Precision = Literal["fp32", "bf16", "fp16"]
Compile = bool | Literal["reduce-overhead"]

OPTIMIZER = "adam"
"""Optimizer of a config that names none."""
LEARNING_RATE = 1e-3
"""Learning rate of a config that sets none."""
BATCH_SIZE = 32
"""Batch size of a config that sets none."""


def one_of(text: str) -> WrapValidator:
    """Return a validator that replaces pydantic's errors for all members of a union by one sentence.

    Args:
        text: Valid values in words (``auto, or an integer of 1 or more``).
    """

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValueError as error:
            raise PydanticCustomError("one_of", "expected {text}", {"text": text}) from error

    return WrapValidator(check)


# Inside a Python validator, strict mode does not convert a list to a tuple as it does for JSON.
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


class Until(Block):
    """Freeze policy: a stage and all stages before it.

    Args:
        until: Last frozen stage, counted from the input.
    """

    until: str


class Parameters(Block):
    """Freeze policy: the parameters whose names match one of several patterns.

    Args:
        parameters: Regular expressions. A parameter is frozen if ``re.search`` finds one of them in its name.
    """

    parameters: Annotated[Names, Field(min_length=1)]


Freeze = Annotated[
    Literal["none", "backbone"] | Until | Parameters | Names,
    one_of("none, backbone, {until: STAGE}, a list of stages, or {parameters: [REGEX, ...]}"),
]
# `train.optimizer.lr=0.01` on the command line needs no name.
Optimizer = Annotated[
    dict[str, Any], BeforeValidator(lambda value: {"name": OPTIMIZER} | value if isinstance(value, dict) else value)
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LearningRate = Annotated[
    Positive | Annotated[dict[str, Positive], Field(min_length=1)],
    one_of("a positive number, or positive numbers by group: head, backbone, a stage, or layer_decay"),
]
Count = Annotated[int, Field(ge=1)]
BatchNorm = Literal["frozen", "eval", "train"]
Solver = Literal["gradient", "lbfgs"]
RecipeName = Literal["feature_extraction", "fine_tune", "lp_ft", "gradual", "scratch", "random_features"]


class NamedBlock(Block):
    """A block that names a plugin or one of torch's classes, and contains its options.

    Args:
        name: Name of the plugin or class.
    """

    name: str


class BackboneOptions(NamedBlock):
    """Options of every backbone that has no option weights of its own, in addition to its own options.

    Args:
        weights: Earlier run of the same backbone (runs/NAME), or its model folder. The weights start from those of the
            run, and a vocabulary or the like is the run's instead of learned. null does not read a run.
    """

    weights: str | None = None


class Fold(Block):
    """Fold of a cross-validation.

    Args:
        number: Number of the fold that is the test split, from 1.
        of: Number of folds.
        repeat: Number of the repetition, from 1. Each divides the examples in another way.
    """

    number: Count
    of: Annotated[int, Field(ge=2)]
    repeat: Count = 1

    @model_validator(mode="after")
    def _number_exists(self) -> Fold:
        if self.number > self.of:
            raise ValueError(f"fold {self.number} does not exist: expected a number from 1 to {self.of}")
        return self


class DataOptions(NamedBlock):
    """Options of every dataset, in addition to its own.

    Args:
        validation: Fraction of the training split that is used for validation if the dataset has no split for it. 0
            trains on all examples and keeps the last epoch.
        limit: Maximum number of examples per class in the training and validation splits; null uses all examples. The
            test split is never limited.
        exclude: CSV file with the columns name and exclude (yes or no), such as `transfer audit` writes: these examples
            are left out of the training and the validation split. null uses all examples.
        fold: Fold of a cross-validation (number, of, repeat): a part of the training split becomes the test split, and
            the test split of the dataset is not used. `transfer run --folds` sets it. null uses the splits as they are.
    """

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    limit: Count | None = None
    exclude: str | None = None
    fold: Fold | None = None


class TaskOptions(NamedBlock):
    """Options of every task that has no option metrics of its own, in addition to its own options.

    Args:
        metrics: Metrics of torchmetrics (auroc, mcc) or of plugins in addition to those of the task: names, or blocks
            of a name and options.
        select_by: Metric that selects the best epoch, one of the task's or one of metrics; null uses the default of the
            task.
    """

    metrics: tuple[
        Annotated[str | dict[str, Any], one_of("the name of a metric, or a mapping of its name and options")], ...
    ] = ()
    select_by: str | None = None


class OptimizerOptions(NamedBlock):
    """Options of every optimizer, in addition to torch's own.

    Args:
        lr: Learning rate: one number, or numbers by group (head, backbone, adapter, a stage, layer_decay).
        no_weight_decay: Kinds of parameters without weight decay: norm (normalization layers), bias.
    """

    lr: LearningRate = LEARNING_RATE
    no_weight_decay: tuple[Literal["norm", "bias"], ...] = ()


class PhaseSettings(Block):
    """A part of training with one freeze policy.

    Args:
        epochs: Number of passes over the training split.
        freeze: Frozen part of the model in this phase: none, backbone, {until: STAGE} (the stage and all before it), a
            list of stages, or {parameters: [REGEX, ...]}.
        lr: Learning rate of this phase; null uses the optimizer's.
        scheduler: Scheduler of this phase; null uses the run's.
        patience: Number of epochs without a better validation metric after which the phase ends; null disables early
            stopping.
        batch_norm: Statistics of batch-norm layers. frozen: those of frozen layers are fixed. eval: those of trained
            layers of the backbone are fixed too, and only their weights are trained. train: all follow the data.
        solver: Solver of the phase. gradient: steps of the optimizer. lbfgs: a linear head on a frozen backbone is
            fitted to the features by L-BFGS in one epoch, with the L2 penalty that has the lowest validation loss.
    """

    epochs: Count
    freeze: Freeze = "none"
    lr: LearningRate | None = None
    scheduler: dict[str, Any] | None = None
    patience: Count | None = None
    batch_norm: BatchNorm = "frozen"
    solver: Solver = "gradient"

    @model_validator(mode="after")
    def _solved_phase_has_no_steps(self) -> PhaseSettings:
        if self.solver == "lbfgs" and (self.epochs, self.freeze) != (1, "backbone"):
            raise ValueError("solver: lbfgs needs epochs: 1 and freeze: backbone")
        if self.solver == "lbfgs" and (self.lr, self.scheduler, self.patience) != (None, None, None):
            raise ValueError("lr, scheduler and patience have no effect with solver: lbfgs")
        return self


class Recipe(Block):
    """A named sequence of phases, adapted to the stages of the model.

    Args:
        name: Name of the recipe. feature_extraction: train only the head. fine_tune: train everything, the backbone at
            a tenth of the head's learning rate (1/50 with Adam and its variants). lp_ft: only the head, solved in one
            epoch or trained for the first half, then everything at the lower rate (Kumar et al. 2022). gradual:
            unfreeze one more stage per phase (several if there are fewer epochs than stages), from the output on, with
            lower learning rates for lower stages (Howard and Ruder 2018). scratch: train everything from random
            weights. random_features: train only the head, on a backbone with random weights.
        epochs: Number of epochs of all phases together. Solving the head takes one epoch.
        batch_norm: Statistics of batch-norm layers in the phases that train the backbone, as in a phase. null is eval
            with fewer than 5,000 training examples, otherwise frozen.
        solver: Solver of a phase that trains only the head, in feature_extraction, random_features and lp_ft. null is
            lbfgs if the head is linear, otherwise gradient. It solves on examples without augmentation, or on all views
            if views is a number; with views null, the first two recipes train by gradient on augmented examples.
    """

    name: RecipeName
    epochs: Count
    batch_norm: BatchNorm | None = None
    solver: Solver | None = None


class MixupCutmix(Block):
    """Batch augmentation that trains on mixtures of two examples and their losses.

    Args:
        mixup: Parameter of the Beta distribution of the mixing weight in mixup (Zhang et al. 2018); null disables it.
        cutmix: Parameter of the Beta distribution of the mixing weight in CutMix, which pastes a rectangle of one image
            into another (Yun et al. 2019); null disables it. If both are set, each batch uses one of the two at random.
    """

    mixup: Positive | None = None
    cutmix: Positive | None = None

    @model_validator(mode="after")
    def _one_is_set(self) -> MixupCutmix:
        if self.mixup is None and self.cutmix is None:
            raise ValueError("set mixup, cutmix or both")
        return self


class Checkpoint(Block):
    """Times of checkpoints within an epoch, and the number of checkpoints to keep.

    Args:
        every_steps: Number of optimizer steps within an epoch after which a checkpoint is written; null disables it.
        every_minutes: Minutes since the last checkpoint after which the next is written; null disables it.
        keep: Number of latest checkpoints to keep. With 1 there is no earlier one to use if it is damaged.
        in_background: Whether a thread writes a copy of the state while training continues. auto: when training on a
            GPU; on the CPU the thread would take processor time from training.
    """

    every_steps: Count | None = None
    every_minutes: Positive | None = 10.0
    keep: Count = 2
    in_background: bool | Literal["auto"] = "auto"


class TrainConfig(Block):
    """Training of the model.

    Args:
        batch_size: Examples per training step, or auto: the largest power of two that fits into memory. The size that
            auto finds at the start is written to the run's config.
        max_tokens: Alternative to batch_size for text: fill each batch up to this many tokens, padding included. A
            longer text forms a batch of its own.
        evaluation_batch_size: Examples per step in evaluation; null uses twice the batch size, or max_tokens.
        optimizer: Name of one of torch's optimizers in lower case, or of a plugin, with its options; without a name it
            is adam. The option lr may differ by group.
        scheduler: Name of one of torch's schedulers in lower case, or of a plugin, with its options; null keeps the
            learning rates. cosine, and linear without options, fall to zero by optimizer step over each phase. The
            default is null; cosine in the recipes fine_tune, lp_ft and gradual.
        warmup_epochs: Epochs (fractions are allowed) at the start of each phase in which the learning rates rise
            linearly from zero. The scheduler starts after them. The default is 0; half an epoch in recipes for
            fine-tuning without a scheduler of their own.
        epochs: Number of epochs if neither phases nor a recipe are set: everything is trained; null is the number that
            the backbone chooses (5 for most).
        phases: Phases of training, in order, each with its number of epochs.
        recipe: Named sequence of phases, as an alternative to phases. The default is fine_tune if the layers of the
            backbone are pretrained and optimizer.lr is not set; otherwise one phase trains everything at one rate.
        max_minutes: Duration of the run, in minutes, after which training ends: an epoch is not started if it would end
            later, judged by the last one. At least one epoch is trained. A resumed run counts the time before it was
            interrupted. null disables the limit.
        augment: Whether training examples are augmented at random, as the backbone's preprocessing defines it.
        bucket: Whether examples of similar length share a batch, which saves padding in texts. A number sets how many
            random batches are sorted by length together; true means 50, false means plain shuffling.
        sampler: Name of a sampler with its options, which decides the order of the training examples, such as balanced;
            null shuffles them.
        workers: Number of loader processes; 0 loads in the training process. auto: one less than the number of cores
            per process, at most 16, when training on a GPU; 0 when training on the CPU, which needs all cores itself.
        accumulate: Number of batches whose gradients are accumulated for one step of the optimizer.
        clip_norm: Maximum norm of the gradient; a larger gradient is scaled down to it. null disables clipping.
        device: Device to train on: auto (CUDA, then MPS, then the CPU), cpu, cuda, cuda:N or mps.
        precision: Floating-point type of the forward and backward pass: auto, fp32, bf16 or fp16; weights are kept in
            fp32. auto: bf16 on a GPU that computes in it (Ampere or later), otherwise fp32.
        deterministic: Whether a GPU uses only kernels that give the same result in every run, without TF32. This is
            slower, and has no effect on the CPU, whose results are always reproducible.
        compile: Whether the model is compiled with torch.compile, which starts slowly and speeds up many models.
            reduce-overhead also records CUDA graphs on a GPU, for small models and batches whose shapes repeat; it
            needs accumulate 1.
        recompute: Whether the backward pass computes the activations of each backbone stage a second time instead of
            keeping them in memory (activation checkpointing). Results are the same, and a step takes up to a third
            longer. Not together with compile.
        sync_batch_norm: Whether trained batch-norm layers use the statistics of the batches of all processes in
            distributed training, instead of those of each process; GPUs only. Has no effect in one process.
        ema: Decay per step of an exponential moving average of the weights, which is then evaluated and saved instead
            of the weights; null disables it.
        mix: Batch augmentation by mixup and CutMix; null disables it.
        cache: Cache for the features of the frozen prefix: auto, off, or verify (recompute a sample and compare).
        views: Number of augmented views of each training example in the feature cache. auto: 4 if a phase freezes the
            complete backbone for more than 4 epochs of gradient steps, otherwise none. null does not cache the training
            split if it is augmented at random.
        cache_limit_gib: Maximum size of the feature cache on disk in GiB; the least recently used entries are removed.
        select: Epoch whose weights are kept: loss (lowest validation loss), the name of a metric, or last; null uses
            the task's primary metric. Differences within one standard error of a metric are decided by the loss.
        checkpoint: Times of checkpoints within an epoch (every_steps, every_minutes), and the number to keep (keep).
            A checkpoint is also written at the end of an epoch.
        score_test: Whether the test split is evaluated at the end. `transfer evaluate` can do it later; the trials of a
            sweep report only validation metrics.
        report: Whether report.html is written at the end. `transfer report` can write it later.
    """

    batch_size: Annotated[Count | Literal["auto"] | None, one_of("an integer of 1 or more, or auto")] = BATCH_SIZE
    max_tokens: Count | None = None
    evaluation_batch_size: Count | None = None
    optimizer: Optimizer = Field(default_factory=lambda: {"name": OPTIMIZER, "lr": LEARNING_RATE})
    scheduler: dict[str, Any] | None = None
    warmup_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    epochs: Count | None = None
    phases: Annotated[tuple[PhaseSettings, ...], Field(min_length=1)] | None = None
    recipe: Recipe | None = None
    max_minutes: Positive | None = None
    augment: bool = True
    bucket: Annotated[bool | Count, one_of("true, false, or a number of batches of 1 or more")] = True
    sampler: dict[str, Any] | None = None
    workers: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], one_of("an integer of 0 or more, or auto")] = (
        "auto"
    )
    accumulate: Count = 1
    clip_norm: Positive | None = None
    device: Annotated[
        Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")],
        one_of("auto, cpu, cuda, cuda:N (the GPU with index N) or mps"),
    ] = "auto"
    precision: Precision | Literal["auto"] = "auto"
    deterministic: bool = False
    compile: Annotated[Compile, one_of("true, false or reduce-overhead")] = False
    recompute: bool = False
    sync_batch_norm: bool = False
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    mix: MixupCutmix | None = None
    cache: Literal["auto", "off", "verify"] = "auto"
    views: Annotated[Count | Literal["auto"] | None, one_of("an integer of 1 or more, auto, or null")] = "auto"
    cache_limit_gib: Positive = 20.0
    select: str | None = None
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    score_test: bool = True
    report: bool = True

    @property
    def step(self) -> str:
        """The size of one training step in words."""
        if self.batch_size == "auto":
            return "the largest batch size that fits into memory at the start"
        return f"batch size {self.batch_size}" if self.batch_size else f"at most {self.max_tokens:,} tokens per batch"

    @model_validator(mode="after")
    def _batch_size_or_max_tokens(self) -> TrainConfig:
        chosen = "batch_size" in self.model_fields_set and self.batch_size is not None
        if chosen and self.max_tokens is not None:
            raise ValueError("set batch_size or max_tokens, not both")
        if self.batch_size is None and self.max_tokens is None:
            raise ValueError("set batch_size or max_tokens")
        # batch_size has a default, so it is set even if the config contains only max_tokens.
        return self if self.max_tokens is None else self.model_copy(update={"batch_size": None})

    @model_validator(mode="after")
    def _graphs_without_accumulation(self) -> TrainConfig:
        # The gradients of a batch would be in memory that the graphs of the next batch overwrite.
        if self.compile == "reduce-overhead" and self.accumulate > 1:
            raise ValueError("compile: reduce-overhead needs accumulate: 1; set compile: true, or a larger batch_size")
        return self

    @model_validator(mode="after")
    def _recompute_without_compile(self) -> TrainConfig:
        if self.recompute and self.compile:
            raise ValueError("recompute and compile do not combine; set one of them to false")
        return self

    @model_validator(mode="after")
    def _phases_or_recipe(self) -> TrainConfig:
        if self.phases is not None and self.recipe is not None:
            raise ValueError("set phases or recipe, not both; train.phases=null removes the phases")
        if self.epochs is not None and self.phases is not None:
            raise ValueError("set the epochs of each phase (train.phases.0.epochs), not train.epochs")
        if self.epochs is not None and self.recipe is not None:
            raise ValueError("set train.recipe.epochs, not train.epochs")
        return self
