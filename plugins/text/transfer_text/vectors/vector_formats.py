"""The formats of word vectors: GloVe's and fastText's text, word2vec's binary; read in blocks of lines."""

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
"""Some words and their vectors, float32 (N, D)."""

BLOCK_LINES = 512
LONGEST_WORD_BYTES = 1 << 14
LONGEST_LINE_BYTES = 1 << 22
MAX_DIMENSIONS = 1 << 16
FASTTEXT_MODEL = (793_712_314).to_bytes(4, "little")  # how fastText's own binary models begin
_DECIMAL = re.compile(rb"-?\d*\.\d+(?:e-?\d+)?")
_NOT_VECTORS = "give a file with a word and its numbers, separated by single spaces, on each line"


def read_blocks(file: IO[bytes], where: str, *, binary: bool) -> tuple[int, Iterator[Block]]:
    """Read the vectors of an open file.

    Args:
        file: At its beginning.
        where: What it is called in messages.
        binary: In word2vec's binary format; otherwise in text, with or without a first line of count and width.

    Returns:
        The width D, and the vectors in blocks.

    Raises:
        transfer.WeightsError: It does not begin with a vector; the blocks raise it at a line that is no vector of that
            width, naming it.
    """
    return _binary(file, where) if binary else _text(_Lines(file, where), where)


# ---------------------------------------------------------------------------------------------------------------- text


class _Lines:
    """The lines of a file, none beyond a length: a small archive may unpack to a line without an end."""

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file = file
        self._where = where

    def readline(self) -> bytes:
        line = self._file.readline(LONGEST_LINE_BYTES)
        if len(line) == LONGEST_LINE_BYTES:
            raise WeightsError(
                f"a line is longer than {LONGEST_LINE_BYTES:,} bytes", where=self._where, fix=_NOT_VECTORS
            )
        return line

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")


def _text(lines: _Lines, where: str) -> tuple[int, Iterator[Block]]:
    number, first = 1, lines.readline().rstrip()
    fields = first.split(b" ")
    width, count = len(fields) - 1, None
    if width == 1 and fields[0].isdigit() and fields[1].isdigit():  # word2vec and fastText say COUNT WIDTH first
        count, width = map(int, fields)
        number, first = 2, lines.readline().rstrip()
    if width < 1:
        raise WeightsError("the first line holds no vector", where=f"{where}:{number}", fix=_NOT_VECTORS)
    _parse(_part(first, width, where, number)[1], width, where, number)

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
        word, row = _part(line, width, where, number)
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
        logger.warning("%s holds %d vectors, and its first line says %d: it was cut short", where, total, count)


def _matrix(rows: list[bytes], width: int, where: str, numbers: list[int]) -> npt.NDArray[np.float32]:
    try:
        matrix = np.loadtxt(rows, dtype=np.float32, delimiter=" ", comments=None, ndmin=2, encoding="latin-1")
        if matrix.shape == (len(rows), width) and np.isfinite(matrix).all():
            return matrix
    except ValueError:
        pass
    return np.stack([_parse(row, width, where, number) for row, number in zip(rows, numbers, strict=True)])


def _part(line: bytes, width: int, where: str, number: int) -> tuple[bytes, bytes]:
    """Part a line into its word and its numbers."""
    if (spaces := line.count(b" ")) == width:
        word, _, numbers = line.partition(b" ")
        return word, numbers
    # glove.840B has words with spaces in them; anything else that is too long is wrong, as is what is too short.
    fields = line.split(b" ")
    if spaces < width or all(_DECIMAL.fullmatch(field) for field in fields[1:-width]):
        raise WeightsError(
            f"the line holds {spaces} numbers where the file's width is {width}: {_excerpt(line)}",
            where=f"{where}:{number}",
            fix="the file is damaged or was cut short; fetch it again",
        )
    return b" ".join(fields[:-width]), b" ".join(fields[-width:])


def _parse(numbers: bytes, width: int, where: str, number: int) -> npt.NDArray[np.float32]:
    try:
        vector = np.array(numbers.split(b" "), dtype=np.float32)
    except ValueError:
        vector = np.full(width, np.nan, dtype=np.float32)
    if not np.isfinite(vector).all():
        raise WeightsError(
            f"the vector holds something that is no finite number: {_excerpt(numbers)}",
            where=f"{where}:{number}",
            fix="correct or remove the line",
        )
    return vector


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:60] + "...")


# -------------------------------------------------------------------------------------------------------------- binary


def _binary(file: IO[bytes], where: str) -> tuple[int, Iterator[Block]]:
    header = file.readline(100)
    fields = header.split()
    if header.startswith(FASTTEXT_MODEL):
        raise WeightsError(
            "this is a model of fastText, not word vectors",
            where=where,
            fix="give the .vec file that comes beside it",
        )
    if len(fields) != 2 or not (fields[0].isdigit() and fields[1].isdigit()) or not int(fields[1]):
        raise WeightsError(
            f"word2vec's binary format begins with count and width, this file with {_excerpt(header)}",
            where=where,
            fix="give a text file the ending .txt or .vec",
        )
    count, width = map(int, fields)
    if width > MAX_DIMENSIONS:
        raise WeightsError(f"the file says that its vectors are {width:,} wide", where=where, fix="fetch it again")
    return width, _binary_blocks(file, count, width, where)


def _binary_blocks(file: IO[bytes], count: int, width: int, where: str) -> Iterator[Block]:
    size = 4 * width
    waiting, place = b"", 0
    for begin in range(0, count, BLOCK_LINES):
        words, rows = list[bytes](), list[bytes]()
        for number in range(begin, min(begin + BLOCK_LINES, count)):
            blank = waiting.find(b" ", place)
            while blank < 0 or len(waiting) - blank - 1 < size:
                more = file.read(max(1 << 20, size))
                if not more or (blank < 0 and len(waiting) - place > LONGEST_WORD_BYTES):
                    raise WeightsError(
                        f"the file ends or breaks off at vector {number + 1:,} of the {count:,} that it says it holds",
                        where=where,
                        fix="the file is damaged or was cut short; fetch it again",
                    )
                waiting, place = waiting[place:] + more, 0
                blank = waiting.find(b" ")
            words.append(waiting[place:blank].lstrip(b"\n"))  # some writers end each vector with a new line
            rows.append(waiting[blank + 1 : blank + 1 + size])
            place = blank + 1 + size
        matrix = np.frombuffer(b"".join(rows), dtype="<f4").reshape(len(rows), width)
        finite = np.isfinite(matrix).all(1)
        if not finite.all():
            bad = int(np.flatnonzero(~finite)[0])
            raise WeightsError(
                f"vector {begin + bad + 1:,}, of {_excerpt(words[bad])}, holds something that is no finite number",
                where=where,
                fix="the file is damaged; fetch it again",
            )
        yield words, matrix.astype(np.float32, copy=False)
