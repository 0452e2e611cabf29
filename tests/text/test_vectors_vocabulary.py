"""Words that training never saw, but the vectors know."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import transfer
from transfer import ConfigError
from transfer.training.events import Note
from transfer_text.models import embedding as embedding_module
from transfer_text.models.bilstm import BiLSTM
from transfer_text.models.embedding import TextBackbone, WordEmbedding, look_up
from transfer_text.models.textcnn import TextCNN

TEXTS = ["a fine film", "a slow film", "fine", "slow"]
VECTORS = {
    "a": (0.0, 0.1, 0.0),
    "film": (0.1, 0.0, 0.0),
    "fine": (1.0, 1.0, 0.2),
    "slow": (-1.0, -1.0, 0.2),
    "superb": (0.9, 1.1, 0.2),
    "tedious": (-1.1, -0.9, 0.2),
    "two words": (3.0, 3.0, 3.0),
    "Fine": (2.0, 2.0, 2.0),
}
FURTHER = ["superb", "tedious"]
"""What the tokenizer gives back as one token, and training never saw."""
SMALL: dict[str, Any] = {"kernel_sizes": (1, 2), "filters": 4}


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "cache"))
    lines = (f"{word} {' '.join(map(str, row))}\n" for word, row in VECTORS.items())
    (tmp_path / "own.txt").write_text("".join(lines), encoding="utf-8")
    return str(tmp_path / "own.txt")


def build(source: str, cls: type[TextBackbone] = TextCNN, **options: Any) -> TextBackbone:
    torch.manual_seed(0)
    own = SMALL if cls is TextCNN else {"hidden_size": 3, "layers": 1}
    backbone = cls.from_data(TEXTS, **{"vectors": source, "vectors_vocabulary": True, **own, **options})
    backbone.load_pretrained()
    return backbone


def inputs(backbone: TextBackbone, texts: list[str]) -> Tensor:
    return backbone.preprocessing.model_inputs(backbone.preprocessing.encode(texts))


def table(backbone: TextBackbone, word: str) -> Tensor:
    """Return the vectors of a word as they leave the first stage."""
    return look_up(*backbone.stages[0](inputs(backbone, [word])))[0, 0].detach()


def embedding(backbone: TextBackbone) -> WordEmbedding:
    stage = backbone.stages[0]
    assert isinstance(stage, WordEmbedding)
    return stage


VARIANTS = [(TextCNN, "static"), (TextCNN, "nonstatic"), (TextCNN, "multichannel"), (BiLSTM, "static")]


@pytest.mark.parametrize("word_by_word", [False, True])
@pytest.mark.parametrize(("cls", "variant"), VARIANTS)
def test_every_channel_holds_the_vectors_of_further_words(
    source: str, cls: type[TextBackbone], variant: str, word_by_word: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if word_by_word:  # as on a GPU
        monkeypatch.setattr(embedding_module, "use_batch_vocabulary", lambda indices: False)
    backbone = build(source, cls, variant=variant)
    assert list(backbone.vocabulary.tokens[-2:]) == FURTHER
    channels = 2 if variant == "multichannel" else 1
    for word in ("superb", "tedious", "fine"):
        torch.testing.assert_close(table(backbone, word), torch.tensor(VECTORS[word] * channels))
    mixed = inputs(backbone, ["superb fine film", "slow"])
    vectors = look_up(*backbone.stages[0](mixed)).detach()
    torch.testing.assert_close(vectors[0, 0], torch.tensor(VECTORS["superb"] * channels))
    torch.testing.assert_close(vectors[1, 0], torch.tensor(VECTORS["slow"] * channels))
    assert not vectors[1, 1].any()  # padding


def test_without_the_option_the_words_are_unknown(source: str) -> None:
    backbone = build(source, vectors_vocabulary=False)
    assert inputs(backbone, ["superb"]).tolist() == [[1]]
    assert embedding(backbone).further is None
    assert inputs(build(source), ["superb"]).tolist() == [[6]]


def test_training_words_are_unchanged_by_option(source: str) -> None:
    backbone, plain = build(source), build(source, vectors_vocabulary=False)
    assert torch.equal(inputs(backbone, TEXTS), inputs(plain, TEXTS))
    assert torch.equal(backbone.stages[0].tuned, plain.stages[0].tuned)
    assert torch.equal(backbone.stages[0].static, plain.stages[0].static)


def test_second_backbone_reads_from_cache(source: str) -> None:
    first, second = build(source), build(source)
    assert first.vocabulary.tokens == second.vocabulary.tokens
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_words_below_min_frequency_keep_vectors(source: str) -> None:
    texts = ["film film film", "fine film"]
    backbone = TextCNN.from_data(texts, vectors=source, vectors_vocabulary=True, min_frequency=2, **SMALL)
    backbone.load_pretrained()
    assert backbone.vocabulary.tokens[2:] == ("film", "a", "fine", "slow", *FURTHER)
    assert [ids.tolist() for ids in backbone.preprocessing.encode(texts)] == [[2, 2, 2], [4, 2]]
    torch.testing.assert_close(table(backbone, "fine"), torch.tensor(VECTORS["fine"] * 2))


def test_training_keeps_vectors_of_unseen_words(source: str) -> None:
    backbone = build(source, variant="nonstatic")
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.1, weight_decay=0.5)
    before = table(backbone, "fine").clone()
    for _ in range(3):
        backbone(inputs(backbone, TEXTS)).sum().backward()
        optimizer.step()
    assert not torch.equal(table(backbone, "fine"), before)
    torch.testing.assert_close(table(backbone, "superb"), torch.tensor(VECTORS["superb"]))
    assert len(embedding(backbone).tuned) == len(backbone.vocabulary) - len(FURTHER)


@pytest.mark.parametrize(("cls", "variant"), VARIANTS)
def test_a_saved_model_comes_back_without_the_vectors(source: str, cls: type[TextBackbone], variant: str) -> None:
    backbone = build(source, cls, variant=variant)
    assets, state = backbone.assets(), backbone.state_dict()
    Path(source).unlink()
    options = {**(SMALL if cls is TextCNN else {"hidden_size": 3, "layers": 1}), "variant": variant}
    # The width of the saved embedding counts: the file of vectors is not asked for.
    again = cls.from_assets(assets, vectors=source, vectors_vocabulary=True, **options)
    again.load_state_dict(state)
    texts = [*TEXTS, "superb", "tedious film", "never heard"]
    assert torch.equal(inputs(again, texts), inputs(backbone, texts))
    assert torch.equal(again(inputs(again, texts)), backbone(inputs(backbone, texts)))
    assert again.preprocessing.describe() == backbone.preprocessing.describe()


def test_coverage_is_that_of_the_training_texts(source: str) -> None:
    backbone = TextCNN.from_data([*TEXTS, "unheard"], vectors=source, vectors_vocabulary=True, **SMALL)
    report = backbone.load_pretrained()
    assert (report["words"], report["found"], report["missing"]) == (5, 4, ["unheard"])
    learned = backbone.learned()
    assert (learned["words"], learned["further_words"]) == (5, 2)
    assert backbone.preprocessing.describe()["further_words"] == 2


def test_truncation_loss_without_vectors() -> None:
    backbone = TextCNN.from_data(TEXTS, max_length=2, **SMALL)
    assert backbone.learned() == {"words": 4, "max_length": 2, "texts_cut": 0.5, "tokens_cut": 0.25}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "vectors is null"),
        ({"vectors": "mini", "tokenizer": "FILE"}, "vocabulary"),
    ],
)
@pytest.mark.parametrize("with_data", [False, True])
def test_what_cannot_have_further_words_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str, with_data: bool
) -> None:
    tokenizer = TextCNN.from_data(TEXTS).vocabulary.to_json()
    (tmp_path / "tokenizer.json").write_text(tokenizer.replace("< padding >", "[p]").replace("< unknown >", "[u]"))
    options = {k: str(tmp_path / "tokenizer.json") if v == "FILE" else v for k, v in options.items()}
    make = functools.partial(TextCNN.from_data, TEXTS) if with_data else TextCNN
    with pytest.raises(ConfigError, match=message) as caught:
        make(vectors_vocabulary=True, **options)
    assert caught.value.problems[0].fix


def test_run_uses_unseen_word_of_vectors(source: str, tmp_path: Path) -> None:
    rows = [f"{text},{label}" for text, label in (("a fine film", "good"), ("a slow film", "bad")) for _ in range(20)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    config = {
        "data": {"name": "text_csv", "train": str(tmp_path / "reviews.csv"), "text": "text", "label": "label"},
        "backbone": {"name": "textcnn", "vectors": source, "vectors_vocabulary": True, **SMALL, "kernel_sizes": [1]},
        "head": {"name": "linear"},
        "task": {"name": "classification"},
        "train": {"batch_size": 8, "optimizer": {"name": "adam", "lr": 0.05}, "phases": [{"epochs": 8}]},
    }
    notes: list[Note] = []
    run = transfer.run(config, output=tmp_path, observe=lambda e: notes.append(e) if isinstance(e, Note) else None)
    Path(source).unlink()
    labels = [answer["label"] for answer in transfer.predict(run.folder, ["a superb film", "a tedious film"])]
    assert labels == ["good", "bad"]
    (learned,) = (note.details for note in notes if note.text == "learned from the training split")
    assert learned == run.summary["learned"]
    assert learned["further_words"] == 2
    json.dumps(learned)


def test_check_describes_placeholder_vocabulary(source: str) -> None:
    backbone = TextCNN(vectors=source, vectors_vocabulary=True, **SMALL)
    assert "plus the words of" in backbone.preprocessing.describe()["vocabulary"]
    assert np.isfinite(backbone(torch.ones(2, 5, dtype=torch.int64)).detach().numpy()).all()
