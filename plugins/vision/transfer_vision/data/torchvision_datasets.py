"""The classification datasets that torchvision can download, by name."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torchvision.datasets
from PIL import Image
from pydantic import Field

from transfer import ConfigError, Data, DataError, Dataset, DataSpec, Split, data_folder, split_off
from transfer_vision.images.image_sources import FolderSource, ImageColumn
from transfer_vision.images.validation import BadFiles, decodable_images

Name = Literal[
    "caltech101",
    "caltech256",
    "cifar10",
    "cifar100",
    "country211",
    "dtd",
    "eurosat",
    "fashion_mnist",
    "fgvc_aircraft",
    "flowers102",
    "food101",
    "gtsrb",
    "imagenette",
    "kmnist",
    "mnist",
    "oxford_pets",
    "rendered_sst2",
    "stl10",
    "sun397",
    "svhn",
    "usps",
]


@dataclass(frozen=True)
class _Entry:
    """A dataset class of torchvision and the arguments of each split."""

    cls: str
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"train": {}})


def _by_name(**names: str) -> dict[str, dict[str, Any]]:
    return {split: {"split": name} for split, name in names.items()}


_FLAG = {"train": {"train": True}, "test": {"train": False}}
_TRAIN_TEST = _by_name(train="train", test="test")
_ALL_THREE = _by_name(train="train", validation="val", test="test")

_ENTRIES: dict[str, _Entry] = {
    "caltech101": _Entry("Caltech101"),
    "caltech256": _Entry("Caltech256"),
    "cifar10": _Entry("CIFAR10", _FLAG),
    "cifar100": _Entry("CIFAR100", _FLAG),
    "country211": _Entry("Country211", _by_name(train="train", validation="valid", test="test")),
    "dtd": _Entry("DTD", _ALL_THREE),
    "eurosat": _Entry("EuroSAT"),
    "fashion_mnist": _Entry("FashionMNIST", _FLAG),
    "fgvc_aircraft": _Entry("FGVCAircraft", _ALL_THREE),
    "flowers102": _Entry("Flowers102", _ALL_THREE),
    "food101": _Entry("Food101", _TRAIN_TEST),
    "gtsrb": _Entry("GTSRB", _TRAIN_TEST),
    "imagenette": _Entry("Imagenette", _by_name(train="train", test="val")),
    "kmnist": _Entry("KMNIST", _FLAG),
    "mnist": _Entry("MNIST", _FLAG),
    "oxford_pets": _Entry("OxfordIIITPet", _by_name(train="trainval", test="test")),
    "rendered_sst2": _Entry("RenderedSST2", _ALL_THREE),
    "stl10": _Entry("STL10", _TRAIN_TEST),
    "sun397": _Entry("SUN397"),
    "svhn": _Entry("SVHN", _TRAIN_TEST),
    "usps": _Entry("USPS", _FLAG),
}
assert set(_ENTRIES) == set(get_args(Name))


class Torchvision(Dataset):
    """A classification dataset of torchvision, read from the data folder in torchvision's layout or downloaded there.

    The published splits are used. ``caltech101``, ``caltech256``, ``eurosat`` and ``sun397`` have none.

    Args:
        dataset: Name of the dataset.
        test_fraction: Fraction of each class that becomes the test split if no test split was published.
        bad_files: Action for image files that cannot be decoded: ``error`` refuses the data; ``skip`` leaves them out
            and logs a table of them.
    """

    def __init__(
        self,
        *,
        dataset: Name,
        test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2,
        bad_files: BadFiles = "error",
    ) -> None:
        if not hasattr(torchvision.datasets, _ENTRIES[dataset].cls):
            raise ConfigError(f"this release of torchvision has no {dataset}", fix="install a newer torchvision")
        self._name = dataset
        self._test_fraction = test_fraction
        self._bad_files: BadFiles = bad_files

    @property
    def spec(self) -> DataSpec:
        """One image and one class; the names of the classes are unknown until the data is read."""
        return DataSpec(("image",), "class")

    def load(self) -> Data:
        """Read the splits, and download the files that are missing.

        Raises:
            transfer.DataError: The data is missing and cannot be downloaded, or is damaged.
        """
        entry = _ENTRIES[self._name]
        datasets = {split: self._open(entry, arguments) for split, arguments in entry.splits.items()}
        labels = {split: _labels(dataset) for split, dataset in datasets.items()}
        classes = _classes(datasets["train"], labels)
        splits = {split: self._split(split, dataset, labels[split]) for split, dataset in datasets.items()}
        if set(splits) == {"train"}:
            splits["train"], splits["test"] = split_off(splits["train"], self._test_fraction)
        return Data(DataSpec(("image",), "class", classes), splits)

    def _open(self, entry: _Entry, arguments: Mapping[str, Any]) -> Any:
        cls, root = getattr(torchvision.datasets, entry.cls), data_folder()
        try:
            return cls(str(root), **arguments)
        except (RuntimeError, OSError):  # torchvision finds it missing or incomplete
            pass
        except ModuleNotFoundError as error:
            raise DataError(f"{self._name} is read with {error.name}", fix=f"pip install {error.name}") from error
        try:
            root.mkdir(parents=True, exist_ok=True)
            return cls(str(root), **arguments, download=True)  # files with the right checksum are not fetched again
        except ModuleNotFoundError as error:
            raise DataError(f"{self._name} is read with {error.name}", fix=f"pip install {error.name}") from error
        # torchvision also passes on the exceptions of the archives and tables that it opens.
        except (RuntimeError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, pickle.PickleError) as error:
            raise DataError(
                f"{self._name} is missing or incomplete in {root}, and cannot be downloaded: {error}",
                fix=f"fetch it elsewhere with torchvision.datasets.{entry.cls}(FOLDER, download=True), and move the "
                f"content of FOLDER to {root} (TRANSFER_DATA names another folder)",
            ) from error

    def _split(self, split: str, dataset: Any, labels: npt.NDArray[np.int64]) -> Split:
        files = _files(dataset)
        if files is None:
            names = [f"{self._name}/{split}/{index}" for index in range(len(labels))]
            return Split({"image": Items(dataset)}, labels, names)
        source = FolderSource(data_folder())
        paths = [Path(file).relative_to(source.path).as_posix() for file in files]
        good = decodable_images(source, paths, self._bad_files)
        left = [index for index, path in enumerate(paths) if path in good]
        remaining = [paths[index] for index in left]
        return Split({"image": ImageColumn(source, remaining)}, labels[left], [source.name(path) for path in remaining])


class Items(Sequence[Image.Image]):
    """A column of the images that a dataset of torchvision keeps as arrays. Picklable.

    Args:
        dataset: A sequence of pairs of a PIL image and a class.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        """Return one PIL image, or a list of images for a slice."""
        indices = range(len(self))[index]
        return self._dataset[indices][0] if isinstance(indices, int) else [self._dataset[i][0] for i in indices]

    def fingerprint(self) -> str:
        """Return a digest of the arrays, or of the images if there are no arrays."""
        arrays = getattr(self._dataset, "data", None)
        pixels = [arrays] if arrays is not None else (self[i] for i in range(len(self)))
        digest = hashlib.sha256()
        for array in map(np.asarray, pixels):
            digest.update(repr((array.dtype, array.shape)).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def content_keys(self) -> list[bytes] | None:
        """Return a digest of the pixels of each image; None if the images are not in arrays."""
        arrays = getattr(self._dataset, "data", None)
        return None if arrays is None else [hashlib.sha256(np.asarray(array).tobytes()).digest() for array in arrays]


# torchvision has several names for the files and classes of a dataset; these are all that it uses.
def _files(dataset: Any) -> list[Any] | None:
    for name in ("_image_files", "_images"):
        if hasattr(dataset, name):
            return list(getattr(dataset, name))
    for name in ("_samples", "samples"):
        if hasattr(dataset, name):
            return [file for file, _ in getattr(dataset, name)]
    return None


def _labels(dataset: Any) -> npt.NDArray[np.int64]:
    for name in ("_samples", "samples"):
        if hasattr(dataset, name):
            return np.array([label for _, label in getattr(dataset, name)], dtype=np.int64)
    for name in ("_labels", "targets", "labels", "y"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name)).astype(np.int64)
    return np.array([int(dataset[index][1]) for index in range(len(dataset))], dtype=np.int64)


def _classes(dataset: Any, labels: Mapping[str, npt.NDArray[np.int64]]) -> tuple[str, ...]:
    count = 1 + max(int(values.max()) for values in labels.values())
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or range(count)
    # Some names are tuples of synonyms, and a few occur twice.
    texts = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    return tuple(text if texts.count(text) == 1 else f"{text} ({number})" for number, text in enumerate(texts))
