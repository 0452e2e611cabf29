"""Tables and panels of the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from transfer.errors import TransferError
from transfer.system.formatting import format_value
from transfer.system.terminal import printable

if TYPE_CHECKING:
    from transfer.experiments.audit import Audit
    from transfer.experiments.comparison import Comparison
    from transfer.experiments.probe import Probe


MAX_PIECES_SHOWN = 5
"""Maximum number of pieces that are listed below an explained input."""
MAX_STEPS_SHOWN = 12
"""Maximum number of steps in the table of a range test."""
MAX_SHOWN_CHARACTERS = 80
"""Length of the part of a text that a table of neighbors shows."""
MAX_FINDINGS_SHOWN = 20
"""Maximum number of suspicious examples that are listed; the file contains all."""
MAX_UNANSWERED_SHOWN = 20
"""Maximum number of inputs without an answer that are listed."""
DIGITS = 6
"""Significant digits of predicted numbers: a regression may predict large values."""
MIN_PROBABILITY = 0.0001
"""Smallest probability that is printed as a number; smaller ones are ``<0.0001``."""
NOT_IN_TABLE = ("error", "note", "unknown_fraction")
"""Parts of an answer that are listed below the table instead of in a column."""
NO_CHANGE_FRACTION, STRONG_FRACTION, STRONGEST_FRACTION = 1 / 10, 1 / 3, 2 / 3
"""Fractions of the largest change at which a piece is colored, printed bold, and printed inverted."""


def error_panel(error: TransferError) -> Panel:
    """Return a panel with the message, the location, the available alternatives and the fix of every problem."""
    parts: list[RenderableType] = []
    for problem in error.problems:
        rows = Table.grid(padding=(0, 1))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(overflow="fold")
        rows.add_row("error", Text(printable(problem.message), style="bold"))
        if problem.where:
            rows.add_row("where", Text(printable(problem.where)))
        if problem.available:
            rows.add_row("available", Text(printable(", ".join(problem.available))))
        if problem.fix:
            rows.add_row("fix", Text(printable(problem.fix), style="green"))
        parts += [rows, Text()]
    count = len(error.problems)
    title = type(error).__name__ if count == 1 else f"{count} problems"
    # The last part is the empty line after the last problem.
    return Panel(Group(*parts[:-1]), title=title, title_align="left", border_style="red")


def facts_table(facts: Mapping[str, Any], *, digits: int = 4) -> Table:
    """Return a table of names and values.

    Args:
        facts: Values by name; underscores in names are shown as spaces.
        digits: Significant digits of floats.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), Text(printable(format_value(value, digits=digits))))
    return table


def seeds_table(summary: Mapping[str, Any]) -> Table:
    """Return a table with mean, standard deviation, interval and values of every metric of a folder of seeds."""
    split = "test" if summary["test"] else "validation"
    return _spreads_table(f"{split}, {len(summary['seeds'])} seeds", summary[split])


def folds_table(summary: Mapping[str, Any]) -> Table:
    """Return a table with mean, standard deviation, interval and values of every metric of a cross-validation."""
    repeats = f", {summary['repeats']} times" if summary["repeats"] > 1 else ""
    return _spreads_table(f"cross-validation with {summary['folds']} folds{repeats}", summary["test"])


def _spreads_table(title: str, spreads: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for heading in ("metric", "mean ± standard deviation", "95 % interval of the mean", "values"):
        table.add_column(heading)
    for metric, spread in spreads.items():
        low, high = spread["interval"]
        mean = f"{spread['mean']:.4f} ± {spread['standard_deviation']:.4f}"
        table.add_row(metric, mean, f"{low:.4f} to {high:.4f}", " ".join(f"{value:.4f}" for value in spread["values"]))
    return table


def pretraining_gain_table(result: Mapping[str, Any]) -> Group:
    """Return a table of the arms of ``transfer pretraining-gain``, with notes and the result in a sentence.

    Args:
        result: Content of ``value.json``.
    """
    metric, split = result["metric"], result["split"]
    table = Table(box=None, padding=(0, 2, 0, 0), title=f"{metric} on the {split} split", title_justify="left")
    for heading in ("arm", "mean ± standard deviation", "difference to from scratch", "verdict", "seconds"):
        table.add_column(heading)
    for name, arm in result["arms"].items():
        spread, difference = arm[split][metric], arm.get("to_from_scratch")
        deviation = "" if spread["standard_deviation"] is None else f" ± {spread['standard_deviation']:.4f}"
        cells = [name.replace("_", " "), f"{spread['mean']:.4f}{deviation}", "", ""]
        if difference is not None:
            low, high = difference["interval"]
            cells[2:] = [f"{difference['mean']:+.4f} ({low:+.4f} to {high:+.4f})", difference["verdict"]]
        table.add_row(*cells, f"{arm['seconds']:,.0f}" if "seconds" in arm else "")
    return Group(table, *(Text(note, style="dim") for note in result["notes"]), Text(result["sentence"], style="bold"))


def audit_table(audited: Audit) -> Group:
    """Return a table of the most suspicious examples of an audit, with the number of each issue."""
    counts, total = audited.counts(), sum(audited.examples.values())
    title = f"{len(audited.findings):,} of {total:,} examples have an issue"
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for heading in ("example", "label", "suggested", "probability of the label", "issues"):
        table.add_column(heading, overflow="fold")
    for one in audited.findings[:MAX_FINDINGS_SHOWN]:
        issues = ", ".join(one.issues) + (f" of {one.duplicate_of}" if one.duplicate_of else "")
        table.add_row(f"{one.split}: {one.name}", one.label, one.suggested, f"{one.probability:.4f}", issues)
    summary = ", ".join(
        [
            f"wrong labels: {counts['label']:,}",
            f"near duplicates: {counts['duplicate']:,} ({counts['leak']:,} in another split)",
            f"outliers: {counts['outlier']:,}",
        ]
    )
    accuracy = f"out-of-fold accuracy of a linear head: {audited.accuracy:.4f}"
    return Group(table, Text(summary, style="bold"), Text(accuracy, style="dim"))


def comparison_table(comparison: Comparison) -> Group:
    """Return a table of the runs of a comparison, with their verdicts and notes."""
    best = "higher" if comparison.higher_is_better else "lower"
    title = f"{comparison.metric} on the {comparison.split} split ({best} is better)"
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for heading in ("run", "seeds", "mean ± standard deviation", "difference to the first", "verdict"):
        table.add_column(heading, overflow="fold")
    colors = {"better": "green", "worse": "red"}
    for row in comparison.rows:
        verdict = Text(row.verdict, style=colors.get(row.verdict, "dim"))
        difference = "" if row.difference is None else str(row.difference)
        table.add_row(Text(row.name), str(len(row.spread.values)), str(row.spread), difference, verdict)
    return Group(table, *(Text(note, style="dim") for note in comparison.notes))


def probe_table(probe: Probe) -> Group:
    """Return a table of backbones and classifiers for each number of labels, with notes and a recommendation."""
    best = "higher" if probe.higher_is_better else "lower"
    parts: list[RenderableType] = [Text(f"{probe.metric} on the test split ({best} is better)")]
    styles = {"reference": "bold green", "better": "green", "worse": "dim"}
    table = Table()
    for index, row in enumerate(probe.rows):
        if index == 0 or row.labels != probe.rows[index - 1].labels:
            table = Table(box=None, padding=(0, 1, 0, 0), title=row.labels, title_justify="left")
            table.add_column("config", overflow="fold", min_width=max(len(row.config) for row in probe.rows))
            for heading in ("classifier", "mean", "95 % interval", "verdict"):
                table.add_column(heading, no_wrap=True, min_width=19 if heading == "classifier" else None)
            parts.append(table)
        low, high = row.spread.interval or (row.spread.mean, row.spread.mean)
        judged = "best" if row.verdict == "reference" else row.verdict
        cells = (row.config, row.classifier, f"{row.spread.mean:.4f}", f"{low:.3f} to {high:.3f}", judged)
        table.add_row(*map(Text, cells), style=styles.get(row.verdict, ""))
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in probe.seconds.items())
    parts += [Text(line, style="dim") for line in (*probe.notes, seconds)]
    return Group(*parts, *(Text(sentence, style="bold") for sentence in probe.recommendation))


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Return metrics as one line of text."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def range_test_table(rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float]) -> Table:
    """Return a table of evenly spaced steps of a range test."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("learning rate", "loss", "smoothed"):
        table.add_column(heading, justify="right")
    shown = min(len(rates), MAX_STEPS_SHOWN)
    # A set, because rounding may give the same step twice.
    for step in sorted({round(i * (len(rates) - 1) / max(1, shown - 1)) for i in range(shown)}):
        table.add_row(f"{rates[step]:.1e}", f"{losses[step]:.4f}", f"{smoothed[step]:.4f}")
    return table


def predictions_table(answers: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row for each answer (:func:`transfer.runs.predict.predict`)."""
    names = dict.fromkeys(name for answer in answers for name in answer if name not in NOT_IN_TABLE)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    for answer in answers:
        table.add_row(*(Text(prediction_cell(name, answer.get(name))) for name in names))
    return table


def neighbors_table(answer: Mapping[str, Any]) -> Table:
    """Return the nearest training examples of an input (:func:`transfer.runs.neighbors.neighbors`)."""
    table = Table(box=None, padding=(0, 2, 0, 0), title=Text(_shortened(answer["input"])), title_justify="left")
    names = ["distance", "label", "name", *(["text"] if any("text" in one for one in answer["neighbors"]) else [])]
    for name in names:
        table.add_column(name, overflow="fold")
    for one in answer["neighbors"]:
        cells = one | {"distance": f"{one['distance']:.4f}", "text": _shortened(one.get("text", ""))}
        table.add_row(*(Text(str(cells[name])) for name in names))
    return table


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_SHOWN_CHARACTERS else line[: MAX_SHOWN_CHARACTERS - 1] + "…"


def prediction_cell(name: str, value: Any) -> str:
    """Return a value of an answer as text: probabilities with four decimals, other numbers with six digits."""
    if value is None:
        return "-"
    if name in ("probability", "probabilities"):
        pairs = value.items() if isinstance(value, Mapping) else [("", value)]
        return ", ".join(f"{key} {_probability(number)}".strip() for key, number in pairs)
    return format_value(value, digits=DIGITS)


def _probability(value: float) -> str:
    return f"<{MIN_PROBABILITY}" if 0 < value < MIN_PROBABILITY else f"{value:.4f}"


def unanswered_text(answers: Sequence[Mapping[str, Any]], total: int) -> Text:
    """Return the list of inputs without an answer, with the reasons.

    Args:
        answers: Answers with an ``error`` or a ``note``.
        total: Number of all inputs.
    """
    text = Text(f"no answer for {len(answers):,} of {total:,} inputs:")
    for answer in answers[:MAX_UNANSWERED_SHOWN]:
        reason, style = (answer["error"], "red") if "error" in answer else (answer["note"], "dim")
        text.append("\n  ").append(_location(answer)).append(f": {reason}", style=style)
    if len(answers) > MAX_UNANSWERED_SHOWN:
        text.append(f"\n  and {len(answers) - MAX_UNANSWERED_SHOWN:,} more")
    return text


def unknown_text(answers: Sequence[Mapping[str, Any]], total: int) -> Text:
    """Return the inputs with the largest fractions of unknown words, in one line.

    Args:
        answers: Answers with an ``unknown_fraction``.
        total: Number of all inputs.
    """
    ranked = sorted(answers, key=lambda answer: -answer["unknown_fraction"])
    shown = [f"{_location(answer)}: {answer['unknown_fraction']:.0%}" for answer in ranked[:MAX_PIECES_SHOWN]]
    more = f"; and {len(ranked) - len(shown):,} more" if len(ranked) > len(shown) else ""
    return Text(
        f"words outside the vocabulary in {len(answers):,} of {total:,} inputs: {'; '.join(shown)}{more}", style="dim"
    )


def _location(answer: Mapping[str, Any]) -> str:
    file = f"{answer['file']}, " if "file" in answer else ""
    return f"{file}line {answer['line']}" if "line" in answer else answer["input"] or "(empty input)"


def explanation_text(explanation: Mapping[str, Any]) -> Text:
    """Return the input with its pieces colored by their effect on the score, and the pieces with the largest effect.

    Args:
        explanation: Explanation of a prediction (:func:`transfer.runs.predict.predict`).
    """
    pieces = [piece | {"change": piece["change"] or 0.0} for piece in explanation["pieces"]]
    largest = max((abs(piece["change"]) for piece in pieces), default=0.0)
    text = Text()
    for piece in pieces:
        if isinstance(piece["piece"], str):
            # Only the word is styled: a colored blank would connect it to the next word.
            word = piece["piece"].rstrip()
            text.append(word, style=_style(piece["change"], largest)).append(piece["piece"][len(word) :])
    ranked = sorted(pieces, key=lambda piece: -abs(piece["change"]))[:MAX_PIECES_SHOWN]
    ranked = [piece for piece in ranked if round(piece["change"], 4)]
    text.append(f"\n{explanation['of']} {explanation['score']:.4f}; largest changes:", style="dim")
    for piece in ranked:
        name = piece["piece"].strip() if isinstance(piece["piece"], str) else format_value(piece["piece"])
        text.append(f"  {name} {piece['change']:+.4f}", style=_style(piece["change"], largest))
    return text.append("\n" if ranked else "  none\n")


def _style(change: float, largest: float) -> str:
    """Return the style of a piece: green if it raises the score of the prediction, red if it lowers it."""
    fraction = abs(change) / largest if largest else 0.0
    if fraction < NO_CHANGE_FRACTION:
        return ""
    color = "green" if change > 0 else "red"
    if fraction < STRONG_FRACTION:
        return color
    return f"bold {color}" if fraction < STRONGEST_FRACTION else f"bold reverse {color}"
