"""Records of tables by the content of the file: compression, JSON, JSON Lines, Parquet and Arrow."""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from transfer.data.class_folders import is_hidden
from transfer.errors import DataError, unknown_name

MAX_TABLE_BYTES = 1 << 32
"""Maximum size of a decompressed table: a larger one is refused, because it may be a decompression bomb."""
JSON_LINES = (".jsonl", ".ndjson")
MAX_START_BYTES = 1 << 16
"""Number of bytes by which JSON is recognized."""
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""Byte order marks of UTF-16."""
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError)
"""Exceptions of the file system and of damaged or encrypted archives (zipfile raises RuntimeError)."""

Record = Mapping[str, object]
"""Values of a row by column: text in a delimited file, and plain data in JSON and Parquet."""

_TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".txt", ".json", *JSON_LINES, ".parquet")
_COMPRESSED: Mapping[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # with and without files
_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_SAVE_AS_CSV = "save the sheet as CSV and give that file"
# Files that users pass as tables by mistake, by their first bytes.
_NOT_TABLES = {
    b"\xd0\xcf\x11\xe0": ("an Excel workbook (.xls) or another Office file", _SAVE_AS_CSV),
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", "decompress it first"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it first"),
    b"Rar!": ("a RAR archive", "unpack it first"),
    b"%PDF": ("a PDF document", "give a table"),
    b"SQLite format 3": ("an SQLite database", "export the table as CSV"),
    b"version https://git-lfs": ("a Git LFS pointer, without the data", "download the file: git lfs pull"),
    b"<!doctype html": ("a web page", "download the file itself instead of the page that shows it"),
}


def open_table(path: Path) -> BinaryIO:
    """Open a table for reading. A compressed file, recognized by its content, is decompressed into memory.

    Raises:
        DataError: The content is not a table: a workbook, an archive of several files, a document.
        OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError: The file is missing or damaged.
    """
    with ExitStack() as stack:
        file: BinaryIO = stack.enter_context(path.open("rb"))
        if not file.seekable():  # a pipe: the table is read more than once
            file = io.BytesIO(_limited(file))
        head = _head(file)
        for magic, opener in _COMPRESSED.items():
            if head.startswith(magic):
                file = io.BytesIO(_limited(stack.enter_context(opener(file))))
        if head.startswith(_ZIP):
            file = io.BytesIO(_unzipped(file, path))
        head = _head(file)
        if head.startswith((*_ZIP, *_COMPRESSED)):
            raise DataError("the table is compressed twice", where=str(path), fix="decompress it once")
        tar = (b"ustar", ("a tar archive", "unpack it, and give the path of one table"))
        for magic, (what, fix) in [*_NOT_TABLES.items(), tar]:
            if (head[257:] if magic == b"ustar" else head.lower()).startswith(magic.lower()):
                raise DataError(f"the file is not a table: it is {what}", where=str(path), fix=fix)
        if not isinstance(file, io.BytesIO):
            stack.pop_all()  # the caller closes the file
        return file


@dataclass(frozen=True)
class Rows:
    """Rows of an open table.

    Args:
        records: Position and record of each row.
        by_line: Whether the positions are lines, counted from 1; otherwise indices, counted from 0.
        is_delimited: Whether the table is a delimited file.
        class_names: Names of the classes in the metadata of the file, by column.
    """

    records: Iterator[tuple[int, Record]]
    by_line: bool = True
    is_delimited: bool = False
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)


@contextmanager
def open_rows(
    path: Path,
    read_delimited: Callable[[io.TextIOWrapper], Generator[tuple[int, Record], None, None]],
    *,
    columns: Collection[str] | None,
    encoding: str = "utf-8-sig",
    example: str = "text",
) -> Iterator[Rows]:
    """Open a table of any format.

    Args:
        path: Path of the table.
        read_delimited: Function that reads the rows of a delimited file from its lines.
        columns: Names of the columns to read from Parquet; None reads all.
        encoding: Character encoding of text.
        example: Name of an example in errors.

    Raises:
        DataError: The content is not a table.
        UnicodeError, or one of :data:`UNREADABLE`: The file is missing, damaged or in another encoding.
    """
    with open_table(path) as file:
        if _head(file).startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)):
            records, class_names = read_arrow(file, path, columns)
            yield Rows(records, by_line=False, class_names=class_names)
            return
        start = codecs.getincrementaldecoder(encoding)("ignore").decode(file.read(MAX_START_BYTES))
        file.seek(0)
        suffix = table_suffix(path)
        is_json = bool(_OBJECT.match(start.lstrip())) or suffix in (".json", *JSON_LINES)
        # The csv module must see the line ends, which may be part of a quoted field. JSON ends lines at "\n".
        with io.TextIOWrapper(file, encoding, newline="\n" if is_json else "") as lines:
            if is_json:
                records, by_line = read_json(lines, path, example, is_lines=suffix in JSON_LINES)
                yield Rows(records, by_line=by_line)
            else:
                # Closed here: while a reader is open, a limit of the csv module is changed for all readers.
                with closing(read_delimited(lines)) as delimited:
                    yield Rows(delimited, is_delimited=True)


def table_suffix(path: Path) -> str:
    """Return the suffix of a table's file name, ignoring that of a compression."""
    return Path(re.sub(r"\.(gz|bz2|xz|zip)$", "", path.name.lower())).suffix


def _head(file: BinaryIO) -> bytes:
    head = file.read(512)
    file.seek(0)
    return head


def _limited(file: IO[bytes] | Any) -> bytes:
    content: bytes = file.read(MAX_TABLE_BYTES)  # never decompresses more than the limit
    if len(content) == MAX_TABLE_BYTES:
        raise OSError(f"it would unpack to {MAX_TABLE_BYTES / 2**30:.0f} GiB or more; decompress it yourself")
    return content


def _unzipped(file: BinaryIO, path: Path) -> bytes:
    """Return the content of the only table in a zip archive."""
    with zipfile.ZipFile(file) as archive:
        names = [m.filename for m in archive.infolist() if not m.is_dir()]
        if "xl/workbook.xml" in names or "[Content_Types].xml" in names or "content.xml" in names:
            raise DataError("the file is a spreadsheet, not a text table", where=str(path), fix=_SAVE_AS_CSV)
        # Archives made on macOS contain a hidden copy of the metadata of each file.
        names = [n for n in names if not any(map(is_hidden, n.split("/")))]
        tables = [name for name in names if name.lower().endswith(_TABLE_SUFFIXES)]
        if len(tables or names) != 1:
            raise DataError(
                f"the archive is ambiguous: expected one table, got {len(tables or names)} files",
                where=str(path),
                available=(tables or names)[:20],
                fix="unpack it, and give the path of one table",
            )
        with archive.open((tables or names)[0]) as member:
            return _limited(member)


class RowNames(Sequence[str]):
    """Names ``path:line`` or ``path[index]`` of the rows of a table, formatted on access.

    Args:
        path: Path of the table.
        positions: First line of each row, counted from 1, or index of each row, counted from 0.
        by_line: Whether the positions are lines.
    """

    def __init__(self, path: Path, positions: Sequence[int], *, by_line: bool) -> None:
        self._path = path
        self._positions = positions
        self._by_line = by_line

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return RowNames(self._path, self._positions[index], by_line=self._by_line)
        return row_name(self._path, self._positions[index], by_line=self._by_line)


def row_name(path: Path, position: int, *, by_line: bool) -> str:
    """Return the name of a row by its line or index."""
    return f"{path}:{position}" if by_line else f"{path}[{position}]"


# ---------------------------------------------------------------------------------------------------------------- JSON


# No table in CSV starts with {"key":
_OBJECT = re.compile(r'(?:\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:')


def read_json(
    lines: io.TextIOBase, path: Path, example: str, *, is_lines: bool
) -> tuple[Iterator[tuple[int, Record]], bool]:
    """Return the rows of a JSON file with their positions, and whether the positions are lines.

    A file contains one object on each line (JSON Lines), a list of objects, several objects after another, an object
    with such a list under one key, or an object of columns as pandas writes it.

    Args:
        lines: Lines of the file; must be seekable.
        path: Path of the file, for errors.
        example: Name of an example in errors (``text``).
        is_lines: Whether the suffix is that of JSON Lines: then a list is the only other form.

    Raises:
        DataError: The content is not JSON, or not a table; also while the rows are read.
    """
    filled = (line for line in lines if line.strip())
    first, second = next(filled, ""), next(filled, "")
    lines.seek(0)
    # A file of one line may be an object of columns.
    if (is_lines and not first.lstrip().startswith("[")) or (second and _is_object(first)):
        return _json_lines(lines, path, example), True
    text = lines.read()
    start = _skip_blanks(text, 0)
    if start == len(text):
        return iter(()), True
    if text.startswith("[", start):
        return _json_items(text, start + 1, path, in_list=True), True
    try:
        content, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise _not_json(error, path) from error
    if _skip_blanks(text, end) < len(text):
        return _json_items(text, start, path, in_list=False), True
    return enumerate(_columns_or_rows(content, path)), False


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(lines: Iterable[str], path: Path, example: str) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():  # blank lines are skipped
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"the line is not JSON: {error}", where=where, fix="write one object on each line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"the line is malformed: expected a JSON object, got {type(record).__name__}",
                where=where,
                fix=f'write one object on each line: {{"{example}": ..., "label": ...}}',
            )
        _refuse_surrogates(line, record, where)
        yield number, record


def _json_items(text: str, start: int, path: Path, *, in_list: bool) -> Iterator[tuple[int, Record]]:
    """Yield the line and the record of each object in a list, or of objects after another, from ``start``."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = _skip_blanks(text, start)
    while position < len(text) and not (in_list and text.startswith("]", position)):
        line += text.count("\n", counted, position)
        counted = position
        where = f"{path}:{line}"
        try:
            record, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _not_json(error, path) from error
        if not isinstance(record, dict):
            raise DataError(
                f"the JSON is not a table: expected a list of objects, got a list of {type(record).__name__}",
                where=where,
                fix='write [{"text": ..., "label": ...}, ...]',
            )
        _refuse_surrogates(text[position:end], record, where)
        yield line, record
        position = _skip_blanks(text, end)
        if in_list and text.startswith(",", position):
            position = _skip_blanks(text, position + 1)
        elif in_list and not text.startswith("]", position):
            raise DataError("the JSON is malformed: expected ',' or ']' after an object", where=where)
    if in_list and position == len(text):
        raise DataError("the list of JSON objects does not end: expected ']'", where=str(path), fix="repair the file")


def _columns_or_rows(content: object, path: Path) -> Sequence[Record]:
    """Return the rows in a JSON object: those of the only list of objects in it, or of its columns."""
    if isinstance(content, dict):
        lists = [v for v in content.values() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)]
        if len(lists) == 1:
            return list(lists[0])
        columns = list(content.values())
        if columns and all(isinstance(c, list) for c in columns) and len({len(c) for c in columns}) == 1:
            return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
        # pandas writes a data frame as {"column": {"index": value}}.
        if columns and all(isinstance(c, dict) for c in columns) and len({tuple(c) for c in columns}) == 1:
            return [{name: column[key] for name, column in content.items()} for key in columns[0]]
        if any(isinstance(value, str) for value in columns):
            return [content]  # a table of one row
    raise DataError(
        "the JSON is not a table: expected a list of objects",
        where=str(path),
        fix='write [{"text": ..., "label": ...}, ...], or one object on each line',
    )


def _skip_blanks(text: str, position: int) -> int:
    match = _BLANKS.match(text, position)
    assert match is not None, "the pattern matches the empty string"
    return match.end()


_BLANKS = re.compile(r"\s*")


def _not_json(error: Exception, path: Path) -> DataError:
    where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
    return DataError(f"the file is not JSON: {error}", where=where, fix="write a list of objects, or one on each line")


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _refuse_surrogates(text: str, record: Record, where: str) -> None:
    """Refuse an unpaired surrogate, which JSON escapes allow and no encoding can represent."""
    # The search is fast and rarely matches; most surrogates are valid pairs, so the record is then encoded.
    if _SURROGATE.search(text):
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(
                "a text contains an unpaired surrogate (\\ud800 to \\udfff)", where=where, fix="remove it, or the row"
            ) from None


# --------------------------------------------------------------------------------------------------- Parquet and Arrow


def read_arrow(
    file: BinaryIO, path: Path, columns: Collection[str] | None
) -> tuple[Iterator[tuple[int, Record]], Mapping[str, Sequence[str]]]:
    """Return the rows of a Parquet or Arrow file with their indices, and the class names of its columns.

    The class names are those that the ``datasets`` library stores in the metadata of the file.

    Args:
        file: Content of the file.
        path: Path of the file, for errors.
        columns: Names of the columns to read; None reads all.

    Raises:
        DataError: pyarrow is not installed, a column is missing, or the file is damaged; also while the rows are read.
    """
    try:
        parquet, ipc = (importlib.import_module(f"pyarrow.{name}") for name in ("parquet", "ipc"))
    except ImportError as error:
        raise DataError(
            "Parquet and Arrow files need the library `pyarrow`, which is not installed",
            where=str(path),
            fix="pip install 'transferkit[huggingface]', or save the table as CSV",
        ) from error
    head = _head(file)
    try:
        if head.startswith(_PARQUET):
            table = parquet.ParquetFile(file)
            schema = table.schema_arrow
            # Columns that are not used may contain images, which would fill the memory.
            batches = table.iter_batches(columns=[n for n in schema.names if columns is None or n in columns])
        elif head.startswith(_ARROW_FILE):
            table = ipc.open_file(file)
            schema = table.schema
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            batches = ipc.open_stream(file)
            schema = batches.schema
    except (OSError, ValueError) as error:  # pyarrow's exceptions for damaged files derive from ValueError
        raise _damaged(error, path) from error
    for name in columns or ():
        if name not in schema.names:
            fix = "set the options that name columns to names in the table"
            raise DataError.of([unknown_name("column", name, schema.names, where=str(path), fix=fix)])
    return _arrow_rows(batches, path), _class_names(schema)


def _arrow_rows(batches: Iterable[Any], path: Path) -> Iterator[tuple[int, Record]]:
    index = 0
    try:
        for batch in batches:
            for record in batch.to_pylist():
                yield index, record
                index += 1
    except (OSError, ValueError) as error:
        raise _damaged(error, path) from error


def _damaged(error: Exception, path: Path) -> DataError:
    return DataError(f"the table cannot be read: {error}", where=str(path), fix="write the file again")


def _class_names(schema: Any) -> Mapping[str, Sequence[str]]:
    """Return the class names by column from the metadata of an Arrow schema; empty if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        # A list of labels is {"feature": {...}, "_type": "Sequence"} or {"feature": ..., "_type": "List"}, or [{...}].
        inner = {
            name: (f[0] if isinstance(f, list) and f else f.get("feature", f) if isinstance(f, dict) else {})
            for name, f in features.items()
        }
        return {name: f["names"] for name, f in inner.items() if isinstance(f, dict) and f.get("names")}
    except (KeyError, ValueError, TypeError, AttributeError):  # written by another program
        return {}
