"""Rows of delimited tables (CSV, TSV), and the choice of delimiter and quoting by the content of a file."""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from transfer.errors import DataError

logger = logging.getLogger(__name__)

Quoting = Literal["csv", "backslash", "none"]
"""``csv``: quotes in a quoted field are doubled. ``backslash``: they follow a backslash. ``none``: quotes are text."""
MAX_FIELD_CHARACTERS = 2**31 - 1
"""Maximum length of a field: the largest limit that the csv module accepts on all platforms."""
SAMPLE_LINES = 100
"""Number of lines that the delimiter is chosen by."""

_DELIMITERS = ("\t", ",", ";", "|")
_BLANK = " "
_UNIT_SEPARATOR = "\x1f"
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_BACKSLASHED = re.compile(r'"(?:[^"\\]|\\.)*"')
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Dialect:
    """Format of a delimited file.

    Args:
        delimiter: Character between two columns.
        quoting: Meaning of quotes.
        was_chosen: Whether the quoting was chosen by the content; fields that seem to contain rows are then refused.
    """

    delimiter: str
    quoting: Quoting = "csv"
    was_chosen: bool = False


def choose_dialect(
    lines: TextIO,
    path: Path,
    *,
    header: bool | Sequence[str],
    columns: Collection[str],
    labels: Collection[str],
    delimiter: str | None,
    quoting: Quoting | None,
) -> Dialect:
    """Return the format of a file, by its options and otherwise by its content; ``lines`` is read and rewound.

    Args:
        lines: Lines of the file; must be seekable.
        path: Path of the file, whose suffix decides if several delimiters fit.
        header: Whether the first row contains the names of the columns, or the names themselves.
        columns: Names of the columns that are read.
        labels: Names of the columns whose values occur in many rows; empty if there are none.
        delimiter: Character between two columns; None chooses it.
        quoting: Meaning of quotes; None chooses it.
    """
    sample = list(islice(lines, SAMPLE_LINES))
    lines.seek(0)
    with long_fields():
        if delimiter is None:
            delimiter = _choose_delimiter(sample, path, header, columns)
        if quoting is not None or (delimiter == _BLANK and header is not True):
            return Dialect(delimiter, quoting or "none")
        names = list(header) if not isinstance(header, bool) else next(csv.reader(sample, delimiter=delimiter), [])
        if header is False:
            names = [str(number) for number in range(len(names))]
        positions = [names.index(label) for label in labels if label in names]
        quoting = _choose_quoting(lines, path, delimiter, positions, has_header=header is True)
        lines.seek(0)
    if quoting != "csv":
        how = "as part of the text" if quoting == "none" else 'as CSV with \\" for a quote'
        logger.warning("%s: quotes are read %s; set quoting to read them otherwise", path, how)
    return Dialect(delimiter, quoting, was_chosen=True)


def _choose_delimiter(sample: Sequence[str], path: Path, header: bool | Sequence[str], columns: Collection[str]) -> str:
    """Return the delimiter that gives the columns that are read; the usual one of the suffix if none does."""
    names = path.name.lower()
    usual = "," if ".csv" in names else "\t" if ".tsv" in names or ".tab" in names else None
    candidates = sorted(_DELIMITERS, key=lambda delimiter: delimiter != usual)  # stable: the usual one first
    if header is True and not columns:
        return max(candidates, key=lambda delimiter: len(next(csv.reader(sample, delimiter=delimiter), [])))
    for delimiter in candidates:
        rows = [row for row in csv.reader(sample, delimiter=delimiter) if row]
        if header is True:
            if rows and all(column in rows[0] for column in columns):
                return delimiter
            continue
        # Without names in the file, each line must have the same number of fields, counted with or without quotes.
        # The last row is left out of the first count: the sample may end inside a quoted field.
        counts = (
            {len(row) for row in (rows[:-1] or rows)},
            {line.count(delimiter) + 1 for line in sample if line.strip()},
        )
        needed = len(header) if not isinstance(header, bool) else 2
        if any(len(count) == 1 and max(count) >= needed for count in counts):
            return delimiter
    return usual or ","


def _choose_quoting(lines: TextIO, path: Path, delimiter: str, labels: Sequence[int], *, has_header: bool) -> Quoting:
    """Return the quoting that a file was written with.

    A writer of CSV quotes fields that contain delimiters, line ends or quotes. A corpus written without quoting has the
    same number of delimiters in every line, and fields that start with a quote which is not closed. If it is read as
    CSV, such a field swallows the next lines up to another stray quote.

    Args:
        lines: Lines of the file.
        path: Path of the file, for errors.
        delimiter: Character between two columns.
        labels: Positions of the columns whose values occur in many rows; empty if there are none.
        has_header: Whether the first line contains the names of the columns.

    Raises:
        DataError: Both readings are possible, and the labels do not show which one is right.
    """
    count, quoted_header = None, False
    stray: dict[int, list[str]] = {}  # rows with a field that starts with a quote and is not a quoted field, by line
    proper, backslashed = 0, True  # number of rows that only a writer of CSV produces
    before_quote = delimiter + '"'
    for number, row in enumerate(lines, 1):
        line = row.rstrip("\r\n")
        if not line:
            continue
        if count is None:
            count = line.count(delimiter)
            quoted_header = has_header and line.startswith('"')
        elif line.count(delimiter) != count:
            return _by_parsing(lines, delimiter)
        if not (line[0] == '"' or before_quote in line):
            continue
        fields = line.split(delimiter)
        quoted = [field for field in fields if field.startswith('"')]
        wrong = [field for field in quoted if not _QUOTED.fullmatch(field)]
        if not wrong:
            proper += any('""' in field[1:-1] for field in quoted)
        elif _is_row(line, delimiter):  # a field contains the delimiter in quotes
            proper += 1
        else:
            stray[number] = fields
            backslashed = backslashed and all(_BACKSLASHED.fullmatch(field) for field in wrong)
    if not stray:
        return "csv"
    if backslashed:
        return "backslash"
    # The file was written as CSV, and reading it as such names the wrong line.
    if quoted_header or proper >= len(stray):
        return "csv"
    # By chance, each line of a field over several lines may have the delimiters of a row. Its label is then no label.
    lines.seek(0)
    filled = ((number, line.rstrip("\r\n").split(delimiter)) for number, line in enumerate(lines, 1) if line.strip())
    values = {
        tuple(fields[position].strip('"') for position in labels)
        for number, fields in islice(filled, int(has_header), None)
        if number not in stray
    }
    rows = [tuple(fields[position] for position in labels) for fields in stray.values()]
    plausible = sum(row in values or all(map(_NUMBER.fullmatch, row)) for row in rows)
    if 2 * plausible >= len(rows):
        return "none"
    if len(values) < 2:
        raise DataError(
            "a field starts with a quote that is not closed in its line: it is part of the text, or lines are missing",
            where=f"{path}:{min(stray)}",
            fix="set quoting: none if quotes are part of the text, or quoting: csv if the field spans lines",
        )
    return "csv"


def _is_row(line: str, delimiter: str) -> bool:
    try:
        next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        return False
    return True


def _by_parsing(lines: TextIO, delimiter: str) -> Quoting:
    """Return ``backslash`` if a file can be read with it and not as CSV."""
    lines.seek(0)
    if not any('\\"' in line for line in lines):
        return "csv"
    for quoting in ("csv", "backslash"):
        lines.seek(0)
        try:
            for _ in delimited_reader(lines, Dialect(delimiter, quoting)):
                pass
        except csv.Error:
            continue
        return quoting
    return "csv"


def read_delimited(
    lines: Iterable[str],
    path: Path,
    dialect: Dialect,
    *,
    header: bool | Sequence[str] = True,
    columns: Collection[str] | None = None,
    labels: Collection[str] = (),
) -> Generator[tuple[int, dict[str, object]], None, None]:
    """Yield the first line and the record of each row of a delimited table.

    Args:
        lines: Lines of the file.
        path: Path of the file, for errors.
        dialect: Format of the file.
        header: Whether the first row contains the names of the columns, or the names themselves. False numbers the
            columns from 0.
        columns: Names of the columns that are read, which must be unique; None reads every column that has a name.
        labels: Names of the columns whose values occur in many rows, to recognize rows inside a field.

    Raises:
        DataError: A row cannot be parsed or has another number of fields than the first, two of the columns that are
            read have one name, or a field seems to contain rows.
    """
    with long_fields():
        first_line, delimiter = 1, dialect.delimiter
        names = None if isinstance(header, bool) else list(header)
        if delimiter == _BLANK and header is not True:
            # Corpora with lines such as "LABEL some text": the last column is the rest of the line.
            last = max((int(name) for name in columns or () if name.isdigit()), default=0)
            blanks = len(names) - 1 if names else last
            lines = (line.replace(_BLANK, _UNIT_SEPARATOR, blanks) if blanks else line for line in lines)
            dialect = Dialect(_UNIT_SEPARATOR, dialect.quoting)
        reader = delimited_reader(lines, dialect)
        try:
            if header is True:
                names = next(reader, [])
                first_line = reader.line_num + 1
                _refuse_repeated(names, path, columns)
            swallowed = _Swallowed(dialect, path, names or [], labels) if dialect.was_chosen and labels else None
            for fields in reader:
                line, first_line = first_line, reader.line_num + 1
                if not fields:  # blank lines are skipped
                    continue
                if names is None:
                    names = [str(number) for number in range(len(fields))]
                    swallowed = swallowed and _Swallowed(dialect, path, names, labels)
                if len(fields) > len(names) and not any(fields[len(names) :]):
                    fields = fields[: len(names)]  # spreadsheets write empty fields at the end of a row
                if len(fields) != len(names):
                    raise DataError(
                        f"the row is malformed: expected {len(names)} fields, got {len(fields)}",
                        where=f"{path}:{line}",
                        fix=f"quote a field that contains {delimiter!r}, or set delimiter",
                    )
                if swallowed:
                    swallowed.add(line, fields, is_one_line=reader.line_num == line)
                yield line, dict(zip(names, fields, strict=True))
            if swallowed:
                swallowed.check()
        except csv.Error as error:
            raise DataError(
                f"the row cannot be parsed: {error}",
                where=f"{path}:{first_line}",
                fix='write a quote within quotes as "", or set quoting: none if quotes are part of the text',
            ) from error


@contextmanager
def long_fields() -> Iterator[None]:
    """Raise the csv module's limit of a field, 131,072 characters, inside the block: a text may be longer."""
    # The limit is global, so it is restored at the end. It is never lowered, because an abandoned generator restores it
    # late.
    limit = csv.field_size_limit()
    csv.field_size_limit(max(MAX_FIELD_CHARACTERS, limit))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def delimited_reader(lines: Iterable[str], dialect: Dialect) -> Any:
    """Return a csv reader of lines in a dialect."""
    if dialect.quoting == "none":
        return csv.reader(lines, delimiter=dialect.delimiter, quoting=csv.QUOTE_NONE)
    if dialect.quoting == "backslash":
        # Not the csv module's escapechar, which removes every backslash: "C:\new" would lose one.
        lines = (re.sub(r'\\(["\\])', lambda m: '""' if m[1] == '"' else "\\", line) for line in lines)
    # Strict: otherwise an unclosed quote silently turns the rest of the file into one field.
    return csv.reader(lines, delimiter=dialect.delimiter, strict=True)


def _refuse_repeated(names: Sequence[str], path: Path, columns: Collection[str] | None) -> None:
    """Refuse names of columns that are read and not unique. Spreadsheets write empty names for empty columns."""
    for name, count in Counter(names).items():
        if count > 1 and (name in columns if columns is not None else name):
            raise DataError(f"two columns are called {name!r}", where=f"{path}:1", fix="rename one of them")


class _Swallowed:
    """Finds fields over several lines whose lines look like rows: between two stray quotes, a field swallows rows.

    Args:
        dialect: Format of the file.
        path: Path of the file, for errors.
        names: Names of all columns.
        labels: Names of the columns whose values occur in many rows.
    """

    def __init__(self, dialect: Dialect, path: Path, names: Sequence[str], labels: Collection[str]) -> None:
        self.dialect = dialect
        self.path = path
        self.names = names
        self.values: dict[int, set[str]] = {names.index(label): set() for label in labels if label in names}
        self.suspects: list[tuple[int, int, list[dict[int, str]]]] = []

    def add(self, line: int, fields: Sequence[str], *, is_one_line: bool) -> None:
        """Record the labels of a row of one line, and the lines of a field over several lines."""
        if is_one_line:
            for position, values in self.values.items():
                values.add(fields[position])
            return
        for column, field in enumerate(fields):
            pieces = re.split(r"\r\n|\r|\n", field)
            rows = []
            for number, piece in enumerate(pieces):
                # The first piece lacks the columns before the field, and the last one those after it.
                first = column if number == 0 else 0
                last = column if number == len(pieces) - 1 else len(self.names) - 1
                parts = piece.split(self.dialect.delimiter)
                labels = [p for p in self.values if first <= p <= last and (p != column or first < p < last)]
                if labels and len(parts) == last - first + 1:
                    rows.append({position: parts[position - first] for position in labels})
            if rows and 2 * len(rows) >= len(pieces) - 1 > 0:
                self.suspects.append((line, len(pieces), rows))

    def check(self) -> None:
        """Refuse the first field in which at least half of the lines have a label that other rows have.

        Raises:
            DataError: There is such a field.
        """
        numbers = {p for p, values in self.values.items() if all(map(_NUMBER.fullmatch, values))}
        for line, count, rows in self.suspects:
            matches = sum(
                all(value in self.values[p] or (p in numbers and _NUMBER.fullmatch(value)) for p, value in row.items())
                for row in rows
            )
            if 2 * matches >= count - 1:
                raise DataError(
                    f"a quoted field spans lines {line} to {line + count - 1}, which look like separate rows",
                    where=f"{self.path}:{line}",
                    fix="set quoting: none if quotes are part of the text, or quoting: csv if the field is right",
                )
