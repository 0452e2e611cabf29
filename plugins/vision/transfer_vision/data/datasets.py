"""Datasets of pictures: your own folders, published ones, and one that is drawn."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from transfer import ConfigError, Data, DataError, Dataset, DataSpec, Split, data_folder, download, find_file
from transfer_vision.data.shapes import SHAPES, ShapePictures
from transfer_vision.images.image_sources import (
    FolderSource,
    Level,
    Pictures,
    Source,
    ZipSource,
    is_picture,
    open_source,
    walk,
)
from transfer_vision.images.validation import BadFiles, good_pictures

logger = logging.getLogger(__name__)

_VALIDATION_NAMES = ("validation", "valid", "val")
_TEST_NAMES = ("test",)
_SPLIT_NAMES = ("train", "training", *_VALIDATION_NAMES, *_TEST_NAMES, "testing")

_LAYOUT = "put the pictures of each class in a folder of its own: ROOT/CLASS/* or ROOT/{train,test}/CLASS/*"

ByClass = dict[str, list[str]]
"""Paths of pictures by class, both sorted."""


class ImageFolder(Dataset):
    """Pictures in a folder for each class, with or without a folder for each split.

    ``root/train/CLASS/*``, ``root/val/CLASS/*`` and so on, or ``root/CLASS/*``, of which a part becomes the test split.

    Args:
        root: The folder or zip archive, from the working folder or from the data folder.
        train: The folder of the training split.
        val: The folder of the validation split; null: ``validation``, ``valid`` or ``val`` if there is one. Without a
            test split it is the test split, and validation is cut from train.
        test: The folder of the test split; null: ``test`` if there is one.
        test_fraction: The part of each class that becomes the test split where there are no folders of splits; the same
            pictures every time.
        bad_files: What to do about pictures that cannot be decoded: ``error``, or ``skip`` them with a table in the
            log.
    """

    def __init__(
        self,
        *,
        root: str,
        train: str = "train",
        val: str | None = None,
        test: str | None = None,
        test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2,
        bad_files: BadFiles = "error",
    ) -> None:
        names = [name for name in (train, val, test) if name is not None]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"two splits cannot be one folder: train {train!r}, val {val!r}, test {test!r}",
                fix="name another folder, or leave the split out",
            )
        self._root = root
        self._train = train
        self._val = val
        self._test = test
        self._test_fraction = test_fraction
        self._bad_files: BadFiles = bad_files

    @property
    def spec(self) -> DataSpec:
        """One picture and one class; the classes are known when the folders have been read."""
        return DataSpec(("image",), "class")

    def load(self) -> Data:
        """List the pictures, and decode those that are new to see whether they are good.

        Raises:
            transfer.DataError: A folder is missing or empty, the splits have different classes, or a picture is bad.
        """
        path = Path(self._root).expanduser()
        source = open_source(path if path.exists() else find_file(self._root) or path)
        levels = source.levels()
        folders = self._split_folders(source, levels)
        splits = {split: _by_class(source, levels, folder) for split, folder in (folders or {"train": ""}).items()}
        if len(splits["train"]) == 1:
            raise DataError(f"there is only one class, {min(splits['train'])!r}", where=source.name(""), fix=_LAYOUT)
        if not folders and self._test_fraction:
            splits = _cut(splits["train"], self._test_fraction, source.name(""))
        return _data(source, splits, self._bad_files)

    def _split_folders(self, source: Source, levels: Mapping[str, Level]) -> dict[str, str]:
        """Return the folder of each split; empty where the root holds the classes themselves."""
        top = levels[""].folders
        usable = [name for name in top if levels[name].folders]
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
                    where=source.name(""),
                    available=usable,
                    fix=f"name the folder of this split ({option}: FOLDER), and put a folder for each class in it",
                )
        rest = [name for name in likely if name not in asked.values()]
        val = self._val or _only([name for name in rest if name in _VALIDATION_NAMES], "val", source, levels)
        test = self._test or _only([name for name in rest if name in _TEST_NAMES], "test", source, levels)
        if test is None:
            val, test = None, val
        found = {"train": self._train, "validation": val, "test": test}
        return {split: name for split, name in found.items() if name is not None}


class PublishedPictures(Dataset):
    """A published archive of pictures in a folder for each split and class, or the folder it unpacks to."""

    folder: ClassVar[str]
    """The folder in the archive; the archive is named after it."""
    url: ClassVar[str]
    splits: ClassVar[Mapping[str, tuple[str, int]]]
    """For each split its folder and its number of pictures."""
    classes: ClassVar[tuple[str, ...]]

    def __init__(self, *, bad_files: BadFiles = "error") -> None:
        self._bad_files: BadFiles = bad_files

    @property
    def spec(self) -> DataSpec:
        """One picture and one class."""
        return DataSpec(("image",), "class", self.classes)

    def load(self) -> Data:
        """Find or download the archive and list its pictures; nothing is unpacked, and new pictures are decoded once.

        Raises:
            transfer.DataError: It is not there and cannot be downloaded, or holds other pictures than were published,
                or bad ones.
        """
        archive = f"{self.folder}.zip"
        path = find_file(archive, self.folder) or download(self.url, archive)
        source = FolderSource(path) if path.is_dir() else ZipSource(path, self.folder)
        levels = source.levels()
        missing = [folder for folder, _ in self.splits.values() if folder not in levels]
        fix = f"remove it, and {self.url} is downloaded to {data_folder()} again"
        if missing:
            raise DataError(f"there is no folder {missing[0]!r} in it", where=source.name(""), fix=fix)
        pictures = {split: _by_class(source, levels, folder, quiet=True) for split, (folder, _) in self.splits.items()}
        found = {split: sum(map(len, by_class.values())) for split, by_class in pictures.items()}
        expected = {split: count for split, (_, count) in self.splits.items()}
        classes = tuple(pictures["train"])
        if found != expected or classes != self.classes:
            raise DataError(
                f"holds {found} pictures of {', '.join(classes)}, not the {expected} that were published",
                where=source.name(""),
                fix=fix,
            )
        return _data(source, pictures, self._bad_files)


class Hymenoptera(PublishedPictures):
    """Ants and bees: 244 training and 153 test pictures, from PyTorch's transfer-learning tutorial.

    The tutorial's ``val`` folder is the test split. https://download.pytorch.org/tutorial/hymenoptera_data.zip

    Args:
        bad_files: What to do about pictures that cannot be decoded: ``error``, or ``skip`` them with a table in the
            log.
    """

    folder = "hymenoptera_data"
    url = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
    splits = {"train": ("train", 244), "test": ("val", 153)}
    classes = ("ants", "bees")


class HotDog(PublishedPictures):
    """Hot dogs and other food: 2000 training and 800 test pictures, from Dive into Deep Learning.

    https://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip

    Args:
        bad_files: What to do about pictures that cannot be decoded: ``error``, or ``skip`` them with a table in the
            log.
    """

    folder = "hotdog"
    url = "https://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip"
    splits = {"train": ("train", 2000), "test": ("test", 800)}
    classes = ("hotdog", "not-hotdog")


class Shapes(Dataset):
    """Circles, squares and triangles on noisy backgrounds, drawn on the fly: needs no file and no network.

    The classes share their areas, colours and places, so that only the outline tells them apart.

    Args:
        per_class: Training pictures of each class; validation and test have a quarter as many each.
        image_size: Height and width of the pictures, in pixels.
        seed: Other seeds give other pictures.
    """

    def __init__(
        self,
        *,
        per_class: Annotated[int, Field(ge=4)] = 200,
        image_size: Annotated[int, Field(ge=16)] = 64,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self._per_class = per_class
        self._image_size = image_size
        self._seed = seed

    @property
    def spec(self) -> DataSpec:
        """One picture and one of three shapes."""
        return DataSpec(("image",), "class", SHAPES)

    def load(self) -> Data:
        """Return the three splits; a picture is drawn when it is asked for."""
        few = self._per_class // 4
        counts = {"train": self._per_class, "validation": few, "test": few}
        splits = {}
        for number, (split, count) in enumerate(counts.items()):
            pictures = ShapePictures(count * len(SHAPES), self._image_size, (self._seed, number))
            targets = pictures.targets()
            names = [f"shapes/{split}/{SHAPES[target]}/{index}" for index, target in enumerate(targets)]
            splits[split] = Split({"image": pictures}, targets, names)
        return Data(self.spec, splits)


def _by_class(source: Source, levels: Mapping[str, Level], folder: str, *, quiet: bool = False) -> ByClass:
    """Return the pictures in a folder of classes; files that are none are counted in the log."""
    where = source.name(folder)
    classes = levels[folder].folders
    if not classes:
        files = levels[folder].files
        raise DataError(
            f"holds {len(files)} files but no folder of a class" if files else "is empty", where=where, fix=_LAYOUT
        )
    found: ByClass = {}
    skipped = [f"{folder}/{name}" if folder else name for name in levels[folder].files]
    for name in classes:
        files = list(walk(levels, f"{folder}/{name}" if folder else name))
        found[name] = [path for path in files if is_picture(path)]
        others = [path for path in files if not is_picture(path)]
        if not found[name]:
            raise DataError(
                f"class {name!r} has no pictures" + (f", only {_extensions(others)}" if others else ""),
                where=where,
                fix="put pictures in its folder, or remove the folder",
            )
        skipped += others
    if skipped and not quiet:
        logger.warning("%s: skipped %d files that are no pictures: %s", where, len(skipped), _extensions(skipped))
    return found


def _extensions(paths: list[str]) -> str:
    counts = Counter(PurePosixPath(path).suffix or "without extension" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def _data(source: Source, splits: Mapping[str, ByClass], bad_files: BadFiles) -> Data:
    classes = tuple(splits["train"])
    made = {}
    everything = [path for by_class in splits.values() for paths in by_class.values() for path in paths]
    good = good_pictures(source, everything, bad_files)
    for split, pictures in splits.items():
        if tuple(pictures) != classes:
            only_train = sorted(set(classes) - set(pictures))
            only_here = sorted(set(pictures) - set(classes))
            raise DataError(
                f"the {split} split has other classes than the training split"
                + (f"; only in train: {', '.join(only_train)}" if only_train else "")
                + (f"; only in {split}: {', '.join(only_here)}" if only_here else ""),
                where=source.name(""),
                fix="give every split a folder of the same name for each class",
            )
        left = [[path for path in pictures[name] if path in good] for name in classes]
        if not all(left):
            name = classes[left.index([])]
            raise DataError(
                f"class {name!r} of the {split} split has no good picture", where=source.name(""), fix="mend some"
            )
        paths = [path for of_class in left for path in of_class]
        targets = np.repeat(np.arange(len(classes), dtype=np.int64), list(map(len, left)))
        made[split] = Split({"image": Pictures(source, paths)}, targets, [source.name(path) for path in paths])
    return Data(DataSpec(("image",), "class", classes), made)


def _cut(pictures: ByClass, fraction: float, where: str) -> dict[str, ByClass]:
    """Cut a test split, a part of each class: by a digest of the path, for neighbours by name are often alike."""
    train: ByClass = {}
    test: ByClass = {}
    for name, paths in pictures.items():
        count = min(len(paths) - 1, max(1, round(len(paths) * fraction)))
        if count == 0:
            raise DataError(
                f"class {name!r} has a single picture, too few for a test split",
                where=where,
                fix="add pictures, or set test_fraction: 0",
            )
        chosen = set(
            sorted(paths, key=lambda path: hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest())[:count]
        )
        test[name] = [path for path in paths if path in chosen]
        train[name] = [path for path in paths if path not in chosen]
    return {"train": train, "test": test}


def _only(names: list[str], option: str, source: Source, levels: Mapping[str, Level]) -> str | None:
    """Return the one folder that can be this split, if any."""
    for name in names:
        if not levels[name].folders:
            logger.warning("%s: not used: it has no folder for each class", source.name(name))
    usable = [name for name in names if levels[name].folders]
    if len(usable) > 1:
        raise DataError(
            f"{' and '.join(usable)} could each be the {option} split",
            where=source.name(""),
            fix=f"say which one: {option}: {usable[0]}",
        )
    return usable[0] if usable else None
