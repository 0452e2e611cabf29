"""``train.batch_size: auto``: the largest batch whose training step fits into memory, found before training begins."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace

import torch

from transfer.data.randomness import preserve_rng_state
from transfer.errors import MemoryRanOut, TrainingError
from transfer.system.memory import PeakResident, available_bytes
from transfer.training import freezing
from transfer.training.engine import rehearse
from transfer.training.events import Note, Observer
from transfer.training.experiment import Experiment, Phase

LEAST = 2
"""The first size that is tried: batch norm cannot train on one example."""
MAX_ON_GPU, MAX_ON_CPU = 1024, 128
"""On a CPU larger batches are hardly faster (docs/log.md), and a step of pictures takes many seconds."""
MIN_STEPS = 8
"""Of an epoch: in fewer, however large, little is learned."""
SHARE_OF_GPU = 0.9
"""Of its free memory; fragments and what other batches need beyond the largest one take the rest."""
SHARE_OF_CPU = 0.5
"""Of what is available; decoded examples that are kept from one epoch to the next may take as much."""


def find_batch_size(experiment: Experiment, observe: Observer, evaluation_batch_size: int | None = None) -> int:
    """Return the largest power of two whose training step fits into memory, with some room.

    Steps are made as training makes them, in the phase with the fewest frozen stages, on a copy of the model, with the
    examples that cost most; and twice as many are evaluated, as the validation split is by default. On the CPU, where a
    process that takes too much is killed, a size is tried only if the two before it say that it fits.

    Args:
        experiment: Is left as it is, the random state too.
        observe: Is told what was tried and found.
        evaluation_batch_size: Batch size of evaluation. None tries twice the training batch size.

    Raises:
        TrainingError: Not even two examples fit.
    """
    count, device = len(experiment.train.split), experiment.options.device
    on_gpu = device.type == "cuda"
    most = min(MAX_ON_GPU if on_gpu else MAX_ON_CPU, max(LEAST, count // MIN_STEPS))
    with preserve_rng_state(), torch.random.fork_rng([device.index] if on_gpu else []):
        costs, why, room = _try_all(experiment, most, evaluation_batch_size)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    if not costs:
        raise TrainingError(
            f"train.batch_size: auto found none: {why}", fix="freeze more stages, or use a smaller model or input"
        )
    found = max(costs)
    observe(Note(f"batch size {found}, found by auto: {why}", {"may take": _gib(room)} | _shown(costs)))
    return found


def _try_all(experiment: Experiment, most: int, evaluation_batch_size: int | None) -> tuple[dict[int, int], str, int]:
    """Try sizes until one does not fit; return what each that fits took, why the search ended, and the room."""
    device, on_gpu = experiment.options.device, experiment.options.device.type == "cuda"
    options = replace(experiment.options, compile=False)  # each size would be compiled anew
    experiment = replace(experiment, model=copy.deepcopy(experiment.model), options=options)
    step = rehearse(experiment, most_demanding(experiment.phases, experiment))
    if on_gpu:
        torch.cuda.empty_cache()
        room = int(SHARE_OF_GPU * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)))
    else:
        room = int(SHARE_OF_CPU * available_bytes())
    costs: dict[int, int] = {}
    before = PeakResident.now()
    for size in _powers(most):
        if not on_gpu and (expected := _expected(costs)) > room:
            return costs, f"{size} would take about {_gib(expected)}", room
        largest = experiment.train.largest_batch(size)
        evaluated = experiment.train.largest_batch(2 * size) if evaluation_batch_size is None else largest
        try:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            with PeakResident() as peak:
                for _ in range(1 if costs else 2):  # what the optimizer keeps is there from the second step on
                    step(largest, evaluated)
        except MemoryRanOut:
            return costs, f"{size} ran out of memory", room
        cost = torch.cuda.max_memory_reserved(device) if on_gpu else peak.bytes - before
        if cost > room:
            return costs, f"{size} takes {_gib(cost)}", room
        costs[size] = cost
    return costs, f"no more than {most} is tried here", room


def most_demanding(phases: tuple[Phase, ...], experiment: Experiment) -> Phase:
    """Return the phase that keeps most for its backward pass: fewest frozen stages, then most that is trained."""
    sizes = {name: parameter.numel() for name, parameter in experiment.model.named_parameters()}

    def demand(phase: Phase) -> tuple[int, int]:
        trained = sum(sizes[name] for group in phase.groups for name in group.parameters)
        return -freezing.prefix_length(experiment.model, phase.frozen), trained

    return max(phases, key=demand)


def _powers(most: int) -> Iterator[int]:
    size = LEAST
    while size <= most:
        yield size
        size *= 2


def _expected(costs: dict[int, int]) -> int:
    """Return what the next size will take: memory grows in proportion to the examples that are added."""
    if len(costs) < 2:
        return 0
    *_, before, last = costs.values()
    return last + 2 * max(0, last - before)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


def _shown(costs: dict[int, int]) -> dict[str, str]:
    return {f"a step of {size}": _gib(cost) for size, cost in costs.items()}
