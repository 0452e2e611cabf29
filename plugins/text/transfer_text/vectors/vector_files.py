"""Files of word vectors: known names, packaged files, paths and archives."""

from __future__ import annotations

import contextlib
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO

from transfer import DataError, WeightsError, data_folder, download
from transfer_text.plugins import names

SITE = "https://nlp.stanford.edu/data/"
_6B = "glove.6B.zip"
_TWITTER = "glove.twitter.27B.zip"
# Archive and width of each known name (Pennington et al. 2014, https://nlp.stanford.edu/projects/glove).
KNOWN: dict[str, tuple[str, int]] = {
    "glove.6B.50d": (_6B, 50),
    "glove.6B.100d": (_6B, 100),
    "glove.6B.200d": (_6B, 200),
    "glove.6B.300d": (_6B, 300),
    "glove.42B.300d": ("glove.42B.300d.zip", 300),
    "glove.840B.300d": ("glove.840B.300d.zip", 300),
    "glove.twitter.27B.25d": (_TWITTER, 25),
    "glove.twitter.27B.50d": (_TWITTER, 50),
    "glove.twitter.27B.100d": (_TWITTER, 100),
    "glove.twitter.27B.200d": (_TWITTER, 200),
}
PACKAGED = {"mini": ("mini.vectors.txt.gz", 100)}
SUFFIXES = (".txt", ".txt.gz", ".zip", ".vec", ".vec.gz", ".vec.zip", ".bin", ".bin.gz")
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class VectorFile:
    """A file of word vectors, possibly in an archive.

    Args:
        path: Path of the file or of the archive that contains it.
        member: Name of the file in the archive. None if the archive contains only one file.
    """

    path: Traversable
    member: str | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[IO[bytes], str, bool]]:
        """Open the file. Yield its content, its name for errors, and whether it has word2vec's binary format.

        Raises:
            transfer.WeightsError: The file cannot be read or is damaged.
        """
        where, name = str(self.path), self.path.name
        with contextlib.ExitStack() as stack:
            try:
                content: IO[bytes] = stack.enter_context(self.path.open("rb"))
                if name.endswith(".gz"):
                    # Readers take single lines: without a buffer, each line would be a call of gzip.
                    content = io.BufferedReader(gzip.GzipFile(fileobj=content), BUFFER_BYTES)
                    name = name.removesuffix(".gz")
                elif name.endswith(".zip"):
                    archive = stack.enter_context(zipfile.ZipFile(content))
                    name = _member(archive, self.member, where)
                    where = f"{where}:{name}"
                    content = io.BufferedReader(archive.open(name), BUFFER_BYTES)  # type: ignore[type-var]  # reads like one
                yield content, where, name.endswith(".bin")
            except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise WeightsError(
                    f"the archive of the vectors is damaged: {error}",
                    where=where,
                    fix="delete it and download it again",
                ) from error
            except OSError as error:
                raise WeightsError(f"the vectors cannot be read: {error}", where=where) from error


def locate(source: str, *, fetch: bool = True) -> VectorFile:
    """Return the file of a source.

    Args:
        source: A known or packaged name, the name or path of a file, or ``archive.zip:member.txt``.
        fetch: Whether to download the vectors of a known name if they are missing.

    Raises:
        transfer.WeightsError: The file does not exist; the error lists the available files and the expected path.
    """
    if source in PACKAGED:
        return VectorFile(resources.files("transfer_text") / "resources" / PACKAGED[source][0])
    name, _, member = source.partition(".zip:")
    written = Path(f"{name}.zip" if member else source).expanduser()
    folders = (data_folder(), data_folder() / "vectors")
    # A file that the user has named takes precedence over a known name.
    for path in (written, *(folder / written for folder in folders)):
        if path.is_file():
            return VectorFile(path, member or None)
    for folder in folders:
        for suffix in SUFFIXES:
            if (path := folder / f"{source}{suffix}").is_file():
                return VectorFile(path, f"{source}.txt" if suffix == ".zip" and source in KNOWN else None)
    if source in KNOWN:
        archive = KNOWN[source][0]
        for folder in folders:
            if (path := folder / archive).is_file():
                return VectorFile(path, f"{source}.txt")
        if fetch:
            try:
                return VectorFile(download(SITE + archive, f"vectors/{archive}"), f"{source}.txt")
            except DataError as error:
                raise WeightsError(
                    error.problems[0].message,
                    fix=f"put {source}.txt, {source}.txt.gz or {archive} into {folders[1]}",
                ) from error
    raise WeightsError(
        f"unknown word vectors {source!r}",
        available=(*KNOWN, *PACKAGED, *(f"{name}/..." for name in names("vectors")), *_on_disk(folders)),
        fix=f"use a known name or a path, or put {source if source.endswith(SUFFIXES) else f'{source}.txt'} "
        f"into {folders[1]}",
    )


def _member(archive: zipfile.ZipFile, member: str | None, where: str) -> str:
    names = [name for name in archive.namelist() if not name.endswith("/")]
    if member is None and len(names) == 1:
        return names[0]
    if member is None or member not in names:
        raise WeightsError(
            f"the archive contains {len(names)} files: expected one"
            if member is None
            else f"the archive does not contain {member!r}",
            where=where,
            available=names,
            fix=f"name one of them: {where}:{names[0]}" if names else "download the archive again",
        )
    return member


def _on_disk(folders: Sequence[Path]) -> list[str]:
    """Return the names of the vector files in the folder of vectors."""
    folder = folders[-1]
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(SUFFIXES)) if folder.is_dir() else []
