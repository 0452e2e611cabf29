"""Which words moved the score."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import transfer
from transfer import DataError, Occlusion, RunError
from transfer.cli.app import main
from transfer.cli.tables import explanation_text
from transfer_text.encoding.preprocessing import TextPreprocessing
from transfer_text.encoding.vocabulary import TOKENIZERS, TokenizerName, Vocabulary

GOOD, BAD, NEUTRAL = "superb", "dreadful", ("the", "film", "was", "a", "long", "story", "of", "two", "men", ",", ".")


def preprocessing(tokenizer: TokenizerName = "glove") -> TextPreprocessing:
    return TextPreprocessing(Vocabulary.build(["a film"], tokenizer), None)


def apart(text: str, tokenizer: TokenizerName = "glove") -> list[Occlusion]:
    return list(preprocessing(tokenizer).occlusions(text))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny model on texts in which one word decides."""
    folder = tmp_path_factory.mktemp("explained")
    rows = [
        f'"{" ".join(NEUTRAL[i % 11] for i in range(n, n + 5))} {word} {NEUTRAL[n % 7]}",{label}'
        for n in range(40)
        for word, label in ((GOOD, "good"), (BAD, "bad"))
    ]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    config = {
        "data": {"name": "text_csv", "train": str(folder / "reviews.csv"), "text": "text", "label": "label"},
        "backbone": {"name": "textcnn", "dimensions": 8, "kernel_sizes": [1, 2], "filters": 8},
        "head": {"name": "linear"},
        "task": {"name": "classification"},
        "train": {"batch_size": 8, "optimizer": {"name": "adam", "lr": 0.02}, "phases": [{"epochs": 4}]},
    }
    return transfer.run(config, output=folder).folder


def explained(run: Path, *texts: str) -> list[dict[str, Any]]:
    return list(transfer.predict(run, texts, explain=True))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(
    "text", ["A film.", "  It's  n't \"good\",\n<br /> O'Brien &amp; co-star; 3.5/10 ... caf\u00e9 \u2019s ", "film"]
)
def test_the_pieces_in_a_row_are_the_text(tokenizer: TokenizerName, text: str) -> None:
    assert "".join(found.piece for found in apart(text, tokenizer)) == text


def test_pieces_are_words_and_punctuation() -> None:
    found = [piece.piece.strip() for piece in apart("Don't miss O'Brien's co-star,<br />&quot;he 's\u201d GREAT!!")]
    assert found[:7] == ["Don't", "miss", "O'Brien's", "co-star", ",", "<br />", "&quot;"]
    assert found[7:] == ["he", "'s", "\u201d", "GREAT", "!!"]


def test_rest_lacks_only_the_piece() -> None:
    words = preprocessing()
    tokens = words.vocabulary.tokenize("not a good film,but warm")
    for place, found in enumerate(words.occlusions("not a good film,but warm")):
        assert words.vocabulary.tokenize(found.rest) == tokens[:place] + tokens[place + 1 :]


def test_without_its_only_word_nothing_is_left() -> None:
    assert [(found.piece, found.rest) for found in apart("<p>Film</p>")] == [
        ("<p>", " Film</p>"),
        ("Film", None),
        ("</p>", "<p>Film "),
    ]


def test_the_word_that_decides_changes_the_score_most(run: Path) -> None:
    for word, label in ((GOOD, "good"), (BAD, "bad")):
        (answer,) = explained(run, f"The story, a long {word.upper()} film, was of two men.")
        explanation = answer["explanation"]
        assert (answer["label"], explanation["of"]) == (label, label)
        assert explanation["score"] == pytest.approx(answer["probability"])
        strongest = max(explanation["pieces"], key=lambda piece: abs(piece["change"]))
        assert strongest["piece"] == f"{word.upper()} "
        assert strongest["change"] > 0.2
    json.dumps(answer)


def test_change_is_loss_of_score_without_piece(run: Path) -> None:
    (whole,) = explained(run, f"a {GOOD} film")
    (without,) = transfer.predict(run, ["a film"])
    change = whole["explanation"]["pieces"][1]["change"]
    assert whole["probability"] - without["probabilities"]["good"] == pytest.approx(change, abs=1e-6)


def test_opposing_word_has_opposite_change(run: Path) -> None:
    (answer,) = explained(run, f"{GOOD} {GOOD} story of two men, long {BAD}")
    of = {piece["piece"].strip(): piece["change"] for piece in answer["explanation"]["pieces"]}
    other = BAD if answer["label"] == "good" else GOOD
    assert of[other] < 0


def test_many_long_texts_are_explained_in_order(run: Path) -> None:
    texts = [f"{'film ' * 90}{word}" for word in (GOOD, BAD)] * 35
    answers = explained(run, *texts)
    assert [answer["input"] for answer in answers] == texts
    assert {len(answer["explanation"]["pieces"]) for answer in answers} == {91}
    assert answers[0] == answers[2]


def test_a_text_of_one_word_has_no_change(run: Path) -> None:
    (answer,) = explained(run, GOOD)
    assert answer["explanation"]["pieces"] == [{"piece": GOOD, "change": None}]
    assert "largest changes:  none" in explanation_text(answer["explanation"]).plain


@pytest.mark.parametrize("task", ["labels", "number"])
def test_other_tasks_are_explained_by_their_main_output(tmp_path: Path, task: str) -> None:
    good, other = ("good", "calm|slow") if task == "labels" else ("2", "0")
    rows = [f"a {GOOD} film,{good}", f"a long film,{other}"] * 20
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    target = {"target": "label_list", "separator": "|"} if task == "labels" else {"target": "number"}
    config = {
        "data": {"name": "text_csv", "train": str(tmp_path / "reviews.csv"), "text": "text", "label": "label"} | target,
        "backbone": {"name": "textcnn", "dimensions": 6, "kernel_sizes": [1], "filters": 8},
        "head": {"name": "linear"},
        "task": {"name": "multilabel" if task == "labels" else "regression"},
        "train": {"batch_size": 8, "optimizer": {"name": "adam", "lr": 0.05}, "phases": [{"epochs": 12}]},
    }
    folder = transfer.run(config, output=tmp_path).folder
    (answer,) = explained(folder, f"a {GOOD} film")
    explanation = answer["explanation"]
    assert explanation["of"] == ("good" if task == "labels" else "label")
    expected = max(answer["probabilities"].values()) if task == "labels" else answer["label"]
    assert explanation["score"] == pytest.approx(expected)
    assert max(explanation["pieces"], key=lambda piece: abs(piece["change"]))["piece"] == f"{GOOD} "


# ------------------------------------------------------------------------------------------------------- command line


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["transfer", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def test_console_shows_text_and_strongest_words(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "predict", str(run), f"A long, {GOOD} film!", "--explain")
    shown = capsys.readouterr().out
    assert f"A long, {GOOD} film!\n" in shown
    assert re.search(rf"good \d\.\d{{4}}; largest changes:  {GOOD} \+0\.\d{{4}}", shown)


def test_json_holds_the_numbers(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command(monkeypatch, "predict", str(run), f"a {GOOD} film", "--explain", "--json")
    answer = json.loads(capsys.readouterr().out)
    assert [piece["piece"] for piece in answer["explanation"]["pieces"]] == ["a ", f"{GOOD} ", "film"]
    assert set(answer) == {"input", "label", "probability", "probabilities", "explanation"}


def test_colours_follow_sign_and_strength() -> None:
    pieces = [("so ", 0.01), ("superb ", 0.6), ("and ", 0.3), ("long", -0.5), (" <br />", None)]
    explanation = {"of": "good", "score": 0.9, "pieces": [{"piece": p, "change": c} for p, c in pieces]}
    text = explanation_text(explanation)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans[:4]}
    assert text.plain.startswith("so superb and long <br />\n")
    assert styles == {"superb": "bold reverse green", "and": "bold green", "long": "bold reverse red"} | {
        name: style for name, style in styles.items() if name not in ("superb", "and", "long")
    }
    regions = {"of": "cat", "score": 0.5, "pieces": [{"piece": [0, 0, 8, 8], "change": 0.2}]}
    assert "cat 0.5000; largest changes:  0, 0, 8, 8 +0.2000" in explanation_text(regions).plain


def test_a_backbone_that_cannot_is_refused_by_name(tmp_path: Path) -> None:
    config = {
        "data": {"name": "shapes", "per_class": 6},
        "backbone": {"name": "resnet18", "weights": None, "image_size": 32},
        "head": {"name": "linear"},
        "task": {"name": "classification"},
        "train": {"phases": [{"epochs": 1}]},
    }
    folder = transfer.run(config, output=tmp_path, quick=True).folder
    with pytest.raises(RunError, match="backbone 'resnet18' cannot divide an input into pieces"):
        explained(folder, "picture.png")


@pytest.mark.parametrize("path", ["reviews.txt", "/no/such/file", "./review", "~/review", "../x.txt"])
def test_missing_path_is_not_predicted_as_text(path: str) -> None:
    with pytest.raises(DataError, match="text file does not exist") as caught:
        preprocessing().read(path)
    assert caught.value.problems[0].where == path


def test_a_folder_is_not_taken_for_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reviews").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="this is a folder"):
        preprocessing().read("reviews/")


@pytest.mark.parametrize("text", ["5/10", "/s", "and/or", "a film. ./ no", "good.txt is a fine name", "", "./"])
def test_a_text_with_a_slash_is_a_text(text: str) -> None:
    assert preprocessing().read(text) == text
