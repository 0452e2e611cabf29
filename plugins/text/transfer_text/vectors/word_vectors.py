"""Pretrained word vectors: those of a vocabulary's words, and how many of them there are.

A file is parsed once; its matrix and words are kept as one safetensors file in the user's cache folder and mapped from
there, so that the second look-up takes a moment.
"""

from __future__ import annotations

import contextlib
import io
import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer import PluginError, WeightsError
from transfer_text import cache
from transfer_text.interfaces import Vectors, WordVectors
from transfer_text.plugins import is_plugin, make_vectors
from transfer_text.vectors.vector_files import KNOWN, PACKAGED, VectorFile, locate
from transfer_text.vectors.vector_formats import Block, read_blocks

__all__ = ["WordVectors", "coverage", "read_vectors", "width_of", "words_of"]

FORMAT = 1
MISSING = 1_000  # above the rank of any spelling
HEADER_BYTES = 1024
"""Room for the header of a safetensors file, whose sizes are known at the end."""
KEPT_ROWS = 1 << 14
"""Rows of a kept matrix that are looked at together."""


def width_of(source: str) -> int:
    """Return the width of the vectors that ``source`` names, reading at most the first line.

    Raises:
        transfer.WeightsError: There is no such source, or its first line holds no vector.
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
    """Read the vectors of these words; the others pass by, so memory stays near the rows that are wanted.

    A word that the source lacks is looked up in other spellings too: in lower case, without the marks around it, a
    run of marks as one (``mr.`` as ``mr``, ``...`` as ``.``), since not all vectors come from one tokenizer.

    Args:
        source: A known name (``glove.6B.100d``), ``mini``, the name or path of a file in the text format of GloVe,
            word2vec or fastText or in word2vec's binary one (``.bin``), plain, ``.gz`` or ``.zip``, or
            ``archive.zip:member.txt``; or ``NAME/ARGUMENT`` of a plugin.
        words: The words that are needed.

    Raises:
        transfer.WeightsError: The source is missing, broken, or holds a line that is no vector of its width.
    """
    if is_plugin("vectors", source):
        return _look_up(make_vectors(source), source, words)
    wanted: dict[bytes, list[tuple[int, int]]] = {}  # spelling -> the rows it may fill, and its rank there
    for row, word in enumerate(words):
        for rank, spelling in enumerate(_spellings(word)):
            wanted.setdefault(spelling.encode(), []).append((row, rank))
    with _blocks(source) as (width, blocks):
        matrix = np.zeros((len(words), width), dtype=np.float32)
        best = np.full(len(words), MISSING, dtype=np.int64)  # the rank of the spelling that gave a row
        for spellings, vectors in blocks:
            for place, found in enumerate(map(wanted.get, spellings)):
                for row, rank in found or ():
                    if rank < best[row]:  # of two lines for one word the first counts
                        matrix[row] = vectors[place]
                        best[row] = rank
    return WordVectors(matrix, best < MISSING)


def words_of(source: str) -> list[str]:
    """Return all words that a source has vectors of, in its order; words that are not UTF-8 are left out.

    Raises:
        transfer.WeightsError: As :func:`read_vectors`.
    """
    if is_plugin("vectors", source):
        if not (listed := make_vectors(source).words()):
            raise WeightsError(
                f"{source!r} lists no words", fix="leave vectors_vocabulary out, or choose other vectors"
            )
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
    """Say how much of a vocabulary has vectors: JSON alone.

    Args:
        words: The words of the vocabulary.
        found: bool (V,), which of them have a vector.
        counts: How often each occurs in the training texts, int64 (V,), where that is known; words that never do are
            left out.
        examples: How many missing words to name, the most frequent first.

    Returns:
        ``words``, ``found``, ``types`` (the share of words found), ``tokens`` (the share of their occurrences found;
        None where the counts are not known) and ``missing``.
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
    """Ask a plugin for every spelling of the words, and take for each word the vector of the best."""
    places: dict[str, int] = {}
    for word in words:
        for spelling in _spellings(word):
            places.setdefault(spelling, len(places))
    read = vectors.read(list(places))
    expected, dtype = (len(places), vectors.width), read.matrix.dtype
    if read.matrix.shape != expected or dtype != np.float32 or read.found.shape != expected[:1]:
        raise PluginError(
            f"vectors {source!r} gave a matrix of {dtype} {read.matrix.shape}, and found of {read.found.shape}",
            fix=f"a source of vectors returns float32 {expected} and bool {expected[:1]} for so many words",
        )
    best = [next((p for p in map(places.__getitem__, _spellings(word)) if read.found[p]), -1) for word in words]
    rows = np.array(best, dtype=np.int64)
    return WordVectors(np.where(rows[:, None] < 0, np.float32(0), read.matrix[rows]), rows >= 0)


def _spellings(word: str) -> list[str]:
    """Return the word and what else it may be called, the best first."""
    lower = word.lower()
    return list(dict.fromkeys((word, lower, lower.strip(string.punctuation) or lower[:1])))


# -------------------------------------------------------------------------------------------------------- parsed, once


@contextlib.contextmanager
def _blocks(source: str) -> Iterator[tuple[int, Iterator[Block]]]:
    """Give the width of a source's vectors and all of them in blocks: from the cache, where that can be written."""
    file = locate(source)
    if (kept := _kept(file)) is not None:
        yield kept
        return
    with file.open() as (content, where, binary):
        yield read_blocks(content, where, binary=binary)


def _kept(file: VectorFile) -> tuple[int, Iterator[Block]] | None:
    if not isinstance(file.path, Path):  # a package that is not unpacked
        return None
    try:
        known = file.path.stat()
    except OSError:
        return None  # opening it says what is wrong
    key = cache.digest(FORMAT, str(file.path.resolve()), known.st_size, known.st_mtime_ns, file.member)
    for _ in range(2):  # an entry that is damaged is made again
        folder = cache.entry("vectors", key, lambda folder: _write(folder, file))
        if folder is None:
            return None
        try:
            return _open_kept(folder / "vectors.safetensors")
        except (OSError, ValueError, KeyError, TypeError):
            cache.drop(folder)
    return None


def _write(folder: Path, file: VectorFile) -> None:
    """Parse a file into ``vectors.safetensors``: the matrix (N, D), and the words in UTF-8 with new lines between."""
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
        if len(written.encode()) > HEADER_BYTES:  # a path beyond all measure
            header["__metadata__"] = {}
            written = json.dumps(header)
        try:
            out.write(words.getvalue())
            out.seek(0)
            out.write(HEADER_BYTES.to_bytes(8, "little") + written.ljust(HEADER_BYTES).encode())
        except OSError as error:
            raise cache.UnwritableError(str(error)) from error


def _open_kept(path: Path) -> tuple[int, Iterator[Block]]:
    """Map a file that :func:`_write` wrote; the safetensors library would read all of the matrix."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size != HEADER_BYTES:
            raise ValueError("the header is of another size")
        header = json.loads(file.read(size))
        begin, end = (8 + size + offset for offset in header["words"]["data_offsets"])
        if path.stat().st_size != end:
            raise ValueError("the file was cut short")
        file.seek(begin)
        words = io.BytesIO(file.read())
    count, width = header["matrix"]["shape"]
    matrix: npt.NDArray[np.float32] = np.asarray(
        np.memmap(path, dtype="<f4", mode="r", offset=8 + size, shape=(count, width))
    )

    def blocks() -> Iterator[Block]:
        for first in range(0, count, KEPT_ROWS):
            rows = matrix[first : first + KEPT_ROWS]
            yield [words.readline()[:-1] for _ in range(len(rows))], rows

    return width, blocks()
