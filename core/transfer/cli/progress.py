"""What a person sees: tables, panels and live progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from transfer.errors import TransferError
from transfer.system.terminal import Console, printable
from transfer.training.events import (
    EpochEnded,
    EpochStarted,
    EvaluationStarted,
    EvaluationStep,
    Event,
    Note,
    RunEnded,
    RunStarted,
    StepEnded,
)

if TYPE_CHECKING:
    from transfer.experiments.comparison import Comparison

MOST_PIECES_SHOWN = 5
MOST_STEPS_SHOWN = 12
PLAIN_LINE_SECONDS = 10.0
"""Without a terminal, a line of progress is printed this often."""


def error_panel(error: TransferError) -> Panel:
    """Show what was asked, where, what exists and the fix, for every problem."""
    parts: list[RenderableType] = []
    for problem in error.problems:
        rows = Table.grid(padding=(0, 1))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(overflow="fold")
        rows.add_row("error", Text(printable(problem.message), style="bold"))
        if problem.where:
            rows.add_row("where", Text(printable(problem.where)))
        if problem.available:
            rows.add_row("exists", Text(printable(", ".join(problem.available))))
        if problem.fix:
            rows.add_row("fix", Text(printable(problem.fix), style="green"))
        parts += [rows, Text()]
    count = len(error.problems)
    title = type(error).__name__ if count == 1 else f"{count} problems"
    return Panel(Group(*parts[:-1]), title=title, title_align="left", border_style="red")


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Show names and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), Text(printable(_show(value))))
    return table


def seeds_table(summary: Mapping[str, Any]) -> Table:
    """Show mean, spread and values of every metric of a folder of seeds."""
    split = "test" if summary["test"] else "validation"
    table = Table(box=None, padding=(0, 2, 0, 0), title=f"{split}, {len(summary['seeds'])} seeds", title_justify="left")
    for heading in ("metric", "mean ± standard deviation", "95 % interval of the mean", "each seed"):
        table.add_column(heading)
    for metric, figure in summary[split].items():
        low, high = figure["interval"]
        mean = f"{figure['mean']:.4f} ± {figure['standard_deviation']:.4f}"
        table.add_row(metric, mean, f"{low:.4f} to {high:.4f}", " ".join(f"{value:.4f}" for value in figure["values"]))
    return table


def value_table(found: Mapping[str, Any]) -> Group:
    """Show every arm of ``transfer value``, and the answer."""
    metric, split = found["metric"], found["split"]
    table = Table(box=None, padding=(0, 2, 0, 0), title=f"{metric} on the {split} split", title_justify="left")
    for heading in ("", "mean ± standard deviation", "difference to from scratch", "", "seconds"):
        table.add_column(heading)
    for name, arm in found["arms"].items():
        figure, difference = arm[split][metric], arm.get("to_from_scratch")
        deviation = "" if figure["standard_deviation"] is None else f" ± {figure['standard_deviation']:.4f}"
        cells = [name.replace("_", " "), f"{figure['mean']:.4f}{deviation}", "", ""]
        if difference is not None:
            low, high = difference["interval"]
            cells[2:] = [f"{difference['mean']:+.4f} ({low:+.4f} to {high:+.4f})", difference["verdict"]]
        table.add_row(*cells, f"{arm['seconds']:,.0f}" if "seconds" in arm else "")
    return Group(table, *(Text(note, style="dim") for note in found["notes"]), Text(found["sentence"], style="bold"))


def comparison_table(comparison: Comparison) -> Group:
    """Show runs beside each other, and what is noise."""
    best = "higher" if comparison.higher_is_better else "lower"
    title = f"{comparison.metric} on the {comparison.split} split ({best} is better)"
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for heading in ("run", "seeds", "mean ± standard deviation", "difference to the first", ""):
        table.add_column(heading, overflow="fold")
    colours = {"better": "green", "worse": "red"}
    for row in comparison.rows:
        verdict = Text(row.verdict, style=colours.get(row.verdict, "dim"))
        difference = "" if row.difference is None else str(row.difference)
        table.add_row(Text(row.name), str(len(row.spread.values)), str(row.spread), difference, verdict)
    return Group(table, *(Text(note, style="dim") for note in comparison.notes))


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Show metrics in one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def range_test_table(rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float]) -> Table:
    """Show some of the steps of a range test, evenly over the whole."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("learning rate", "loss", "smoothed"):
        table.add_column(heading, justify="right")
    shown = min(len(rates), MOST_STEPS_SHOWN)
    for step in sorted({round(i * (len(rates) - 1) / max(1, shown - 1)) for i in range(shown)}):
        table.add_row(f"{rates[step]:.1e}", f"{losses[step]:.4f}", f"{smoothed[step]:.4f}")
    return table


def explanation_text(explanation: Mapping[str, Any]) -> Text:
    """Show what moved a score: the input with its pieces coloured by sign and strength, then those that moved it most.

    Args:
        explanation: As :func:`transfer.runs.train.predict` gives it.
    """
    pieces = [piece | {"change": piece["change"] or 0.0} for piece in explanation["pieces"]]
    strongest = max((abs(piece["change"]) for piece in pieces), default=0.0)
    text = Text()
    for piece in pieces:
        if isinstance(piece["piece"], str):
            word = piece["piece"].rstrip()
            text.append(word, style=_strength(piece["change"], strongest)).append(piece["piece"][len(word) :])
    ranked = sorted(pieces, key=lambda piece: -abs(piece["change"]))[:MOST_PIECES_SHOWN]
    ranked = [piece for piece in ranked if round(piece["change"], 4)]
    text.append(f"\n{explanation['of']} {explanation['score']:.4f}, of which", style="dim")
    for piece in ranked:
        name = piece["piece"].strip() if isinstance(piece["piece"], str) else _show(piece["piece"])
        text.append(f"  {name} {piece['change']:+.4f}", style=_strength(piece["change"], strongest))
    return text.append("\n" if ranked else "  no piece moves it\n")


def _strength(change: float, strongest: float) -> str:
    """Return the style of a piece: green speaks for what was predicted, red against it."""
    share = abs(change) / strongest if strongest else 0.0
    if share < 1 / 10:
        return ""
    colour = "green" if change > 0 else "red"
    return colour if share < 1 / 3 else f"bold {colour}" if share < 2 / 3 else f"bold reverse {colour}"


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_show(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_show(item) for item in value) or "none"
    return str(value)


class RunConsole:
    """Observes a run and shows it: a context manager, to be called with each event."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self.live,
        )
        self.epochs: TaskID | None = None
        self.steps: TaskID | None = None
        self.primary_metric = ""
        self.epoch: EpochStarted | None = None
        self.split: EvaluationStarted | None = None
        self.last_line_seconds = time.monotonic()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Note():
                if event.details is None:
                    self.console.print(Text(event.text, style="dim"))
                else:
                    self.console.print(Panel(facts_table(event.details), title=event.text, title_align="left"))
            case RunStarted():
                self._start_again()
                self.console.print(Panel(facts_table(event.facts), title=str(event.folder), title_align="left"))
                self.primary_metric = event.primary_metric
                self.epochs = self.progress.add_task("epochs", total=event.epochs, figures="")
            case EpochStarted():
                self.epoch = event
                if self.epochs is not None:  # a run that goes on begins in the middle
                    self.progress.update(self.epochs, completed=event.epoch - 1)
                self._bar(f"epoch {event.epoch}/{event.epochs}", event.steps)
            case StepEnded():
                self._step(event)
            case EvaluationStarted():
                self.split = event
                self._bar(f"scoring {event.split}", event.steps)
            case EvaluationStep():
                self._advance(event.step, "")
            case EpochEnded():
                self._epoch_ended(event)
            case RunEnded():
                self._run_ended(event)

    def _start_again(self) -> None:
        """Show progress from the beginning: this may be the next of several runs."""
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
        self.steps = None
        self.progress.start()

    def _bar(self, description: str, total: int) -> None:
        if self.steps is not None:
            self.progress.remove_task(self.steps)
        self.steps = self.progress.add_task(description, total=total, figures="")
        self.last_line_seconds = time.monotonic()

    def _advance(self, step: int, figures: str) -> None:
        if self.steps is not None:
            self.progress.update(self.steps, completed=step, figures=figures)

    def _step(self, event: StepEnded) -> None:
        name, value = event.metric
        figures = f"loss {event.loss:.4f}  {name} {value:.4f}  {event.examples_per_second:,.0f} examples/s"
        self._advance(event.step, figures)
        due = time.monotonic() - self.last_line_seconds >= PLAIN_LINE_SECONDS
        if not self.live and due and self.epoch:
            self.last_line_seconds = time.monotonic()
            at = f"epoch {self.epoch.epoch}/{self.epoch.epochs}  step {event.step}/{self.epoch.steps}"
            self.console.print(f"{at}  {figures}", highlight=False, soft_wrap=True)

    def _epoch_ended(self, event: EpochEnded) -> None:
        record = event.record
        assert self.epoch is not None
        # All metrics are in metrics.jsonl; a line has room for the one that matters.
        short = {"loss", self.primary_metric}
        train, validation = (
            metrics_text({name: value for name, value in record[split].items() if name in short})
            for split in ("train", "validation")
        )
        line = Text(f"epoch {record['epoch']}/{self.epoch.epochs}")
        if self.epoch.phases > 1:
            line.append(f"  phase {record['phase']}/{self.epoch.phases}")
        line.append(f"  train {train}", style="dim").append(f"  validation {validation}")
        line.append(f"  {record['seconds']:.1f} s  {record['examples_per_second']:,.0f} examples/s", style="dim")
        if event.best:
            line.append("  best", style="green")
        self.console.print(line, soft_wrap=True)
        if self.epochs is not None:
            self.progress.advance(self.epochs)

    def _run_ended(self, event: RunEnded) -> None:
        summary = event.summary
        self.progress.stop()
        facts = {
            "best epoch": summary["best_epoch"],
            "validation": metrics_text(summary["validation"]),
            "test": metrics_text(summary["test"]) if summary["test"] else "not scored",
            "parameters": f"{summary['parameters']['trainable']:,} trained of {summary['parameters']['total']:,}",
            "speed": f"{summary['examples_per_second']:,.0f} examples/s, {summary['waiting_for_data']:.0%} of the time "
            f"spent waiting for data, {summary['seconds']:.1f} s in all",
            "memory": f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB at most",
        }
        self.console.print(Panel(facts_table(facts), title="done", title_align="left", border_style="green"))
