"""Tables and panels for the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from transfer.errors import TransferError
from transfer.system.terminal import printable

if TYPE_CHECKING:
    from transfer.experiments.comparison import Comparison


MAX_PIECES_SHOWN = 5
MAX_STEPS_SHOWN = 12


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
    shown = min(len(rates), MAX_STEPS_SHOWN)
    for step in sorted({round(i * (len(rates) - 1) / max(1, shown - 1)) for i in range(shown)}):
        table.add_row(f"{rates[step]:.1e}", f"{losses[step]:.4f}", f"{smoothed[step]:.4f}")
    return table


def explanation_text(explanation: Mapping[str, Any]) -> Text:
    """Show what moved a score: the input with its pieces coloured by sign and strength, then those that moved it most.

    Args:
        explanation: As :func:`transfer.runs.predict.predict` gives it.
    """
    pieces = [piece | {"change": piece["change"] or 0.0} for piece in explanation["pieces"]]
    strongest = max((abs(piece["change"]) for piece in pieces), default=0.0)
    text = Text()
    for piece in pieces:
        if isinstance(piece["piece"], str):
            word = piece["piece"].rstrip()
            text.append(word, style=_strength(piece["change"], strongest)).append(piece["piece"][len(word) :])
    ranked = sorted(pieces, key=lambda piece: -abs(piece["change"]))[:MAX_PIECES_SHOWN]
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
