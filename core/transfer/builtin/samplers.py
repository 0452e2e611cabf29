"""Samplers for targets of any modality."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from transfer.errors import ConfigError
from transfer.interfaces import Sampler


class Balanced(Sampler):
    """Draws classes with equal probability, and then an example of the class, with replacement.

    An epoch has as many examples as the training split.

    Args:
        power: Exponent between 0 and 1: a class of n examples is drawn in proportion to ``n ** (1 - power)``. 1 draws
            all classes equally often, 0.5 is square-root sampling (Mahajan et al. 2018, ECCV), and 0 keeps the
            frequencies.
    """

    def __init__(self, *, power: Annotated[float, Field(ge=0, le=1)] = 1.0) -> None:
        self.power = power

    def order(self, targets: npt.NDArray[np.generic], seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Return random indices of a balanced epoch, int64 (N,)."""
        if targets.ndim != 1:
            raise ConfigError("the sampler 'balanced' needs one class per example", fix="remove train.sampler")
        _, classes, counts = np.unique(targets, return_inverse=True, return_counts=True)
        if self.power == 1:  # computed as in earlier versions, so that resumed runs draw the same examples
            probabilities = 1 / (len(counts) * counts[classes])
        else:
            frequencies = counts ** (1 - self.power)
            probabilities = frequencies[classes] / (frequencies.sum() * counts[classes])
        return np.random.default_rng((seed, epoch)).choice(len(targets), size=len(targets), p=probabilities)
