"""What a person sees."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import transfer
from transfer import ConfigError
from transfer.cli.plan import render
from transfer.cli.progress import RunConsole
from transfer.cli.tables import error_panel, facts_table, metrics_text
from transfer.errors import Problem
from transfer.training.events import CachingStep, EncodingStep, EpochEnded, EpochStarted, Note, RunStarted, StepEnded


def shown(*parts: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    for part in parts:
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_an_error_says_what_where_what_exists_and_the_fix() -> None:
    text = shown(error_panel(ConfigError("no such head", where="a.yaml:7", available=["linear", "mlp"], fix="use mlp")))
    for part in ("ConfigError", "no such head", "a.yaml:7", "linear, mlp", "use mlp"):
        assert part in text


def test_several_problems_are_counted() -> None:
    text = shown(error_panel(ConfigError.of([Problem("first"), Problem("second")])))
    assert "2 problems" in text
    assert "first" in text
    assert "second" in text


def test_square_brackets_are_shown_as_they_are() -> None:
    error = ConfigError("[red]{until: x}[/red]", where="[0]", available=["[bold]"], fix="[/]")
    text = shown(error_panel(error))
    for part in ("[red]{until: x}[/red]", "[0]", "[bold]", "[/]"):
        assert part in text
    assert "[/]" in shown(facts_table({"a": "[/]"}))


def test_values_are_shown_for_people() -> None:
    text = shown(
        facts_table({"some_thing": 0.123456, "n": 12345, "on": True, "none": None, "l": [1, 2.5], "m": {"a": 1}})
    )
    for part in ("some thing", "0.1235", "12,345", "true", "none  ", "1, 2.5", "a 1"):
        assert part in text
    assert metrics_text({"loss": 0.51234, "accuracy": 0.9}) == "loss 0.5123  accuracy 0.9000"


def test_a_run_on_no_terminal_is_plain_lines(config: dict[str, Any], tmp_path: Path) -> None:
    file = io.StringIO()
    with RunConsole(Console(file=file, width=200)) as observe:
        transfer.run(config, ["train.phases=[{epochs: 2}]"], output=tmp_path, observe=observe)
    text = file.getvalue()
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert "best" in lines[0]
    assert "done" in text
    assert "160" not in text.partition("done")[2]


def test_a_run_on_a_terminal_shows_the_same_results(config: dict[str, Any], tmp_path: Path) -> None:
    file = io.StringIO()
    with RunConsole(Console(file=file, width=200, force_terminal=True)) as observe:
        transfer.run(config, output=tmp_path, observe=observe)
    assert "epoch 2/2" in file.getvalue()
    assert "best epoch" in file.getvalue()


def test_long_epochs_on_no_terminal_show_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfer.cli.progress.PLAIN_LINE_SECONDS", 0.0)
    file = io.StringIO()
    with RunConsole(Console(file=file, width=200)) as observe:
        observe(EpochStarted(1, 3, 1, 1, 50))
        observe(StepEnded(7, 0.25, ("accuracy", 0.5), 1234.0))
    assert "epoch 1/3  step 7/50  loss 0.2500  accuracy 0.5000  1,234 examples/s" in file.getvalue()


def test_a_note_is_shown() -> None:
    file = io.StringIO()
    with RunConsole(Console(file=file, width=80)) as observe:
        observe(Note("pretrained weights", {"found": 400_000}))
    assert "pretrained weights" in file.getvalue()
    assert "400,000" in file.getvalue()


def test_the_plan_is_shown_stage_by_stage(config: dict[str, Any]) -> None:
    phases = "train.phases=[{epochs: 1, freeze: backbone}, {epochs: 2, freeze: {until: first}, lr: 0.5}]"
    text = shown(*render(*transfer.check(config, [phases])), width=150)
    rows = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert rows["first"].count("frozen") == 2
    assert "frozen" in rows["second"]
    assert "lr 0.5" in rows["second"]
    assert rows["head"].count("lr") == 2
    assert "phase 2: 2 epochs" in text


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_line_of_an_epoch_fits_the_terminal(width: int) -> None:
    metrics = {"loss": 0.6931, "accuracy": 0.5}
    record = {"epoch": 12, "phase": 1, "train": metrics, "validation": metrics, "seconds": 12.3}
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    observe = RunConsole(console)
    observe(RunStarted(Path("runs/a"), {}, 20, "accuracy"))
    observe(EpochStarted(12, 20, 1, 2, 50))
    observe(EpochEnded(record | {"examples_per_second": 1234.0}, best=True))
    observe.progress.stop()
    (line,) = [line.rstrip() for line in file.getvalue().splitlines() if "validation loss" in line]
    line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)[-width:]
    assert "validation loss 0.6931  accuracy 0.5000" in line
    assert line.endswith("best")
    assert ("examples/s" in line) == (width == 200)
    assert ("train" in line) == (width > 80)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("step_of", "text"), [(EncodingStep, "encoding"), (CachingStep, "computing features")])
def test_progress_before_training_is_shown(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, step_of: type[EncodingStep | CachingStep], text: str
) -> None:
    monkeypatch.setattr("transfer.cli.progress.PLAIN_LINE_SECONDS", 0.0)
    file = io.StringIO()
    with RunConsole(Console(file=file, width=200, force_terminal=terminal)) as observe:
        for split in ("train", "validation"):
            for step in (1, 2, 3):
                observe(step_of(split, step, 3))
    for split in ("train", "validation"):
        assert f"{text}: {split}" in file.getvalue()
    if not terminal:
        assert f"{text}: train  2/3\n" in file.getvalue()


def test_plan_caches_training_examples_without_augmentation() -> None:
    config = {
        "data": {"name": "shapes", "image_size": 32},
        "backbone": {"name": "torchvision", "model": "squeezenet1_1", "weights": None, "image_size": 32},
    }
    frozen = "train.phases=[{epochs: 2, freeze: backbone}]"
    for overrides, expected in (
        ([], "no: random augmentation"),
        (["train.augment=false"], "after pool"),
        (["train.views=4"], "after pool, 2 views each"),
        (["train.phases.0.epochs=4"], "no: random augmentation"),
        (["train.phases.0.epochs=5"], "after pool, 4 views each (train.views: auto, because 5 epochs use the frozen"),
        (["train.phases.0.epochs=5", "train.views=null"], "no: random augmentation"),
        (["train.phases.0.epochs=5", "train.phases.0.freeze={until: stage2}"], "no: random augmentation"),
    ):
        text = shown(*render(*transfer.check(config, [frozen, *overrides])), width=250)
        assert expected in text.partition("feature cache")[2]
