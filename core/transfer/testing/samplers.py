"""Contracts of samplers."""

from __future__ import annotations

import numpy as np

from transfer.interfaces import Sampler
from transfer.testing.cases import Case, promise, require

TARGETS = np.array([0, 1, 2, 1, 0, 0, 0, 2, 0, 0])


@promise("interfaces.Sampler", "quick")
def the_order_is_a_function_of_seed_and_epoch(case: Case) -> None:
    """``order`` returns indices of the examples, int64 (M,), which are the same for the same seed and epoch."""
    for epoch in range(3):
        orders = []
        for state in (0, 1):
            np.random.seed(state)  # the order must not depend on the global generator
            sampler: Sampler = case.component().make()
            orders.append(np.asarray(sampler.order(TARGETS, 5, epoch)))
        one, other = orders
        good = one.ndim == 1 and len(one) and one.dtype.kind in "iu" and one.min() >= 0 and one.max() < len(TARGETS)
        require(good, f"order returns {one!r:.80}: expected int64 (M,) indices from 0 to {len(TARGETS) - 1}")
        require(np.array_equal(one, other), f"order returns two different orders for seed 5 and epoch {epoch}")
