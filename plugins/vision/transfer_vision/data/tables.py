"""Images that a table lists, with labels and possibly a text."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from transfer import ConfigError, Data, DataError, Dataset, DataSpec, Quoting, Split, Tables, TableTarget, find_file
from transfer_vision.images.image_sources import (
    ImageColumn,
    ImageSource,
    has_image_extension,
    open_source,
)
from transfer_vision.images.validation import BadFiles, decodable_images


class _ImageTable(Dataset):
    r"""Images whose paths a table lists.

    The arguments below are the options that the subclasses have in common.

    Args:
        train: Path of the training table, or its name in the data folder.
        val: Path of the table that selects the best epoch; null: cut from ``train``. Without a test table it is the
            test split, and the validation split is cut from ``train``.
        test: Path of the test table.
        root: Folder or zip archive to which the paths are relative; null: the folder of the training table.
        label: Column of the label, by name or number; for ``labels`` and ``number``, one column each.
        target: ``class``: one class per example. ``labels``: one column of 0 and 1 per label. ``label_list``: one
            column with all labels of an example. ``number``: one column per number.
        separator: Separator between the labels of a ``label_list``. Lists in JSON or Python notation are read as lists.
        delimiter: Separator between the columns; null chooses the one that gives the named columns.
        encoding: Character encoding of the tables.
        split: Column of ``train`` with the split of each row: train, val or test.
        group: Column of a group that must not be divided between splits (a patient, a camera).
        test_fraction: Fraction of ``train`` that becomes the test split if there is none, the same in every class.
        bad_files: Action for images that cannot be decoded: ``error`` refuses the data; ``skip`` leaves them out and
            logs a table of them.
        header: Whether the first row of a delimited file contains the names of the columns. false numbers the columns
            from 0 (``label: 1``); a list names the columns of a file without header.
        quoting: Meaning of quotes in a delimited file. ``csv``: a field in quotes may contain delimiters, line ends
            and doubled quotes. ``backslash``: the same with ``\"`` for a quote. ``none``: quotes are part of the text.
            null chooses one by the content.
        label_names: Names of the labels if a ``label_list`` contains a zero or one for each label (``[0, 1, 0]``).
    """

    def __init__(self, tables: Tables, root: str | None, bad_files: BadFiles) -> None:
        if root == "":
            raise ConfigError("root is empty", fix="name a folder, or leave root out")
        self._tables = tables
        self._root = root
        self._bad_files: BadFiles = bad_files

    @property
    def spec(self) -> DataSpec:
        """The fields of an example and its target; the names of classes are unknown until the tables are read."""
        return self._tables.spec("image")

    def load(self) -> Data:
        """Read the tables, and decode the new images to check them.

        Raises:
            transfer.DataError: A table is missing or malformed, or an image is missing or bad.
        """
        data = self._tables.read("image")
        source = self._source()
        # One image may be in many rows: it is checked once, and its first row is named in errors.
        row_names: dict[str, str] = {}  # of the first row with each path
        for split in data.splits.values():
            for index, path in enumerate(split.fields["image"]):
                if path not in row_names:
                    row_names[path] = split.name(index)
        files = find_images(source, row_names)
        good = decodable_images(source, list(dict.fromkeys(files.values())), self._bad_files)
        splits = {name: _with_images(split, source, files, good, name) for name, split in data.splits.items()}
        return Data(data.spec, splits)

    def _source(self) -> ImageSource:
        if self._root is None:
            return open_source(self._tables.find(self._tables.paths["train"]).parent)
        root = Path(self._root).expanduser()
        return open_source(root if root.exists() else find_file(self._root) or root)


class ImageCSV(_ImageTable):
    """Images and labels from a table: CSV, TSV, JSON, JSON Lines or Parquet, plain or compressed (gz, bz2, xz, zip).

    Args:
        path: Column of the path of the image, relative to ``root``. The extension may be left out, and case
            is ignored if no file has that exact path.
    """

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        root: str | None = None,
        path: str | int = "path",
        label: str | int | tuple[str | int, ...] = "label",
        target: TableTarget = "class",
        separator: str = ",",
        delimiter: str | None = None,
        encoding: str = "utf-8-sig",
        split: str | int | None = None,
        group: str | int | None = None,
        test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        bad_files: BadFiles = "error",
        header: bool | tuple[str, ...] = True,
        quoting: Quoting | None = None,
        label_names: tuple[str, ...] = (),
    ) -> None:
        tables = Tables(
            train=train,
            val=val,
            test=test,
            example="path",
            column=path,
            label=label,
            target=target,
            separator=separator,
            delimiter=delimiter,
            encoding=encoding,
            split=split,
            group=group,
            test_fraction=test_fraction,
            header=header,
            quoting=quoting,
            label_names=label_names,
        )
        super().__init__(tables, root, bad_files)


class MultimodalCSV(_ImageTable):
    """Images, texts and labels from a table: CSV, TSV, JSON, JSON Lines or Parquet, plain or compressed.

    Args:
        image: Column of the path of the image, relative to ``root``. The extension may be left out, and case
            is ignored if no file has that exact path.
        text: Column of the text.
    """

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        root: str | None = None,
        image: str | int = "image",
        text: str | int = "text",
        label: str | int | tuple[str | int, ...] = "label",
        target: TableTarget = "class",
        separator: str = ",",
        delimiter: str | None = None,
        encoding: str = "utf-8-sig",
        split: str | int | None = None,
        group: str | int | None = None,
        test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        bad_files: BadFiles = "error",
        header: bool | tuple[str, ...] = True,
        quoting: Quoting | None = None,
        label_names: tuple[str, ...] = (),
    ) -> None:
        tables = Tables(
            train=train,
            val=val,
            test=test,
            example="image",
            column=image,
            label=label,
            target=target,
            separator=separator,
            delimiter=delimiter,
            encoding=encoding,
            split=split,
            group=group,
            test_fraction=test_fraction,
            header=header,
            quoting=quoting,
            label_names=label_names,
            extra_fields={"text": text},
        )
        super().__init__(tables, root, bad_files)


def find_images(source: ImageSource, row_names: Mapping[str, str]) -> dict[str, str]:
    """Return the path in the source of each path in a table.

    A path that does not exist is compared with the files of the source without regard to blanks around it, backslashes,
    case, and the extension. It is returned unchanged if no file fits.

    Args:
        source: The folder or archive that contains the images.
        row_names: Name of the row of each path, for errors.

    Raises:
        transfer.DataError: A path is a URL, or several files fit.
    """
    missing = [path for path in row_names if not _exists(source, path)]
    if urls := [path for path in missing if _URL.match(path)]:
        raise DataError(
            f"{len(urls)} of the images are URLs: expected paths of files, got {urls[0]!r}",
            where=row_names[urls[0]],
            fix="download the images, and write their paths into the table",
        )
    files: dict[str, list[str]] = {}
    if missing:  # the source is only listed if necessary: it may contain millions of files
        for folder, level in source.levels().items():
            for path in (f"{folder}/{name}" if folder else name for name in level.files if has_image_extension(name)):
                for key in (path.lower(), path.lower().rpartition(".")[0]):
                    files.setdefault(key, []).append(path)
    paths = {path: path for path in row_names}
    for path in missing:
        # normpath removes "./" and double slashes.
        fitting = files.get(posixpath.normpath(path.strip().replace("\\", "/").lower()), [])
        if len(fitting) > 1:
            raise DataError(
                f"the image {path!r} is ambiguous: {len(fitting)} files fit",
                where=row_names[path],
                available=fitting,
                fix="write the complete path of one of them",
            )
        paths[path] = fitting[0] if fitting else path
    return paths


_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]+://")


def _exists(source: ImageSource, path: str) -> bool:
    try:
        source.identity(path)
    except (ValueError, OSError):
        return False
    return True


def _with_images(split: Split, source: ImageSource, files: Mapping[str, str], good: set[str], name: str) -> Split:
    paths = [files[path] for path in split.fields["image"]]
    left = np.flatnonzero([path in good for path in paths])
    if not len(left):
        raise DataError(f"the {name} split has no good image", where=source.name(""), fix="repair some")
    # Selected first, so that targets, groups and other fields lose the same rows.
    remaining = split.select(left)
    images = ImageColumn(source, [paths[index] for index in left])
    return replace(remaining, fields={**remaining.fields, "image": images})
