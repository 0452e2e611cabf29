"""Datasets of images: folders, published archives, and drawn shapes."""

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
from transfer_vision.data.shapes import SHAPES, ShapeImages
from transfer_vision.images.image_sources import (
    ArchiveSource,
    FolderSource,
    ImageColumn,
    ImageSource,
    Level,
    has_image_extension,
    open_source,
    walk,
)
from transfer_vision.images.validation import BadFiles, decodable_images

logger = logging.getLogger(__name__)

_VALIDATION_NAMES = ("validation", "valid", "val")
_TEST_NAMES = ("test",)
_SPLIT_NAMES = ("train", "training", *_VALIDATION_NAMES, *_TEST_NAMES, "testing")

_LAYOUT = "put the images of each class in a folder of its own: ROOT/CLASS/* or ROOT/{train,test}/CLASS/*"

ImagesByClass = dict[str, list[str]]
"""Paths of the images of each class; classes and paths are sorted."""


class ImageFolder(Dataset):
    """Images in one folder per class, with or without one folder per split.

    The layout is ``root/train/CLASS/*``, ``root/val/CLASS/*`` ..., or ``root/CLASS/*``, from which a test split is cut.

    Args:
        root: Path of the folder or zip archive, relative to the working folder or the data folder.
        train: Name of the folder of the training split.
        val: Name of the folder of the validation split; null: ``validation``, ``valid`` or ``val`` if it exists.
            Without a test split it is the test split, and the validation split is cut from the training split.
        test: Name of the folder of the test split; null: ``test`` if it exists.
        test_fraction: Fraction of each class that becomes the test split if there are no folders of splits. The choice
            depends on the paths only.
        bad_files: Action for images that cannot be decoded: ``error`` refuses the data; ``skip`` leaves them out and
            logs a table of them.
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
        """One image and one class; the names of the classes are unknown until the folders are read."""
        return DataSpec(("image",), "class")

    def load(self) -> Data:
        """List the images, and decode the new ones to check them.

        Raises:
            transfer.DataError: A folder is missing or empty, the splits have different classes, or an image is bad.
        """
        path = Path(self._root).expanduser()
        source = open_source(path if path.exists() else find_file(self._root) or path)
        levels = source.levels()
        folders = self._split_folders(source, levels)
        splits = {split: _by_class(source, levels, folder) for split, folder in (folders or {"train": ""}).items()}
        if len(splits["train"]) == 1:
            raise DataError(f"there is only one class, {min(splits['train'])!r}", where=source.name(""), fix=_LAYOUT)
        if not folders and self._test_fraction:
            splits = _split_off_test(splits["train"], self._test_fraction, source.name(""))
        return _data(source, splits, self._bad_files)

    def _split_folders(self, source: ImageSource, levels: Mapping[str, Level]) -> dict[str, str]:
        """Return the folder of each split; empty if the root contains the folders of the classes."""
        top = levels[""].folders
        usable = [name for name in top if levels[name].folders]
        likely = [name for name in top if name.lower() in _SPLIT_NAMES]
        asked = {"train": self._train, "val": self._val, "test": self._test}
        nothing_asked = asked == {"train": "train", "val": None, "test": None}
        # A class may be called "train". A split contains folders, or is in a root that contains only splits.
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
        val = self._val or _single_folder([name for name in rest if name in _VALIDATION_NAMES], "val", source, levels)
        test = self._test or _single_folder([name for name in rest if name in _TEST_NAMES], "test", source, levels)
        # A published dataset often has only two splits; the second one then is the test split.
        if test is None:
            val, test = None, val
        folders = {"train": self._train, "validation": val, "test": test}
        return {split: name for split, name in folders.items() if name is not None}


class PublishedImages(Dataset):
    """A published archive with a folder per split and class, or the folder that it unpacks to.

    Args:
        bad_files: Action for images that cannot be decoded: ``error`` refuses the data; ``skip`` leaves them out and
            logs a table of them.
    """

    folder: ClassVar[str]
    """The folder in the archive. The archive has the same name."""
    url: ClassVar[str]
    splits: ClassVar[Mapping[str, tuple[str, int]]]
    """The folder and the number of images of each split."""
    classes: ClassVar[tuple[str, ...]]

    def __init__(self, *, bad_files: BadFiles = "error") -> None:
        self._bad_files: BadFiles = bad_files

    @property
    def spec(self) -> DataSpec:
        """One image and one class."""
        return DataSpec(("image",), "class", self.classes)

    def load(self) -> Data:
        """Find or download the archive and list its images. Nothing is unpacked, and new images are decoded once.

        Raises:
            transfer.DataError: The archive is missing and cannot be downloaded, contains other images than published,
                or an image is bad.
        """
        archive = f"{self.folder}.zip"
        path = find_file(archive, self.folder) or download(self.url, archive)
        source = FolderSource(path) if path.is_dir() else ArchiveSource(path, self.folder)
        levels = source.levels()
        missing = [folder for folder, _ in self.splits.values() if folder not in levels]
        fix = f"remove it; {self.url} is then downloaded to {data_folder()} again"
        if missing:
            raise DataError(f"there is no folder {missing[0]!r} in it", where=source.name(""), fix=fix)
        images = {split: _by_class(source, levels, folder, quiet=True) for split, (folder, _) in self.splits.items()}
        counts = {split: sum(map(len, by_class.values())) for split, by_class in images.items()}
        expected = {split: count for split, (_, count) in self.splits.items()}
        classes = tuple(images["train"])
        if counts != expected or classes != self.classes:
            raise DataError(
                f"wrong content: expected {expected} images of {', '.join(self.classes)}, "
                f"got {counts} of {', '.join(classes)}",
                where=source.name(""),
                fix=fix,
            )
        return _data(source, images, self._bad_files)


class Hymenoptera(PublishedImages):
    """Ants and bees: 244 training and 153 test images, from PyTorch's transfer-learning tutorial.

    The tutorial's ``val`` folder is the test split. https://download.pytorch.org/tutorial/hymenoptera_data.zip
    """

    folder = "hymenoptera_data"
    url = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
    splits = {"train": ("train", 244), "test": ("val", 153)}
    classes = ("ants", "bees")


class HotDog(PublishedImages):
    """Hot dogs and other food: 2000 training and 800 test images, from Dive into Deep Learning.

    https://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip
    """

    folder = "hotdog"
    url = "https://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip"
    splits = {"train": ("train", 2000), "test": ("test", 800)}
    classes = ("hotdog", "not-hotdog")


class Shapes(Dataset):
    """Circles, squares and triangles on noisy backgrounds, drawn on access; no file or network is needed.

    All classes have the same distributions of area, color and position, so that they only differ in the outline.

    Args:
        per_class: Number of training images of each class. The validation and test splits have a quarter of it each.
        image_size: Height and width of the images, in pixels.
        seed: Seed of the drawn images.
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
        """One image and one of three shapes."""
        return DataSpec(("image",), "class", SHAPES)

    def load(self) -> Data:
        """Return the three splits; an image is drawn on access."""
        few = self._per_class // 4
        counts = {"train": self._per_class, "validation": few, "test": few}
        splits = {}
        for number, (split, count) in enumerate(counts.items()):
            images = ShapeImages(count * len(SHAPES), self._image_size, (self._seed, number))
            targets = images.targets()
            names = [f"shapes/{split}/{SHAPES[target]}/{index}" for index, target in enumerate(targets)]
            splits[split] = Split({"image": images}, targets, names)
        return Data(self.spec, splits)


def _by_class(source: ImageSource, levels: Mapping[str, Level], folder: str, *, quiet: bool = False) -> ImagesByClass:
    """Return the images in a folder of classes, and log the number of other files."""
    where = source.name(folder)
    classes = levels[folder].folders
    if not classes:
        files = levels[folder].files
        raise DataError(
            f"holds {len(files)} files but no folder of a class" if files else "is empty", where=where, fix=_LAYOUT
        )
    images: ImagesByClass = {}
    skipped = [f"{folder}/{name}" if folder else name for name in levels[folder].files]
    for name in classes:
        files = list(walk(levels, f"{folder}/{name}" if folder else name))
        images[name] = [path for path in files if has_image_extension(path)]
        others = [path for path in files if not has_image_extension(path)]
        if not images[name]:
            raise DataError(
                f"class {name!r} has no images" + (f", only {_extensions(others)}" if others else ""),
                where=where,
                fix="put images in its folder, or remove the folder",
            )
        skipped += others
    if skipped and not quiet:
        logger.warning("%s: skipped %d files that are no images: %s", where, len(skipped), _extensions(skipped))
    return images


def _extensions(paths: list[str]) -> str:
    counts = Counter(PurePosixPath(path).suffix or "without extension" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def _data(source: ImageSource, splits: Mapping[str, ImagesByClass], bad_files: BadFiles) -> Data:
    classes = tuple(splits["train"])
    made = {}
    everything = [path for by_class in splits.values() for paths in by_class.values() for path in paths]
    good = decodable_images(source, everything, bad_files)
    for split, images in splits.items():
        if tuple(images) != classes:
            only_train = sorted(set(classes) - set(images))
            only_here = sorted(set(images) - set(classes))
            raise DataError(
                f"the {split} split has other classes than the training split"
                + (f"; only in train: {', '.join(only_train)}" if only_train else "")
                + (f"; only in {split}: {', '.join(only_here)}" if only_here else ""),
                where=source.name(""),
                fix="give every split a folder of the same name for each class",
            )
        left = [[path for path in images[name] if path in good] for name in classes]
        if not all(left):
            name = classes[left.index([])]
            raise DataError(
                f"class {name!r} of the {split} split has no good image", where=source.name(""), fix="repair some"
            )
        paths = [path for of_class in left for path in of_class]
        targets = np.repeat(np.arange(len(classes), dtype=np.int64), list(map(len, left)))
        made[split] = Split({"image": ImageColumn(source, paths)}, targets, [source.name(path) for path in paths])
    return Data(DataSpec(("image",), "class", classes), made)


def _split_off_test(images: ImagesByClass, fraction: float, where: str) -> dict[str, ImagesByClass]:
    """Cut a test split with a fraction of each class.

    Images are chosen by a digest of the path, because images with similar names are often near duplicates.
    """
    train: ImagesByClass = {}
    test: ImagesByClass = {}
    for name, paths in images.items():
        count = min(len(paths) - 1, max(1, round(len(paths) * fraction)))
        if count == 0:
            raise DataError(
                f"class {name!r} has a single image, too few for a test split",
                where=where,
                fix="add images, or set test_fraction: 0",
            )
        chosen = set(
            sorted(paths, key=lambda path: hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest())[:count]
        )
        test[name] = [path for path in paths if path in chosen]
        train[name] = [path for path in paths if path not in chosen]
    return {"train": train, "test": test}


def _single_folder(names: list[str], option: str, source: ImageSource, levels: Mapping[str, Level]) -> str | None:
    """Return the only folder that can be this split, or None."""
    for name in names:
        if not levels[name].folders:
            logger.warning("%s: not used: it has no folder for each class", source.name(name))
    usable = [name for name in names if levels[name].folders]
    if len(usable) > 1:
        raise DataError(
            f"{' and '.join(usable)} could each be the {option} split",
            where=source.name(""),
            fix=f"choose one: {option}: {usable[0]}",
        )
    return usable[0] if usable else None
