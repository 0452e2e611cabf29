"""What a config may say beside naming components: the options of core itself, each with its type and default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from transfer.config.option_schema import Block

Precision = Literal["fp32", "bf16", "fp16"]

LEARNING_RATE = 1e-3
BATCH_SIZE = 32
"""Where a config gives none."""


def one_of(text: str) -> WrapValidator:
    """Say what a union takes in one sentence, where pydantic would list the complaint of every member."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValueError as error:
            raise PydanticCustomError("one_of", "it should be {text}", {"text": text}) from error

    return WrapValidator(check)


# Inside a Python validator a list is a list, which strict mode does not take for a tuple as it does in JSON.
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


class Until(Block):
    """Freeze a stage and all before it."""

    until: str


class Parameters(Block):
    """Freeze every parameter whose name a pattern matches (``re.search``)."""

    parameters: Annotated[Names, Field(min_length=1)]


Freeze = Annotated[
    Literal["none", "backbone"] | Until | Parameters | Names,
    one_of("none, backbone, {until: STAGE}, a list of stages, or {parameters: [REGEX, ...]}"),
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LearningRate = Annotated[
    Positive | Annotated[dict[str, Positive], Field(min_length=1)],
    one_of("a positive number, or a positive number for each of head, backbone, any stage, and layer_decay"),
]
Count = Annotated[int, Field(ge=1)]
BatchNorm = Literal["frozen", "train"]
RecipeName = Literal["feature_extraction", "fine_tune", "lp_ft", "gradual", "scratch", "random_features"]


class NamedBlock(Block):
    """A block that names a plugin or one of torch's classes; the options of what it names stand beside the name."""

    name: str


class DataOptions(NamedBlock):
    """What every dataset's block takes beside the dataset's own options.

    Args:
        validation: The share of ``train`` that is cut off to pick the best epoch, where the data has no split for it.
        limit: Take only the first so many examples per class of each split.
    """

    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    limit: Count | None = None


class OptimizerOptions(NamedBlock):
    """What every optimizer's block takes beside torch's own options.

    Args:
        lr: The learning rate: of all parameters, or by group.
        no_weight_decay: Kinds of parameters that are left out of weight decay: those of normalisation layers, biases.
    """

    lr: LearningRate = LEARNING_RATE
    no_weight_decay: tuple[Literal["norm", "bias"], ...] = ()


class PhaseSettings(Block):
    """One stretch of training with one freeze policy.

    Args:
        epochs: Passes over the training split.
        freeze: What does not change in this phase: none, backbone, {until: STAGE} (it and all before it), a list of
            stages, or {parameters: [REGEX, ...]}.
        lr: Learning rates of this phase, instead of the optimizer's.
        scheduler: Scheduler of this phase, instead of the run's.
        patience: End the phase after so many epochs without a better validation metric.
        batch_norm: Whether the statistics of frozen batch-norm layers stay, or follow the training data after all.
    """

    epochs: Count
    freeze: Freeze = "none"
    lr: LearningRate | None = None
    scheduler: dict[str, Any] | None = None
    patience: Count | None = None
    batch_norm: BatchNorm = "frozen"


class Recipe(Block):
    """A named sequence of phases, worked out for the model's stages.

    Args:
        name: feature_extraction: train the head alone. fine_tune: train everything, the backbone at a tenth of the
            head's rate. lp_ft: the head alone for the first half, then everything at a tenth of the rate (Kumar et al.
            2022). gradual: unfreeze from the top, a stage per phase, lower stages slower (Howard and Ruder 2018).
            scratch: train everything from random weights. random_features: train the head alone, over random weights.
        epochs: Over all phases.
    """

    name: RecipeName
    epochs: Count


class MixupCutmix(Block):
    """Batch augmentation: train on blends of two examples, losses blended alike.

    Args:
        mixup: Parameter of the Beta distribution of the blend's share (Zhang et al. 2018).
        cutmix: The same for pasting a rectangle of one picture into the other (Yun et al. 2019); with both, a batch
            draws one of the two.
    """

    mixup: Positive | None = None
    cutmix: Positive | None = None

    @model_validator(mode="after")
    def _something(self) -> MixupCutmix:
        if self.mixup is None and self.cutmix is None:
            raise ValueError("it should set mixup, cutmix or both")
        return self


class Checkpoint(Block):
    """When the run's state is saved beside once per epoch, and how often that is kept.

    Args:
        every_steps: Also after every so many steps of the optimizer within an epoch.
        every_minutes: Also so many minutes after the last time; null: not by the clock.
        keep: The newest so many checkpoints stay; with 1 there is none to fall back on where that one is damaged.
    """

    every_steps: Count | None = None
    every_minutes: Positive | None = 10.0
    keep: Count = 2


class TrainConfig(Block):
    """How the model is trained.

    Args:
        batch_size: Examples per step; auto: the largest power of two that fits into memory, found when the run begins
            and written into the run's config.
        max_tokens: Instead of batch_size: as many examples per step as are no longer than this together when all are
            padded to the longest of them (texts); one that is longer alone is a step of its own.
        evaluation_batch_size: Examples per step where nothing is trained; by default twice the batch size, or as
            max_tokens says.
        optimizer: One of torch's optimizers by its lower-case name, with its options; lr may differ by group.
        scheduler: One of torch's schedulers by its lower-case name, with its options.
        warmup_epochs: Raise the learning rates linearly from zero over the first so many epochs (or part of one) of
            each phase; the scheduler begins after them.
        phases: Run in order; by default one of 5 epochs with nothing frozen.
        recipe: A named sequence of phases, instead of phases.
        augment: Augment training examples at random as the backbone says; false: see them as they are.
        bucket: Put examples of like length into one batch (texts); the order stays random by seed. The number of
            batches that are drawn at random and then sorted by length together; true: 50; false: plain shuffling.
        workers: Loader processes; 0 loads in the training process.
        accumulate: Batches whose gradients make one step of the optimizer.
        clip_norm: The gradient is scaled down to this norm where it is longer.
        device: Device to train on: auto (CUDA, then MPS, then the CPU), cpu, cuda, cuda:N or mps.
        precision: What forward and backward compute in; weights stay fp32.
        compile: Compile the model (torch.compile): slow to start, then faster on many models.
        ema: Decay per step of an exponential moving average of the weights, which is what is scored and kept.
        mix: Batch augmentation by mixup and cutmix.
        cache: Keep the features of stages that are frozen from the input on: auto, off, or verify (recompute a sample).
        views: With random augmentation, so many augmented views of each training example are cached and drawn from;
            without it (null) the training split is not cached.
        cache_limit_gib: Size of the feature cache on disk; what was used longest ago goes first.
        checkpoint: When the run's state is saved beside once per epoch (every_steps, every_minutes), and how many stay
            (keep).
        score_test: Score the test split at the end. Without it the validation figures stand alone, as in the trials of
            a sweep; `transfer evaluate` scores it later.
        report: Write report.html at the end; `transfer report` writes it later.
    """

    batch_size: Annotated[Count | Literal["auto"] | None, one_of("a whole number, 1 or more, or auto")] = BATCH_SIZE
    max_tokens: Count | None = None
    evaluation_batch_size: Count | None = None
    optimizer: dict[str, Any] = Field(default_factory=lambda: {"name": "adam", "lr": LEARNING_RATE})
    scheduler: dict[str, Any] | None = None
    warmup_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    phases: Annotated[tuple[PhaseSettings, ...], Field(min_length=1)] | None = None
    recipe: Recipe | None = None
    augment: bool = True
    bucket: Annotated[bool | Count, one_of("true, false, or a number of batches, 1 or more")] = True
    workers: Annotated[int, Field(ge=0)] = 0
    accumulate: Count = 1
    clip_norm: Positive | None = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")] = "auto"
    precision: Precision = "fp32"
    compile: bool = False
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    mix: MixupCutmix | None = None
    cache: Literal["auto", "off", "verify"] = "auto"
    views: Count | None = None
    cache_limit_gib: Positive = 20.0
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    score_test: bool = True
    report: bool = True

    @property
    def step(self) -> str:
        """What one step consumes, for a person."""
        if self.batch_size == "auto":
            return "the batch size that fits into memory when the run begins"
        return f"batch size {self.batch_size}" if self.batch_size else f"at most {self.max_tokens:,} tokens a batch"

    @model_validator(mode="after")
    def _batch_size_or_max_tokens(self) -> TrainConfig:
        chosen = "batch_size" in self.model_fields_set and self.batch_size is not None
        if chosen and self.max_tokens is not None:
            raise ValueError("it should set batch_size or max_tokens, not both")
        if self.batch_size is None and self.max_tokens is None:
            raise ValueError("it should set batch_size or max_tokens")
        return self if self.max_tokens is None else self.model_copy(update={"batch_size": None})

    @model_validator(mode="after")
    def _phases_or_recipe(self) -> TrainConfig:
        if self.phases is not None and self.recipe is not None:
            raise ValueError("it should set phases or recipe, not both; null takes one away: train.phases=null")
        return self
