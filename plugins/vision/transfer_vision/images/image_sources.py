"""Folders and zip archives of images behind one interface."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from transfer import DataError, Level, folder_levels, is_hidden
from transfer_vision.images.decoding import open_image

# The extensions that torchvision's ImageFolder takes, and others of photos and graphics that Pillow reads.
TORCHVISION_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
EXTENSIONS = (*TORCHVISION_EXTENSIONS, ".jfif", ".jpe", ".jp2", ".avif", ".gif", ".pbm", ".pnm", ".dib", ".tga")
_MAX_MEMBER_BYTES = 1 << 29


class ImageSource(ABC):
    """A tree of files. A file's path is relative to the root, with ``/`` as the separator. Picklable.

    Args:
        path: The folder or archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digests: dict[str, str] = {}
        """Digests of the contents of files that have been read, by path."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"digests": {}}  # loader processes need no digests

    def digest(self, path: str) -> str:
        """Return the digest of a file's content; the file is read if its digest is not recorded."""
        return self.digests.get(path) or content_digest(self.read(path))

    def name(self, path: str) -> str:
        """Return the name of a file or folder in messages; bytes that are not UTF-8 are escaped."""
        return _shown(f"{self.path}/{path}" if path else str(self.path))

    @abstractmethod
    def levels(self) -> Mapping[str, Level]:
        """Return every folder by its path; the path of the root is empty.

        Raises:
            transfer.DataError: The folder or archive cannot be read.
        """

    @abstractmethod
    def identity(self, path: str) -> tuple[int, ...]:
        """Return a value that changes if the file changes, without reading the file: size and time, or checksum.

        Raises:
            ValueError, OSError: The file is missing, or is a link to a missing file.
        """

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return the content of a file.

        Raises:
            ValueError, OSError: The file is missing or damaged.
        """


class FolderSource(ImageSource):
    """A folder on disk."""

    def levels(self) -> Mapping[str, Level]:  # noqa: D102  # see the base class
        return folder_levels(self.path)

    def identity(self, path: str) -> tuple[int, ...]:  # noqa: D102
        file = self.path / path
        try:
            status = file.stat()
        except FileNotFoundError:
            if file.is_symlink():
                raise FileNotFoundError(f"a link to a file that is missing, {_shown(os.readlink(file))}") from None
            raise FileNotFoundError("there is no such file") from None
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")  # a device or pipe may never end
        return status.st_size, status.st_mtime_ns

    def read(self, path: str) -> bytes:  # noqa: D102
        return (self.path / path).read_bytes()


class ArchiveSource(ImageSource):
    """A zip archive, or one folder in it. It is never unpacked, and each process opens it separately.

    Args:
        path: The archive.
        inside: The folder that is the root; None: the only folder of the archive, or the archive itself.
    """

    def __init__(self, path: Path, inside: str | None = None) -> None:
        super().__init__(path)
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        if inside is None:
            top = _zip_levels(path)[""]
            # Most archives contain one folder with everything in it.
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
            member = self._archive().getinfo(self._member(path))
        except KeyError:
            raise FileNotFoundError("there is no such file in the archive") from None
        return member.file_size, member.CRC

    def _member(self, path: str) -> str:
        return f"{self._inside}/{path}" if self._inside else path

    def read(self, path: str) -> bytes:  # noqa: D102
        member = self._member(path)
        archive = self._archive()
        try:
            if archive.getinfo(member).file_size > _MAX_MEMBER_BYTES:
                raise ValueError(f"would unpack to more than {_MAX_MEMBER_BYTES} bytes")
            return archive.read(member)
        # The exceptions of zipfile for damaged, missing, encrypted or unsupported members.
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"cannot be read from the archive: {error}") from error

    def _archive(self) -> zipfile.ZipFile:
        # A forked loader process shares the file position of its parent, so it opens the archive again.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_opened": None}


def open_source(path: Path) -> ImageSource:
    """Open a folder or a zip archive.

    Raises:
        transfer.DataError: The path is neither of the two.
    """
    if path.is_dir():
        return FolderSource(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return ArchiveSource(path)
    raise DataError(
        "this is neither a folder nor a zip archive" if path.exists() else "there is no such folder or zip archive",
        where=str(path),
        fix="give a folder of images, with a folder for each class",
    )


class ImageColumn(Sequence[Image.Image]):
    """A column of images that are opened, but not decoded, on access. Picklable.

    Args:
        source: The folder or archive that contains them.
        paths: Their paths in the source.
    """

    def __init__(self, source: ImageSource, paths: Sequence[str]) -> None:
        self._source = source
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        """Return one PIL image, or a column for a slice.

        Raises:
            ValueError, OSError: The file is missing or no image.
        """
        if isinstance(index, slice):
            return ImageColumn(self._source, self._paths[index])
        path = self._paths[index]
        return open_image(self._source.read(path), self._source.name(path))

    def fingerprint(self) -> str:
        """Return a digest that changes if a file changes, without reading the files."""
        # Sizes and times instead of contents: a fingerprint of a million images must not read them.
        identities = [(path, *self._source.identity(path)) for path in self._paths]
        return hashlib.sha256(repr(identities).encode()).hexdigest()

    def content_keys(self) -> list[str]:
        """Return the digest of the content of each file."""
        return [self._source.digest(path) for path in self._paths]


def content_digest(content: bytes) -> str:
    """Return the digest by which files with the same content are found."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def has_image_extension(path: str) -> bool:
    """Return whether a file has the extension of an image format."""
    return path.lower().endswith(EXTENSIONS)


def has_torchvision_extension(path: str) -> bool:
    """Return whether torchvision's ImageFolder takes a file, by which the images of published datasets are counted."""
    return path.lower().endswith(TORCHVISION_EXTENSIONS)


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
        # Archives need not have entries for folders: derive them from the paths of the files.
        parts = PurePosixPath(member).parts
        if not parts or any(map(is_hidden, parts)):
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
    """Return the name of a member; refuse names and sizes that only a malicious archive contains."""
    name = member.filename
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or name.startswith(("/", "\\")) or ":" in name.split("/")[0]:
        reason = "leads out of the archive"
    elif stat.S_ISLNK(member.external_attr >> 16):
        reason = "is a link"
    elif member.file_size > _MAX_MEMBER_BYTES and has_image_extension(name):
        reason = f"would unpack to {member.file_size:,} bytes"
    else:
        return name
    raise DataError(
        f"the member {name!r} {reason}", where=_shown(str(archive)), fix="get the archive from its publisher"
    )


def _shown(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
