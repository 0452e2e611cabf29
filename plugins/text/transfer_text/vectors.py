"""Word vectors in GloVe's text format: a word and its numbers on each line, packed or not."""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import string
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from transfer import DataError, WeightsError, data_folder, download

SITE = "https://nlp.stanford.edu/data/"
_6B = "glove.6B.zip"
# The archive and the width of each known name (Pennington et al. 2014, https://nlp.stanford.edu/projects/glove).
KNOWN: dict[str, tuple[str, int]] = {
    "glove.6B.50d": (_6B, 50),
    "glove.6B.100d": (_6B, 100),
    "glove.6B.200d": (_6B, 200),
    "glove.6B.300d": (_6B, 300),
    "glove.42B.300d": ("glove.42B.300d.zip", 300),
    "glove.840B.300d": ("glove.840B.300d.zip", 300),
}
PACKAGED = {"mini": ("mini.vectors.txt.gz", 100)}
MISSING = 1_000  # above the rank of any spelling
SUFFIXES = (".txt", ".txt.gz", ".zip", ".vec", ".vec.gz")
BUFFER_BYTES = 1 << 20
_DECIMAL = re.compile(rb"-?\d*\.\d+(?:e-?\d+)?")


@dataclass(frozen=True)
class WordVectors:
    """The vectors of some words.

    Args:
        matrix: float32 (V, D), a row for each word; zeros where the source lacks the word.
        found: bool (V,).
    """

    matrix: npt.NDArray[np.float32]
    found: npt.NDArray[np.bool_]


def width_of(source: str) -> int:
    """Return the width of the vectors that ``source`` names, reading at most the first line.

    Raises:
        transfer.WeightsError: There is no such source, or its first line holds no vector.
    """
    if source in KNOWN:
        return KNOWN[source][1]
    if source in PACKAGED:
        return PACKAGED[source][1]
    with _open(source, fetch=False) as (lines, where):
        return _first(lines, where)[0]


def read_vectors(source: str, words: Sequence[str]) -> WordVectors:
    """Read the vectors of these words; the others on file pass by, so memory stays near the rows that are kept.

    A word that the source lacks is looked up in other spellings too: in lower case, without the marks around it, a
    run of marks as one (``mr.`` as ``mr``, ``...`` as ``.``), since not all vectors come from one tokenizer.

    Args:
        source: A known name (``glove.6B.100d``), ``mini``, the name or path of a file (``.txt``, ``.gz``, ``.zip``),
            or ``archive.zip:member.txt``.
        words: The words that are needed.

    Raises:
        transfer.WeightsError: The source is missing, broken, or holds a line that is no vector of its width.
    """
    wanted: dict[bytes, list[tuple[int, int]]] = {}  # spelling -> the rows it may fill, and its rank there
    for row, word in enumerate(words):
        for rank, spelling in enumerate(_spellings(word)):
            wanted.setdefault(spelling.encode(), []).append((row, rank))
    with _open(source) as (lines, where):
        width, numbered = _first(lines, where)
        matrix = np.zeros((len(words), width), dtype=np.float32)
        best = np.full(len(words), MISSING, dtype=np.int64)  # the rank of the spelling that gave a row
        for number, line in numbered:
            spelling_found, numbers = _part(line, width, where, number)
            if (rows := wanted.get(spelling_found)) is None:
                continue
            vector = None
            for row, rank in rows:
                if rank < best[row]:  # of two lines for one word the first counts
                    vector = _parse(numbers, width, where, number) if vector is None else vector
                    matrix[row] = vector
                    best[row] = rank
    return WordVectors(matrix, best < MISSING)


def coverage(
    words: Sequence[str], found: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64] | None, examples: int = 10
) -> dict[str, Any]:
    """Say how much of a vocabulary has vectors: JSON alone.

    Args:
        words: The words of the vocabulary.
        found: bool (V,), which of them have a vector.
        counts: How often each occurs in the training texts, int64 (V,), where that is known.
        examples: How many missing words to name, the most frequent first.

    Returns:
        ``words``, ``found``, ``types`` (the share of words found), ``tokens`` (the share of their occurrences found;
        None where the counts are not known) and ``missing``.
    """
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


# --------------------------------------------------------------------------------------------------------------- lines


def _spellings(word: str) -> list[str]:
    """Return the word and what else it may be called, the best first."""
    lower = word.lower()
    return list(dict.fromkeys((word, lower, lower.strip(string.punctuation) or lower[:1])))


def _first(lines: IO[bytes], where: str) -> tuple[int, Iterator[tuple[int, bytes]]]:
    """Return the width, and the lines that hold vectors with their numbers."""
    number, first = 1, lines.readline().rstrip()
    fields = first.split(b" ")
    width = len(fields) - 1
    if width == 1 and fields[0].isdigit() and fields[1].isdigit():  # word2vec and fastText say COUNT WIDTH first
        width = int(fields[1])
        number, first = 2, lines.readline().rstrip()
    if width < 1:
        raise WeightsError(
            "the first line holds no vector",
            where=f"{where}:{number}",
            fix="give a file with a word and its numbers, separated by single spaces, on each line",
        )
    _parse(_part(first, width, where, number)[1], width, where, number)

    def numbered() -> Iterator[tuple[int, bytes]]:
        yield number, first
        for later, line in enumerate(lines, number + 1):
            if line := line.rstrip():
                yield later, line

    return width, numbered()


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
            f"the vector holds something that is no finite number: {_excerpt(numbers)}", where=f"{where}:{number}"
        )
    return vector


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:60] + "...")


# ------------------------------------------------------------------------------------------------------------- sources


@contextlib.contextmanager
def _open(source: str, *, fetch: bool = True) -> Iterator[tuple[IO[bytes], str]]:
    """Open a source and give its lines, and its name for messages."""
    with contextlib.ExitStack() as stack:
        try:
            if source in PACKAGED:
                path: Traversable = resources.files("transfer_text") / "resources" / PACKAGED[source][0]
                member: str | None = None
                where = source
            else:
                path, member = _locate(source, fetch=fetch)
                where = str(path)
            lines: IO[bytes] = stack.enter_context(path.open("rb"))
            if path.name.endswith(".gz"):
                lines = io.BufferedReader(gzip.GzipFile(fileobj=lines), BUFFER_BYTES)
            elif path.name.endswith(".zip"):
                archive = stack.enter_context(zipfile.ZipFile(lines))
                member = _member(archive, member, where)
                where = f"{where}:{member}"
                lines = io.BufferedReader(archive.open(member), BUFFER_BYTES)  # type: ignore[type-var]  # reads like one
            yield lines, where
        except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise WeightsError(
                f"the vectors {source!r} are in a damaged archive: {error}", fix="delete it and fetch it again"
            ) from error
        except OSError as error:
            raise WeightsError(f"the vectors {source!r} cannot be read: {error}") from error


def _member(archive: zipfile.ZipFile, member: str | None, where: str) -> str:
    names = [name for name in archive.namelist() if not name.endswith("/")]
    if member is None and len(names) == 1:
        return names[0]
    if member is None or member not in names:
        raise WeightsError(
            f"the archive holds {len(names)} files" if member is None else f"the archive holds no {member!r}",
            where=where,
            available=names,
            fix=f"name one of them: {where}:{names[0]}" if names else "fetch the archive again",
        )
    return member


def _locate(source: str, *, fetch: bool) -> tuple[Path, str | None]:
    """Return the file that a source means, and the member of it where it is an archive that was told."""
    name, _, member = source.partition(".zip:")
    written = Path(f"{name}.zip" if member else source).expanduser()
    folders = (data_folder(), data_folder() / "vectors")
    for path in (written, *(folder / written for folder in folders)):
        if path.is_file():
            return path, member or None
    for folder in folders:
        for suffix in SUFFIXES:
            if (path := folder / f"{source}{suffix}").is_file():
                return path, f"{source}.txt" if suffix == ".zip" and source in KNOWN else None
    if source in KNOWN:
        archive = KNOWN[source][0]
        for folder in folders:
            if (path := folder / archive).is_file():
                return path, f"{source}.txt"
        if fetch:
            try:
                return download(SITE + archive, f"vectors/{archive}"), f"{source}.txt"
            except DataError as error:
                raise WeightsError(
                    error.problems[0].message,
                    fix=f"put {source}.txt, {source}.txt.gz or {archive} into {folders[1]}",
                ) from error
    raise WeightsError(
        f"there are no word vectors {source!r}",
        available=(*KNOWN, *PACKAGED, *_on_disk(folders)),
        fix=f"give a known name, a path, or put {source}.txt into {folders[1]}",
    )


def _on_disk(folders: Sequence[Path]) -> list[str]:
    """Return the names of what looks like vectors in the folder of vectors."""
    found = folders[-1]
    return sorted(path.name for path in found.iterdir() if path.name.endswith(SUFFIXES)) if found.is_dir() else []
