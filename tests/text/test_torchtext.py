"""Ours against torchtext's parts, in the environment where torchtext loads: ``make torchtext``."""

from __future__ import annotations

import io
import json
import os
import pickle
import ssl
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import transfer
from transfer import ConfigError, DataError, WeightsError, find_plugin
from transfer_text import torchtext_parts
from transfer_text.data.datasets import IMDb, MiniReviews
from transfer_text.encoding.plugin_vocabulary import PluginVocabulary, read_vocabulary
from transfer_text.encoding.vocabulary import UNKNOWN, Vocabulary
from transfer_text.models.embedding import TextBackbone, WordEmbedding
from transfer_text.models.textcnn import TextCNN
from transfer_text.vectors.word_vectors import read_vectors, width_of, words_of

UNAVAILABLE = find_plugin("tokenizer", "torchtext").unavailable
pytestmark = [pytest.mark.torchtext, pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))]

WORDS = ["the", "film", "Film", "(film)", "film-maker", "...", "zzyzx"]
LINES = ["the 1 2 3", "film 0.25 -1e-3 7", "... 4 5 6", "Film 9 9 9"]


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Point the data folder at an empty one, from which nothing may be downloaded."""

    def refuse(url: str, name: str) -> Path:
        raise DataError(f"{name} is not there", fix=f"download {url}")

    def refuse_torchtext(*arguments: Any, **options: Any) -> None:
        raise AssertionError("torchtext downloads")

    folder = tmp_path / "data"
    (folder / "vectors").mkdir(parents=True)
    monkeypatch.setenv("TRANSFER_DATA", str(folder))
    monkeypatch.setattr(torchtext_parts, "download", refuse)
    torchtext_parts._torchtext("vocab")
    monkeypatch.setattr("torchtext.vocab.vectors.urlretrieve", refuse_torchtext)
    yield folder
    assert not list(folder.rglob("*.pt")), "torchtext leaves a pickle in the data folder"


def real(*names: str) -> list[Path]:
    paths = [Path(os.environ.get("TRANSFER_DATA", "nowhere")) / name for name in names]
    if not all(path.exists() for path in paths):
        pytest.skip(f"TRANSFER_DATA lacks {names}")
    return paths


# ---------------------------------------------------------------------------------------------- tokens and vocabularies


def assert_same_tokens(texts: list[str]) -> None:
    """Compare the indices of all tokens: with no word left out, equal indices are equal tokens."""
    ours, theirs = Vocabulary.build(texts, "basic_english"), PluginVocabulary.build(texts, "torchtext/basic_english")
    assert theirs.tokens == ours.tokens
    np.testing.assert_array_equal(theirs.counts, ours.counts)
    np.testing.assert_array_equal(theirs.lengths, ours.lengths)
    our_texts, their_texts = ours.encode(texts), theirs.encode(texts)
    np.testing.assert_array_equal(their_texts.offsets, our_texts.offsets)
    np.testing.assert_array_equal(their_texts.indices, our_texts.indices)


def test_basic_english_is_torchtexts_on_the_packaged_reviews() -> None:
    assert_same_tokens([text for split in MiniReviews().load().splits.values() for text in split.fields["text"]])


@pytest.mark.data
def test_basic_english_is_torchtexts_on_all_of_imdb() -> None:
    real("aclImdb_v1.tar.gz")
    texts = [text for split in IMDb().load().splits.values() for text in split.fields["text"]]
    assert len(texts) == 50_000
    assert_same_tokens(texts)


@pytest.mark.parametrize("cut", [{"min_frequency": 3}, {"max_size": 100}, {"min_frequency": 2, "max_size": 1000}])
def test_a_vocabulary_that_is_cut_is_torchtexts(cut: dict[str, int]) -> None:
    texts = list(MiniReviews().load().splits["train"].fields["text"])
    ours = Vocabulary.build(texts, "basic_english", **cut)
    theirs = PluginVocabulary.build(texts, "torchtext/basic_english", **cut)
    assert theirs.tokens == ours.tokens
    np.testing.assert_array_equal(theirs.counts, ours.counts)


def test_a_model_folder_brings_torchtexts_tokenizer_back() -> None:
    vocabulary = PluginVocabulary.build(["A film, a cast."], "torchtext/basic_english")
    content = json.loads(vocabulary.to_json())
    assert content["plugin"]["requirement"].startswith("transferkit[torchtext]==")
    assert content["words"] == ["a", ",", ".", "cast", "film"]
    for again in (read_vocabulary(vocabulary.to_json()), pickle.loads(pickle.dumps(vocabulary))):
        assert again.encode(["a FILM; new"])[0].tolist() == [2, 6, UNKNOWN]


def test_a_tokenizer_that_torchtext_lacks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="torchtext has no tokenizer 'basic_french'"):
        TextCNN(tokenizer="torchtext/basic_french")
    with pytest.raises(ConfigError, match="torchtext has no tokenizer ''"):
        TextCNN(tokenizer="torchtext")
    with pytest.raises(ConfigError, match="torchtext's tokenizer 'revtok' cannot be loaded: No module named 'revtok'"):
        TextCNN(tokenizer="torchtext/revtok")
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------------- vectors


def test_glove_by_name_equals_ours_without_download(data_folder: Path) -> None:
    lines = [line + " 0" * 97 for line in LINES]
    (data_folder / "vectors" / "glove.6B.100d.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ours, theirs = read_vectors("glove.6B.100d", WORDS), read_vectors("torchtext/glove.6B.100d", WORDS)
    assert ours.found.tolist() == [True, True, True, True, False, True, False]
    np.testing.assert_array_equal(theirs.found, ours.found)
    np.testing.assert_array_equal(theirs.matrix, ours.matrix)
    assert words_of("torchtext/glove.6B.100d") == words_of("glove.6B.100d")
    assert width_of("torchtext/glove.6B.100d") == 100


def test_glove_in_its_archive_is_not_downloaded(data_folder: Path) -> None:
    with zipfile.ZipFile(data_folder / "glove.6B.zip", "w") as archive:
        for width in (50, 100):
            archive.writestr(f"glove.6B.{width}d.txt", f"film{' 1' * width}\n")
    assert read_vectors("torchtext/glove.6B.50d", ["film"]).matrix.shape == (1, 50)


def test_any_file_of_vectors_is_read_as_ours(data_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.vec"
    file.write_text("\n".join(["4 3", *LINES]) + "\n", encoding="utf-8")
    assert width_of(f"torchtext/{file}") == 3
    np.testing.assert_array_equal(
        read_vectors(f"torchtext/{file}", WORDS).matrix, read_vectors(str(file), WORDS).matrix
    )
    assert read_vectors("torchtext/mini", ["film", "zzyzx"]).found.tolist() == [True, False]


def test_fasttext_by_usual_name(data_folder: Path) -> None:
    lines = ["2 300", f"film{' 0.5' * 300}", f"kino{' -0.5' * 300}"]
    (data_folder / "wiki.de.vec").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("torchtext/fasttext.de", "torchtext/fasttext.de.300d"):
        assert width_of(name) == 300
        vectors = read_vectors(name, ["kino", "cast"])
        assert vectors.found.tolist() == [True, False]
        assert np.unique(vectors.matrix[0]).tolist() == [-0.5]
    with pytest.raises(WeightsError, match=r"wiki\.en\.vec is not there"):
        read_vectors("torchtext/fasttext.en", ["film"])


@pytest.mark.parametrize("packed", [False, True])
def test_character_ngrams_make_a_vector_of_any_word(data_folder: Path, packed: bool) -> None:
    content = f"2gram-fi{' 1' * 100}\n3gram-fil{' 3' * 100}\n".encode()
    if packed:
        with tarfile.open(data_folder / "vectors" / "jmt_pre-trained_embeddings.tar.gz", "w:gz") as archive:
            member = tarfile.TarInfo("charNgram.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    else:
        (data_folder / "vectors" / "charNgram.txt").write_bytes(content)
    assert width_of("torchtext/charngram.100d") == 100
    vectors = read_vectors("torchtext/charngram.100d", ["film", "fin", "xyz"])
    assert vectors.found.tolist() == [True, True, False]
    assert vectors.matrix[:, 0].tolist() == [2.0, 1.0, 0.0]
    with pytest.raises(WeightsError, match="lists no words"):
        words_of("torchtext/charngram.100d")


def test_vectors_that_cannot_be_had_are_named(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not there") as caught:
        read_vectors("torchtext/charngram.100d", ["film"])
    assert str(caught.value.problems[0].fix).startswith("download https://")
    with pytest.raises(ConfigError, match="needs the name of vectors") as unnamed:
        TextCNN(vectors="torchtext")
    assert "glove.6B.100d" in unnamed.value.problems[0].available
    with pytest.raises(ConfigError, match=r"unknown word vectors 'glove\.7B'"):
        TextCNN(vectors="torchtext/glove.7B")
    (tmp_path / "broken.txt").write_text("film 1 2 3\ncast 1 2\n", encoding="utf-8")
    with pytest.raises(WeightsError, match="torchtext cannot read"):
        read_vectors(f"torchtext/{tmp_path}/broken.txt", ["film"])


def test_certificates_are_still_checked_after_torchtext_has_read(data_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    read_vectors(f"torchtext/{tmp_path}/own.txt", ["film"])
    assert ssl._create_default_https_context is ssl.create_default_context


# -------------------------------------------------------------------------------------- one config, theirs against ours


def assert_same_training(config: dict[str, Any], vectors: str, tmp_path: Path) -> None:
    """Train a config through our parts and through torchtext's, and compare what it begins with and every loss."""
    began: list[TextBackbone] = []
    losses = []
    for prefix in ("", "torchtext/"):
        overrides = [f"backbone.tokenizer={prefix}basic_english", f"backbone.vectors={prefix}{vectors}"]
        _, parts = transfer.check(config, overrides)
        run = transfer.run(config, overrides, output=tmp_path)
        lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        epochs = [json.loads(line) for line in lines]
        losses.append([(epoch["train"], epoch["validation"]) for epoch in epochs] + [run.summary["test"]])
        options = run_options(run.folder)
        torch.manual_seed(0)
        texts = training_texts(config)
        backbone = type(parts.backbone).from_data(texts, **options)
        backbone.load_pretrained()
        assert isinstance(backbone, TextBackbone)
        began.append(backbone)
    ours, theirs = began
    assert isinstance(theirs.vocabulary, PluginVocabulary)
    assert theirs.vocabulary.tokens == ours.vocabulary.tokens
    assert torch.equal(matrix_of(theirs), matrix_of(ours))
    assert losses[1] == losses[0]
    assert len(losses[0]) == config["train"]["phases"][0]["epochs"] + 1


def run_options(run: Path) -> dict[str, Any]:
    described = json.loads((run / "model" / "model.json").read_text(encoding="utf-8"))["backbone"]
    return {name: value for name, value in described.items() if name != "name"}


def training_texts(config: dict[str, Any]) -> list[str]:
    dataset = {"imdb": IMDb, "mini_reviews": MiniReviews}[config["data"]["name"]]()
    return list(dataset.load().splits["train"].fields["text"][:2000])


def matrix_of(backbone: TextBackbone) -> torch.Tensor:
    embedding = backbone.stages[0]
    assert isinstance(embedding, WordEmbedding)
    matrix = embedding.static if embedding.tuned is None else embedding.tuned
    assert matrix is not None
    return matrix


def config_of(data: dict[str, Any], backbone: dict[str, Any]) -> dict[str, Any]:
    train = {"batch_size": 32, "optimizer": {"name": "adam", "lr": 0.002}, "phases": [{"epochs": 2}]}
    return {"data": data, "backbone": backbone, "head": {"name": "linear", "dropout": 0.5}, "train": train}


BACKBONES = [
    {"name": "textcnn", "variant": "multichannel", "filters": 10},
    {"name": "bilstm", "variant": "nonstatic", "hidden_size": 8, "layers": 1},
]


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone["name"])
def test_the_same_config_has_the_same_losses(backbone: dict[str, Any], tmp_path: Path) -> None:
    assert_same_training(config_of({"name": "mini_reviews"}, backbone), "mini", tmp_path)


@pytest.mark.data
def test_losses_equal_with_torchtext_glove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (head,) = real("vectors/glove.6B.100d.head.txt")
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "glove.6B.100d.txt").symlink_to(head)  # where ours and torchtext's look for it
    monkeypatch.setenv("TRANSFER_DATA", str(tmp_path))
    assert_same_training(config_of({"name": "mini_reviews"}, BACKBONES[0]), "glove.6B.100d", tmp_path / "runs")


@pytest.mark.data
def test_losses_equal_on_real_reviews(tmp_path: Path) -> None:
    real("aclImdb_v1.tar.gz", "vectors/imdb.w2v.100d.txt.gz")
    config = config_of({"name": "imdb", "limit": 300}, BACKBONES[0] | {"min_frequency": 2, "filters": 20})
    assert_same_training(config, "imdb.w2v.100d.txt.gz", tmp_path)
