from __future__ import annotations

import io
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.models import ResNet50_Weights

from transfer import ConfigError, DataError
from transfer.config.check import load_component
from transfer_vision.images import decoding
from transfer_vision.images.decoding import open_image
from transfer_vision.preprocessing import ImagePreprocessing


def make_image(width: int = 90, height: int = 60, mode: str = "RGB") -> Image.Image:
    """Return a smooth image whose quarters differ, so that no two turns of it are alike."""
    x, y = np.linspace(0, 255, width)[None, :], np.linspace(0, 255, height)[:, None]
    pixels = np.stack([x + 0 * y, y + 0 * x, (x + y) / 2], -1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def small() -> ImagePreprocessing:
    return ImagePreprocessing(image_size=32, augmentation="none")


def one(preprocessing: ImagePreprocessing, image: Image.Image) -> torch.Tensor:
    return preprocessing.encode([image])[0]


# ------------------------------------------------------------------------------------------------------------- encode


@pytest.mark.parametrize(
    ("crop_mode", "size", "expected"),
    [
        ("squash", (90, 60), (40, 40)),
        ("squash", (60, 90), (40, 40)),
        ("border", (90, 60), (27, 40)),
        ("border", (60, 90), (40, 27)),
        ("border", (900, 3), (1, 40)),
    ],
)
def test_crop_mode_decides_which_sides_are_resized(
    crop_mode: Any, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    preprocessing = ImagePreprocessing(image_size=40, resize=40, augmentation="none", crop_mode=crop_mode)
    image = make_image(*size)
    assert one(preprocessing, image).shape == (3, *expected)
    assert preprocessing.encode([np.asarray(image)])[0].shape == (3, *expected)
    assert preprocessing.model_inputs(preprocessing.encode([image])).shape == (1, 3, 40, 40)
    assert preprocessing.describe()["crop_mode"] == crop_mode


def test_border_has_the_mean_color() -> None:
    preprocessing = ImagePreprocessing(image_size=40, resize=40, augmentation="none", crop_mode="border")
    white = preprocessing.model_inputs(preprocessing.encode([Image.new("RGB", (80, 40), "white")]))[0]
    assert white[:, :10].abs().max() < 0.01  # the mean, rounded to 8 bits
    assert white[:, 30:].abs().max() < 0.01
    assert (white[:, 10:30] > 2).all()


def test_squash_shows_the_corners_of_an_image() -> None:
    image = Image.new("RGB", (200, 50))
    image.paste("white", (0, 0, 20, 50))
    squashed = ImagePreprocessing(image_size=32, resize=32, augmentation="none", crop_mode="squash")
    assert one(squashed, image)[:, :, 0].float().mean() > 200


@pytest.mark.parametrize(("size", "expected"), [((90, 60), (37, 55)), ((60, 90), (55, 37)), ((20, 20), (37, 37))])
def test_encode_resizes_the_shorter_side(
    small: ImagePreprocessing, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    encoded = one(small, make_image(*size))
    assert encoded.dtype == torch.uint8
    assert encoded.shape == (3, *expected)


@pytest.mark.parametrize("size", [(301, 200), (200, 333), (500, 375)])
def test_evaluation_input_is_what_torchvisions_own_preset_makes(size: tuple[int, int]) -> None:
    preset = ResNet50_Weights.IMAGENET1K_V2.transforms()
    ours = ImagePreprocessing(image_size=224, resize=232)
    image = make_image(*size)
    torch.testing.assert_close(ours.model_inputs(ours.encode([image])), preset(image)[None], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_every_mode_becomes_rgb(small: ImagePreprocessing, mode: str) -> None:
    gray = make_image().convert("L")
    if mode.startswith("I"):
        sixteen = np.asarray(gray).astype(np.int32) * 257
        image = Image.fromarray(sixteen.astype(np.uint16) if mode == "I;16" else sixteen)
        assert image.mode == mode
    elif mode in ("P", "PA"):
        image = gray.convert("P").convert(mode)
    else:
        image = gray.convert("RGB").convert(mode)
    encoded = one(small, image).float()
    expected = one(small, gray).float()
    assert encoded.shape == expected.shape
    assert (encoded - expected).abs().mean() < (40 if mode == "1" else 3)  # one bit per pixel is dithered


def test_sixteen_bit_png_keeps_its_range(small: ImagePreprocessing) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    encoded = one(small, open_image(stored(Image.fromarray(values), "PNG"), "deep.png")).float()
    assert encoded.min() < 6
    assert encoded.max() > 249
    assert abs(encoded.mean() - 127.5) < 2


def test_transparency_is_put_over_white(small: ImagePreprocessing) -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    assert (one(small, clear) == 255).all()
    assert (one(small, half).float() - 127).abs().max() <= 1


def test_transparent_palette_color_becomes_white(small: ImagePreprocessing) -> None:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    opened = open_image(stored(image, "PNG", transparency=b"\x00\xff"), "palette.png")
    assert (one(small, opened) == 255).all()


def test_cmyk_jpeg(small: ImagePreprocessing) -> None:
    red = Image.new("RGB", (64, 64), (250, 10, 10)).convert("CMYK")
    encoded = one(small, open_image(stored(red, "JPEG", quality=95), "press.jpg")).float().mean((1, 2))
    torch.testing.assert_close(encoded, torch.tensor([250.0, 10.0, 10.0]), atol=6, rtol=0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(small: ImagePreprocessing, orientation: int, kind: str) -> None:
    upright = make_image()
    turns = [
        [],
        [Image.Transpose.FLIP_LEFT_RIGHT],
        [Image.Transpose.ROTATE_180],
        [Image.Transpose.FLIP_TOP_BOTTOM],
        [Image.Transpose.TRANSPOSE],
        [Image.Transpose.ROTATE_90],
        [Image.Transpose.TRANSVERSE],
        [Image.Transpose.ROTATE_270],
    ]
    turned = upright
    for turn in turns[orientation - 1]:
        turned = turned.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(stored(turned, kind, exif=exif), "phone")
    expected, got = one(small, upright).float(), one(small, opened).float()
    assert got.shape == expected.shape
    assert (got - expected).abs().mean() < 3


def test_scaled_jpeg_decoding_resembles_full_decoding(small: ImagePreprocessing) -> None:
    image = make_image(1200, 800)
    ImageDraw.Draw(image).ellipse((300, 200, 700, 600), fill=(240, 30, 30))
    content = stored(image, "JPEG", quality=90)
    scaled = one(small, open_image(content, "large.jpg")).float()
    loaded = open_image(content, "large.jpg")
    loaded.load()  # what has been decoded cannot be decoded at another scale
    full = one(small, loaded).float()
    assert (scaled - full).abs().mean() < 1
    assert (scaled - full).abs().max() < 25


def test_encode_leaves_the_image_as_it_was(small: ImagePreprocessing) -> None:
    image = open_image(stored(make_image(1200, 800), "JPEG"), "large.jpg")
    first = one(small, image)
    assert image.size == (1200, 800)
    assert torch.equal(one(small, image), first)
    assert ImagePreprocessing(image_size=400).encode([image])[0].shape == (3, 457, 685)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_truncated_files_are_refused(small: ImagePreprocessing, kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3)).astype(np.uint8))
    content = stored(noise, kind)
    with pytest.raises((ValueError, OSError)):
        one(small, open_image(content[: len(content) // 2], "cut"))


@pytest.mark.parametrize(
    "content", [b"", b"this is a text, not an image", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n" + b"x" * 40]
)
def test_what_is_no_image_is_refused_clearly(content: bytes) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        open_image(content, "notes.jpg")
    assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
def test_damaged_files_raise_only_documented_errors(small: ImagePreprocessing, kind: str) -> None:
    content = stored(make_image(), kind, exif=Image.Exif()) if kind != "BMP" else stored(make_image(), kind)
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for place in random.integers(0, min(len(damaged), 400), 5):
            damaged[place] = random.integers(0, 256)
        try:
            encoded = one(small, open_image(bytes(damaged), "damaged"))
        except (ValueError, OSError):
            continue
        assert encoded.ndim == 3


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = stored(Image.new("1", (3000, 3000)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000_000)
    with pytest.raises(ValueError, match="decompression bomb"):
        open_image(content, "bomb.png")


def test_warnings_of_pillow_are_logged_with_the_name(
    small: ImagePreprocessing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content = stored(Image.new("1", (2000, 2000)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one(small, open_image(content, "panorama.png")).shape == (3, 37, 37)
    assert "panorama.png: " in caplog.text
    assert "3000000" in caplog.text


def test_threads_change_neither_pixels_nor_order(
    small: ImagePreprocessing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)
    contents = [stored(make_image(130 + i, 120), "PNG" if i % 3 else "JPEG") for i in range(24)]
    before = warnings.showwarning, list(warnings.filters)
    found = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(small.encode([open_image(c, f"{threads}/{i}.png") for i, c in enumerate(contents)]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert {f"{t}/{i}.png" for t in (1, 4) for i in range(24)} <= {r.getMessage().split(":")[0] for r in caplog.records}
    assert (warnings.showwarning, list(warnings.filters)) == before


@pytest.mark.parametrize("decoder", ["torchvision's", "Pillow's"])
def test_a_jpeg_has_the_pixels_that_pillow_gives(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if decoder == "Pillow's":
        monkeypatch.setattr(decoding, "decode_jpeg", None)
    preprocessing = ImagePreprocessing(image_size=64, resize=64)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 90, 3)).astype(np.uint8))
    for options in ({}, {"subsampling": 0}, {"progressive": True}, {"quality": 20}):
        for image in (noise, noise.convert("L")):
            content = stored(image, "JPEG", **options)
            expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            assert np.array_equal(one(preprocessing, open_image(content, "a.jpg")).permute(1, 2, 0), expected)


def test_batches_are_channels_last(small: ImagePreprocessing) -> None:
    batch = small.model_inputs(small.encode([make_image(), make_image()]))
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_usual_is_an_alias_of_the_default_augmentation() -> None:
    alias: Any = "usual"
    assert ImagePreprocessing(augmentation=alias).describe() == ImagePreprocessing().describe()
    component = load_component("backbone", {"name": "resnet18", "augmentation": "usual"}, "backbone")
    assert component.options["augmentation"] == "default"


def test_damaged_exif_is_logged_and_the_image_kept(small: ImagePreprocessing, caplog: pytest.LogCaptureFixture) -> None:
    content = stored(make_image(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\x00\x09" + b"\xff" * 30)
    assert one(small, open_image(content, "odd.jpg")).shape == (3, 37, 55)
    assert "odd.jpg" in caplog.text


def test_extreme_aspect_ratio_is_refused(small: ImagePreprocessing) -> None:
    with pytest.raises(ValueError, match="too long and thin"):
        one(small, Image.new("L", (3_000_000, 1)))


@pytest.mark.parametrize(
    ("value", "message"), [("a.jpg", "PIL image, got str"), (Image.new("F", (9, 9)), "8 or 16 bits")]
)
def test_values_that_cannot_be_encoded(small: ImagePreprocessing, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small.encode([value])


# ------------------------------------------------------------------------------------------------- augment and collate


def test_augmentation_is_a_function_of_the_seed() -> None:
    preprocessing = ImagePreprocessing(image_size=32)
    encoded = one(preprocessing, make_image())

    def augmented(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return preprocessing.augment(encoded)

    assert augmented(0).shape == (3, 32, 32)
    assert augmented(0).dtype == torch.uint8
    assert torch.equal(augmented(0), augmented(0))
    assert not torch.equal(augmented(0), augmented(1))


def test_no_augmentation_changes_nothing(small: ImagePreprocessing) -> None:
    encoded = one(small, make_image())
    assert small.augment(encoded) is encoded


def test_collate_crops_center_and_pads(small: ImagePreprocessing) -> None:
    wide, tiny = torch.zeros(3, 32, 64, dtype=torch.uint8), torch.full((3, 16, 16), 255, dtype=torch.uint8)
    wide[:, :, 16:48] = 255
    batch = small.model_inputs([wide, tiny])
    assert batch.shape == (2, 3, 32, 32)
    assert batch.dtype == torch.float32
    white = (1 - torch.tensor(small.mean)) / torch.tensor(small.std)
    torch.testing.assert_close(batch[0], white.view(3, 1, 1).expand(3, 32, 32))
    torch.testing.assert_close(batch[1, :, 8:24, 8:24], white.view(3, 1, 1).expand(3, 16, 16))
    assert (batch[1, :, 0] < 0).all()


def test_listed_augmentations_are_applied_in_order() -> None:
    steps = [{"name": "RandomVerticalFlip", "p": 1.0}, {"name": "CenterCrop", "size": 16}]
    preprocessing = ImagePreprocessing(image_size=16, resize=32, augmentation=steps)
    encoded = one(preprocessing, make_image(32, 32))
    assert torch.equal(preprocessing.augment(encoded), encoded.flip(1)[:, 8:24, 8:24])


def test_options_that_are_enumerations_are_given_by_name() -> None:
    steps = [{"name": "AutoAugment", "policy": "cifar10", "interpolation": "bilinear"}]
    preprocessing = ImagePreprocessing(image_size=32, augmentation=steps)
    assert preprocessing.augment(one(preprocessing, make_image())).shape == (3, 37, 55)


@pytest.mark.parametrize(
    ("steps", "message", "hint"),
    [
        ([{"name": "RandomHorizontalFlop"}], "no augmentation 'RandomHorizontalFlop'", "RandomHorizontalFlip"),
        ([{"name": "RandomHorizontalFlip", "q": 0.5}], "no option 'q'", "p"),
        ([{"name": "ColorJitter", "brightnes": 0.5}], "no option 'brightnes'", "brightness"),
        ([{"name": "ColorJitter", "brightness": "much"}], "does not take", None),
        ([{"name": "AutoAugment", "policy": "imagenot"}], "does not take", None),
        ([{"p": 0.5}], "needs a name", None),
        ([{"name": "RandomCrop", "size": 500}], "fails on an image of 37 x 37", None),
        ([{"name": "MixUp", "num_classes": 2}], "fails", None),
        ([{"name": "Grayscale"}], "3 channels", None),
    ],
)
def test_augmentations_that_cannot_work_are_refused_at_once(
    steps: list[dict[str, object]], message: str, hint: str | None
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ImagePreprocessing(image_size=32, augmentation=steps)
    if hint:
        assert hint in str(caught.value)


def test_checking_an_augmentation_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ImagePreprocessing(image_size=32, augmentation=[{"name": "RandomRotation", "degrees": 10}])
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------- rest


def test_resize_below_image_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="resize 20 is smaller than image_size 32"):
        ImagePreprocessing(image_size=32, resize=20)


def test_read_opens_a_path(small: ImagePreprocessing, tmp_path) -> None:
    path = tmp_path / "image.png"
    make_image().save(path)
    assert small.read(str(path)).size == (90, 60)


def test_read_error_names_path(small: ImagePreprocessing, tmp_path) -> None:
    text = tmp_path / "notes.jpg"
    text.write_text("no image")
    for path, message in (
        (text, "cannot be read: not an image"),
        (tmp_path / "absent.png", "no such"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            small.read(str(path))
        assert str(path) in str(caught.value)


def test_a_copy_in_another_process_does_the_same() -> None:
    preprocessing = ImagePreprocessing(image_size=32, augmentation=[{"name": "RandomHorizontalFlip"}])
    copy = pickle.loads(pickle.dumps(preprocessing))
    assert copy.describe() == preprocessing.describe()
    assert torch.equal(one(copy, make_image()), one(preprocessing, make_image()))


def test_describe_returns_resolved_options() -> None:
    assert ImagePreprocessing().describe() == {
        "image_size": 224,
        "resize": 256,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "augmentation": "default",
        "crop_mode": "center",
        "decode": "cpu",
    }


# ------------------------------------------------------------------------------------------------- other augmentations


@pytest.mark.parametrize(
    "steps",
    [
        "strong",
        [{"name": "RandAugment", "num_ops": 2, "magnitude": 9}],
        [{"name": "TrivialAugmentWide", "interpolation": "bilinear"}],
        [{"name": "RandomErasing", "p": 1.0, "scale": [0.1, 0.2]}],
        [{"name": "RandomResizedCrop", "size": 24, "scale": [0.5, 1.0], "interpolation": "bicubic"}],
        [{"name": "ColorJitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}],
        [{"name": "RandomApply", "p": 0.9, "transforms": [{"name": "GaussianBlur", "kernel_size": 3}]}],
        [{"name": "RandomChoice", "transforms": [{"name": "RandomRotation", "degrees": 9}, {"name": "AugMix"}]}],
    ],
)
def test_augmentations_of_torchvision_by_name(steps: Any) -> None:
    with torch.device("meta"):  # as every run builds it first, to see whether all fits together
        preprocessing = ImagePreprocessing(image_size=32, augmentation=steps)
    encoded = one(preprocessing, make_image())
    drawn = []
    for seed in (*range(5), 0):
        torch.manual_seed(seed)
        drawn.append(preprocessing.model_inputs([preprocessing.augment(encoded)]))
    assert drawn[0].shape == (1, 3, 32, 32)
    assert torch.equal(drawn[0], drawn[-1])
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])


def test_a_choice_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="RandomApply needs transforms"):
        ImagePreprocessing(augmentation=[{"name": "RandomApply", "p": 0.5}])
    with pytest.raises(ConfigError, match="no augmentation 'GausianBlur'"):
        ImagePreprocessing(augmentation=[{"name": "RandomApply", "transforms": [{"name": "GausianBlur"}]}])


# ------------------------------------------------------------------------------------------------------ other channels


def test_grey_images_keep_their_grey_in_one_channel() -> None:
    levels = np.arange(256, dtype=np.uint8)
    one_channel = ImagePreprocessing(image_size=32, mean=(0.5,), std=(0.25,), resize=32)
    found = [int(one(one_channel, Image.new("L", (32, 32), int(level))).unique()) for level in levels]
    assert found == levels.tolist()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I"])
def test_every_mode_becomes_gray_for_one_channel(mode: str) -> None:
    gray = ImagePreprocessing(image_size=32, mean=(0.5,), std=(0.25,), augmentation="strong")
    image = make_image().convert("L")
    expected = one(gray, image).float()
    if mode == "I":
        image = Image.fromarray(np.asarray(image).astype(np.int32) * 257)
    encoded = one(gray, image if mode in ("L", "I") else image.convert("RGB").convert(mode))
    assert encoded.shape == (1, 37, 55)
    assert (encoded.float() - expected).abs().mean() < (5 if mode == "P" else 3)  # a palette has few colors
    assert gray.model_inputs([gray.augment(encoded)]).shape == (1, 1, 32, 32)


def test_arrays_of_many_channels() -> None:
    bands = ImagePreprocessing(image_size=32, mean=(0.5,) * 6, std=(0.25,) * 6, augmentation="default")
    array = np.random.default_rng(0).integers(0, 256, (80, 60, 6), dtype=np.uint8)
    encoded = bands.encode([array])[0]
    assert encoded.shape == (6, 49, 37)
    for band in (0, 5):
        alone = ImagePreprocessing(image_size=32, mean=(0.5,), std=(0.25,)).encode([array[:, :, band]])[0]
        assert torch.equal(alone[0], encoded[band])
    assert bands.model_inputs([bands.augment(encoded)]).shape == (1, 6, 32, 32)
    assert bands.example().shape == (37, 37, 6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((9, 9, 5), np.uint8), r"uint8 \(H, W, 6\), got uint8 \(9, 9, 5\)"),
        (np.zeros((9, 9, 6), np.float32), "got float32"),
        (Image.new("RGB", (9, 9)), r"expected an array \(H, W, 6\) of uint8"),
    ],
)
def test_wrong_number_of_channels_is_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImagePreprocessing(image_size=32, mean=(0.5,) * 6, std=(0.25,) * 6).encode([value])


@pytest.mark.parametrize(
    ("value", "channels", "size"),
    [
        (Image.new("RGB", (640, 480), "red"), 3, (213, 160)),
        (Image.new("L", (20, 4000), 200), 3, (2, 320)),
        (Image.new("RGBA", (40, 30), (255, 0, 0, 0)), 3, (40, 30)),
        (np.full((40, 50, 5), 100, np.uint8), 5, (60, 48)),
    ],
    ids=["photograph", "long", "transparent", "five channels"],
)
def test_thumbnail_is_small(value: Any, channels: int, size: tuple[int, int]) -> None:
    stats = (0.5,) * channels
    preprocessing = ImagePreprocessing(image_size=42, resize=48, mean=stats, std=stats)
    image = Image.open(io.BytesIO(preprocessing.thumbnail(value)))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)


def test_batch_is_uint8_and_normalized_on_device() -> None:
    preprocessing = ImagePreprocessing(image_size=16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    batch = preprocessing.collate(preprocessing.encode([make_image(), make_image()]))
    assert (batch.dtype, batch.shape) == (torch.uint8, (2, 3, 16, 16))
    inputs = preprocessing.to_device(batch, torch.device("cpu"))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ((0.1, 0.2, 0.3), (0.5, 0.4, 0.3)))
    torch.testing.assert_close(inputs, (batch / 255 - mean) / std)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert preprocessing.to_device(batch, torch.device("meta")).device.type == "meta"
