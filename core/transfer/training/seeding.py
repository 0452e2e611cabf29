"""Random numbers of a training step as a function of the seed and the batch number."""

from __future__ import annotations

import numpy as np
import torch


def seed_generators(device: torch.device, seed: int, batch: int, rank: int = 0) -> None:
    """Seed torch's generators of the CPU and of a device.

    A resumed run draws the same numbers, whatever has drawn numbers in between (data loading, evaluation).
    ``torch.manual_seed`` is not used: it checks for every kind of device, which takes longer than a small step.

    Args:
        device: Device that the model is on.
        seed: Seed of the run.
        batch: Number of the batch over the entire run.
        rank: Rank of this process: ranks draw different numbers for their shards.
    """
    entropy = (seed, batch, rank) if rank else (seed, batch)
    value = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        # torch.cuda.manual_seed seeds the current device, which may be another one.
        torch.cuda.default_generators[device.index].manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)
