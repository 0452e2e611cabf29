"""Predictions of inputs that users give: bad files among good ones, unknown words, raw values."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import transfer
from transfer.cli.tables import prediction_cell
from transfer.deployment.serving.models import ServedModel
from transfer.registry import entry_points as registry
from transfer_text.encoding.preprocessing import TextPreprocessing
from transfer_text.encoding.vocabulary import Vocabulary
from transfer_vision.preprocessing import ImagePreprocessing

TRAIN = {"batch_size": 8, "phases": [{"epochs": 1}], "report": False, "cache": "off"}


class Pixels(transfer.Backbone):
    """The mean color of an image, (B, 3, H, W) -> (B, 3)."""

    field = "image"

    def __init__(self) -> None:
        super().__init__({"mean": nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())})

    @property
    def features(self) -> transfer.FeatureSpec:
        """The mean of each channel."""
        return transfer.FeatureSpec("vector", 3)

    @property
    def preprocessing(self) -> transfer.Preprocessing:
        """Small images."""
        return ImagePreprocessing(image_size=8, resize=8, augmentation="none")


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    transfer.register("backbone", "pixels")(Pixels)
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = folder / "data" / ("dark", "light")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image // 2 + 127 * (index % 2)).save(path)
    data = {"name": "image_folder", "root": str(folder / "data")}
    yield transfer.run({"data": data, "backbone": {"name": "pixels"}, "train": TRAIN}, output=folder).folder
    del registry._registered["backbone", "pixels"]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = {"name": "textcnn", "filters": 4, "dimensions": 8}
    config = {"data": {"name": "mini_reviews"}, "backbone": backbone, "train": TRAIN}
    return transfer.run(config, output=tmp_path_factory.mktemp("texts")).folder


@pytest.fixture
def images(image_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imgs").mkdir()
    for name in ("a.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "imgs" / name)
    (tmp_path / "imgs" / "b.png").write_text("no image", encoding="utf-8")
    return image_run


@pytest.mark.parametrize("argument", ["imgs", "imgs/*"])
def test_bad_file_gets_error_and_others_answers(call: Any, images: Path, argument: str) -> None:
    status, out, err = call("predict", images, argument, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 2
    assert [(row["input"], row["label"] is None, "error" in row) for row in rows] == [
        ("imgs/a.png", False, False),
        ("imgs/b.png", True, True),
        ("imgs/c.png", False, False),
    ]
    assert "no answer for 1 of 3 inputs:" in err
    assert "imgs/b.png: this image cannot be read" in err


def test_on_error_fail_stops_at_first_bad_file(call: Any, images: Path) -> None:
    status, out, err = call("predict", images, "imgs", "--on-error", "fail")
    assert (status, out) == (2, "")
    assert "imgs/b.png" in err


def test_library_raises_unless_it_skips(images: Path) -> None:
    with pytest.raises(transfer.DataError, match="this image cannot be read"):
        list(transfer.predict(images, [Path("imgs")]))
    answers = list(transfer.predict(images, [Path("imgs")], on_error="skip"))
    assert ["error" in answer for answer in answers] == [False, True, False]


def test_value_that_cannot_be_encoded_leaves_the_others(images: Path) -> None:
    values = [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 5), np.uint8)]
    good, bad = transfer.predict(images, values, on_error="skip")
    assert good["input"] == "input 0"
    assert "expected an array of uint8 (H, W, 3)" in bad["error"]


def test_image_array_bytes_and_path_agree(images: Path) -> None:
    path = Path("imgs/a.png")
    image = Image.open(path)
    sources = [path, str(path), image, np.asarray(image), path.read_bytes()]
    (alone,) = transfer.predict(images, image)
    for answer in transfer.predict(images, sources):
        assert answer["probability"] == pytest.approx(alone["probability"], abs=1e-6)


def test_text_of_unknown_words_has_no_label(call: Any, text_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("zzxx qqyy\na film zzxx\n\n"))
    status, out, err = call("predict", text_run, "-", "--json")
    unknown, known, blank = (json.loads(line) for line in out.splitlines())
    assert status == 0
    assert (unknown["label"], unknown["probability"], unknown["unknown_fraction"]) == (None, None, 1.0)
    assert "vocabulary" in unknown["note"]
    assert known["label"] in ("positive", "negative")
    assert known["unknown_fraction"] == pytest.approx(1 / 3)
    assert (blank["line"], blank["label"], blank["note"]) == (3, None, "the input is blank")
    assert "no answer for 2 of 3 inputs:" in err
    _, _, err = call("predict", text_run, "a film zzxx")
    assert "words outside the vocabulary in 1 of 1 inputs: a film zzxx: 33%" in err


def test_server_gives_no_label_to_unknown_words(text_run: Path) -> None:
    served = ServedModel.read("reviews", text_run, device="cpu")
    unknown, known = served.predict([{"text": b"zzxx qqyy"}, {"text": b"a film"}])
    assert isinstance(unknown, dict)
    assert isinstance(known, dict)
    assert (unknown["label"], "note" in unknown) == (None, True)
    assert known["label"] in ("positive", "negative")


def test_table_gives_an_answer_for_each_row(call: Any, text_run: Path, tmp_path: Path) -> None:
    table = tmp_path / "test.csv"
    table.write_text("text,label\na film,positive\nthe film,negative\n", encoding="utf-8")
    status, out, _ = call("predict", text_run, table, "--column", "text", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [(row["input"], row["file"], row["line"]) for row in rows] == [
        ("a film", str(table), 2),
        ("the film", str(table), 3),
    ]
    status, out, err = call("predict", text_run, table)
    assert (status, out) == (2, "")
    assert "name the column with the inputs by --column (text, label)" in err


def test_explained_table_row_without_answer(call: Any, text_run: Path) -> None:
    status, out, _ = call("predict", text_run, "zzxx", "a film", "--explain")
    assert status == 0
    assert "largest changes" in out


def test_loaded_model_predicts_and_returns_features(text_run: Path) -> None:
    model = transfer.load(text_run)
    texts = ["a film", "the worst film of the year"] * 40
    assert model.classes == ("negative", "positive")
    assert model.stages == ("embedding", "convolution", "head")
    assert model.predict(texts) == list(transfer.predict(text_run, texts))
    features = model.features(texts)
    assert features.shape == (80, 12)
    torch.testing.assert_close(model.features(texts[1:2]), features[1:2])
    with pytest.raises(transfer.UserError, match="the output of stage 'embedding' is not one tensor"):
        model.features(texts, "embedding")
    with pytest.raises(transfer.UserError, match="unknown stage 'convolutoin'") as caught:
        model.features(texts, "convolutoin")
    assert caught.value.problems[0].fix == "did you mean 'convolution'?"
    with pytest.raises(transfer.UserError, match="there are no values"):
        model.features([])


def test_features_of_sequences_are_padded_to_the_longest(tmp_path: Path) -> None:
    backbone = {"name": "bilstm", "hidden_size": 4, "dimensions": 8, "readout": "sequence"}
    config = {"data": {"name": "mini_reviews"}, "backbone": backbone, "head": {"name": "attention"}, "train": TRAIN}
    model = transfer.load(transfer.run(config, output=tmp_path, quick=True).folder)
    features, mask = model.features(["a film"] * 70 + ["the worst film of the year"])
    assert (features.shape, mask.shape) == ((71, 6, 8), (71, 6))
    assert (mask[0].sum(), mask[70].sum()) == (2, 6)
    assert not features[0, 2:].any()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("probability", 2.48655e-06, "<0.0001"),
        ("probability", 0.0, "0.0000"),
        ("probability", 0.99999, "1.0000"),
        ("probabilities", {"a": 0.5, "b": 1e-5}, "a 0.5000, b <0.0001"),
        ("price", 278955.4, "278955"),
        ("label", None, "-"),
    ],
)
def test_prediction_cell(name: str, value: object, text: str) -> None:
    assert prediction_cell(name, value) == text


def test_unknown_token_of_tokenizer_file_is_counted(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    preprocessing = TextPreprocessing(Vocabulary.build(["good"], str(tmp_path / "tokenizer.json")), None)
    encoded = preprocessing.encode(["good", "good night", "night"])
    assert [preprocessing.unknown_fraction(text) for text in encoded] == [0.0, 0.5, 1.0]
