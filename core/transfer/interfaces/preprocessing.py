"""The contract of preprocessing: encode, augment, collate."""

from __future__ import annotations

import os
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

from transfer.errors import DataError
from transfer.interfaces.renamed import adopt_renamed_methods


@dataclass(frozen=True)
class Occlusion:
    """A piece of a raw value, and the value without it.

    Args:
        piece: Piece that a person perceives as a unit: a word of a text (a string), or a region of an image (left, top,
            width, height); JSON values. The strings of a text, concatenated, are the complete text.
        rest: Raw value with the piece removed or covered; None if nothing would remain.
    """

    piece: Any
    rest: Any


_CPU = torch.device("cpu")


def move(inputs: Any, device: torch.device) -> Any:
    """Return a tensor or a tuple of tensors on another device, copied asynchronously from pinned memory."""
    if isinstance(inputs, Tensor):
        # A copy to the CPU must be complete when it is returned: nothing makes the CPU wait before it reads the values.
        return inputs.to(device, non_blocking=device.type != "cpu")
    return tuple(move(item, device) for item in inputs)


class Preprocessing(ABC):
    """Conversion of raw values of a field to the input of a backbone.

    Preprocessing belongs to the backbone, because it must match the pretraining. It has a deterministic step
    (:meth:`encode`), which can be done once, a random one (:meth:`augment`), and two for batches: :meth:`collate` makes
    a compact batch on the CPU, and :meth:`to_device` completes it on the device of the model. Objects are small and
    picklable: loader processes get a copy.
    """

    encode_once: ClassVar[bool] = False
    """Whether a split is encoded once and kept in memory, because encoded values are small."""

    media_type: ClassVar[str] = "text/plain"
    """MIME type of the input on the demo page: a text box for ``text/plain``, a file picker for anything else
    (``image/*``)."""

    file_suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes, in lower case, of the files in a folder that a prediction reads. Empty: all files."""

    parts: Mapping[str, Preprocessing] = {}
    """Preprocessing of each input by name, if there are several; a raw value is then a tuple with one value each."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Plugins written for version 0.1 define the old names.
        adopt_renamed_methods(cls, {"picture": "thumbnail", "show": "render_batch"})  # codespell:ignore picture

    @property
    def keep_bytes(self) -> int | None:
        """Maximum memory in bytes for the encoded values of a split between epochs; 0, the default, keeps none.

        None allows half of the available memory. A split that needs more is encoded again in every epoch. Keeping
        values is worthwhile if encoding is slow (images). Encoded values must then be arrays or tensors.
        """
        return 0

    @abstractmethod
    def encode(self, values: Sequence[Any]) -> Sequence[Any]:
        """Run the deterministic step on raw values, in order: decode and resize, or tokenize and encode as integers.

        Raises:
            ValueError, OSError: A value cannot be encoded; the framework then names the example.
        """

    def augment(self, encoded: Any) -> Any:
        """Run the random step on one encoded training example; by default return it unchanged.

        Draw only from the global generators of ``torch``, ``numpy`` and ``random``: the framework seeds them from
        (seed, epoch, example index) before the call and restores them after it. The value may be changed in place if it
        consists of tensors, arrays, lists, tuples and dicts.
        """
        return encoded

    @property
    def augments(self) -> bool:
        """Whether :meth:`augment` changes values; by default, whether a subclass defines it."""
        return type(self).augment is not Preprocessing.augment

    def collate(self, encoded: Sequence[Any]) -> Any:
        """Combine encoded (and, in training, augmented) values to a batch.

        The default stacks tensors, or tuples of tensors, whose shapes are the same in every example.

        Returns:
            A tensor or a tuple of tensors, batch first, in the smallest type for the values (uint8 for images).
        """
        if isinstance(encoded[0], Tensor):
            return torch.stack(list(encoded))
        return tuple(torch.stack(column) for column in zip(*encoded, strict=True))

    def to_device(self, inputs: Any, device: torch.device) -> Any:
        """Move the output of :meth:`collate` to a device, and complete it there: convert and normalize, for example.

        By default the tensors are only moved. An override must not wait for the device: copy with ``non_blocking``, and
        keep constants on the device.

        Returns:
            Input of the backbone: a tensor or a tuple of tensors, batch first, on the device.
        """
        return move(inputs, device)

    def model_inputs(self, encoded: Sequence[Any], device: torch.device = _CPU) -> Any:
        """Return the input of the backbone for encoded values: :meth:`collate`, then :meth:`to_device`."""
        return self.to_device(self.collate(encoded), device)

    def length(self, encoded: Any) -> int:
        """Return the length of an encoded value, to which a batch is padded; by default 1."""
        return 1

    def lengths(self, encoded: Sequence[Any]) -> npt.NDArray[np.int64]:
        """Return the :meth:`length` of each encoded value, int64 (N,).

        Override it if the sequence stores all lengths: a split may contain millions of values.
        """
        return np.fromiter(map(self.length, encoded), dtype=np.int64, count=len(encoded))

    @property
    def varies_in_length(self) -> bool:
        """Whether encoded values vary in length; by default, whether a subclass defines :meth:`length`."""
        return type(self).length is not Preprocessing.length

    def warning(self, values: Sequence[Any]) -> str | None:
        """Return a warning about raw values that can be encoded but mean little to the model; None by default.

        An example are texts whose words are mostly unknown. Raw values may be slow to read: examine a sample.

        Args:
            values: Raw values of the validation split.
        """
        return None

    @abstractmethod
    def read(self, source: str) -> Any:
        """Return the raw value for an argument of the command line.

        Args:
            source: Path of a file, or a text.

        Raises:
            transfer.DataError, ValueError, OSError: The source cannot be read; the framework then names it.
        """

    def read_bytes(self, content: bytes) -> Any:
        """Return the raw value for the content of a request to a server: of a file, or of a typed text in UTF-8.

        The default writes the content to a temporary file and passes its path to :meth:`read`: input from a network
        must never be interpreted as a path. For other media types than text, a server calls this method and
        :meth:`encode` from several threads.

        Args:
            content: Content of the file, or the encoded text.

        Raises:
            transfer.DataError, ValueError, OSError: The content cannot be read.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "content"
            path.write_bytes(content)
            return self.read(str(path))

    def read_value(self, source: Any) -> Any:
        """Return the raw value for an item of a list, a line of standard input, or the path of a file.

        A string is a value and never a path if :attr:`media_type` is a text: a text may be equal to the name of a file.
        For any other media type, a string is the path of a file.

        Args:
            source: String, ``pathlib.Path`` of a file, bytes of a file, or raw value, which is returned unchanged.

        Raises:
            transfer.DataError, ValueError, OSError: The source cannot be read; the framework then names it.
        """
        # Plugins that define only `read` receive every string there.
        has_content_reader = type(self).read_bytes is not Preprocessing.read_bytes
        is_text = self.media_type.startswith("text/") and has_content_reader
        if isinstance(source, str):
            return self.read_bytes(source.encode()) if is_text else self.read(source)
        if isinstance(source, os.PathLike):
            path = Path(source).expanduser()
            if not path.is_file():  # a device or pipe may never end
                raise DataError("it is no regular file" if path.exists() else "there is no such file", where=str(path))
            return self.read_bytes(path.read_bytes()) if is_text else self.read(str(path))
        return self.read_bytes(source) if isinstance(source, bytes) else source

    def unknown_fraction(self, encoded: Any) -> float:
        """Return the fraction of an encoded value that is outside the vocabulary, from 0 to 1; by default 0.

        There is no prediction for a value that is completely unknown.
        """
        return 0.0

    def example(self) -> Any:
        """Return a typical raw value to check shapes with before data is read; None if there is none."""
        return None

    def render_batch(
        self, inputs: Any, values: Sequence[Any], captions: Sequence[str], groups: Mapping[str, Sequence[int]]
    ) -> bytes | str | None:
        """Render the examples of a batch as the model receives them.

        Args:
            inputs: Output of :meth:`to_device`; a training batch may be augmented and mixed.
            values: Raw values of the examples.
            captions: Caption of each example, in one or more lines.
            groups: Indices of the examples under each heading, in order.

        Returns:
            Bytes of a PNG file, or a text; None (the default) if the field cannot be rendered.
        """
        return None

    def thumbnail(self, value: Any) -> bytes | None:
        """Return a small image of a raw value for a page, as the bytes of a JPEG or PNG file; None by default.

        Raises:
            ValueError, OSError: The value cannot be rendered.
        """
        return None

    def occlusions(self, value: Any) -> Iterable[Occlusion]:
        """Yield the pieces of a raw value in order, each with the value without it, for explanations by occlusion.

        By default this is not implemented, and explanations are refused.
        """
        raise NotImplementedError

    @property
    def explains(self) -> bool:
        """Whether explanations are supported; by default, whether a subclass defines :meth:`occlusions`."""
        return type(self).occlusions is not Preprocessing.occlusions

    def standalone_code(self) -> str | None:
        """Return the code of a Python module that prepares inputs without this package; None (the default) if none can.

        Exports contain it as ``prepare.py``. It defines ``prepare(value: str, settings: dict, folder: Path)``, which
        returns the model's input for one value of a command line (the path of an image, or a text): a NumPy array with
        a batch of one example, or a tuple of arrays. ``settings`` is the result of :meth:`describe`, and ``folder``
        contains the files of the backbone's assets.
        """
        return None

    def restore(self, described: Mapping[str, Any]) -> None:  # noqa: B027  # most have no such settings
        """Adopt settings that a saved model was trained with and that depend on the machine; by default there are none.

        If this machine cannot do so, warn and use the nearest setting.

        Args:
            described: Result of :meth:`describe` in training.
        """

    def describe(self) -> Mapping[str, Any]:
        """Return the settings that determine the model's input, for tables and the saved model; JSON values."""
        return {}
