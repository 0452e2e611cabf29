"""The contract of a preprocessing: encode, augment, collate."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.interfaces.renamed import adopt_renamed_methods


@dataclass(frozen=True)
class Occlusion:
    """A piece of a raw value, and the value without it.

    Args:
        piece: What a person would see as one: a word as the text has it (a string), a region of a picture (left, top,
            width, height); JSON alone. Strings in a row are the whole value.
        rest: The raw value with the piece taken out or covered; None where nothing would be left.
    """

    piece: Any
    rest: Any


class Preprocessing(ABC):
    """From raw values of the backbone's field to its input: a part of the backbone, because it must match pretraining.

    It comes in two halves, deterministic and random, so that the first can be done once. Objects are small and
    picklable: loader processes get a copy.
    """

    encode_once: ClassVar[bool] = False
    """Encoded values are small: a split is encoded once, as a whole, and kept in memory."""

    media_type: ClassVar[str] = "text/plain"
    """What a person gives to a server, as browsers name it: ``text/plain`` is typed, of anything else (``image/*``) a
    file is chosen."""

    parts: Mapping[str, Preprocessing] = {}
    """Those that it is made of, by the name of what each reads; a raw value is then a tuple with one of each."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        adopt_renamed_methods(cls, {"picture": "thumbnail", "show": "render_batch"})

    @property
    def keep_bytes(self) -> int | None:
        """How much memory the encoded values of a split may take from one epoch to the next; none by default.

        A split that would take more is encoded anew every epoch. None: half of what is available. Values are arrays or
        tensors; for those that are slow to make (pictures), not for those that are made in no time.
        """
        return 0

    @abstractmethod
    def encode(self, values: Sequence[Any]) -> Sequence[Any]:
        """Do the deterministic half (decode and resize; tokenize and numericalise) for some raw values, in order.

        Raises:
            ValueError, OSError: One value cannot be encoded; the framework then names the example.
        """

    def augment(self, encoded: Any) -> Any:
        """Do the random half, for training examples alone; by default nothing.

        Draw only from the global generators of ``torch``, ``numpy`` and ``random``: the framework seeds them from
        (seed, epoch, example index) before the call and restores them after it.
        """
        return encoded

    @property
    def augments(self) -> bool:
        """Whether :meth:`augment` does anything; by default, whether a subclass defines it."""
        return type(self).augment is not Preprocessing.augment

    def collate(self, encoded: Sequence[Any]) -> Any:
        """Make the backbone's input of a batch of encoded (and, in training, augmented) values.

        By default these are tensors, or tuples of tensors, of the same shapes in every example, and are stacked.

        Returns:
            A tensor or a tuple of tensors, with the batch first in each.
        """
        if isinstance(encoded[0], Tensor):
            return torch.stack(list(encoded))
        return tuple(torch.stack(column) for column in zip(*encoded, strict=True))

    def length(self, encoded: Any) -> int:
        """Return the length of an encoded value: what padding to the longest makes a batch cost. By default 1."""
        return 1

    def lengths(self, encoded: Sequence[Any]) -> npt.NDArray[np.int64]:
        """Return :meth:`length` of each value of what :meth:`encode` returned, int64 (N,).

        Define it where the sequence knows all lengths at once: a split may hold millions of values.
        """
        return np.fromiter(map(self.length, encoded), dtype=np.int64, count=len(encoded))

    @abstractmethod
    def read(self, source: str) -> Any:
        """Return the raw value that a person means by ``source`` at the command line (a path, a text).

        Raises:
            transfer.DataError, ValueError, OSError: Nothing can be read there; the framework then names the source.
        """

    def read_bytes(self, content: bytes) -> Any:
        """Return the raw value that the content of a file is, or a typed text in UTF-8: what a server was sent.

        By default the content is put into a file for as long as :meth:`read` takes: what comes over a network must
        never be taken for a path.

        Raises:
            transfer.DataError, ValueError, OSError: It cannot be read.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "content"
            path.write_bytes(content)
            return self.read(str(path))

    def example(self) -> Any:
        """Return a raw value to check shapes with before any data is read; None where there is no typical one."""
        return None

    def render_batch(
        self, inputs: Any, values: Sequence[Any], captions: Sequence[str], groups: Mapping[str, Sequence[int]]
    ) -> bytes | str | None:
        """Show some examples as the model sees them, for a person.

        Args:
            inputs: What :meth:`collate` made of them (a training batch may be augmented and mixed).
            values: Their raw values.
            captions: What stands under each, in one or more lines.
            groups: For each heading the places of the examples that stand under it, in order.

        Returns:
            The bytes of a PNG file, or a text; None (the default) where the field has no picture.
        """
        return None

    def thumbnail(self, value: Any) -> bytes | None:
        """Return a small picture of a raw value for a page, the bytes of a JPEG or PNG file; by default there is none.

        Raises:
            ValueError, OSError: The value cannot be drawn.
        """
        return None

    def occlusions(self, value: Any) -> Iterable[Occlusion]:
        """Take a raw value apart, for explanations: each of its pieces in order, with the value that lacks it.

        By default there are no pieces, and explanations are refused.
        """
        raise NotImplementedError

    @property
    def explains(self) -> bool:
        """Whether raw values can be taken apart; by default, whether a subclass defines :meth:`occlusions`."""
        return type(self).occlusions is not Preprocessing.occlusions

    def describe(self) -> Mapping[str, Any]:
        """Return the settings that decide what the model sees, for tables and for the model folder; JSON alone."""
        return {}
