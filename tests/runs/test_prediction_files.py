"""Files of predictions: CSV, JSON Lines and Parquet."""

from __future__ import annotations

import csv
import importlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import transfer
from transfer.system.iteration import map_ahead

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = {"name": "textcnn", "filters": 4, "dimensions": 8}
    train = {"batch_size": 64, "phases": [{"epochs": 1}], "report": False, "cache": "off"}
    config = {"data": {"name": "mini_reviews"}, "backbone": backbone, "train": train}
    return transfer.run(config, output=tmp_path_factory.mktemp("texts")).folder


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "reviews.csv"
    path.write_text('id,text,label\n7,"a good film, mostly",pos\n8,,neg\n9,xyzzy,neg\n', encoding="utf-8")
    return path


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_every_row_with_kept_columns_and_all_probabilities(call: Call, run: Path, table: Path) -> None:
    arguments = ("reviews.csv", "--column", "text", "--keep", "id", "--keep", "label", "--output", "new/out.csv")
    status, out, err = call("predict", run, *arguments)
    assert status == 0
    assert "new/out.csv: 3 predictions, 0 failed" in out
    assert "no answer for 2 of 3 inputs" in err
    first, blank, unknown = rows("new/out.csv")
    assert list(first) == [
        *("input", "file", "line", "id", "input_label", "label", "probability"),
        *("probability_negative", "probability_positive", "unknown_fraction", "note", "error"),
    ]
    assert [row["id"] + row["input_label"] for row in (first, blank, unknown)] == ["7pos", "8neg", "9neg"]
    assert float(first["probability_negative"]) + float(first["probability_positive"]) == pytest.approx(1, abs=1e-6)
    assert (blank["label"], blank["note"]) == ("", "the input is blank")
    assert "no word" in unknown["note"]


def test_json_lines_contain_the_answers_and_the_failures(call: Call, run: Path, table: Path) -> None:
    Path("a.txt").write_text("a good film", encoding="utf-8")
    Path("b.txt").write_bytes(b"\xff\xfe\x00")
    status, out, err = call("predict", run, "*.txt", "--output", "out.jsonl")
    assert status == 2  # an input failed
    assert "out.jsonl: 2 predictions, 1 failed" in out
    assert "b.txt" in err
    good, bad = (json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines())
    assert list(good["probabilities"]) == ["negative", "positive"]
    assert "error" in bad


def test_parquet_has_the_types_of_the_values(call: Call, run: Path, table: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra `huggingface` is not installed")
    assert call("predict", run, "reviews.csv", "--column", "text", "--keep", "id", "--output", "out.parquet")[0] == 0
    written = importlib.import_module("pyarrow.parquet").read_table("out.parquet")
    assert written.column("line").to_pylist() == [2, 3, 4]
    assert written.column("id").to_pylist() == ["7", "8", "9"]


def test_stopped_prediction_leaves_the_previous_file(call: Call, run: Path, table: Path) -> None:
    Path("out.csv").write_text("previous", encoding="utf-8")
    Path("b.txt").write_bytes(b"\xff\xfe\x00")
    assert call("predict", run, "b.txt", "--on-error", "fail", "--output", "out.csv")[0] == 2
    assert Path("out.csv").read_text(encoding="utf-8") == "previous"
    assert not list(Path().glob(".*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("reviews.csv", "--column", "review", "--output", "out.csv"), "unknown column 'review' of the table"),
        (("reviews.csv", "--column", "text", "--keep", "stars", "--output", "out.csv"), "unknown column 'stars'"),
        (("empty.csv", "--column", "text", "--output", "out.csv"), "the table is empty"),
        (("reviews.csv", "--keep", "id"), "--keep needs a table"),
        (("good", "--output", "out.xlsx"), "the format of the output is unknown"),
        (("good", "--output", "out.csv", "--json"), "--output and --json exclude each other"),
    ],
)
def test_wrong_table_or_output_is_one_panel(
    call: Call, run: Path, table: Path, arguments: tuple[str, ...], message: str
) -> None:
    Path("empty.csv").touch()
    status, out, err = call("predict", run, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("╭─") == 1
    assert not Path("out.csv").exists()


def test_frame_is_predicted_with_kept_columns(run: Path) -> None:
    model = transfer.load(run)
    frame = {"text": ["a good film", "***"], "label": [1, 0]}
    good, unknown = model.predict(frame, column="text", keep=["label"])
    assert (good["row"], good["input_label"]) == (0, 1)
    assert unknown["input"] == "***"
    with pytest.raises(transfer.UserError, match="there is no column 'label' to keep"):
        model.predict(["a"], keep=["label"])


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_computed_ahead_are_in_order(threads: int) -> None:
    names = set()

    def double(value: int) -> int:
        names.add(threading.current_thread() is threading.main_thread())
        if value == 8:
            raise ValueError(value)
        return 2 * value

    results = map_ahead(double, iter(range(20)), threads)
    assert [next(results) for _ in range(8)] == [*range(0, 16, 2)]
    with pytest.raises(ValueError, match="8"):
        next(results)
    assert names == {threads == 0}


def test_answers_with_reading_threads_are_the_same(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transfer.load(run)
    texts: list[Any] = [f"a good film {index}" for index in range(200)]
    texts[70] = 5  # fails
    expected = model.predict(texts, on_error="skip")
    monkeypatch.setattr(model, "_reading_threads", lambda device, explain: 2)
    assert model.predict(texts, on_error="skip") == expected
    answers = model.answers(model.inputs(texts))
    assert [next(answers)["input"] for _ in range(64)] == texts[:64]  # the batch before the error
    with pytest.raises(transfer.DataError):
        next(answers)
