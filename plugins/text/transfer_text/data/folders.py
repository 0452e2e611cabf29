"""Text files in one folder per class."""

from __future__ import annotations

import codecs
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
from pydantic import Field

from transfer import (
    ClassFolders,
    ConfigError,
    Data,
    DataError,
    Dataset,
    DataSpec,
    Level,
    Split,
    find_file,
    folder_levels,
)
from transfer_text.data.empty_texts import BadTexts, is_empty

logger = logging.getLogger(__name__)

SUFFIX = ".txt"
SNIFFED_BYTES = 8192
MAX_PATHS_SHOWN = 30
"""Maximum number of paths in the message about empty texts."""


class TextFolder(Dataset):
    """Text files in one folder per class, with or without a folder per split.

    The layout is ``root/train/CLASS/*``, ``root/val/CLASS/*`` and so on, or ``root/CLASS/*``. In the second case a
    fraction of each class becomes the test split.

    Args:
        root: Path of the folder, relative to the working folder or to the data folder.
        train: Name of the folder of the training split.
        val: Name of the folder of the validation split. null uses ``validation``, ``valid`` or ``val`` if it exists. If
            there is no test split, this folder is the test split, and validation is split off from train.
        test: Name of the folder of the test split. null uses ``test`` if it exists.
        test_fraction: Fraction of each class that becomes the test split if there are no folders of splits. The same
            texts are selected every time.
        encoding: Character encoding of the files.
        extensions: Extensions of the names of the text files, such as ``[.txt, .md]``. null reads ``.txt`` files if
            there are any, and otherwise every file that is text.
        bad_texts: Action for texts that are empty after cleaning (whitespace, markup): ``error`` refuses the data;
            ``skip`` leaves them out and logs their paths.
    """

    def __init__(
        self,
        *,
        root: str,
        train: str = "train",
        val: str | None = None,
        test: str | None = None,
        test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2,
        encoding: str = "utf-8-sig",
        extensions: tuple[str, ...] | None = None,
        bad_texts: BadTexts = "error",
    ) -> None:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ConfigError(
                f"unknown encoding {encoding!r}", available=("utf-8-sig", "utf-16", "latin-1", "cp1252")
            ) from None
        self._root = root
        self._folders = ClassFolders("texts", train=train, val=val, test=test, test_fraction=test_fraction)
        self._encoding = encoding
        self._extensions = None if extensions is None else tuple(extension.lower() for extension in extensions)
        self._bad_texts = bad_texts

    @property
    def spec(self) -> DataSpec:
        """Field ``text`` and one class; the class names are known after the folders have been read."""
        return DataSpec(("text",), "class")

    def load(self) -> Data:
        """Read the texts.

        Raises:
            transfer.DataError: A folder is missing or empty, the splits have different classes, or a file is not text.
        """
        root = Path(self._root).expanduser()
        root = root if root.exists() else find_file(self._root) or root
        if not root.is_dir():
            raise DataError(
                "this is not a folder" if root.exists() else "the folder does not exist",
                where=str(root),
                fix="give a folder of texts, with a folder for each class",
            )

        def name(path: str) -> str:
            return str(root / path)

        levels = folder_levels(root)
        listing = self._folders.list_files(levels, self._text_filter(root, levels), name)
        splits = {}
        empty: list[str] = []
        for split, paths in listing.paths.items():
            texts = [self._read(root / path) for path in paths]
            examples = Split({"text": texts}, listing.targets[split], list(map(name, paths)))
            # Targets and names must lose the same rows as the texts.
            is_full = np.array([not is_empty(text) for text in texts])
            if not is_full.all():
                empty += [paths[index] for index in np.flatnonzero(~is_full)]
                examples = examples.select(np.flatnonzero(is_full))
            splits[split] = examples
        if empty:
            self._report_empty(root, empty, sum(map(len, listing.paths.values())))
        return Data(DataSpec(("text",), "class", listing.classes), splits)

    def _text_filter(self, root: Path, levels: Mapping[str, Level]) -> Callable[[str], bool]:
        """Return the function that returns whether the file at a path is a text."""
        extensions = self._extensions
        # Files next to folders, such as a README.txt in the root, do not show the extension of the texts.
        leaves = (file for level in levels.values() if not level.folders for file in level.files)
        if extensions is None and any(file.lower().endswith(SUFFIX) for file in leaves):
            extensions = (SUFFIX,)
        if extensions is None:
            return lambda path: _is_text(root / path, self._encoding)
        return lambda path: PurePosixPath(path).suffix.lower() in extensions

    def _report_empty(self, root: Path, paths: Sequence[str], count: int) -> None:
        """Refuse or log the texts that are empty, all in one message."""
        more = len(paths) - MAX_PATHS_SHOWN
        message = f"{len(paths)} of {count} texts are empty:\n" + "\n".join(
            f"  {path}" for path in paths[:MAX_PATHS_SHOWN]
        )
        message += f"\n  and {more} more" if more > 0 else ""
        if self._bad_texts != "skip":
            fix = "fill them, remove them, or set bad_texts: skip to leave them out"
            raise DataError(message, where=str(root), fix=fix)
        logger.warning("%s: left out: %s", root, message)

    def _read(self, path: Path) -> str:
        try:
            if not path.is_file() and path.exists():
                raise OSError("it is no regular file")  # reading a pipe may never end
            return path.read_bytes().decode(self._encoding)
        except OSError as error:
            raise DataError(
                f"the text cannot be read: {error.strerror or error}", where=str(path), fix="make it readable"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"byte {error.object[error.start]:#04x} is not {self._encoding}",
                where=str(path),
                fix="set encoding to the encoding of the files (cp1252 and utf-16 are common), or save them as UTF-8",
            ) from error


def _is_text(path: Path, encoding: str) -> bool:
    """Return whether a file is text: no NUL byte is in its first bytes, as Git decides, unless it is UTF-16 or 32."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"\0" not in file.read(SNIFFED_BYTES) or codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
