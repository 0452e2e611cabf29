"""Datasets of texts: IMDb, a packaged miniature of it, and files of your own."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import math
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from transfer import ConfigError, Data, DataError, Dataset, DataSpec, Split, download, find_file

SENTIMENTS = ("negative", "positive")

# ---------------------------------------------------------------------------------------------------------------- IMDb

IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_ARCHIVE = "aclImdb_v1.tar.gz"
IMDB_FOLDER = "aclImdb"
IMDB_REVIEWS = 12_500  # of each sentiment in each split
_IMDB_SENTIMENTS = {"neg": 0, "pos": 1}


class IMDb(Dataset):
    """The Large Movie Review Dataset: 25,000 reviews to train on and 25,000 to test, balanced (Maas et al. 2011, ACL).

    It is read from ``aclImdb_v1.tar.gz`` without unpacking, or from the unpacked folder ``aclImdb``, and downloaded
    where the data folder has neither.

    Args:
        root: The archive, the folder ``aclImdb``, or the folder that holds one of them; null: the data folder.
    """

    def __init__(self, *, root: str | None = None) -> None:
        self.root = root

    @property
    def spec(self) -> DataSpec:
        """A text and its sentiment."""
        return DataSpec(fields=("text",), target="class", classes=SENTIMENTS)

    def load(self) -> Data:
        """Read the reviews, the negative ones first, each by name."""
        path = self._find()
        reviews: dict[str, list[tuple[int, str, bytes]]] = {"train": [], "test": []}
        for name, content in _read_folder(path) if path.is_dir() else _read_archive(path):
            if (parts := _labelled(name)) is not None:
                reviews[parts[0]].append((parts[1], name, content))
        return Data(self.spec, {split: _split_of(found, split, path) for split, found in reviews.items()})

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
            f"there is no {IMDB_FOLDER} and no {IMDB_ARCHIVE} in {root}",
            available=sorted(path.name for path in root.iterdir())[:20] if root.is_dir() else (),
            fix=f"download {IMDB_URL} and give its path or that of the unpacked folder as root",
        )


def _labelled(name: str) -> tuple[str, int] | None:
    """Return the split and the class of ``aclImdb/train/pos/0_9.txt``; None of what is no labelled review."""
    parts = name.split("/")
    if len(parts) != 4 or parts[1] not in ("train", "test") or not name.endswith(".txt"):
        return None
    sentiment = _IMDB_SENTIMENTS.get(parts[2])
    return None if sentiment is None else (parts[1], sentiment)


def _read_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        # One pass over the stream; nothing is written, so no name in the archive can point anywhere.
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.isfile() and _labelled(member.name) and (file := archive.extractfile(member)) is not None:
                    yield member.name, file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"the archive cannot be read: {error}", where=str(path), fix=f"delete it and download {IMDB_URL} again"
        ) from error


def _read_folder(path: Path) -> Iterator[tuple[str, bytes]]:
    for split in ("train", "test"):
        for sentiment in _IMDB_SENTIMENTS:
            for file in (path / split / sentiment).glob("*.txt"):
                yield f"{IMDB_FOLDER}/{split}/{sentiment}/{file.name}", file.read_bytes()


def _split_of(reviews: list[tuple[int, str, bytes]], split: str, path: Path) -> Split:
    counts = Counter(sentiment for sentiment, _, _ in reviews)
    if any(counts[sentiment] != IMDB_REVIEWS for sentiment in _IMDB_SENTIMENTS.values()):
        raise DataError(
            f"{split} holds {counts[0]:,} negative and {counts[1]:,} positive reviews, not {IMDB_REVIEWS:,} of each",
            where=str(path),
            fix=f"the data is incomplete; delete it and download {IMDB_URL} again",
        )
    reviews.sort(key=lambda review: review[:2])
    texts = []
    for _, name, content in reviews:
        try:
            texts.append(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"the review is not UTF-8: {error}", where=f"{path}: {name}") from error
    targets = np.array([sentiment for sentiment, _, _ in reviews], dtype=np.int64)
    return Split({"text": texts}, targets, [name for _, name, _ in reviews])


# -------------------------------------------------------------------------------------------------------- mini reviews


class MiniReviews(Dataset):
    """1,128 short film reviews that come with this plugin, in three splits: to try a config in seconds, offline."""

    @property
    def spec(self) -> DataSpec:
        """A text and its sentiment."""
        return DataSpec(fields=("text",), target="class", classes=SENTIMENTS)

    def load(self) -> Data:
        """Read the packaged file."""
        file = "mini_reviews.csv"
        content = (resources.files("transfer_text") / "resources" / file).read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(content, newline="")))
        splits = {}
        for split in ("train", "validation", "test"):
            chosen = [(line, row) for line, row in enumerate(rows, 2) if row["split"] == split]
            splits[split] = Split(
                {"text": [row["text"] for _, row in chosen]},
                np.array([SENTIMENTS.index(row["label"]) for _, row in chosen], dtype=np.int64),
                [f"{file}:{line}" for line, _ in chosen],
            )
        return Data(self.spec, splits)


# ------------------------------------------------------------------------------------------------------------ text_csv


class TextCSV(Dataset):
    """Texts and labels from a table of your own: CSV, TSV, or JSON Lines.

    Args:
        train: The table to train on, by its path (or its name in the data folder).
        test: The table to test on; null: the framework cuts one from ``train``.
        text: Column of the text.
        label: Column of the label; for several labels or numbers, one column each.
        target: ``class``: each text is of one class. ``labels``: each column says 0 or 1. ``number``: each
            column is a number.
        delimiter: What separates the columns; null: a tab in a .tsv file, a comma elsewhere.
        encoding: Character encoding of the files.
    """

    def __init__(
        self,
        *,
        train: str,
        test: str | None = None,
        text: str = "text",
        label: str | tuple[str, ...] = "label",
        target: Literal["class", "labels", "number"] = "class",
        delimiter: str | None = None,
        encoding: str = "utf-8-sig",
    ) -> None:
        labels = (label,) if isinstance(label, str) else label
        if not labels or len({text, *labels}) != len(labels) + 1:
            raise ConfigError(
                f"text {text!r} and label {', '.join(map(repr, labels)) or '()'} do not name different columns",
                fix="name one column for the text and at least one other for the label",
            )
        if target == "class" and len(labels) > 1:
            raise ConfigError(
                f"a class is in one column, but label names {len(labels)}: {', '.join(labels)}",
                fix="name one column, or set target: labels (zeros and ones) or target: number",
            )
        if delimiter is not None and len(delimiter) != 1:
            raise ConfigError(f"delimiter is one character, not {delimiter!r}", fix=r'write ";" or "\t"')
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ConfigError(
                f"there is no encoding called {encoding!r}", available=("utf-8-sig", "utf-16", "latin-1", "cp1252")
            ) from None
        self.paths = {"train": train} | ({} if test is None else {"test": test})
        self.text = text
        self.labels = labels
        self.target = target
        self.delimiter = delimiter
        self.encoding = encoding

    @property
    def spec(self) -> DataSpec:
        """A text and its target; the names of classes are in the data."""
        return DataSpec(("text",), self.target, () if self.target == "class" else self.labels)

    def load(self) -> Data:
        """Read the tables; classes are in alphabetical order."""
        tables = {split: self._read(path) for split, path in self.paths.items()}
        if self.target != "class":
            parse = _zero_or_one if self.target == "labels" else _number
            return Data(
                self.spec,
                {split: self._split(rows, _floats(rows, self.labels, parse)) for split, rows in tables.items()},
            )
        classes = tuple(sorted({row.labels[0] for row in tables["train"]}))
        if len(classes) < 2:
            raise DataError(
                f"column {self.labels[0]!r} holds one class alone: {classes[0]!r}",
                where=self.paths["train"],
                fix="training needs two classes or more",
            )
        splits = {split: self._split(rows, _indices(rows, classes)) for split, rows in tables.items()}
        return Data(DataSpec(("text",), "class", classes), splits)

    def _split(self, rows: Sequence[_Row], targets: npt.NDArray[Any]) -> Split:
        return Split({"text": [row.text for row in rows]}, targets, [row.where for row in rows])

    def _read(self, written: str) -> list[_Row]:
        path = Path(written).expanduser()
        if not path.is_file():
            path = find_file(written) or path
        content = self._decode(path)
        suffix = path.suffix.lower()
        if suffix == ".jsonl":
            records = _json_lines(content, path, (self.text, *self.labels))
        else:
            records = _delimited(content, path, self.delimiter or ("\t" if suffix == ".tsv" else ","))
        rows = []
        for where, record in records:
            for column in (self.text, *self.labels):
                if column not in record:
                    raise _missing_column(column, record, where)
            text = record[self.text]
            if not text.strip():
                raise DataError(f"column {self.text!r} is empty", where=where, fix="fill it, or remove the row")
            labels = tuple(record[column].strip() for column in self.labels)
            if "" in labels:
                column = self.labels[labels.index("")]
                raise DataError(f"column {column!r} is empty", where=where, fix="fill it, or remove the row")
            rows.append(_Row(where, text, labels))
        if not rows:
            raise DataError("the table holds no rows", where=str(path))
        return rows

    def _decode(self, path: Path) -> str:
        try:
            return path.read_bytes().decode(self.encoding)
        except OSError as error:
            raise DataError(
                f"the table cannot be read: {error.strerror or error}",
                where=str(path),
                fix="give the path of a .csv, .tsv or .jsonl file",
            ) from error
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"byte {error.object[error.start]:#04x} is not {self.encoding}",
                where=f"{path}:{line}",
                fix="set encoding to that of the file (cp1252 and utf-16 are common), or save it as UTF-8",
            ) from error


@dataclass(frozen=True)
class _Row:
    where: str
    text: str
    labels: tuple[str, ...]


def _delimited(content: str, path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Give each record of a table with a header, and where it begins."""
    # Python's limit on a field is meant for broken files; a text may well be longer. It is global, so it is put back.
    limit = csv.field_size_limit(max(len(content), 1))
    # Strict, because otherwise a quote that is never closed swallows the rest of the file in silence.
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    begin = 1
    try:
        header = next(reader, [])
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise DataError(f"two columns are called {twice[0]!r}", where=f"{path}:1", fix="rename one of them")
        begin = reader.line_num + 1
        for fields in reader:
            where, begin = f"{path}:{begin}", reader.line_num + 1
            if len(fields) == len(header):
                yield where, dict(zip(header, fields, strict=True))
            elif fields:  # a blank line is no record
                raise DataError(
                    f"the row has {len(fields)} fields, the header {len(header)}",
                    where=where,
                    fix=f"quote a field that holds {delimiter!r}, or set delimiter",
                )
    except csv.Error as error:
        raise DataError(
            f"the row cannot be parsed: {error}", where=f"{path}:{begin}", fix='write a quote within quotes as ""'
        ) from error
    finally:
        csv.field_size_limit(limit)


def _json_lines(content: str, path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Give each object of a file with one on every line; numbers and booleans as JSON writes them."""
    for number, line in enumerate(content.split("\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"the line is not JSON: {error}", where=where) from error
        if not isinstance(record, dict):
            raise DataError(f"the line holds a {type(record).__name__}, not an object", where=where)
        for column in columns:
            if isinstance(record.get(column), list | dict):
                raise DataError(f"{column!r} holds a {type(record[column]).__name__}, not a single value", where=where)
        yield where, {k: v if isinstance(v, str) else "" if v is None else json.dumps(v) for k, v in record.items()}


def _missing_column(column: str, record: Mapping[str, str], where: str) -> DataError:
    close = difflib.get_close_matches(column, record, n=1)
    if close:
        fix = f"did you mean {close[0]!r}?"
    elif len(record) == 1:
        fix = "there is one column alone; set delimiter to what separates them"
    else:
        fix = "set text and label to the names of the columns"
    return DataError(f"there is no column {column!r}", where=where, available=list(record), fix=fix)


def _indices(rows: Sequence[_Row], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    known = {name: index for index, name in enumerate(classes)}
    for row in rows:
        if row.labels[0] not in known:
            raise DataError(
                f"class {row.labels[0]!r} is not in the training data",
                where=row.where,
                available=classes[:20],
                fix="correct the label, or add training rows of that class",
            )
    return np.array([known[row.labels[0]] for row in rows], dtype=np.int64)


def _floats(rows: Sequence[_Row], columns: Sequence[str], parse: Callable[[str], float]) -> npt.NDArray[np.float32]:
    values = np.empty((len(rows), len(columns)), dtype=np.float32)
    for index, row in enumerate(rows):
        for position, (column, label) in enumerate(zip(columns, row.labels, strict=True)):
            try:
                values[index, position] = parse(label)
            except ValueError as error:
                raise DataError(f"column {column!r} holds {label!r}, which is {error}", where=row.where) from None
    return values


def _zero_or_one(text: str) -> float:
    try:
        return {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}[text.lower()]
    except KeyError:
        raise ValueError("neither 0 nor 1") from None


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("no finite number")
    return number
