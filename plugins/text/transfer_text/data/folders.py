"""Texts in a file each, in a folder for each class."""

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
"""Files by class, both sorted."""


class TextFolder(Dataset):
    """Texts in a folder for each class, with or without a folder for each split.

    ``root/train/CLASS/*.txt``, ``root/val/CLASS/*.txt`` and so on, or ``root/CLASS/*.txt``, of which a part becomes the
    test split.

    Args:
        root: The folder, from the working folder or from the data folder.
        train: The folder of the training split.
        val: The folder of the validation split; null: ``validation``, ``valid`` or ``val`` if there is one. Without a
            test split it is the test split, and validation is cut from train.
        test: The folder of the test split; null: ``test`` if there is one.
        test_fraction: The part of each class that becomes the test split where there are no folders of splits; the same
            texts every time.
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
                f"two splits cannot be one folder: train {train!r}, val {val!r}, test {test!r}",
                fix="name another folder, or leave the split out",
            )
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ConfigError(
                f"there is no encoding called {encoding!r}", available=("utf-8-sig", "utf-16", "latin-1", "cp1252")
            ) from None
        self._root = root
        self._train = train
        self._val = val
        self._test = test
        self._test_fraction = test_fraction
        self._encoding = encoding

    @property
    def spec(self) -> DataSpec:
        """A text and one class; the classes are known when the folders have been read."""
        return DataSpec(("text",), "class")

    def load(self) -> Data:
        """Read the texts.

        Raises:
            transfer.DataError: A folder is missing or empty, the splits have different classes, or a file is no text.
        """
        root = Path(self._root).expanduser()
        root = root if root.exists() else find_file(self._root) or root
        if not root.is_dir():
            raise DataError(
                "this is not a folder" if root.exists() else "there is no such folder", where=str(root), fix=_LAYOUT
            )
        folders = self._split_folders(root)
        splits = {split: _by_class(folder) for split, folder in (folders or {"train": root}).items()}
        if len(splits["train"]) == 1:
            raise DataError(f"there is only one class, {min(splits['train'])!r}", where=str(root), fix=_LAYOUT)
        if not folders and self._test_fraction:
            splits = _cut(splits["train"], self._test_fraction, root)
        return self._data(root, splits)

    def _split_folders(self, root: Path) -> dict[str, Path]:
        """Return the folder of each split; empty where the root holds the classes themselves."""
        top = [path.name for path in _folders(root)]
        usable = [name for name in top if _folders(root / name)]
        likely = [name for name in top if name.lower() in _SPLIT_NAMES]
        asked = {"train": self._train, "val": self._val, "test": self._test}
        nothing_asked = asked == {"train": "train", "val": None, "test": None}
        # A class may be called "train"; a split holds folders, or stands among splits alone.
        holds_splits = any(name in usable for name in likely) or (bool(top) and likely == top)
        if nothing_asked and not holds_splits:
            return {}
        for option, name in asked.items():
            if name is not None and name not in usable:
                raise DataError(
                    f"there is no folder {name!r} with a folder for each class",
                    where=str(root),
                    available=usable,
                    fix=f"name the folder of this split ({option}: FOLDER), and put a folder for each class in it",
                )
        rest = [name for name in usable if name not in asked.values()]
        val = self._val or _only([name for name in rest if name.lower() in _VALIDATION_NAMES], "val", root)
        test = self._test or _only([name for name in rest if name.lower() in _TEST_NAMES], "test", root)
        if test is None:
            val, test = None, val
        found = {"train": self._train, "validation": val, "test": test}
        return {split: root / name for split, name in found.items() if name is not None}

    def _data(self, root: Path, splits: Mapping[str, ByClass]) -> Data:
        classes = tuple(splits["train"])
        made = {}
        for split, files in splits.items():
            if tuple(files) != classes:
                only_train = sorted(set(classes) - set(files))
                only_here = sorted(set(files) - set(classes))
                raise DataError(
                    f"the {split} split has other classes than the training split"
                    + (f"; only in train: {', '.join(only_train)}" if only_train else "")
                    + (f"; only in {split}: {', '.join(only_here)}" if only_here else ""),
                    where=str(root),
                    fix="give every split a folder of the same name for each class",
                )
            paths = [path for name in classes for path in files[name]]
            targets = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files[name]) for name in classes])
            made[split] = Split({"text": [self._read(path) for path in paths]}, targets, [str(path) for path in paths])
        return Data(DataSpec(("text",), "class", classes), made)

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
                fix="set encoding to that of the files (cp1252 and utf-16 are common), or save it as UTF-8",
            ) from error
        if not text.strip():
            raise DataError("the text is empty", where=str(path), fix="fill the file, or remove it")
        return text


def _folders(path: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones."""
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"this folder cannot be read: {error.strerror}", where=str(path), fix="make it readable"
        ) from error


def _by_class(folder: Path) -> ByClass:
    """Return the texts in a folder of classes; files that are none are counted in the log."""
    classes = _folders(folder)
    if not classes:
        count = sum(1 for _ in folder.iterdir())
        raise DataError(
            f"holds {count} files but no folder of a class" if count else "is empty", where=str(folder), fix=_LAYOUT
        )
    found: ByClass = {}
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
        found[path.name] = texts
        skipped += others
    if skipped:
        logger.warning("%s: skipped %d files that are no texts: %s", folder, len(skipped), _extensions(skipped))
    return found


def _extensions(paths: list[Path]) -> str:
    counts = Counter(path.suffix or "without extension" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def _cut(texts: ByClass, fraction: float, root: Path) -> dict[str, ByClass]:
    """Cut a test split, a part of each class: by a digest of the path, for neighbours by name are often alike."""
    train: ByClass = {}
    test: ByClass = {}
    for name, paths in texts.items():
        count = min(len(paths) - 1, max(1, round(len(paths) * fraction)))
        if count == 0:
            raise DataError(
                f"class {name!r} has a single text, too few for a test split",
                where=str(root),
                fix="add texts, or set test_fraction: 0",
            )
        chosen = set(sorted(paths, key=lambda path: _digest(path.relative_to(root)))[:count])
        test[name] = [path for path in paths if path in chosen]
        train[name] = [path for path in paths if path not in chosen]
    return {"train": train, "test": test}


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).digest()


def _only(names: list[str], option: str, root: Path) -> str | None:
    """Return the one folder that can be this split, if any."""
    if len(names) > 1:
        raise DataError(
            f"{' and '.join(names)} could each be the {option} split",
            where=str(root),
            fix=f"say which one: {option}: {names[0]}",
        )
    return names[0] if names else None
