"""Samplers for targets of any modality."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from transfer.errors import ConfigError
from transfer.interfaces import Sampler


class Balanced(Sampler):
    """Draws classes with equal probability, and then an example of the class, with replacement.

    An epoch has as many examples as the training split.
    """

    def order(self, targets: npt.NDArray[np.generic], seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Return random indices in which every class is equally frequent on average, int64 (N,)."""
        if targets.ndim != 1:
            raise ConfigError("the sampler 'balanced' needs one class per example", fix="remove train.sampler")
        _, classes, counts = np.unique(targets, return_inverse=True, return_counts=True)
        probabilities = 1 / (len(counts) * counts[classes])
        return np.random.default_rng((seed, epoch)).choice(len(targets), size=len(targets), p=probabilities)
