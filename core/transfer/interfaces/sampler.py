"""The contract of a sampler: the order of the training examples in an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt


class Sampler(ABC):
    """Order of the training examples, a function of the seed and the epoch.

    The constructor takes only options. The same arguments always give the same order: a resumed run continues within an
    epoch, and every rank of a distributed run computes the order of the complete batches.
    """

    @abstractmethod
    def order(self, targets: npt.NDArray[np.generic], seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Return the indices of the examples of an epoch, int64 (M,), in order. Indices may occur several times.

        Args:
            targets: Targets of the N training examples: int64 (N,) class indices, or float32 (N, C).
            seed: Seed of the run.
            epoch: Index of the epoch, counted from 0 over all phases of the run.
        """
