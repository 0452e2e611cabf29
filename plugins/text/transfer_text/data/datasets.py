"""Published datasets of texts: IMDb, and a packaged miniature of it."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
import tarfile
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from transfer import Data, DataError, Dataset, DataSpec, FileSchema, Split, download, find_file
from transfer_text import cache

logger = logging.getLogger(__name__)

SENTIMENTS = ("negative", "positive")

IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_ARCHIVE = "aclImdb_v1.tar.gz"
IMDB_FOLDER = "aclImdb"
IMDB_REVIEWS = 12_500  # per sentiment and split
_IMDB_SENTIMENTS = {"neg": 0, "pos": 1}
_IMDB_FOLDERS = {
    f"{split}/{name}": (split, sentiment) for split in ("train", "test") for name, sentiment in _IMDB_SENTIMENTS.items()
}
FORMAT = 2
MAX_REVIEW_BYTES = 1 << 20  # the longest review has 14 kB
READ_BYTES = 1 << 14


class IMDb(Dataset):
    """The Large Movie Review Dataset: 25,000 reviews to train on and 25,000 to test, balanced (Maas et al. 2011, ACL).

    The dataset is read from ``aclImdb_v1.tar.gz`` without unpacking, or from the unpacked folder ``aclImdb``. It is
    downloaded if the data folder contains neither. The 50,000 unlabeled reviews of the original are omitted.

    Args:
        root: Path of the archive, of the folder ``aclImdb``, or of the folder that contains one of them. null uses the
            data folder.
    """

    def __init__(self, *, root: str | None = None) -> None:
        self.root = root

    @property
    def spec(self) -> DataSpec:
        """Field ``text`` and two classes of sentiment."""
        return DataSpec(fields=("text",), target="class", classes=SENTIMENTS)

    def load(self) -> Data:
        """Read the reviews: negative before positive, each sorted by name."""
        path = self._find()
        reviews: dict[str, list[tuple[int, str, bytes]]] = {"train": [], "test": []}
        unlabeled = 0
        for name, content in _read_folder(path) if path.is_dir() else _read_archive(path):
            if (parts := _split_and_class(name)) is not None:
                reviews[parts[0]].append((parts[1], name, content))
            else:
                unlabeled += 1
        if unlabeled:
            logger.info("%s: omitted %d unlabeled reviews", path, unlabeled)
        return Data(self.spec, {split: _split_of(of_split, split, path) for split, of_split in reviews.items()})

    def _find(self) -> Path:
        if self.root is None:
            return find_file(IMDB_FOLDER, IMDB_ARCHIVE) or download(IMDB_URL, IMDB_ARCHIVE)
        root = Path(self.root).expanduser()
        if root.is_file() or (root / "train").is_dir():
            return root
        for path in (root / IMDB_FOLDER, root / IMDB_ARCHIVE):
            if path.exists():
                return path
        raise DataError(
            f"{root} contains neither {IMDB_FOLDER} nor {IMDB_ARCHIVE}",
            available=sorted(path.name for path in root.iterdir())[:20] if root.is_dir() else (),
            fix=f"download {IMDB_URL} and set root to its path or to that of the unpacked folder",
        )


def _split_and_class(name: str) -> tuple[str, int] | None:
    """Return split and class of a review such as ``aclImdb/train/pos/0_9.txt``; None if it is not labeled."""
    folder, _, file = name.partition("/")[2].rpartition("/")
    return _IMDB_FOLDERS.get(folder) if file.endswith(".txt") else None


def _read_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each labeled review, and the name with empty content of each unlabeled one."""
    status = path.stat()
    key = cache.digest(FORMAT, str(path.resolve()), status.st_size, status.st_mtime_ns)
    folder = cache.entry("reviews", key, lambda folder: _write(folder, _stream(path)))
    if folder is not None:
        if (cached := _read_cached(folder)) is not None:
            return cached
        cache.drop(folder)
    return _stream(path)


def _stream(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        # One pass over the stream. Nothing is unpacked to disk, so paths in the archive cannot escape a folder.
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if _split_and_class(member.name) and (file := archive.extractfile(member)) is not None:
                    # A crafted archive could unpack to more than the memory.
                    if member.size > MAX_REVIEW_BYTES:
                        raise tarfile.ReadError(f"{member.name!r} would unpack to {member.size:,} bytes")
                    yield member.name, file.read()
                elif member.name.startswith(f"{IMDB_FOLDER}/train/unsup/"):
                    yield member.name, b""
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"the archive cannot be read: {error}", where=str(path), fix=f"delete it and download {IMDB_URL} again"
        ) from error


class _CachedReviews(FileSchema):
    names: list[str]
    sizes: list[Annotated[int, Field(ge=0)]]


def _write(folder: Path, reviews: Iterator[tuple[str, bytes]]) -> None:
    """Write concatenated reviews, names and sizes. Unpacking the archive would take one to two seconds each time."""
    names, sizes = [], []
    with (folder / "reviews.bin").open("wb") as file:
        for name, content in reviews:
            file.write(content)
            names.append(name)
            sizes.append(len(content))
    reviews_json = _CachedReviews(names=names, sizes=sizes).model_dump_json()
    (folder / "reviews.json").write_text(reviews_json, encoding="utf-8")


def _read_cached(folder: Path) -> Iterator[tuple[str, bytes]] | None:
    """Yield the reviews that :func:`_write` wrote; None if the files are damaged."""
    try:
        reviews = _CachedReviews.model_validate_json((folder / "reviews.json").read_bytes())
        content = (folder / "reviews.bin").read_bytes()
    except (OSError, ValueError):
        return None
    ends = list(itertools.accumulate(reviews.sizes, initial=0))
    if len(reviews.names) != len(reviews.sizes) or ends[-1] != len(content):
        return None
    pairs = zip(reviews.names, itertools.pairwise(ends), strict=True)
    return ((name, content[start:end]) for name, (start, end) in pairs)


def _read_folder(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the same as :func:`_read_archive` from an unpacked archive."""
    for split in ("train", "test"):
        for sentiment in _IMDB_SENTIMENTS:
            for name in _texts_in(path / split / sentiment):
                content = _content(f"{path}/{split}/{sentiment}/{name}")
                yield f"{IMDB_FOLDER}/{split}/{sentiment}/{name}", content
    for name in _texts_in(path / "train" / "unsup"):
        yield f"{IMDB_FOLDER}/train/unsup/{name}", b""


def _content(path: str) -> bytes:
    """Read a small file by system calls only: for 50,000 files this takes half the time of ``open``."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        content = os.read(descriptor, READ_BYTES)
        while more := os.read(descriptor, READ_BYTES):
            content += more
        return content
    finally:
        os.close(descriptor)


def _texts_in(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".txt")] if folder.is_dir() else []


def _split_of(reviews: list[tuple[int, str, bytes]], split: str, path: Path) -> Split:
    # Archives and folders list their files in any order; the split must not depend on it.
    reviews.sort()
    targets = np.array([sentiment for sentiment, _, _ in reviews], dtype=np.int64)
    counts = np.bincount(targets, minlength=len(SENTIMENTS))
    if any(counts != IMDB_REVIEWS):
        raise DataError(
            f"{split} contains {counts[0]:,} negative and {counts[1]:,} positive reviews: "
            f"expected {IMDB_REVIEWS:,} of each",
            where=str(path),
            fix=f"the data is incomplete; delete it and download {IMDB_URL} again",
        )
    texts = []
    for _, name, content in reviews:
        try:
            texts.append(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"the review is not UTF-8: {error}", where=f"{path}: {name}") from error
    return Split({"text": texts}, targets, [name for _, name, _ in reviews])


class MiniReviews(Dataset):
    """1,128 short film reviews that are part of this plugin, in three splits: to try a config in seconds, offline."""

    @property
    def spec(self) -> DataSpec:
        """Field ``text`` and two classes of sentiment."""
        return DataSpec(fields=("text",), target="class", classes=SENTIMENTS)

    def load(self) -> Data:
        """Read the packaged file."""
        file = "mini_reviews.csv"
        content = (resources.files("transfer_text") / "resources" / file).read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(content, newline="")))
        splits = {}
        for split in ("train", "validation", "test"):
            selected = [(line, row) for line, row in enumerate(rows, 2) if row["split"] == split]
            splits[split] = Split(
                {"text": [row["text"] for _, row in selected]},
                np.array([SENTIMENTS.index(row["label"]) for _, row in selected], dtype=np.int64),
                [f"{file}:{line}" for line, _ in selected],
            )
        return Data(self.spec, splits)
