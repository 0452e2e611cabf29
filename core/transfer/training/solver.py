"""Linear heads solved by L-BFGS on the features of the frozen backbone, instead of trained by gradient steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transfer.config.run_config import RunConfig
from transfer.data.loader import Loader
from transfer.errors import TrainingError
from transfer.feature_cache.loader import CachedLoader, StageInputs, reason_not_cached
from transfer.feature_cache.prefix import BATCH_SIZE
from transfer.interfaces import Backbone, Task
from transfer.models.forward import forward_batches
from transfer.models.model import Model
from transfer.training.distributed import ProcessGroup
from transfer.training.evaluation import PREDICTIONS, inputs_of_metrics
from transfer.training.events import Note, Observer
from transfer.training.experiment import Experiment, views_of_phase
from transfer.training.state import EpochSums, TrainingState

STRENGTHS = tuple(10 ** (-k / 2) for k in range(13))
"""Candidate strengths of the L2 penalty, from strong to weak: each solution is a good start for the next."""
MAX_WORSE = 2
"""Number of successive strengths with a higher validation loss after which weaker ones are not tried."""
MAX_ITERATIONS = 200
"""Maximum number of L-BFGS iterations for each strength."""
MAX_FEATURES = 2**27
"""Maximum number of features of all training examples: they are kept in memory in float64 (1 GiB)."""
FOLDS = 5
"""Without a validation split, one of this many training examples is held out to choose the strength."""


@dataclass(frozen=True)
class Solution:
    """A solved head.

    Args:
        weight: Weights, float64 (C, D), on the CPU.
        bias: Biases, float64 (C,), on the CPU.
        strength: Chosen strength of the L2 penalty.
        outputs: Outputs of the model for the training examples, float32 (N, C), on the CPU.
        targets: Targets of the training examples, (N, ...), on the CPU.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    outputs: Tensor
    targets: Tensor


def reason_not_solved(config: RunConfig, backbone: Backbone, model: Model, task: Task, examples: int) -> str | None:
    """Return the reason why the head cannot be solved on the features of the backbone; None if it can.

    Args:
        config: Checked config.
        backbone: Backbone with its preprocessing.
        model: Model on any device.
        task: Task: loss and metrics.
        examples: Number of training examples; 0 if the data was not read.
    """
    train, head = config.train, model.stages["head"]
    linear: nn.Linear | None = head.as_linear()  # type: ignore[operator]
    own = linear is not None and {id(p) for p in head.parameters()} == {id(p) for p in linear.parameters()}
    drops = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p for module in head.modules())
    if not own or linear is None or linear.bias is None or drops:
        return "the head is not one linear layer with a bias and without dropout"
    if not task.has_convex_loss:
        return f"the loss of the task {config.task.plugin.name!r} is not convex and smooth"
    if train.ema is not None:
        return "train.ema averages gradient steps"
    views = views_of_phase(train.views, None)
    if examples * (views or 1) * linear.in_features > MAX_FEATURES:
        return f"the training split has more than {MAX_FEATURES:,} features"
    if train.sampler is not None:
        return "train.sampler draws the examples of gradient steps"
    if config.train.recipe is None or config.train.recipe.name == "lp_ft":
        return None  # the head is only a start of fine-tuning, or is asked for: solved on examples as they are
    return reason_not_cached(
        len(model) - 1,
        cache=True,  # without the cache, one pass computes the features
        # With views: auto, the head is solved on examples as they are: steps on augmented views are no better.
        augments=backbone.preprocessing.augments and train.augment and train.views != "auto",
        views=views,
        mixed=train.mix is not None,
    )


def training_examples(experiment: Experiment) -> Loader:
    """Return the training examples for :func:`solve`: augmented only if the feature cache contains several views."""
    train = experiment.train
    if train.augments and views_of_phase(experiment.options.views, None) is None:
        return train.in_fixed_order(BATCH_SIZE, augment=False)
    return train


def solve(experiment: Experiment, sources: Mapping[str, StageInputs]) -> Solution:
    """Solve the head of an experiment on the features of its splits (:func:`solve_on_features`).

    Args:
        experiment: Experiment, with the model on its device.
        sources: Batches of the training split and, if there is one, of the validation split.

    Raises:
        TrainingError: The features are not finite.
    """
    features, targets, indices = head_inputs(experiment, sources["train"])
    validation = None
    if "validation" in sources:
        held_out, held_out_targets, _ = head_inputs(experiment, sources["validation"])
        validation = held_out, held_out_targets
    scaling = experiment.model.output_scaling
    return solve_on_features(experiment.task, scaling, (features, targets), validation, indices=indices)


def solve_on_features(
    task: Task,
    scaling: tuple[Tensor, Tensor] | None,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor] | None,
    *,
    indices: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> Solution:
    """Minimize the mean training loss plus an L2 penalty, whose strength is chosen by the validation loss.

    Features are centered and divided by the root mean square of their norms. This changes neither the family of
    solutions nor the meaning of the bias, which is not penalized, but the problem is better conditioned, and one grid
    of strengths fits any backbone.

    Args:
        task: Task: the loss.
        scaling: Offset and scale of the outputs, (C,) each; None leaves outputs as they are.
        train: Features, float64 (N, D), which are changed in place, and targets (N, ...) of the training examples.
        validation: Features and targets that choose the strength. None holds out a part of the training examples.
        indices: Index of each training example, (N,): rows of one example are held out together.
        strengths: Candidate strengths, from strong to weak.

    Raises:
        TrainingError: The features are not finite.
    """
    features, targets = train
    mean = features.mean(0)
    scale = (features - mean).square().sum(1).mean().sqrt().clamp_min(torch.finfo(features.dtype).tiny)
    if not bool(torch.isfinite(scale)):
        raise TrainingError(
            "the features of the training split are not finite", fix="use train.precision: fp32, or other weights"
        )
    features.sub_(mean).div_(scale)
    fitted, has_validation = (features, targets), validation is not None
    if validation is None:
        assert indices is not None
        fold = indices.to(features.device) % FOLDS == 0  # all views of an example are in the same part
        fitted, validation = (features[~fold], targets[~fold]), (features[fold], targets[fold])
    else:
        validation = (validation[0] - mean).div_(scale), validation[1]
    losses: list[float] = []
    best = None
    for strength, head in _path(task, scaling, fitted, strengths):
        with torch.no_grad():
            losses.append(float(task.loss(_outputs(scaling, head, validation[0]), validation[1]).mean()))
        if not math.isfinite(losses[-1]):
            raise TrainingError("the loss of a solved head is not finite", fix="set train.recipe.solver: gradient")
        if losses[-1] == min(losses):
            best = strength, [tensor.detach().clone() for tensor in head]
        if len(losses) - 1 - losses.index(min(losses)) >= MAX_WORSE:
            break
    assert best is not None
    strength, head = best
    if not has_validation:  # the chosen strength is solved again on all examples
        ((_, head),) = _path(task, scaling, (features, targets), (strength,))
    weight, bias = (tensor.detach() for tensor in head)
    outputs = _outputs(scaling, [weight, bias], features)
    weight = weight / scale
    return Solution(weight.cpu(), (bias - weight @ mean).cpu(), strength, outputs.float().cpu(), targets.cpu())


def head_inputs(experiment: Experiment, source: StageInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs of the head, float64 (N, D), and targets (N, ...) on the device; indices (N,) on the CPU."""
    loaders = [source.loader]
    if isinstance(source.loader, CachedLoader):  # an epoch draws one view of each example: take every view
        loaders = [CachedLoader(source.loader.loader, [view]) for view in source.loader.views]
    options, model = experiment.options, experiment.model
    features, targets, indices = [], [], []
    for loader in loaders:
        batches = loader.epoch(limit=experiment.max_batches)
        for batch, values in forward_batches(
            model,
            batches,
            device=options.device,
            precision=options.precision,
            first_stage=source.first_stage,
            end_stage=len(model) - 1,
        ):
            # MPS has no float64. A copy, because L-BFGS differentiates with respect to no tensor of inference mode.
            features.append(values.to(torch.float32 if options.device.type == "mps" else torch.float64, copy=True))
            targets.append(batch.targets)
            indices.append(torch.from_numpy(batch.indices))
    return torch.cat(features), torch.cat(targets), torch.cat(indices)


def _outputs(scaling: tuple[Tensor, Tensor] | None, head: Sequence[Tensor], features: Tensor) -> Tensor:
    outputs = nn.functional.linear(features, *head)
    return outputs if scaling is None else scaling[0] + scaling[1] * outputs


def _path(
    task: Task,
    scaling: tuple[Tensor, Tensor] | None,
    examples: tuple[Tensor, Tensor],
    strengths: Sequence[float],
) -> Iterator[tuple[float, list[Tensor]]]:
    """Yield each strength with the solution [weight (C, D), bias (C,)], which the next one starts from."""
    features, targets = examples
    head = [features.new_zeros(task.out_features, *shape) for shape in (features.shape[1:], ())]
    for tensor in head:
        tensor.requires_grad_()
    for strength in strengths:
        optimizer = torch.optim.LBFGS(head, max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

        def objective(strength: float = strength, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = task.loss(_outputs(scaling, head, features), targets).mean()
            loss = loss + strength / 2 * head[0].square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(objective)  # type: ignore[no-untyped-call]
        yield strength, head


def solve_epoch(
    experiment: Experiment,
    state: TrainingState,
    sources: Mapping[str, StageInputs],
    processes: ProcessGroup,
    observe: Observer,
) -> None:
    """Solve the head, set its weights, and record the solution as the current epoch.

    Args:
        experiment: Experiment, with the model on its device.
        state: State of the run.
        sources: Batches of the training split and, if there is one, of the validation split.
        processes: Processes that train together. Rank 0 solves, and the others receive the solution.
        observe: Function that is called with a note about the solution.
    """
    started = time.perf_counter()

    def make() -> tuple[Mapping[str, Mapping[str, Tensor]], float]:
        solved = vars(solve(experiment, sources))
        return {"solution": {name: value for name, value in solved.items() if name != "strength"}}, solved["strength"]

    tensors, strength = processes.broadcast_contents(make)
    solution = Solution(strength=strength, **tensors["solution"])
    device = experiment.options.device
    outputs, targets = solution.outputs.to(device), solution.targets.to(device)
    with torch.no_grad():
        linear = state.model.stages["head"].as_linear()  # type: ignore[operator]
        linear.weight.copy_(solution.weight)
        linear.bias.copy_(solution.bias)
        loss = float(experiment.task.loss(outputs, targets).sum())
        inputs = inputs_of_metrics(experiment.task, outputs)
        for name, metric in state.metrics.items():
            metric.reset()
            metric.update(inputs.get(name, inputs[PREDICTIONS]), targets)
    seconds = time.perf_counter() - started
    # Assigned, not added: a run that is interrupted in the validation solves the head again.
    state.progress.epoch = EpochSums(1, len(targets), loss, seconds, l2=solution.strength)
    observe(Note(f"head solved by L-BFGS in {seconds:.1f} s, with an L2 penalty of {solution.strength:.2g}"))
