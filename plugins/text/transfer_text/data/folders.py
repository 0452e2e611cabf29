"""Text files in one folder per class."""

from __future__ import annotations

import codecs
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from transfer import ConfigError, Data, DataError, Dataset, DataSpec, Split, find_file

logger = logging.getLogger(__name__)

SUFFIX = ".txt"
_VALIDATION_NAMES = ("validation", "valid", "val")
_TEST_NAMES = ("test",)
_SPLIT_NAMES = ("train", "training", *_VALIDATION_NAMES, *_TEST_NAMES, "testing")
_LAYOUT = "put the texts of each class in a folder of its own: ROOT/CLASS/*.txt or ROOT/{train,test}/CLASS/*.txt"

ByClass = dict[str, list[Path]]
"""Files by class; classes and files are sorted."""


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
        names = [name for name in (train, val, test) if name is not None]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"two splits use the same folder: train {train!r}, val {val!r}, test {test!r}",
                fix="use another folder, or remove the split",
            )
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ConfigError(
                f"unknown encoding {encoding!r}", available=("utf-8-sig", "utf-16", "latin-1", "cp1252")
            ) from None
        self._root = root
        self._train = train
        self._val = val
        self._test = test
        self._test_fraction = test_fraction
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
                "this is not a folder" if root.exists() else "the folder does not exist", where=str(root), fix=_LAYOUT
            )
        folders = self._split_folders(root)
        splits = {split: _by_class(folder) for split, folder in (folders or {"train": root}).items()}
        if len(splits["train"]) == 1:
            raise DataError(
                f"there is only one class, {min(splits['train'])!r}: expected two or more", where=str(root), fix=_LAYOUT
            )
        if not folders and self._test_fraction:
            splits = _split_off_test(splits["train"], self._test_fraction, root)
        return self._data(root, splits)

    def _split_folders(self, root: Path) -> dict[str, Path]:
        """Return the folder of each split; empty if the root contains the classes themselves."""
        top = [path.name for path in _folders(root)]
        usable = [name for name in top if _folders(root / name)]
        likely = [name for name in top if name.lower() in _SPLIT_NAMES]
        asked = {"train": self._train, "val": self._val, "test": self._test}
        nothing_asked = asked == {"train": "train", "val": None, "test": None}
        # A class may be called "train". A split contains folders, or all its siblings are splits.
        has_splits = any(name in usable for name in likely) or (bool(top) and likely == top)
        if nothing_asked and not has_splits:
            return {}
        for option, name in asked.items():
            if name is not None and name not in usable:
                raise DataError(
                    f"there is no folder {name!r} with one folder per class",
                    where=str(root),
                    available=usable,
                    fix=f"set the folder of this split ({option}: FOLDER); it contains one folder per class",
                )
        rest = [name for name in usable if name not in asked.values()]
        val = self._val or _only([name for name in rest if name.lower() in _VALIDATION_NAMES], "val", root)
        test = self._test or _only([name for name in rest if name.lower() in _TEST_NAMES], "test", root)
        if test is None:
            val, test = None, val
        folders = {"train": self._train, "validation": val, "test": test}
        return {split: root / name for split, name in folders.items() if name is not None}

    def _data(self, root: Path, splits: Mapping[str, ByClass]) -> Data:
        classes = tuple(splits["train"])
        data = {}
        for split, files in splits.items():
            if tuple(files) != classes:
                only_train = sorted(set(classes) - set(files))
                only_here = sorted(set(files) - set(classes))
                raise DataError(
                    f"the classes of the {split} split differ from those of the training split"
                    + (f"; only in train: {', '.join(only_train)}" if only_train else "")
                    + (f"; only in {split}: {', '.join(only_here)}" if only_here else ""),
                    where=str(root),
                    fix="use the same class folders in every split",
                )
            paths = [path for name in classes for path in files[name]]
            targets = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files[name]) for name in classes])
            data[split] = Split({"text": [self._read(path) for path in paths]}, targets, [str(path) for path in paths])
        return Data(DataSpec(("text",), "class", classes), data)

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


def _folders(path: Path) -> list[Path]:
    """Return the subfolders of a folder, sorted, without hidden ones."""
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"the folder cannot be read: {error.strerror}", where=str(path), fix="make it readable"
        ) from error


def _by_class(folder: Path) -> ByClass:
    """Return the texts in a folder of classes. Other files are counted in the log."""
    classes = _folders(folder)
    if not classes:
        count = sum(1 for _ in folder.iterdir())
        raise DataError(
            f"the folder contains {count} files but no class folder" if count else "the folder is empty",
            where=str(folder),
            fix=_LAYOUT,
        )
    by_class: ByClass = {}
    skipped = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    for path in classes:
        files = sorted(
            Path(parent) / name
            for parent, _, names in os.walk(path, followlinks=True)
            for name in names
            if not name.startswith(".")
        )
        texts = [file for file in files if file.suffix.lower() == SUFFIX]
        others = [file for file in files if file.suffix.lower() != SUFFIX]
        if not texts:
            raise DataError(
                f"class {path.name!r} has no texts" + (f", only {_extensions(others)}" if others else ""),
                where=str(folder),
                fix=f"put {SUFFIX} files in its folder, or remove the folder",
            )
        by_class[path.name] = texts
        skipped += others
    if skipped:
        logger.warning("%s: skipped %d files that are not texts: %s", folder, len(skipped), _extensions(skipped))
    return by_class


def _extensions(paths: list[Path]) -> str:
    counts = Counter(path.suffix or "without extension" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def _split_off_test(texts: ByClass, fraction: float, root: Path) -> dict[str, ByClass]:
    """Split off a fraction of each class as test split.

    Texts are selected by a digest of their path, because files with similar names often have similar content.
    """
    train: ByClass = {}
    test: ByClass = {}
    for name, paths in texts.items():
        count = min(len(paths) - 1, max(1, round(len(paths) * fraction)))
        if count == 0:
            raise DataError(
                f"class {name!r} has only one text: a test split needs two or more",
                where=str(root),
                fix="add texts, or set test_fraction: 0",
            )
        selected = set(sorted(paths, key=lambda path: _digest(path.relative_to(root)))[:count])
        test[name] = [path for path in paths if path in selected]
        train[name] = [path for path in paths if path not in selected]
    return {"train": train, "test": test}


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).digest()


def _only(names: list[str], option: str, root: Path) -> str | None:
    """Return the only folder that can be this split, or None."""
    if len(names) > 1:
        raise DataError(
            f"{' and '.join(names)} can each be the {option} split",
            where=str(root),
            fix=f"choose one: {option}: {names[0]}",
        )
    return names[0] if names else None
