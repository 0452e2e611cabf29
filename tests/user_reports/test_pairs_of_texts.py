"""Examples that consist of two texts, and parts of a fusion that would read the same text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import transfer
from transfer import ConfigError
from transfer_text.data.tables import TextCSV


def _write(path: Path) -> None:
    rows = [
        {
            "premise": f"a {animal} {verb}",
            "hypothesis": f"the {other} {verb}",
            "label": "no" if animal != other else "yes",
        }
        for animal in ("cat", "dog")
        for other in ("cat", "dog")
        for verb in ("sleeps", "runs", "eats", "sits", "barks")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_columns_of_a_pair_are_joined(tmp_path: Path) -> None:
    _write(tmp_path / "pairs.jsonl")
    data = TextCSV(train=str(tmp_path / "pairs.jsonl"), text=("premise", "hypothesis"), test_fraction=0.5).load()
    assert data.spec.fields == ("text",)
    assert sorted(data.splits) == ["test", "train"]
    texts = [text for split in data.splits.values() for text in split.fields["text"]]
    assert "a cat sleeps [SEP] the dog sleeps" in texts
    assert len(texts) == 20


@pytest.mark.parametrize("text", [(), ("premise", "label"), ("premise", "premise")])
def test_unsuitable_columns_of_a_pair_are_refused(text: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"names no column|do not name different columns"):
        TextCSV(train="pairs.jsonl", text=text)


def test_missing_column_of_a_pair_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "pairs.jsonl")
    with pytest.raises(transfer.DataError, match="hypotesis"):
        TextCSV(train=str(tmp_path / "pairs.jsonl"), text=("premise", "hypotesis")).load()


def test_incomplete_pairs_are_refused_together_or_left_out(tmp_path: Path) -> None:
    _write(tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    rows[3]["hypothesis"], rows[7]["hypothesis"], rows[9]["premise"] = None, "<br />", " "
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = str(tmp_path / "pairs.jsonl")
    with pytest.raises(transfer.DataError) as e:
        TextCSV(train=table, text=("premise", "hypothesis")).load()
    assert [problem.message for problem in e.value.problems] == [
        "column 'hypothesis' is empty in 2 of 20 rows: lines 4, 8",
        "column 'premise' is empty in 1 of 20 rows: line 10",
    ]
    data = TextCSV(train=table, text=("premise", "hypothesis"), bad_texts="skip").load()
    assert len(data.splits["train"]) == 17


def test_pairs_train_and_predict(tmp_path: Path) -> None:
    _write(tmp_path / "pairs.jsonl")
    config = {
        "data": {"name": "text_csv", "train": str(tmp_path / "pairs.jsonl"), "text": ["premise", "hypothesis"]},
        "backbone": {"name": "textcnn", "filters": 4},
        "train": {"report": False, "phases": [{"epochs": 1}]},
    }
    run = transfer.run(config, output=tmp_path / "runs")
    (prediction,) = transfer.predict(run.folder, ["a cat sleeps [SEP] the dog sleeps"])
    assert prediction["label"] in ("no", "yes")


def test_fusion_refuses_parts_with_same_field(tmp_path: Path) -> None:
    config = {
        "data": {"name": "text_csv", "train": "pairs.jsonl", "text": "premise"},
        "backbone": {"name": "fusion", "parts": {"premise": {"name": "textcnn"}, "hypothesis": {"name": "bilstm"}}},
    }
    with pytest.raises(
        ConfigError, match="parts 'premise' and 'hypothesis' of a fusion take the same field 'text'"
    ) as e:
        transfer.check(config)
    (problem,) = e.value.problems
    assert problem.fix is not None
    assert "[premise, hypothesis]" in problem.fix
