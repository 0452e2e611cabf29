"""Readers of word vector formats: the text formats of GloVe and fastText, and word2vec's binary format."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

from transfer import WeightsError

logger = logging.getLogger(__name__)

Block = tuple[list[bytes], npt.NDArray[np.float32]]
"""Words and their vectors, float32 (N, D)."""

BLOCK_LINES = 512
MAX_WORD_BYTES = 1 << 14
MAX_LINE_BYTES = 1 << 22
MAX_DIMENSIONS = 1 << 16
FASTTEXT_MODEL = (793_712_314).to_bytes(4, "little")  # the first bytes of fastText's binary models
_DECIMAL = re.compile(rb"-?\d*\.\d+(?:e-?\d+)?")
_NOT_VECTORS = "use a file with a word and its numbers, separated by single spaces, on each line"


def read_blocks(file: IO[bytes], where: str, *, binary: bool) -> tuple[int, Iterator[Block]]:
    """Read the vectors of an open file.

    Args:
        file: Open file, positioned at its start.
        where: Name of the file in errors.
        binary: Whether the file has word2vec's binary format. Otherwise it is text, with or without a first line of
            count and width.

    Returns:
        The width of the vectors, D, and an iterator over blocks of them.

    Raises:
        transfer.WeightsError: The file does not start with a vector. The iterator raises it for a line that is not a
            vector of that width.
    """
    return _binary(file, where) if binary else _text(_Lines(file, where), where)


class _Lines:
    """The lines of a file, up to a maximum length: a small archive may unpack to one endless line."""

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file = file
        self._where = where

    def readline(self) -> bytes:
        line = self._file.readline(MAX_LINE_BYTES)
        if len(line) == MAX_LINE_BYTES:
            raise WeightsError(f"a line is longer than {MAX_LINE_BYTES:,} bytes", where=self._where, fix=_NOT_VECTORS)
        return line

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")


def _text(lines: _Lines, where: str) -> tuple[int, Iterator[Block]]:
    number, first = 1, lines.readline().rstrip()
    fields = first.split(b" ")
    width, count = len(fields) - 1, None
    if width == 1 and fields[0].isdigit() and fields[1].isdigit():  # word2vec and fastText start with COUNT WIDTH
        count, width = map(int, fields)
        number, first = 2, lines.readline().rstrip()
    if width < 1:
        raise WeightsError("the first line contains no vector", where=f"{where}:{number}", fix=_NOT_VECTORS)
    _parse(_split_line(first, width, where, number)[1], width, where, number)

    # The first line has been read to find the width, and is a vector too.
    def numbered() -> Iterator[tuple[int, bytes]]:
        yield number, first
        for later, line in enumerate(lines, number + 1):
            if line := line.rstrip():
                yield later, line

    return width, _text_blocks(numbered(), width, where, count)


def _text_blocks(numbered: Iterator[tuple[int, bytes]], width: int, where: str, count: int | None) -> Iterator[Block]:
    words, rows, numbers = list[bytes](), list[bytes](), list[int]()
    total = 0
    for number, line in numbered:
        word, row = _split_line(line, width, where, number)
        words.append(word)
        rows.append(row)
        numbers.append(number)
        if len(words) == BLOCK_LINES:
            yield words, _matrix(rows, width, where, numbers)
            total += len(words)
            words, rows, numbers = [], [], []
    if words:
        yield words, _matrix(rows, width, where, numbers)
    total += len(words)
    if count is not None and total < count:
        logger.warning(
            "%s is truncated: it contains %d vectors, expected %d as its first line states", where, total, count
        )


def _matrix(rows: list[bytes], width: int, where: str, numbers: list[int]) -> npt.NDArray[np.float32]:
    try:
        matrix = np.loadtxt(rows, dtype=np.float32, delimiter=" ", comments=None, ndmin=2, encoding="latin-1")
        if matrix.shape == (len(rows), width) and np.isfinite(matrix).all():
            return matrix
    except ValueError:
        pass
    # Parsed one by one only after a failure: it is slower, and names the line.
    return np.stack([_parse(row, width, where, number) for row, number in zip(rows, numbers, strict=True)])


def _split_line(line: bytes, width: int, where: str, number: int) -> tuple[bytes, bytes]:
    """Split a line into its word and its numbers."""
    if (spaces := line.count(b" ")) == width:
        word, _, numbers = line.partition(b" ")
        return word, numbers
    # Words of glove.840B may contain spaces. Any other line of another length is an error.
    fields = line.split(b" ")
    if spaces < width or all(_DECIMAL.fullmatch(field) for field in fields[1:-width]):
        raise WeightsError(
            f"the line contains {spaces} numbers: expected {width}: {_excerpt(line)}",
            where=f"{where}:{number}",
            fix="the file is damaged or truncated; download it again",
        )
    return b" ".join(fields[:-width]), b" ".join(fields[-width:])


def _parse(numbers: bytes, width: int, where: str, number: int) -> npt.NDArray[np.float32]:
    try:
        vector = np.array(numbers.split(b" "), dtype=np.float32)
    except ValueError:
        vector = np.full(width, np.nan, dtype=np.float32)
    if not np.isfinite(vector).all():
        raise WeightsError(
            f"the vector contains a value that is not a finite number: {_excerpt(numbers)}",
            where=f"{where}:{number}",
            fix="correct or remove the line",
        )
    return vector


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _binary(file: IO[bytes], where: str) -> tuple[int, Iterator[Block]]:
    header = file.readline(100)
    fields = header.split()
    if header.startswith(FASTTEXT_MODEL):
        raise WeightsError(
            "this is a fastText model, not a file of word vectors",
            where=where,
            fix="use the .vec file of the model",
        )
    if len(fields) != 2 or not (fields[0].isdigit() and fields[1].isdigit()) or not int(fields[1]):
        raise WeightsError(
            f"the file starts with {_excerpt(header)}: expected count and width, as in word2vec's binary format",
            where=where,
            fix="use the suffix .txt or .vec for a text file",
        )
    count, width = map(int, fields)
    if width > MAX_DIMENSIONS:
        raise WeightsError(
            f"the vectors have width {width:,}: expected {MAX_DIMENSIONS:,} or less",
            where=where,
            fix="download the file again",
        )
    return width, _binary_blocks(file, count, width, where)


def _binary_blocks(file: IO[bytes], count: int, width: int, where: str) -> Iterator[Block]:
    size = 4 * width
    buffer, position = b"", 0
    for start in range(0, count, BLOCK_LINES):
        words, rows = list[bytes](), list[bytes]()
        for number in range(start, min(start + BLOCK_LINES, count)):
            blank = buffer.find(b" ", position)
            # A word and its vector may continue in the next part of the file.
            while blank < 0 or len(buffer) - blank - 1 < size:
                more = file.read(max(1 << 20, size))
                if not more or (blank < 0 and len(buffer) - position > MAX_WORD_BYTES):
                    raise WeightsError(
                        f"the file ends or is damaged at vector {number + 1:,}: expected {count:,} vectors",
                        where=where,
                        fix="the file is damaged or truncated; download it again",
                    )
                buffer, position = buffer[position:] + more, 0
                blank = buffer.find(b" ")
            words.append(buffer[position:blank].lstrip(b"\n"))  # some writers end each vector with a line break
            rows.append(buffer[blank + 1 : blank + 1 + size])
            position = blank + 1 + size
        matrix = np.frombuffer(b"".join(rows), dtype="<f4").reshape(len(rows), width)
        finite = np.isfinite(matrix).all(1)
        if not finite.all():
            bad = int(np.flatnonzero(~finite)[0])
            raise WeightsError(
                f"vector {start + bad + 1:,}, of {_excerpt(words[bad])}, contains a value that is not a finite number",
                where=where,
                fix="the file is damaged; download it again",
            )
        yield words, matrix.astype(np.float32, copy=False)
