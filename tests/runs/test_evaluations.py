"""Evaluation of a run on other data: tables, folders and blocks, with their classes, and the stored results."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import transfer
from transfer.runs.evaluations import read_evaluations
from transfer.storage.run_directory import RunDirectory

Call = Callable[..., tuple[int, str, str]]
GOOD, BAD, ODD = "a good film", "a bad film", "an odd film"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rows = [f"{text} {i},{label},7" for i in range(12) for text, label in ((GOOD, "up"), (BAD, "down"), (ODD, "level"))]
    (folder / "train.csv").write_text("\n".join(["review,opinion,stars", *rows]) + "\n", encoding="utf-8")
    data = {"name": "text_csv", "train": str(folder / "train.csv"), "text": "review", "label": "opinion"}
    backbone = {"name": "textcnn", "filters": 4, "dimensions": 8, "min_frequency": 1}
    train = {"batch_size": 8, "phases": [{"epochs": 1}], "report": False, "cache": "off"}
    config = {"data": {**data, "test_fraction": 0.25}, "backbone": backbone, "train": train}
    return transfer.run(config, output=folder).folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    return Path("run")


def table(name: str, *rows: str, header: str = "review,opinion") -> str:
    Path(name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return name


def test_table_with_the_columns_of_the_training_is_scored_and_stored(call: Call, run: Path) -> None:
    new = table("new.csv", f"{GOOD},up", f"{BAD},down", f"{BAD},up")
    status, out, err = call("evaluate", run, "--on", new)
    assert (status, err) == (0, "")
    assert "accuracy" in out
    assert "stored as new" in out
    metrics = transfer.evaluate(run, on=new)
    (evaluation,) = read_evaluations(RunDirectory(run))  # the same data has one result
    assert (evaluation.name, evaluation.examples, evaluation.metrics) == ("new", 3, metrics)
    assert f"{metrics['accuracy']:.4f}" in out or repr(metrics["accuracy"]) in out
    assert 'id="other-data"' in transfer.report(run).read_text("utf-8")
    status, out, _ = call("compare", run, run, "--on", "new")
    assert status == 0
    assert "accuracy on the new split" in out
    assert call("compare", run, "--on", "old")[0] == 2


def test_block_and_overrides_name_other_columns(call: Call, run: Path) -> None:
    new = table("new.csv", f"{GOOD},up", f"{BAD},down", header="text,label")
    by_override = transfer.evaluate(run, overrides=["data.text=text", "data.label=label"], on=new)
    block = "{name: text_csv, train: new.csv}"
    assert call("evaluate", run, "--on", f"data: {block}", "--json")[0] == 0
    assert transfer.evaluate(run, on={"name": "text_csv", "train": new}) == by_override
    Path("other").mkdir()
    transfer.evaluate(run, on=shutil.copy(table("new.csv", f"{GOOD},up", f"{BAD},down"), "other/new.csv"))
    names = [evaluation.name for evaluation in read_evaluations(RunDirectory(run))]
    assert names == ["new", "new-2"]  # another file of the same name does not replace the results


def test_folder_may_lack_a_class(call: Call, run: Path) -> None:
    for index, label in enumerate(("up", "down", "up")):
        Path("texts", label).mkdir(parents=True, exist_ok=True)
        Path("texts", label, f"{index}.txt").write_text(GOOD, encoding="utf-8")
    status, out, _ = call("evaluate", run, "--on", "texts")
    assert status == 0
    assert "the data has no example of 1 of the model's classes: level" in out
    (evaluation,) = read_evaluations(RunDirectory(run))
    assert (evaluation.examples, evaluation.missing) == (3, ["level"])


@pytest.mark.parametrize(
    ("rows", "header", "messages"),
    [
        ((f"{GOOD},up", f"{BAD},sideways"), "review,opinion", ("no class 'sideways' (1 examples", "new.csv:3")),
        ((f"{GOOD},up", f"{BAD},down"), "text,opinion", ("unknown column 'review'",)),
        ((f"{GOOD},up",), "review,opinion", ("contains only the class 'up'",)),
        ((), "review,opinion", ("the table contains no rows",)),
    ],
    ids=["other class", "missing column", "one class", "empty"],
)
def test_wrong_table_is_one_panel(
    call: Call, run: Path, rows: tuple[str, ...], header: str, messages: tuple[str, ...]
) -> None:
    status, out, err = call("evaluate", run, "--on", table("new.csv", *rows, header=header))
    assert (status, out) == (2, "")
    assert err.count("╭─") == 1
    assert all(message in err for message in messages)
    assert not read_evaluations(RunDirectory(run))


def test_missing_data_and_other_targets_are_refused(run: Path) -> None:
    with pytest.raises(transfer.UserError, match="there is no such data"):
        transfer.evaluate(run, on="nothing.csv")
    new = table("new.csv", f"{GOOD},7", f"{BAD},3")
    with pytest.raises(transfer.DataError, match="expected a class, got a number"):
        transfer.evaluate(run, overrides=["data.target=number"], on=new)
    with pytest.raises(transfer.UserError, match="unknown split 'test'"):
        transfer.evaluate(run, "test", on=table("new.csv", f"{GOOD},up", f"{BAD},down"))
