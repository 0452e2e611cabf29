"""The layout of example files in class folders: ROOT/SPLIT/CLASS/* or ROOT/CLASS/*. Files are listed, not read."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from transfer.errors import ConfigError, DataError, unknown_name

logger = logging.getLogger(__name__)

_VALIDATION_NAMES = ("validation", "valid", "val")
_TEST_NAMES = ("test",)
_SPLIT_FOLDERS = ("train", "training", *_VALIDATION_NAMES, *_TEST_NAMES, "testing")

_ByClass = dict[str, list[str]]
"""Paths of the examples of each class; classes and paths are sorted."""


@dataclass
class Level:
    """Names directly in a folder, sorted, without hidden ones.

    Args:
        folders: Names of the folders.
        files: Names of the files.
    """

    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FileListing:
    """The example files of a dataset.

    Args:
        classes: Names of the classes.
        paths: Paths of the N examples of each split, in the order of the classes.
        targets: Class index of each example, int64 (N,), by split.
    """

    classes: tuple[str, ...]
    paths: dict[str, list[str]]
    targets: dict[str, npt.NDArray[np.int64]]


def folder_levels(root: Path) -> dict[str, Level]:
    """Return the content of a folder and of every folder below it, by relative path; the path of the root is empty.

    Raises:
        DataError: A folder cannot be read.
    """
    levels = {}
    try:
        for folder, folders, files in os.walk(root, onerror=_raise, followlinks=True):
            # In place: os.walk visits only the folders that remain, in this order.
            folders[:] = sorted(name for name in folders if not is_hidden(name) and not _is_loop(Path(folder, name)))
            relative = Path(folder).relative_to(root)
            key = "" if relative == Path() else relative.as_posix()
            levels[key] = Level(list(folders), sorted(name for name in files if not is_hidden(name)))
    except OSError as error:
        raise DataError(
            f"the folder cannot be read: {error.strerror}", where=str(error.filename), fix="make it readable"
        ) from error
    return levels


class ClassFolders:
    """A dataset of one file per example in one folder per class, with or without a folder per split.

    Args:
        examples: Name of the examples in messages, in the plural (``images``).
        train: Name of the folder of the training split.
        val: Name of the folder of the validation split. None uses ``validation``, ``valid`` or ``val`` if it exists.
        test: Name of the folder of the test split. None uses ``test`` if it exists.
        test_fraction: Fraction of each class that becomes the test split if there are no folders of splits.

    Raises:
        ConfigError: Two splits have the same folder.
    """

    def __init__(
        self,
        examples: str,
        *,
        train: str = "train",
        val: str | None = None,
        test: str | None = None,
        test_fraction: float = 0.0,
    ) -> None:
        names = [name for name in (train, val, test) if name is not None]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"two splits use the same folder: train {train!r}, val {val!r}, test {test!r}",
                fix="use another folder, or remove the split",
            )
        self.examples = examples
        self._layout = (
            f"put the {examples} of each class in a folder of its own: ROOT/CLASS/* or ROOT/{{train,test}}/CLASS/*"
        )
        self.train = train
        self.val = val
        self.test = test
        self.test_fraction = test_fraction

    def list_files(
        self,
        levels: Mapping[str, Level],
        is_example: Callable[[str], bool],
        name: Callable[[str], str],
        *,
        quiet: bool = False,
    ) -> FileListing:
        """Return the examples of each split. The classes are those of the training split; others may lack some.

        Args:
            levels: Content of every folder, by path (:func:`folder_levels`).
            is_example: Function that returns whether the file at a path is an example.
            name: Function that returns the name of a path in messages.
            quiet: Whether to omit the number of other files from the log.

        Raises:
            DataError: A folder is missing or empty, or a split has a class that the training split does not have.
        """
        folders = self._split_folders(levels, name)
        splits = {
            split: self._by_class(levels, folder, is_example, name, quiet=quiet)
            for split, folder in (folders or {"train": ""}).items()
        }
        train = splits["train"]
        # An empty class is usually a mistake, and its output would never be trained.
        if missing := next((label for label, paths in train.items() if not paths), None):
            folder = folders.get("train", "")
            others = _extensions(_walk(levels, _join(folder, missing)))
            raise DataError(
                f"class {missing!r} has no {self.examples}" + (f", only {others}" if others else ""),
                where=name(folder),
                fix=f"put {self.examples} in its folder, or remove the folder from every split",
            )
        if len(train) == 1:
            raise DataError(
                f"there is only one class, {min(train)!r}: expected two or more", where=name(""), fix=self._layout
            )
        for split, folder in folders.items():
            # Messages name the folder: a `val` folder may become the test split later.
            if unknown := [label for label, paths in splits[split].items() if paths and label not in train]:
                fix = f"put {self.examples} of it into {folders['train']}/{unknown[0]}, or remove the folder"
                raise DataError.of([unknown_name("class", unknown[0], train, where=name(folder), fix=fix)])
            splits[split] = {label: splits[split].get(label, []) for label in train}
            if not any(splits[split].values()):
                raise DataError(f"the folder contains no {self.examples}", where=name(folder), fix=self._layout)
        if not folders and self.test_fraction:
            splits = self._split_off_test(train, name(""))
        paths = {
            split: [path for of_class in by_class.values() for path in of_class] for split, by_class in splits.items()
        }
        targets = {
            split: np.repeat(np.arange(len(train), dtype=np.int64), [len(of_class) for of_class in by_class.values()])
            for split, by_class in splits.items()
        }
        return FileListing(tuple(train), paths, targets)

    def _by_class(
        self,
        levels: Mapping[str, Level],
        folder: str,
        is_example: Callable[[str], bool],
        name: Callable[[str], str],
        *,
        quiet: bool,
    ) -> _ByClass:
        """Return the examples in a folder of class folders, and log the number of other files."""
        if not levels[folder].folders:
            count = len(levels[folder].files)
            raise DataError(
                f"the folder contains {count} files but no class folder" if count else "the folder is empty",
                where=name(folder),
                fix=self._layout,
            )
        by_class: _ByClass = {}
        skipped = [_join(folder, file) for file in levels[folder].files]
        for label in levels[folder].folders:
            by_class[label] = []
            for path in _walk(levels, _join(folder, label)):
                (by_class[label] if is_example(path) else skipped).append(path)
        if skipped and not quiet:
            extensions = _extensions(skipped)
            logger.warning(
                "%s: skipped %d files that are no %s: %s", name(folder), len(skipped), self.examples, extensions
            )
        return by_class

    def _split_folders(self, levels: Mapping[str, Level], name: Callable[[str], str]) -> dict[str, str]:
        """Return the folder of each split; empty if the root contains the class folders."""
        top = levels[""].folders
        usable = [folder for folder in top if levels[folder].folders]
        likely = [folder for folder in top if folder.lower() in _SPLIT_FOLDERS]
        asked = {"train": self.train, "val": self.val, "test": self.test}
        nothing_asked = asked == {"train": "train", "val": None, "test": None}
        # A class may be called "train". A split contains folders, or is in a root that contains only splits.
        has_splits = any(folder in usable for folder in likely) or (bool(top) and likely == top)
        if nothing_asked and not has_splits:
            return {}
        for option, folder in asked.items():
            if folder is not None and folder not in usable:
                raise DataError(
                    f"there is no folder {folder!r} with a folder per class",
                    where=name(""),
                    available=usable,
                    fix=f"set the folder of this split ({option}: FOLDER); it contains a folder per class",
                )

        def choose(option: str, names: tuple[str, ...]) -> str | None:
            """Return the only folder that can be this split, or None."""
            folders = [folder for folder in likely if folder.lower() in names and folder not in asked.values()]
            for folder in folders:
                if folder not in usable:
                    logger.warning("%s: not used: it has no folder for each class", name(folder))
            folders = [folder for folder in folders if folder in usable]
            if len(folders) > 1:
                raise DataError(
                    f"{' and '.join(folders)} can each be the {option} split",
                    where=name(""),
                    fix=f"choose one: {option}: {folders[0]}",
                )
            return folders[0] if folders else None

        splits = {
            "train": self.train,
            "validation": self.val or choose("val", _VALIDATION_NAMES),
            "test": self.test or choose("test", _TEST_NAMES),
        }
        return {split: folder for split, folder in splits.items() if folder is not None}

    def _split_off_test(self, by_class: _ByClass, where: str) -> dict[str, _ByClass]:
        """Split off a fraction of each class as the test split.

        Examples are selected by a digest of their path, because files with similar names often have similar content.
        """
        train: _ByClass = {}
        test: _ByClass = {}
        for label, paths in by_class.items():
            # At least one example for the test, and one that remains for training.
            count = min(len(paths) - 1, max(1, round(len(paths) * self.test_fraction)))
            if count == 0:
                raise DataError(
                    f"class {label!r} has too few {self.examples} for a test split: expected two or more, got 1",
                    where=where,
                    fix=f"add {self.examples}, or set test_fraction: 0",
                )
            selected = set(sorted(paths, key=_path_digest)[:count])
            test[label] = [path for path in paths if path in selected]
            train[label] = [path for path in paths if path not in selected]
        return {"train": train, "test": test}


def _extensions(paths: Iterable[str]) -> str:
    """Return the number of files of each extension as text."""
    counts = Counter(PurePosixPath(path).suffix or "without extension" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def _path_digest(path: str) -> bytes:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is left out, as tools for archives and folders do."""
    return name.startswith((".", "__MACOSX"))  # macOS writes the second one into archives


def _walk(levels: Mapping[str, Level], folder: str) -> Iterator[str]:
    """Yield the paths of all files below a folder, in order."""
    level = levels[folder]
    yield from (_join(folder, name) for name in level.files)
    for name in level.folders:
        yield from _walk(levels, _join(folder, name))


def _is_loop(folder: Path) -> bool:
    """Return whether a folder is a link to one of its parents, which would make the walk endless."""
    return folder.is_symlink() and folder.resolve() in folder.absolute().parent.resolve().joinpath("_").parents


def _raise(error: OSError) -> None:
    raise error
