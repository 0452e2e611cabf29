"""What a folder of images may hold beside images, and archives that mean no good."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfer import DataError, Split
from transfer_vision.data.datasets import ImageFolder
from transfer_vision.images import validation as scan
from transfer_vision.preprocessing import ImagePreprocessing


def make_image(kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """Return a PNG that says it has 40,000 x 40,000 pixels."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(b"\0" * 1000)}
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BAD = {
    "cut.jpg": (make_image()[:-400], "truncated"),
    "zero.jpg": (b"", "the file is empty"),
    "text.jpg": (b"dear diary", "not an image that can be read: it starts with b'dear dia'"),
    "bomb.png": (bomb(), "decompression bomb"),
    "damaged.png": (make_image("PNG").replace(b"IDAT", b"IXAT", 1), "not an image"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.jpg").write_bytes(make_image())
    return tmp_path


def load(root: Path, **options: object) -> Split:
    return ImageFolder(root=str(root), test_fraction=0, **options).load().splits["train"]


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_named_with_reason(root: Path, name: str) -> None:
    content, message = BAD[name]
    (root / "a" / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(root)
    problem = caught.value.problems[0]
    assert f"1 of 9 images cannot be decoded:\n  a/{name}  " in problem.message
    assert message in problem.message
    assert problem.where == str(root)
    assert "bad_files: skip" in (problem.fix or "")


def test_bad_files_are_left_out_with_a_table(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, (content, _) in BAD.items():
        (root / "b" / name).write_bytes(content)
    split = load(root, bad_files="skip")
    assert [Path(name).name for name in split.names] == [f"{i}.jpg" for i in range(4)] * 2
    assert split.targets.tolist() == [0] * 4 + [1] * 4
    assert "5 of 13 images cannot be decoded:" in caplog.text
    for name, (_, message) in BAD.items():
        (line,) = [line for line in caplog.text.splitlines() if f"  b/{name} " in line]
        assert message in line
    encoded = ImagePreprocessing(image_size=32).encode(list(split.fields["image"]))
    assert len(encoded) == 8


@pytest.mark.parametrize(
    ("name", "kind"), [("x.jfif", "JPEG"), ("x.JPE", "JPEG"), ("x.gif", "GIF"), ("x.avif", "AVIF"), ("x.tga", "TGA")]
)
def test_images_with_less_common_extensions_are_read(root: Path, name: str, kind: str) -> None:
    (root / "a" / name).write_bytes(make_image(kind))
    split = load(root)
    assert sum(path.endswith(name) for path in split.names) == 1
    assert len(ImagePreprocessing(image_size=32).encode(list(split.fields["image"]))) == 9


def test_a_name_that_is_not_utf_8(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = os.fsencode(root) + b"/a/caf\xe9.jpg"
    try:
        Path(os.fsdecode(odd)).write_bytes(make_image())
    except OSError:
        pytest.skip("this file system takes no such name")
    split = load(root)
    assert f"{root}/a/caf\\xe9.jpg" in split.names
    assert len(ImagePreprocessing(image_size=32).encode(list(split.fields["image"]))) == 9
    assert split.fingerprint("image") == load(root).fingerprint("image")
    Path(os.fsdecode(odd)).write_bytes(b"")
    assert len(load(root, bad_files="skip")) == 8
    assert "a/caf\\xe9.jpg  not an image" in caplog.text


def test_a_link_that_points_nowhere(root: Path) -> None:
    (root / "a" / "gone.jpg").symlink_to(root / "elsewhere.jpg")
    with pytest.raises(DataError, match=r"a/gone\.jpg  a link to a file that is missing, .*elsewhere\.jpg"):
        load(root)
    assert len(load(root, bad_files="skip")) == 8


def test_a_pipe_without_an_end(root: Path) -> None:
    os.mkfifo(root / "a" / "pipe.jpg")
    with pytest.raises(DataError, match="no regular file"):
        load(root)


def test_link_to_parent_folder_is_not_followed(root: Path) -> None:
    (root / "a" / "again").symlink_to(root, target_is_directory=True)
    assert len(load(root)) == 8


def test_a_class_without_a_good_image_is_refused(root: Path) -> None:
    for path in (root / "b").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="class 'b' of the train split has no good image"):
        load(root, bad_files="skip")


def test_changed_images_are_decoded_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    check = scan.check_image
    monkeypatch.setattr(scan, "check_image", lambda content, name: (decoded.append(name), check(content, name)))
    assert len(load(root)) == len(load(root)) == len(decoded) == 8
    (root / "a" / "2.jpg").write_bytes(b"now a text")
    with pytest.raises(DataError, match=r"a/2\.jpg"):
        load(root)
    assert decoded[8:] == [f"{root}/a/2.jpg"]
    (root / "a" / "2.jpg").write_bytes(make_image())
    assert len(load(root)) == 8


def test_damaged_record_and_unwritable_folder(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = tmp_path_factory.mktemp("records")
    monkeypatch.setenv("TRANSFER_CACHE", str(cache))
    load(root)
    (record,) = (cache / "images").iterdir()
    record.write_text("{")
    assert len(load(root)) == 8
    blocked = tmp_path_factory.mktemp("blocked") / "file"
    blocked.write_text("")
    monkeypatch.setenv("TRANSFER_CACHE", str(blocked))
    assert len(load(root)) == 8
    assert "cannot be recorded" in caplog.text


def test_threads_find_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (content, _) in BAD.items():
        (root / "b" / name).write_bytes(content)
    source, paths = scan.ImageSource, [f"b/{name}" for name in BAD]
    from transfer_vision.images.image_sources import FolderSource

    assert issubclass(FolderSource, source)
    found = []
    for threads in (1, 4):
        monkeypatch.setattr(scan.torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(scan, "_read", lambda _: {})
        found.append(scan.scan(FolderSource(root), paths))
    assert found[0] == found[1]
    assert list(found[0]) == paths


# ------------------------------------------------------------------------------------------------------------ archives


def archive(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in (("p/a/1.jpg", make_image()), ("p/b/1.jpg", make_image()), *members):
            out.writestr(name, content)
    return path


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("p/a/../../../evil.jpg", "leads out of the archive"),
        ("/etc/evil.jpg", "leads out of the archive"),
        ("..\\evil.jpg", "leads out of the archive"),
        ("C:/evil.jpg", "leads out of the archive"),
        (link("p/a/evil.jpg"), "is a link"),
    ],
)
def test_archives_that_mean_no_good_are_refused(tmp_path: Path, member: str | zipfile.ZipInfo, message: str) -> None:
    path = archive(tmp_path / "hostile.zip", (member, b"/etc/passwd"))
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert "evil.jpg" in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hostile.zip"]


def test_a_member_that_would_fill_memory_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.zip", ("p/a/bomb.jpg", b"\0" * 10_000))
    size = (10_000).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (2**31).to_bytes(4, "little")))
    with pytest.raises(DataError, match="would unpack to 2,147,483,648 bytes"):
        load(path)


def test_member_larger_than_declared_is_bad(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.zip", ("p/a/bomb.jpg", b"\0" * 5_000_000))
    size = (5_000_000).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (10).to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"a/bomb\.jpg  cannot be read from the archive"):
        load(path)
