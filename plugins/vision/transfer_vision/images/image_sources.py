"""Folders and zip archives of pictures, read alike: what is in them, and one picture at a time."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from transfer import DataError
from transfer_vision.images.decoding import open_picture

# The extensions that torchvision's ImageFolder takes.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_LARGEST_MEMBER_BYTES = 1 << 29


@dataclass
class Level:
    """What lies directly in a folder: names, sorted, without hidden ones."""

    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class Source(ABC):
    """A tree of files, each known by its path below the root with ``/`` between the parts. Picklable.

    Args:
        path: The folder or archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def name(self, path: str) -> str:
        """Return what a file or folder is called in messages; a byte that is not UTF-8 is written as its number."""
        return _shown(f"{self.path}/{path}" if path else str(self.path))

    @abstractmethod
    def levels(self) -> Mapping[str, Level]:
        """Return every folder by its path; the root's is empty.

        Raises:
            transfer.DataError: It cannot be read.
        """

    @abstractmethod
    def identity(self, path: str) -> tuple[int, ...]:
        """Return what tells whether a file is still the same, without reading it: its size and time, or checksum.

        Raises:
            ValueError, OSError: The file is gone, or is a link to one that is.
        """

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return the content of a file.

        Raises:
            ValueError, OSError: It is gone or damaged.
        """


class FolderSource(Source):
    """A folder on disk."""

    def levels(self) -> Mapping[str, Level]:  # noqa: D102  # as the base says
        found = {}
        try:
            for folder, folders, files in os.walk(self.path, onerror=_raise, followlinks=True):
                folders[:] = sorted(n for n in folders if not _hidden(n) and not _leads_back(Path(folder, n)))
                relative = Path(folder).relative_to(self.path)
                key = "" if relative == Path() else relative.as_posix()
                found[key] = Level(list(folders), sorted(name for name in files if not _hidden(name)))
        except OSError as error:
            raise DataError(f"this folder cannot be read: {error.strerror}", where=str(error.filename)) from error
        return found

    def identity(self, path: str) -> tuple[int, ...]:  # noqa: D102
        file = self.path / path
        try:
            known = file.stat()
        except FileNotFoundError:
            if file.is_symlink():
                raise FileNotFoundError(f"a link that points nowhere, to {_shown(os.readlink(file))}") from None
            raise FileNotFoundError("there is no such file") from None
        if not stat.S_ISREG(known.st_mode):
            raise OSError("it is no regular file")  # and may have no end
        return known.st_size, known.st_mtime_ns

    def read(self, path: str) -> bytes:  # noqa: D102
        return (self.path / path).read_bytes()


class ZipSource(Source):
    """A zip archive, or one folder in it; it is never unpacked, and each process opens it for itself.

    Args:
        path: The archive.
        inside: The folder that counts as the root; null: the archive's only folder where there is just one.
    """

    def __init__(self, path: Path, inside: str | None = None) -> None:
        super().__init__(path)
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        if inside is None:
            top = _zip_levels(path)[""]
            inside = top.folders[0] if len(top.folders) == 1 and not top.files else ""
        self._inside = inside

    def levels(self) -> Mapping[str, Level]:  # noqa: D102
        levels = _zip_levels(self.path)
        if not self._inside:
            return levels
        prefix = f"{self._inside}/"
        return {
            path.removeprefix(self._inside).removeprefix("/"): level
            for path, level in levels.items()
            if path == self._inside or path.startswith(prefix)
        }

    def name(self, path: str) -> str:  # noqa: D102
        return _shown("/".join(part for part in (str(self.path), self._inside, path) if part))

    def identity(self, path: str) -> tuple[int, ...]:  # noqa: D102
        try:
            known = self._archive().getinfo(self._member(path))
        except KeyError:
            raise FileNotFoundError("there is no such file in the archive") from None
        return known.file_size, known.CRC

    def _member(self, path: str) -> str:
        return f"{self._inside}/{path}" if self._inside else path

    def read(self, path: str) -> bytes:  # noqa: D102
        member = self._member(path)
        archive = self._archive()
        try:
            if archive.getinfo(member).file_size > _LARGEST_MEMBER_BYTES:
                raise ValueError(f"would unpack to more than {_LARGEST_MEMBER_BYTES} bytes")
            return archive.read(member)
        # What zipfile raises for a damaged, missing, encrypted or oddly compressed member.
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"cannot be read from the archive: {error}") from error

    def _archive(self) -> zipfile.ZipFile:
        # A forked loader process shares the position of its parent's file, so it needs one of its own.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}


def open_source(path: Path) -> Source:
    """Return a folder or a zip archive as a source.

    Raises:
        transfer.DataError: It is neither.
    """
    if path.is_dir():
        return FolderSource(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return ZipSource(path)
    raise DataError(
        "this is neither a folder nor a zip archive" if path.exists() else "there is no such folder or zip archive",
        where=str(path),
        fix="give a folder of pictures, a folder for each class",
    )


class Pictures(Sequence[Image.Image]):
    """A column of pictures that are opened, not decoded, when they are asked for. Picklable.

    Args:
        source: Where they lie.
        paths: Their paths in it.
    """

    def __init__(self, source: Source, paths: Sequence[str]) -> None:
        self._source = source
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        """Return one PIL image, or a column of some.

        Raises:
            ValueError, OSError: The file is gone or no picture.
        """
        if isinstance(index, slice):
            return Pictures(self._source, self._paths[index])
        path = self._paths[index]
        return open_picture(self._source.read(path), self._source.name(path))

    def fingerprint(self) -> str:
        """Return what tells whether these are the same files, without reading them."""
        identities = [(path, *self._source.identity(path)) for path in self._paths]
        return hashlib.sha256(repr(identities).encode()).hexdigest()


def walk(levels: Mapping[str, Level], folder: str) -> Iterator[str]:
    """Yield the paths of all files below a folder, in order."""
    level = levels[folder]
    yield from (f"{folder}/{name}" if folder else name for name in level.files)
    for name in level.folders:
        yield from walk(levels, f"{folder}/{name}" if folder else name)


def is_picture(path: str) -> bool:
    """Tell by its extension whether a file is taken for a picture."""
    return path.lower().endswith(EXTENSIONS)


def _zip_levels(path: Path) -> Mapping[str, Level]:
    levels = {"": Level()}
    try:
        with zipfile.ZipFile(path) as archive:
            members = [_safe(member, path) for member in archive.infolist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"this archive cannot be read: {error}", where=str(path), fix="remove it and download it again"
        ) from error
    for member in members:
        parts = PurePosixPath(member).parts
        if not parts or any(map(_hidden, parts)):
            continue
        folders = parts if member.endswith("/") else parts[:-1]
        for depth, name in enumerate(folders):
            parent, here = "/".join(folders[:depth]), "/".join(folders[: depth + 1])
            if here not in levels:
                levels[here] = Level()
                levels[parent].folders.append(name)
        if not member.endswith("/"):
            levels["/".join(folders)].files.append(parts[-1])
    for level in levels.values():
        level.folders.sort()
        level.files.sort()
    return levels


def _safe(member: zipfile.ZipInfo, archive: Path) -> str:
    """Return the name of a member; nothing is ever unpacked, but who packs such names means no good."""
    name = member.filename
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or name.startswith(("/", "\\")) or ":" in name.split("/")[0]:
        what = "leads out of the archive"
    elif stat.S_ISLNK(member.external_attr >> 16):
        what = "is a link"
    elif member.file_size > _LARGEST_MEMBER_BYTES and is_picture(name):
        what = f"would unpack to {member.file_size:,} bytes"
    else:
        return name
    raise DataError(f"the member {name!r} {what}", where=_shown(str(archive)), fix="get the archive from its publisher")


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _leads_back(folder: Path) -> bool:
    """Tell a link to a folder that holds it, which would be walked through for ever."""
    return folder.is_symlink() and folder.resolve() in folder.absolute().parent.resolve().joinpath("_").parents


def _shown(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _raise(error: OSError) -> None:
    raise error
