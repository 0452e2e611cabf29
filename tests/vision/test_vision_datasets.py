from __future__ import annotations

import logging
import multiprocessing
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfer import ConfigError, Data, DataError
from transfer.data.splits import complete
from transfer_vision.data import datasets as datasets_module
from transfer_vision.data.datasets import HotDog, Hymenoptera, ImageFolder, PublishedImages, Shapes


def put(root: Path, *names: str) -> Path:
    """Write a small image, whose color tells its path, under each name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp"):
            Image.new("RGB", (6, 4), (sum(name.encode()) % 256, 0, 0)).save(path)
        else:
            path.write_text("no image")
    return root


def zipped(root: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(root.rglob("*")):
            out.write(path, path.relative_to(root.parent).as_posix())
    return archive


def classes_of(data: Data, split: str) -> dict[str, list[str]]:
    """Return the file names of each class in a split."""
    found: dict[str, list[str]] = {}
    for name, target in zip(data.splits[split].names, data.splits[split].targets, strict=True):
        found.setdefault(data.spec.classes[target], []).append(name.rsplit("/", 1)[1])
    return found


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRANSFER_DATA", str(tmp_path))
    return tmp_path


# ------------------------------------------------------------------------------------------------- ImageFolder: layout


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folders_of_splits(tmp_path: Path, val: str) -> None:
    put(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", val, "test") for name in ("dog", "cat")))
    data = ImageFolder(root=str(tmp_path)).load()
    assert data.spec.classes == ("cat", "dog")
    assert data.spec.fields == ("image",)
    assert set(data.splits) == {"train", "validation", "test"}
    assert data.splits["test"].names == [f"{tmp_path}/test/cat/1.png", f"{tmp_path}/test/dog/1.png"]
    assert data.splits["validation"].targets.tolist() == [0, 1]
    assert data.splits["train"].targets.dtype == np.int64


def test_val_without_test_becomes_the_test_split(tmp_path: Path) -> None:
    put(tmp_path, *(f"train/{name}/{i}.png" for name in "ab" for i in range(2)), "val/a/9.png", "val/b/9.png")
    data = ImageFolder(root=str(tmp_path)).load()
    assert set(data.splits) == {"train", "validation"}
    assert len(complete(data, validation=0.5, limit=None)["test"]) == 2


def test_folders_of_splits_may_have_any_names(tmp_path: Path) -> None:
    put(tmp_path, *(f"{split}/{name}/1.png" for split in ("learn", "tune", "judge", "test") for name in "ab"))
    data = ImageFolder(root=str(tmp_path), train="learn", val="tune", test="judge").load()
    assert {split: examples.name(0).split("/")[-3] for split, examples in data.splits.items()} == {
        "train": "learn",
        "validation": "tune",
        "test": "judge",
    }


def test_image_extensions_in_any_case_and_depth(tmp_path: Path) -> None:
    put(tmp_path, "a/1.JPG", "a/deep/er/2.jpeg", "a/3.webp", "b/4.bmp", "b/5.PNG")
    data = ImageFolder(root=str(tmp_path), test_fraction=0).load()
    assert classes_of(data, "train") == {"a": ["1.JPG", "3.webp", "2.jpeg"], "b": ["4.bmp", "5.PNG"]}


def test_other_files_are_counted_and_hidden_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a/1.png", "b/1.png", "a/notes.txt", "b/old.heic", "b/older.heic", "README.md")
    put(tmp_path, "a/.DS_Store", ".ipynb_checkpoints/1.png", "__MACOSX/a/._1.png")
    data = ImageFolder(root=str(tmp_path), test_fraction=0).load()
    assert data.spec.classes == ("a", "b")
    assert len(data.splits["train"]) == 2
    assert "skipped 4 files that are no images: 2 .heic, 1 .md, 1 .txt" in caplog.text


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    put(tmp_path, "train/1.png", "bus/1.png", "car/1.png")
    assert ImageFolder(root=str(tmp_path), test_fraction=0).load().spec.classes == ("bus", "car", "train")


def test_test_folder_without_classes_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png", "test/1.png")
    data = ImageFolder(root=str(tmp_path)).load()
    assert data.splits["validation"].name(0).endswith("val/a/1.png")
    assert f"{tmp_path}/test: not used" in caplog.text


def test_a_stratified_part_becomes_the_test_split(tmp_path: Path) -> None:
    put(tmp_path, *(f"a/{i}.png" for i in range(20)), *(f"b/{i}.png" for i in range(5)))
    first, again = (ImageFolder(root=str(tmp_path)).load() for _ in range(2))
    test, train = classes_of(first, "test"), classes_of(first, "train")
    assert {name: len(files) for name, files in test.items()} == {"a": 4, "b": 1}
    assert {name: sorted(files + test[name]) for name, files in train.items()} == {
        "a": sorted(f"{i}.png" for i in range(20)),
        "b": sorted(f"{i}.png" for i in range(5)),
    }
    assert classes_of(again, "test") == test
    moved = tmp_path / "elsewhere"
    for name in "ab":
        shutil.copytree(tmp_path / name, moved / name)
    assert classes_of(ImageFolder(root=str(moved)).load(), "test") == test


def test_root_is_found_below_the_data_folder(data_folder: Path) -> None:
    put(data_folder / "my" / "images", "a/1.png", "b/1.png")
    assert ImageFolder(root="my/images", test_fraction=0).load().splits["train"].name(0).startswith(str(data_folder))


def test_a_zip_archive_is_read_like_the_folder(tmp_path: Path) -> None:
    root = put(
        tmp_path / "images", "train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png", "train/a/.DS_Store"
    )
    packed = ImageFolder(root=str(zipped(root, tmp_path / "images.zip"))).load()
    unpacked = ImageFolder(root=str(root)).load()
    assert packed.spec == unpacked.spec
    for split in ("train", "test"):
        assert classes_of(packed, split) == classes_of(unpacked, split)
        pairs = zip(packed.splits[split].fields["image"], unpacked.splits[split].fields["image"], strict=True)
        assert all(a.tobytes() == b.tobytes() for a, b in pairs)
    assert packed.splits["train"].name(0) == f"{tmp_path}/images.zip/images/train/a/1.png"


# ------------------------------------------------------------------------------------------------- ImageFolder: errors


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ([], {}, "is empty"),
        (["1.png", "2.png"], {}, "contains 2 files but no class folder"),
        (["a/1.png"], {}, "only one class, 'a'"),
        (["a/1.png", "b/notes.txt", "b/2.heic"], {}, "class 'b' has no images, only 1 .heic, 1 .txt"),
        (["a/1.png", "b/.hidden.png"], {}, "class 'b' has no images"),
        (["a/1.png", "b/1.png", "b/2.png"], {}, "class 'a' has too few images"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"], {}, "unknown class 'c'"),
        (["train/a/1.png", "train/b/1.png", "test/a/note.txt"], {}, "the folder contains no images"),
        (["Train/a/1.png", "Train/b/1.png", "Test/a/1.png", "Test/b/1.png"], {}, "no folder 'train'"),
        (["train/1.png", "test/2.png"], {}, "no folder 'train' with a folder per class"),
        (["train/a/1.png", "train/b/1.png"], {"val": "dev"}, "no folder 'dev'"),
        (
            ["train/a/1.png", "train/b/1.png", "test/1.png"],
            {"test": "test"},
            "no folder 'test' with a folder per class",
        ),
        (["a/1.png", "b/1.png"], {"train": "learn"}, "no folder 'learn'"),
        ([f"{s}/{c}/1.png" for s in ("train", "val", "valid") for c in "ab"], {}, "val and valid can each be"),
    ],
)
def test_layouts_that_cannot_be_meant(tmp_path: Path, files: list[str], options: dict[str, str], message: str) -> None:
    put(tmp_path, *files)
    with pytest.raises(DataError, match=message) as caught:
        ImageFolder(root=str(tmp_path), **options).load()
    assert str(tmp_path) in str(caught.value)
    assert "fix: " in str(caught.value)


@pytest.mark.parametrize("folder", ["val/c", "elsewhere"])
def test_validation_split_may_lack_a_class(tmp_path: Path, folder: str) -> None:
    put(tmp_path, *(f"train/{name}/1.png" for name in "abc"), "val/a/1.png", "val/b/2.png")
    (tmp_path / folder).mkdir()
    data = ImageFolder(root=str(tmp_path)).load()
    assert data.spec.classes == ("a", "b", "c")
    assert classes_of(data, "validation") == {"a": ["1.png"], "b": ["2.png"]}


def test_message_names_the_folder_and_the_nearest_class(tmp_path: Path) -> None:
    put(tmp_path, *(f"train/{name}/1.png" for name in ("cat", "dog")), "val/dogs/1.png")
    with pytest.raises(DataError, match="unknown class 'dogs'") as caught:
        ImageFolder(root=str(tmp_path)).load()
    (problem,) = caught.value.problems
    assert (problem.where, problem.fix) == (f"{tmp_path}/val", "did you mean 'dog'?")


def test_an_empty_class_folder_is_an_error(tmp_path: Path) -> None:
    (put(tmp_path, "a/1.png", "b/1.png") / "c").mkdir()
    with pytest.raises(DataError, match="class 'c' has no images"):
        ImageFolder(root=str(tmp_path)).load()


@pytest.mark.parametrize(
    ("name", "message"), [("absent", "no such folder"), ("text.zip", "neither a folder nor a zip")]
)
def test_a_root_that_is_none(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(DataError, match=message) as caught:
        ImageFolder(root=str(tmp_path / name)).load()
    assert str(tmp_path / name) in str(caught.value)


def test_one_folder_for_two_splits_is_refused() -> None:
    with pytest.raises(ConfigError, match="two splits use the same folder"):
        ImageFolder(root="images", val="held_out", test="held_out")


def test_the_constructor_reads_nothing(tmp_path: Path) -> None:
    spec = ImageFolder(root=str(tmp_path / "absent")).spec
    assert (spec.fields, spec.target, spec.classes) == (("image",), "class", ())


# -------------------------------------------------------------------------------------------------------------- columns


def test_images_are_opened_when_asked_for(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/1.png", "b/2.png")
    column = ImageFolder(root=str(tmp_path), test_fraction=0).load().splits["train"].fields["image"]
    (tmp_path / "b/1.png").write_text("no image")
    (tmp_path / "b/2.png").unlink()
    assert column[0].size == (6, 4)
    with pytest.raises(OSError, match="not an image"):
        column[1]
    with pytest.raises(FileNotFoundError):
        column[-1]
    assert len(column[:2]) == 2


def first_pixel(column: object, index: int) -> int:
    return column[index].getpixel((0, 0))[0]  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_zip_column_works_in_forked_processes(tmp_path: Path) -> None:
    files = [f"{name}/{i}.png" for name in "ab" for i in range(20)]
    archive = zipped(put(tmp_path / "images", *files), tmp_path / "images.zip")
    column = ImageFolder(root=str(archive), test_fraction=0).load().splits["train"].fields["image"]
    expected = [first_pixel(column, i) for i in range(40)]  # opens the archive in this process, before the fork
    assert len(set(expected)) > 10
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(first_pixel, [(column, i) for i in range(40)]) == expected
    assert first_pixel(pickle.loads(pickle.dumps(column)), 3) == expected[3]


def test_damaged_archive_member_is_named(tmp_path: Path) -> None:
    archive = zipped(put(tmp_path / "images", "a/1.png", "b/1.png"), tmp_path / "images.zip")
    content = archive.read_bytes()
    archive.write_bytes(content.replace(b"IDAT", b"XXXX", 1))
    with pytest.raises(DataError, match=r"a/1\.png +cannot be read from the archive: Bad CRC"):
        ImageFolder(root=str(archive), test_fraction=0).load()


# ----------------------------------------------------------------------------------------------------------- published


class Published(PublishedImages):
    folder = "birds"
    url = "https://example.org/birds.zip"
    splits = {"train": ("train", 3), "test": ("val", 2)}
    classes = ("crow", "duck")


BIRDS = (
    "train/crow/1.png",
    "train/crow/2.png",
    "train/duck/1.png",
    "val/crow/1.png",
    "val/duck/1.png",
    "val/duck/x.gif",
)


@pytest.mark.parametrize("packed", [True, False])
def test_published_images_are_read_packed_and_unpacked(
    data_folder: Path, packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    root = put(data_folder / "birds", *BIRDS)
    if packed:
        zipped(root, data_folder / "birds.zip")
        shutil.rmtree(root)
    with caplog.at_level(logging.WARNING):
        data = Published().load()
    assert classes_of(data, "train") == {"crow": ["1.png", "2.png"], "duck": ["1.png"]}
    assert classes_of(data, "test") == {"crow": ["1.png"], "duck": ["1.png"]}
    assert data.spec == Published().spec
    assert not caplog.records
    assert [path.name for path in data_folder.iterdir()] == ["birds.zip" if packed else "birds"]


def test_published_images_are_downloaded_when_absent(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(url: str, name: str) -> Path:
        assert (url, name) == ("https://example.org/birds.zip", "birds.zip")
        return zipped(put(data_folder / "made" / "birds", *BIRDS), data_folder / name)

    monkeypatch.setattr(datasets_module, "download", download)
    assert len(Published().load().splits["train"]) == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (BIRDS[1:], r"got \{'train': 2, 'test': 2\}"),
        (BIRDS[:3], "no folder 'val'"),
        ([name.replace("crow", "raven") for name in BIRDS], "of duck, raven"),
    ],
)
def test_an_incomplete_archive_is_refused(data_folder: Path, files: list[str], message: str) -> None:
    put(data_folder / "birds", *files)
    with pytest.raises(DataError, match=message) as caught:
        Published().load()
    assert "https://example.org/birds.zip" in str(caught.value)


def test_a_truncated_archive_is_refused(data_folder: Path) -> None:
    archive = zipped(put(data_folder / "made" / "birds", *BIRDS), data_folder / "birds.zip")
    archive.write_bytes(archive.read_bytes()[:300])
    with pytest.raises(DataError, match="cannot be read") as caught:
        Published().load()
    assert str(archive) in str(caught.value)


def test_what_is_known_of_published_datasets() -> None:
    assert Hymenoptera().spec.classes == ("ants", "bees")
    assert HotDog().spec.classes == ("hotdog", "not-hotdog")


# --------------------------------------------------------------------------------------------------------------- shapes


def test_shapes_have_three_balanced_splits() -> None:
    dataset = Shapes(per_class=8, image_size=32)
    data = dataset.load()
    assert {name: np.bincount(split.targets).tolist() for name, split in data.splits.items()} == {
        "train": [8, 8, 8],
        "validation": [2, 2, 2],
        "test": [2, 2, 2],
    }
    assert data.spec == dataset.spec
    image = data.splits["train"].fields["image"][4]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert data.splits["train"].name(4) == "shapes/train/square/4"


def test_shapes_are_functions_of_seed_split_and_index() -> None:
    def pixels(seed: int, split: str, index: int) -> bytes:
        column = Shapes(per_class=8, seed=seed).load().splits[split].fields["image"]
        return pickle.loads(pickle.dumps(column))[index].tobytes()

    assert pixels(0, "train", 3) == pixels(0, "train", 3)
    assert len({pixels(0, "train", 3), pixels(1, "train", 3), pixels(0, "test", 3), pixels(0, "train", 0)}) == 4


def test_a_column_of_shapes_is_a_sequence() -> None:
    column = Shapes(per_class=4).load().splits["train"].fields["image"]
    assert column[-1].tobytes() == column[11].tobytes()
    assert len(column[2:5]) == 3
    assert len(list(column)) == 12
    with pytest.raises(IndexError):
        column[12]


def test_colors_do_not_tell_shapes_apart() -> None:
    split = Shapes(per_class=120, image_size=32).load().splits["train"]
    histograms = np.array(
        [np.array(image.histogram()).reshape(24, 32).sum(1) for image in split.fields["image"]], float
    )
    train, test = np.arange(len(split)) < 240, np.arange(len(split)) >= 240
    distances = np.linalg.norm(histograms[test][:, None] - histograms[train][None], axis=-1)
    neighbors = split.targets[train][np.argsort(distances, axis=1)[:, :9]]
    guesses = [np.bincount(row, minlength=3).argmax() for row in neighbors]
    assert np.mean(guesses == split.targets[test]) < 0.5
