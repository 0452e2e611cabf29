"""Isolation and seeding of the global random number generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the state of the global generators on exit, so that draws in the block do not affect the model."""
    # Only the CPU generator of torch: augmentation, which runs in the block, does not draw on a GPU.
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def seed_all(*parts: int) -> None:
    """Seed the global generators of torch (CPU), NumPy and ``random`` from a tuple of integers."""
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
