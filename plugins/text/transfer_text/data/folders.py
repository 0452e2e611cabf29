"""Text files in one folder per class."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Annotated

from pydantic import Field

from transfer import (
    ClassFolders,
    ConfigError,
    Data,
    DataError,
    Dataset,
    DataSpec,
    Split,
    find_file,
    folder_levels,
)

SUFFIX = ".txt"


class TextFolder(Dataset):
    """Text files in one folder per class, with or without a folder per split.

    The layout is ``root/train/CLASS/*.txt``, ``root/val/CLASS/*.txt`` and so on, or ``root/CLASS/*.txt``. In the second
    case a fraction of each class becomes the test split.

    Args:
        root: Path of the folder, relative to the working folder or to the data folder.
        train: Name of the folder of the training split.
        val: Name of the folder of the validation split. null uses ``validation``, ``valid`` or ``val`` if it exists. If
            there is no test split, this folder is the test split, and validation is split off from train.
        test: Name of the folder of the test split. null uses ``test`` if it exists.
        test_fraction: Fraction of each class that becomes the test split if there are no folders of splits. The same
            texts are selected every time.
        encoding: Character encoding of the files.
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

        listing = self._folders.list_files(folder_levels(root), _is_text, name)
        splits = {
            split: Split(
                {"text": [self._read(root / path) for path in paths]}, listing.targets[split], list(map(name, paths))
            )
            for split, paths in listing.paths.items()
        }
        return Data(DataSpec(("text",), "class", listing.classes), splits)

    def _read(self, path: Path) -> str:
        try:
            text = path.read_bytes().decode(self._encoding)
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
        if not text.strip():
            raise DataError("the text is empty", where=str(path), fix="fill the file, or remove it")
        return text


def _is_text(path: str) -> bool:
    return path.lower().endswith(SUFFIX)
