"""Texts in scripts without blanks between words, and texts whose words are mostly unknown."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest

import transfer
from transfer.training.events import Note
from transfer_text.encoding.preprocessing import TextPreprocessing
from transfer_text.encoding.tokenization import tokenizer_for
from transfer_text.encoding.vocabulary import Vocabulary
from transfer_text.models.textcnn import TextCNN

CHINESE = {
    "good": (["这部电影", "这个剧情", "演员表演"], ["非常精彩", "太好看了", "十分感人", "值得推荐"]),
    "bad": (["这部电影", "这个剧情", "演员表演"], ["非常糟糕", "太难看了", "十分无聊", "浪费时间"]),
}


@pytest.fixture
def chinese_table(tmp_path: Path) -> Path:
    """A table of 144 sentences without punctuation, in which no sentence occurs twice."""
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for label, (subjects, verdicts) in CHINESE.items():
            sentences = itertools.product(subjects, verdicts, verdicts)
            writer.writerows([f"{a}{b}而且{c}", label] for a, b, c in sentences if b != c)
            writer.writerows(
                [f"我觉得{a}{b}而且{c}", label] for a, b, c in itertools.product(subjects, verdicts, verdicts)
            )
    return path


def _config(table: Path, **backbone: str) -> dict[str, object]:
    return {
        "data": {"name": "text_csv", "train": str(table), "test_fraction": 0.25},
        "backbone": {"name": "textcnn", "filters": 20, **backbone},
        "train": {"report": False, "phases": [{"epochs": 4, "lr": 0.01}]},
    }


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (
            "我喜歡這部 2019年 movie's電影。",
            ["我", "喜", "歡", "這", "部", "2019", "年", "movie", "'s", "電", "影", "。"],
        ),
        ("コーヒーが好き", ["コ", "ー", "ヒ", "ー", "が", "好", "き"]),
        ("ที่นี่ดี don't", ["ที่", "นี่", "ดี", "do", "n't"]),
        ("abcที่", ["abc", "ที่"]),
        ("한국 영화 naïve é", ["한국", "영화", "naïve", "é"]),
    ],
)
def test_multilingual_tokens(text: str, tokens: list[str]) -> None:
    vocabulary = Vocabulary.build([text], "multilingual")
    assert vocabulary.tokenize(text) == tokens
    # The fast path for many texts returns the same tokens as the library, which reads the saved model.
    assert [vocabulary.tokens[index] for index in vocabulary.encode([text])[0]] == tokens
    assert Vocabulary.from_json(vocabulary.to_json()).tokenizer_name == "multilingual"


def test_multilingual_equals_glove_on_english() -> None:
    text = "Mr. O'Brien's well-known U.S. film<br />isn't 1,000 times “better” than naïve ones..."
    assert Vocabulary.nominal("multilingual").tokenize(text) == Vocabulary.nominal("glove").tokenize(text)


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (["我喜欢", "very good"], "multilingual"),
        (["อาหารอร่อย"], "multilingual"),
        (["映画はとても良い"], "multilingual"),
        (["អាហារឆ្ងាញ់"], "multilingual"),
        (["the film 七人の侍 is a classic" + " indeed" * 100], "glove"),
        (["русский фильм", "한국 영화", "فيلم جيد", "αρχή"], "glove"),
        ([""], "glove"),
    ],
)
def test_tokenizer_chosen_by_text(texts: list[str], name: str) -> None:
    assert tokenizer_for(texts) == name
    assert TextCNN.from_data([*texts, "word"]).vocabulary.tokenizer_name == name


def test_chinese_sentences_are_learned(chinese_table: Path, tmp_path: Path) -> None:
    notes: list[Note] = []
    run = transfer.run(_config(chinese_table), output=tmp_path, observe=lambda e: notes.append(e))
    assert run.summary["test"]["accuracy"] == 1.0
    assert run.summary["learned"]["tokenizer"] == "multilingual"
    assert not any("unknown" in note.text for note in notes if isinstance(note, Note))
    (prediction,) = transfer.predict(run.folder, ["我觉得这部电影十分感人"], explain=True)
    assert prediction["label"] == "good"
    assert [piece["piece"] for piece in prediction["explanation"]["pieces"]] == list("我觉得这部电影十分感人")


def test_mostly_unknown_words_of_validation_are_reported(chinese_table: Path, tmp_path: Path) -> None:
    notes: list[Note] = []
    config = _config(chinese_table, tokenizer="glove")
    transfer.run(config, output=tmp_path, quick=True, observe=lambda e: notes.append(e))
    (text,) = [note.text for note in notes if isinstance(note, Note) and "unknown" in note.text]
    assert text.startswith("warning about the validation split: 100% of the tokens of these texts are unknown (")
    assert "multilingual" in text


@pytest.mark.parametrize(
    ("texts", "warns"),
    [(["a b c x"], False), (["a x", "b y"], False), (["x y a", ""], True), ([], False), ([""], False)],
)
def test_unknown_words_warning(texts: list[str], warns: bool) -> None:
    preprocessing = TextPreprocessing(Vocabulary.build(["a b c"]), None)
    assert (preprocessing.warning(texts) is not None) == warns


def test_unknown_token_of_tokenizer_file_is_counted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.build(["a"], str(tmp_path / "tokenizer.json"))
    assert TextPreprocessing(vocabulary, None).count_unknown(["a b c"]) == (2, 3)
