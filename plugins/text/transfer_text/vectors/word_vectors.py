"""Pretrained word vectors of a vocabulary, and their coverage.

A file is parsed once. Its matrix and words are cached as one safetensors file in the user's cache folder and
memory-mapped from there, so the second look-up is fast.
"""

from __future__ import annotations

import contextlib
import io
import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from transfer import FileSchema, PluginError, WeightsError
from transfer_text import cache
from transfer_text.interfaces import Vectors, WordVectors
from transfer_text.plugins import is_plugin, make_vectors
from transfer_text.vectors.vector_files import KNOWN, PACKAGED, VectorFile, locate
from transfer_text.vectors.vector_formats import Block, read_blocks

__all__ = ["WordVectors", "coverage", "read_vectors", "width_of", "words_of"]

FORMAT = 1
MISSING = 1_000  # larger than the rank of any spelling
HEADER_BYTES = 1024
"""Space reserved for the header of the safetensors file, which is written last."""
BLOCK_ROWS = 1 << 14
"""Rows of a cached matrix that are read together."""


def width_of(source: str) -> int:
    """Return the width of a source's vectors. At most the first line is read.

    Raises:
        transfer.WeightsError: The source does not exist, or its first line contains no vector.
    """
    if source in KNOWN:
        return KNOWN[source][1]
    if source in PACKAGED:
        return PACKAGED[source][1]
    if is_plugin("vectors", source):
        return make_vectors(source).width
    with locate(source, fetch=False).open() as (content, where, binary):
        return read_blocks(content, where, binary=binary)[0]


def read_vectors(source: str, words: Sequence[str]) -> WordVectors:
    """Read the vectors of some words. Memory use is proportional to these words, not to the source.

    A word that the source does not contain is also looked up in other spellings, because vectors come from different
    tokenizers: in lower case, without surrounding punctuation, and a run of punctuation as one character (``mr.`` as
    ``mr``, ``...`` as ``.``).

    Args:
        source: A known name (``glove.6B.100d``), ``mini``, the name or path of a file in the text format of GloVe,
            word2vec or fastText or in word2vec's binary one (``.bin``), plain, ``.gz`` or ``.zip``, or
            ``archive.zip:member.txt``; or ``NAME/ARGUMENT`` of a plugin.
        words: Words to look up.

    Raises:
        transfer.WeightsError: The source is missing or damaged, or contains a line that is not a vector of its width.
    """
    if is_plugin("vectors", source):
        return _look_up(make_vectors(source), source, words)
    wanted: dict[bytes, list[tuple[int, int]]] = {}  # spelling -> (row that it may fill, rank of the spelling)
    for row, word in enumerate(words):
        for rank, spelling in enumerate(_spellings(word)):
            wanted.setdefault(spelling.encode(), []).append((row, rank))
    with _blocks(source) as (width, blocks):
        matrix = np.zeros((len(words), width), dtype=np.float32)
        best = np.full(len(words), MISSING, dtype=np.int64)  # rank of the spelling whose vector each row contains
        for spellings, vectors in blocks:
            for index, matches in enumerate(map(wanted.get, spellings)):
                for row, rank in matches or ():
                    if rank < best[row]:  # if a word occurs in two lines, the first line is used
                        matrix[row] = vectors[index]
                        best[row] = rank
    return WordVectors(matrix, best < MISSING)


def words_of(source: str) -> list[str]:
    """Return all words of a source, in its order; words that are not valid UTF-8 are omitted.

    Raises:
        transfer.WeightsError: As :func:`read_vectors`.
    """
    if is_plugin("vectors", source):
        if not (listed := make_vectors(source).words()):
            raise WeightsError(f"{source!r} lists no words", fix="remove vectors_vocabulary, or choose other vectors")
        return list(dict.fromkeys(listed))
    words = []
    with _blocks(source) as (_, blocks):
        for spellings, _ in blocks:
            for spelling in spellings:
                with contextlib.suppress(UnicodeDecodeError):
                    words.append(spelling.decode())
    return list(dict.fromkeys(words))


def coverage(
    words: Sequence[str], found: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64] | None, examples: int = 10
) -> dict[str, Any]:
    """Return the coverage of a vocabulary by vectors, as JSON values.

    Args:
        words: Words of the vocabulary.
        found: Whether each word has a vector, bool (V,).
        counts: Number of occurrences of each word in the training texts, int64 (V,); words without any are omitted.
            None if the counts are unknown.
        examples: Maximum number of missing words to list, most frequent first.

    Returns:
        ``words``, ``found``, ``types`` (fraction of words with a vector), ``tokens`` (fraction of occurrences with a
        vector, None if the counts are unknown) and ``missing``.
    """
    if counts is not None:
        words = [words[int(index)] for index in np.flatnonzero(counts)]
        found, counts = found[counts > 0], counts[counts > 0]
    missing = np.flatnonzero(~found)
    if counts is not None:
        missing = missing[np.argsort(-counts[missing], kind="stable")]
    return {
        "words": len(words),
        "found": int(found.sum()),
        "types": round(float(found.mean()), 4) if len(words) else 0.0,
        "tokens": round(float(counts[found].sum() / max(counts.sum(), 1)), 4) if counts is not None else None,
        "missing": [words[index] for index in missing[:examples]],
    }


def _look_up(vectors: Vectors, source: str, words: Sequence[str]) -> WordVectors:
    """Look up every spelling of the words in a plugin, and return the vector of each word's best spelling."""
    indices: dict[str, int] = {}
    for word in words:
        for spelling in _spellings(word):
            indices.setdefault(spelling, len(indices))
    read = vectors.read(list(indices))
    expected, dtype = (len(indices), vectors.width), read.matrix.dtype
    if read.matrix.shape != expected or dtype != np.float32 or read.found.shape != expected[:1]:
        raise PluginError(
            f"vectors {source!r} returned a matrix of {dtype} {read.matrix.shape} and found of {read.found.shape}: "
            f"expected float32 {expected} and bool {expected[:1]}",
            fix="correct the plugin's `read`",
        )
    best = [next((p for p in map(indices.__getitem__, _spellings(word)) if read.found[p]), -1) for word in words]
    rows = np.array(best, dtype=np.int64)
    return WordVectors(np.where(rows[:, None] < 0, np.float32(0), read.matrix[rows]), rows >= 0)


def _spellings(word: str) -> list[str]:
    """Return the spellings under which a word may be listed, the best first."""
    lower = word.lower()
    return list(dict.fromkeys((word, lower, lower.strip(string.punctuation) or lower[:1])))


@contextlib.contextmanager
def _blocks(source: str) -> Iterator[tuple[int, Iterator[Block]]]:
    """Yield the width of a source's vectors and its blocks; from the cache, unless that cannot be written."""
    file = locate(source)
    if (cached := _cached_blocks(file)) is not None:
        yield cached
        return
    with file.open() as (content, where, binary):
        yield read_blocks(content, where, binary=binary)


def _cached_blocks(file: VectorFile) -> tuple[int, Iterator[Block]] | None:
    if not isinstance(file.path, Path):  # inside a zipped package
        return None
    try:
        status = file.path.stat()
    except OSError:
        return None  # opening the file raises the error
    key = cache.digest(FORMAT, str(file.path.resolve()), status.st_size, status.st_mtime_ns, file.member)
    for _ in range(2):  # a damaged entry is replaced once
        folder = cache.entry("vectors", key, lambda folder: _write(folder, file))
        if folder is None:
            return None
        try:
            return _open_cached(folder / "vectors.safetensors")
        except Exception:  # parsing a header that was edited may raise anything; the entry is replaced
            cache.drop(folder)
    return None


def _write(folder: Path, file: VectorFile) -> None:
    """Parse a file into ``vectors.safetensors``: the matrix (N, D), and the words in UTF-8, one per line."""
    words = io.BytesIO()
    count = 0
    with file.open() as (content, where, binary), (folder / "vectors.safetensors").open("wb") as out:
        width, blocks = read_blocks(content, where, binary=binary)
        out.seek(8 + HEADER_BYTES)
        for spellings, matrix in blocks:
            try:
                out.write(matrix.astype("<f4", copy=False).tobytes())
            except OSError as error:  # the disk is full
                raise cache.UnwritableError(str(error)) from error
            words.writelines(spelling.replace(b"\n", b" ") + b"\n" for spelling in spellings)
            count += len(spellings)
        matrix_bytes = 4 * count * width
        header = {
            "__metadata__": {"source": where},
            "matrix": {"dtype": "F32", "shape": [count, width], "data_offsets": [0, matrix_bytes]},
            "words": {
                "dtype": "U8",
                "shape": [words.tell()],
                "data_offsets": [matrix_bytes, matrix_bytes + words.tell()],
            },
        }
        written = json.dumps(header)
        if len(written.encode()) > HEADER_BYTES:  # the path is too long for the header
            header["__metadata__"] = {}
            written = json.dumps(header)
        try:
            out.write(words.getvalue())
            out.seek(0)
            out.write(HEADER_BYTES.to_bytes(8, "little") + written.ljust(HEADER_BYTES).encode())
        except OSError as error:
            raise cache.UnwritableError(str(error)) from error


_Number = Annotated[int, Field(ge=0)]


class _Words(FileSchema):
    data_offsets: tuple[_Number, _Number]


class _Matrix(FileSchema):
    shape: tuple[_Number, _Number]


class _Header(FileSchema):
    words: _Words
    matrix: _Matrix


def _open_cached(path: Path) -> tuple[int, Iterator[Block]]:
    """Memory-map a file that :func:`_write` wrote; the safetensors library would read the complete matrix."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size != HEADER_BYTES:
            raise ValueError("unexpected header size")
        header = _Header.model_validate_json(file.read(size))
        start, end = (8 + size + offset for offset in header.words.data_offsets)
        if path.stat().st_size != end:
            raise ValueError("the file is truncated")
        file.seek(start)
        words = io.BytesIO(file.read())
    count, width = header.matrix.shape
    matrix: npt.NDArray[np.float32] = np.asarray(
        np.memmap(path, dtype="<f4", mode="r", offset=8 + size, shape=(count, width))
    )

    def blocks() -> Iterator[Block]:
        for first in range(0, count, BLOCK_ROWS):
            rows = matrix[first : first + BLOCK_ROWS]
            yield [words.readline()[:-1] for _ in range(len(rows))], rows

    return width, blocks()
