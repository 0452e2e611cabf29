"""``train.batch_size: auto``: the largest batch size whose training step fits into memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from transfer.data.randomness import preserve_rng_state
from transfer.errors import MemoryRanOut, TrainingError
from transfer.system.memory import PeakResident, available_bytes
from transfer.training import freezing
from transfer.training.engine import Trainer
from transfer.training.events import Note, Observer
from transfer.training.experiment import Experiment, Phase

MIN_BATCH_SIZE = 2
"""First batch size that is tried: batch norm cannot train on one example."""
MAX_BATCH_SIZE_GPU, MAX_BATCH_SIZE_CPU = 1024, 128
"""On a CPU larger batches are hardly faster (docs/log.md), and a step on images takes many seconds."""
EXTRAPOLATED_SIZES_GPU = (8, 16)
"""Batch sizes from whose memory that of larger ones is extrapolated on a GPU. Smaller batches take memory mostly for
weights and workspaces."""
MIN_STEPS_PER_EPOCH = 8
"""Fewer optimizer steps per epoch train badly, however large the batches are."""
MAX_FRACTION_GPU = 0.9
"""Usable fraction of the free GPU memory; the rest is for fragmentation."""
MAX_FRACTION_CPU = 0.5
"""Usable fraction of the available memory; decoded examples that are kept between epochs may need the rest."""


def find_batch_size(experiment: Experiment, observe: Observer, evaluation_batch_size: int | None = None) -> int:
    """Return the largest power of two whose training step fits into memory.

    Each size is tried with a real training step in the phase with the fewest frozen stages, on a copy of the model,
    with the largest examples. An evaluation step follows, by default with twice as many examples, as in validation.
    On the CPU the operating system kills a process that exceeds memory without warning. A size is therefore tried only
    if extrapolation from the two sizes before predicts that it fits. On a GPU, two small sizes predict the largest one
    that fits, which is then tried.

    Args:
        experiment: Experiment to find the batch size for. It is not changed, and neither is the random state.
        observe: Function that is called with a note of the sizes that were tried.
        evaluation_batch_size: Number of examples per evaluation step, if the config sets it. None tries twice the
            training batch size.

    Raises:
        TrainingError: Two examples do not fit into memory.
    """
    examples, device = len(experiment.train.split), experiment.options.device
    on_gpu = device.type == "cuda"
    max_size = min(
        MAX_BATCH_SIZE_GPU if on_gpu else MAX_BATCH_SIZE_CPU, max(MIN_BATCH_SIZE, examples // MIN_STEPS_PER_EPOCH)
    )
    # The run must draw the same numbers as one whose config contains the batch size.
    with preserve_rng_state(), torch.random.fork_rng([device.index] if on_gpu else []):
        costs, reason, limit = _try_sizes(experiment, max_size, evaluation_batch_size)
    # The copied model and its optimizer may be in reference cycles: free them before training allocates memory.
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    if not costs:
        raise TrainingError(
            f"train.batch_size: auto found none: {reason}", fix="freeze more stages, or use a smaller model or input"
        )
    batch_size = max(costs)
    details = {"memory limit": _gib(limit)} | {f"step of {size}": _gib(cost) for size, cost in costs.items()}
    observe(Note(f"batch size {batch_size}, found by auto: {reason}", details))
    return batch_size


def _try_sizes(
    experiment: Experiment, max_size: int, evaluation_batch_size: int | None
) -> tuple[dict[int, int], str, int]:
    """Try batch sizes until one does not fit into memory.

    Returns:
        The memory in bytes that each size takes, the reason why the search ended, and the memory limit in bytes.
    """
    device, on_gpu = experiment.options.device, experiment.options.device.type == "cuda"
    options = replace(experiment.options, compile=False)  # torch.compile would compile every size anew
    experiment = replace(experiment, model=copy.deepcopy(experiment.model), options=options)
    trainer = Trainer(experiment)
    trainer.prepare_phase(most_demanding_phase(experiment))

    def make_steps(size: int, steps: int) -> None:
        trained = experiment.train.largest_batch(size)
        evaluated = experiment.train.largest_batch(2 * size) if evaluation_batch_size is None else trained
        for _ in range(steps):
            trainer.dry_run_step(trained, evaluated)

    if on_gpu:

        def peak_bytes(size: int) -> int:
            # Not of the first step, in which cuDNN tries algorithms and the optimizer allocates its state.
            make_steps(size, 1)
            torch.cuda.reset_peak_memory_stats(device)
            make_steps(size, 1)
            return torch.cuda.max_memory_allocated(device)

        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info(device)
        # Memory that torch's allocator has reserved is available to new tensors, too.
        limit = int(MAX_FRACTION_GPU * (free_bytes + torch.cuda.memory_reserved(device)))
        return *search_by_extrapolation(peak_bytes, max_size, limit), limit
    limit = int(MAX_FRACTION_CPU * available_bytes())
    costs: dict[int, int] = {}
    resident_before = PeakResident.now()
    for size in _powers_of_two(max_size):
        if (predicted := _predict_next(costs)) > limit:
            return costs, f"{size} would take about {_gib(predicted)}", limit
        try:
            with PeakResident() as peak:
                # The first size takes two steps: the optimizer allocates its state at the end of the first.
                make_steps(size, 1 if costs else 2)
        except MemoryRanOut:
            return costs, f"{size} ran out of memory", limit
        cost = peak.bytes - resident_before
        if cost > limit:
            return costs, f"{size} takes {_gib(cost)}", limit
        costs[size] = cost
    return costs, f"no more than {max_size} is tried here", limit


def search_by_extrapolation(peak_bytes: Callable[[int], int], max_size: int, limit: int) -> tuple[dict[int, int], str]:
    """Measure two small batch sizes, and try the largest one that a line through their memory predicts to fit.

    If that one does not fit after all, the next smaller ones are tried.

    Args:
        peak_bytes: Function that makes a step with a batch size and returns the memory that it takes, in bytes.
        max_size: Largest batch size to try.
        limit: Memory limit in bytes.

    Returns:
        The memory in bytes that each size takes, and the reason why no larger size is used.
    """
    costs: dict[int, int] = {}
    reason = f"no more than {max_size} is tried here"

    def fits(size: int) -> bool:
        nonlocal reason
        try:
            cost = peak_bytes(size)
        except MemoryRanOut:
            reason = f"{size} ran out of memory"
            return False
        if cost > limit:
            reason = f"{size} takes {_gib(cost)}"
            return False
        costs[size] = cost
        return True

    first, second = EXTRAPOLATED_SIZES_GPU
    sizes = list(_powers_of_two(max_size))
    if max_size < second:
        candidates = sizes
    elif not fits(first):
        candidates = [size for size in sizes if size < first]
    elif not fits(second):
        candidates = []
    else:
        # Allocators round up, so that the larger size may seem to take less: never extrapolate downwards.
        slope = max(0, costs[second] - costs[first]) / (second - first)
        predicted = {size: int(costs[second] + slope * (size - second)) for size in sizes if size > second}
        candidates = [size for size, size_bytes in predicted.items() if size_bytes <= limit]
        if len(candidates) < len(predicted):
            # The smallest size that is predicted not to fit: sizes are powers of two.
            size = second * 2 ** (len(candidates) + 1)
            reason = f"{size} would take about {_gib(predicted[size])}"
    # From large to small, because the prediction is usually right for the first.
    for size in reversed(candidates):
        if fits(size):
            break
    return costs, reason


def most_demanding_phase(experiment: Experiment) -> Phase:
    """Return the phase that needs the most memory: the fewest frozen stages, then the most trained parameters.

    The backward pass keeps the activations of all stages after the frozen prefix.
    """
    sizes = {name: parameter.numel() for name, parameter in experiment.model.named_parameters()}

    def demand(phase: Phase) -> tuple[int, int]:
        trained = sum(sizes[name] for group in phase.groups for name in group.parameters)
        return -freezing.prefix_length(experiment.model, phase.frozen), trained

    return max(experiment.phases, key=demand)


def _powers_of_two(max_size: int) -> Iterator[int]:
    size = MIN_BATCH_SIZE
    while size <= max_size:
        yield size
        size *= 2


def _predict_next(costs: dict[int, int]) -> int:
    """Return the memory that the next size will take: it grows linearly with the number of examples."""
    if len(costs) < 2:
        return 0
    *_, before, last = costs.values()
    return last + 2 * max(0, last - before)  # the next size adds twice as many examples as the last one did


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
