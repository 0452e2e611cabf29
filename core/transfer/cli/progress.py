"""Live progress of a run on the console."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from transfer.cli.tables import facts_table, metrics_text
from transfer.system.formatting import format_duration
from transfer.system.terminal import Console
from transfer.training.events import (
    CachingStep,
    EncodingStep,
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

PLAIN_LINE_SECONDS = 10.0
"""Interval between two lines of progress if the output is not a terminal."""


class RunConsole:
    """Observer that shows the progress of a run. It is a context manager that is called with each event.

    Args:
        console: Console to print to. If it is not a terminal, progress is printed as plain lines.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            console=console,
            # The bars disappear at the end of a run; its epochs and results stay.
            transient=True,
            disable=not self.live,
        )
        self.epochs: TaskID | None = None
        self.steps: TaskID | None = None
        self.primary_metric = ""
        self.epoch: EpochStarted | None = None
        self.preparing: str | None = None
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
                    # Not wrapped: a note may contain a command to copy.
                    self.console.print(Text(event.text, style="dim"), soft_wrap=True)
                else:
                    self.console.print(Panel(facts_table(event.details), title=event.text, title_align="left"))
            case RunStarted():
                self._start_again()
                self.console.print(Panel(facts_table(event.facts), title=str(event.folder), title_align="left"))
                self.primary_metric = event.primary_metric
                self.epochs = self.progress.add_task("epochs", total=event.epochs, metrics="")
            case EncodingStep():
                self._preparing_step(f"encoding: {event.split}", event)
            case CachingStep():
                self._preparing_step(f"computing features: {event.split}", event)
            case EpochStarted():
                self.epoch = event
                if self.epochs is not None:  # a resumed run starts at a later epoch
                    self.progress.update(self.epochs, completed=event.epoch - 1)
                self._bar(f"epoch {event.epoch}/{event.epochs}", event.steps)
            case StepEnded():
                self._step(event)
            case EvaluationStarted():
                self._bar(f"evaluating {event.split}", event.steps)
            case EvaluationStep():
                self._advance(event.step, "")
            case EpochEnded():
                self._epoch_ended(event)
            case RunEnded():
                self._run_ended(event)

    def _start_again(self) -> None:
        """Reset the progress bars, because one console may show several runs."""
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
        self.steps = None
        self.progress.start()

    def _bar(self, description: str, total: int) -> None:
        if self.steps is not None:
            self.progress.remove_task(self.steps)
        self.steps = self.progress.add_task(description, total=total, metrics="")
        self.last_line_seconds = time.monotonic()

    def _advance(self, step: int, metrics: str) -> None:
        if self.steps is not None:
            self.progress.update(self.steps, completed=step, metrics=metrics)

    def _preparing_step(self, text: str, event: EncodingStep | CachingStep) -> None:
        if self.preparing != text:
            self.preparing = text
            self._bar(text, event.steps)
        self._advance(event.step, "")
        self._print_if_due(f"{text}  {event.step}/{event.steps}")
        if event.step == event.steps:
            self.preparing = None

    def _step(self, event: StepEnded) -> None:
        name, value = event.metric
        metrics = f"loss {event.loss:.4f}  {name} {value:.4f}  {event.examples_per_second:,.0f} examples/s"
        self._advance(event.step, metrics)
        if self.epoch:
            at = f"epoch {self.epoch.epoch}/{self.epoch.epochs}  step {event.step}/{self.epoch.steps}"
            self._print_if_due(f"{at}  {metrics}")

    def _print_if_due(self, text: str) -> None:
        """Print a line of progress if the output is not a terminal and the last line is old enough."""
        if not self.live and time.monotonic() - self.last_line_seconds >= PLAIN_LINE_SECONDS:
            self.last_line_seconds = time.monotonic()
            self.console.print(text, highlight=False, soft_wrap=True)

    def _epoch_ended(self, event: EpochEnded) -> None:
        record = event.record
        assert self.epoch is not None
        # The line shows only the loss and the primary metric; metrics.jsonl contains all metrics.
        short = {"loss", self.primary_metric}
        train, validation = (
            metrics_text({name: value for name, value in record[split].items() if name in short})
            for split in ("train", "validation")
        )
        # The parts with the style that they have, and the order in which a narrow terminal leaves them out.
        parts = [
            (f"epoch {record['epoch']}/{self.epoch.epochs}", "", 0),
            (f"phase {record['phase']}/{self.epoch.phases}" if self.epoch.phases > 1 else "", "", 2),
            (f"train {train}", "dim", 3),
            (f"validation {validation}" if validation else "", "", 0),
            (f"{record['seconds']:.1f} s", "dim", 1),
            (f"{record['examples_per_second']:,.0f} examples/s", "dim", 1),
            ("best" if event.best else "", "green", 0),
        ]
        line = Text()
        for omitted in range(4):
            shown = [(text, style) for text, style, order in parts if text and not 0 < order <= omitted]
            line = Text("  ").join(Text(text, style=style) for text, style in shown)
            if not self.live or line.cell_len <= self.console.width:
                break
        self.console.print(line, soft_wrap=True)
        if self.epochs is not None:
            self.progress.advance(self.epochs)

    def _run_ended(self, event: RunEnded) -> None:
        summary = event.summary
        self.progress.stop()
        facts = {
            "best epoch": summary["best_epoch"],
            "validation": metrics_text(summary["validation"]) or "none: trained on all examples",
            "test": metrics_text(summary["test"]) if summary["test"] else "not evaluated",
            "parameters": f"{summary['parameters']['trainable']:,} of {summary['parameters']['total']:,} trained",
            "speed": f"{summary['examples_per_second']:,.0f} examples/s, {summary['waiting_for_data']:.0%} of the time "
            f"waiting for data, {format_duration(summary['seconds'])} in total",
            "memory": f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB at peak",
        }
        for warning in summary.get("warnings", ()):
            self.console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
        self.console.print(Panel(facts_table(facts), title="done", title_align="left", border_style="green"))
