"""The page: sections made of what a run left behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transfer.config.run_config import RunConfig
from transfer.config.yaml_document import dump
from transfer.models.saved_model import LoadedModel
from transfer.reports import charts
from transfer.reports.html import escape, facts, said, table
from transfer.reports.metrics import (
    Calibration,
    ClassFigures,
    calibrate,
    confusion,
    most_confused,
    of_classes,
    of_labels,
    residuals,
)
from transfer.reports.top_losses import Example, threshold
from transfer.storage.run_directory import Predictions
from transfer.training.experiment import Phase
from transfer.training.preflight import treatment

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
MAX_DRAWN_CLASSES = 40
"""Of a confusion matrix; of more there are the most frequent mistakes alone."""
MAX_LISTED_CLASSES = 60
"""Of the table of classes; of more there are those with the lowest F1."""
MAX_PAIRS = 8
MAX_RESIDUAL_PLOTS = 4
FEW_PREDICTIONS = 500
"""Of fewer the calibration error says little."""


@dataclass(frozen=True)
class Material:
    """What a page is made of.

    Args:
        folder: The run directory.
        config, phases, trained: The run's.
        summary, environment, metrics: What its files hold.
        scored: What the model made of the test split.
        examples: Those with the highest loss.
        missing: Why there are none.
    """

    folder: Path
    config: RunConfig
    phases: tuple[Phase, ...]
    trained: LoadedModel
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    scored: Predictions | None
    examples: Sequence[Example]
    missing: str
    plots: dict[str, str] = field(default_factory=dict)

    def plot(self, name: str, svg: str) -> str:
        """Keep a plot for a file of its own, and return it."""
        self.plots[name] = svg
        return f"<figure>{svg}</figure>"


def render(material: Material) -> tuple[str, dict[str, str]]:
    """Return the page, and the plots in it by name."""
    config = material.config
    title = f"{config.backbone.plugin.name} on {config.data.plugin.name}"
    sections = {
        "Training": _training(material),
        "Test": _test(material),
        "Calibration": _calibration(material),
        "Highest loss": _highest_loss(material),
        "Plan": _plan(material),
        "Data": _data(material),
        "Environment": _environment(material),
    }
    shown = {name: content for name, content in sections.items() if content}
    anchors = {name: name.lower().replace(" ", "-") for name in shown}
    menu = "".join(f'<a href="#{anchors[name]}">{name}</a>' for name in shown)
    body = "\n".join(
        f'<section id="{anchors[name]}"><h2>{name}</h2>\n{content}\n</section>' for name, content in shown.items()
    )
    page = _PAGE.format(
        style=charts.STYLE + STYLE,
        title=escape(title),
        name=escape(material.folder.resolve().name),
        about=escape(_about(material)),
        banner=_banner(material),
        cards=_cards(material),
        menu=menu,
        body=body,
    )
    return page, material.plots


def _about(material: Material) -> str:
    config = material.config
    head, task = config.head.plugin.name, config.task.plugin.name
    started = said(material.environment.get("started"))
    return f"head {head}, task {task}, seed {config.seed}; started {started}"


def _banner(material: Material) -> str:
    if not material.summary.get("quick"):
        return ""
    return '<p class="banner">A quick try over a few batches: it is not trained, and its figures say nothing.</p>'


def _cards(material: Material) -> str:
    summary, primary = material.summary, str(material.summary["primary_metric"])
    words = primary.replace("_", " ")
    cards = []
    if summary.get("test"):
        cards.append((f"test {words}", f"{summary['test'][primary]:.4f}", _noise(material, primary)))
    loss = f"loss {summary['validation']['loss']:.4f}"
    cards.append((f"validation {words}", f"{summary['validation'][primary]:.4f}", loss))
    cards.append(("best epoch", f"{summary['best_epoch']}", f"of {len(material.metrics)}, by validation {words}"))
    total, trained = summary["parameters"]["total"], summary["parameters"]["trainable"]
    cards.append(("parameters trained", _short(trained), f"of {_short(total)}, {trained / total:.1%}"))
    speed = f"{summary['examples_per_second']:,.0f} examples/s in training"
    cards.append(("time", _duration(summary["seconds"]), speed))
    cards.append(("memory", f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB", "at most"))
    return "".join(
        f'<div class="card"><span>{escape(name)}</span><strong>{escape(value)}</strong>'
        f"<small>{escape(note)}</small></div>"
        for name, value, note in cards
    )


def _noise(material: Material, metric: str) -> str:
    """Say how far a share of the test examples may be off, by their number alone."""
    count = material.summary["examples"]["test"]
    if metric != "accuracy" or material.trained.data.target != "class":
        return f"{count:,} examples"
    value = material.summary["test"][metric]
    return f"± {math.sqrt(value * (1 - value) / count):.4f} (one standard error, {count:,} examples)"


# ----------------------------------------------------------------------------------------------------------- training


def _training(material: Material) -> str:
    records = material.metrics
    if not records:
        return ""
    marks = {float(material.summary["best_epoch"]): "best"}
    for before, after in itertools.pairwise(records):
        if before["phase"] != after["phase"]:
            # Between two epochs, which is where a phase begins.
            marks[(before["epoch"] + after["epoch"]) / 2] = f"phase {after['phase']}"
    parts = []
    for metric in records[0]["validation"]:
        series = {
            split: [
                (float(record["epoch"]), float(record[split][metric])) for record in records if metric in record[split]
            ]
            for split in ("train", "validation")
        }
        drawn = {split: points for split, points in series.items() if points}
        parts.append(material.plot(metric, charts.lines(metric.replace("_", " "), drawn, marks=marks)))
    parts.append(material.plot("learning_rate", _learning_rates(records, marks)))
    parts.append(material.plot("time", charts.shares("where the time went", _times(material), "s")))
    return f'<div class="plots">{"".join(parts)}</div>{_epochs(records)}'


def _learning_rates(records: Sequence[Mapping[str, Any]], marks: Mapping[float, str]) -> str:
    """Draw the learning rate of every stage at the beginning of each epoch; stages that move alike are one line."""
    stages = list(dict.fromkeys(stage for record in records for stage in record["lr"]))
    alike: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for stage in stages:
        points = [(float(r["epoch"]), float(r["lr"][stage])) for r in records if stage in r["lr"]]
        alike.setdefault(tuple(points), []).append(stage)
    series = {_together(names, stages): points for points, names in alike.items()}
    rates = [rate for points in alike for _, rate in points]
    log = min(rates) > 0 and max(rates) / min(rates) > 20
    return charts.lines("learning rate at the beginning of the epoch", series, marks=marks, log=log)


def _together(names: Sequence[str], stages: Sequence[str]) -> str:
    if len(names) == len(stages) > 1:
        return "all stages"
    return ", ".join(names) if len(names) < 3 else f"{names[0]} … {names[-1]}"


def _times(material: Material) -> dict[str, float]:
    """Return the seconds that each part of the run took."""
    summary, examples = material.summary, material.summary["examples"]["train"]
    training = waiting = validation = 0.0
    for record in material.metrics:
        of_epoch = min(examples / record["examples_per_second"], record["seconds"])
        training += of_epoch * (1 - record["waiting_for_data"])
        waiting += of_epoch * record["waiting_for_data"]
        validation += record["seconds"] - of_epoch
    rest = max(0.0, summary["seconds"] - training - waiting - validation)
    return {
        "training steps": training,
        "waiting for training data": waiting,
        "validation": validation,
        "caches, checkpoints, test split": rest,
    }


def _epochs(records: Sequence[Mapping[str, Any]]) -> str:
    metrics = list(records[0]["validation"])
    headings = ["epoch", "phase", *(f"{split} {m}" for split in ("train", "validation") for m in metrics)]
    rows = [
        [
            said(record["epoch"]),
            said(record["phase"]),
            *(_number(record[split].get(metric)) for split in ("train", "validation") for metric in metrics),
            said(record["seconds"]),
        ]
        for record in records
    ]
    return f"<details><summary>Every epoch</summary>{table([*headings, 'seconds'], rows)}</details>"


# --------------------------------------------------------------------------------------------------------------- test


def _test(material: Material) -> str:
    summary, scored, data = material.summary, material.scored, material.trained.data
    if not summary.get("test"):
        why = "there is no test split" if "test" not in summary["examples"] else "the test split was not scored"
        return f"<p>The figures are those of validation, for {why}.</p>"
    rows = [[escape(name), _number(summary["validation"].get(name)), _number(v)] for name, v in summary["test"].items()]
    figures = table(["metric", "validation", "test"], rows)
    if scored is None:
        return figures
    if _is_class(material):
        return f"{figures}{_classes(material, scored)}"
    if data.target == "labels" and scored.predictions.shape == scored.targets.shape:
        found = of_labels(scored.predictions >= threshold(material.trained), scored.targets > 0.5)
        note = f"<p>A label counts as predicted from a probability of {threshold(material.trained):g}.</p>"
        return f"{figures}<h3>Labels</h3>{_table_of_classes(data.classes, found, 'label')}{note}"
    if data.target == "number" and scored.predictions.shape == scored.targets.shape:
        return f"{figures}{_numbers(material, scored)}"
    return figures


def _is_class(material: Material) -> bool:
    """Each test example has one class and one class was predicted for it."""
    scored = material.scored
    whole = scored is not None and not scored.predictions.is_floating_point() and scored.predictions.ndim == 1
    return whole and material.trained.data.target == "class"


def _classes(material: Material, scored: Predictions) -> str:
    names = material.trained.data.classes
    matrix = confusion(scored.predictions.long(), scored.targets.long(), len(names))
    drawn = ""
    if len(names) <= MAX_DRAWN_CLASSES:
        drawn = material.plot("confusion", charts.matrix("confusion", matrix.tolist(), names))
    pairs = ""
    if len(names) > 2:
        rows = [
            [escape(names[true]), escape(names[predicted]), f"{count:,}"]
            for true, predicted, count in most_confused(matrix, MAX_PAIRS)
        ]
        pairs = f"<h3>Most frequent mistakes</h3>{table(['true', 'predicted', 'examples'], rows, words=2)}"
    tables = f"<h3>Classes</h3>{_table_of_classes(names, of_classes(matrix), 'class')}{pairs}"
    return f'<div class="beside">{drawn}<div>{tables}</div></div>'


def _table_of_classes(names: Sequence[str], found: Sequence[ClassFigures], what: str) -> str:
    order = range(len(names))
    note = ""
    if len(names) > MAX_LISTED_CLASSES:
        worst = sorted(order, key=lambda place: -1.0 if found[place].f1 is None else float(found[place].f1 or 0))
        order_shown: Sequence[int] = worst[:MAX_LISTED_CLASSES]
        note = f"<p>Those with the lowest F1, of {len(names):,}.</p>"
    else:
        order_shown = order
    rows = [
        [
            escape(names[place]),
            *(_number(value) for value in (found[place].precision, found[place].recall, found[place].f1)),
            f"{found[place].support:,}",
            f"{found[place].predicted:,}",
        ]
        for place in order_shown
    ]
    return table([what, "precision", "recall", "F1", "support", "predicted"], rows) + note


def _numbers(material: Material, scored: Predictions) -> str:
    names = material.trained.data.classes
    found = residuals(scored.predictions, scored.targets)
    rows = [
        [escape(name), *map(_number, (one.mean_absolute, one.root_mean_square, one.bias, one.explained))]
        for name, one in zip(names, found, strict=True)
    ]
    headings = ["number", "mean absolute error", "root mean square error", "predicted less true", "R²"]
    plots = []
    for place, name in list(enumerate(names))[:MAX_RESIDUAL_PLOTS]:
        points = torch.stack([scored.targets[:, place], scored.predictions[:, place]], 1).double().tolist()
        drawn = charts.scatter(name, [(x, y) for x, y in points], "true", "predicted")
        plots.append(material.plot(f"residuals-{place + 1}", drawn))
    return f'<h3>Numbers</h3>{table(headings, rows)}<div class="plots">{"".join(plots)}</div>'


# -------------------------------------------------------------------------------------------------------- calibration


def _calibration(material: Material) -> str:
    found = _calibrated(material)
    if found is None:
        return ""
    count = sum(one.count for one in found.bins)
    what = "predictions" if _is_class(material) else "probabilities of labels"
    gap = found.confidence - found.right
    noise = math.sqrt(found.right * (1 - found.right) / count)
    verdict = "sure of itself as often as it is right"
    if abs(gap) > 2 * noise:
        verdict = "more sure of itself than it is right" if gap > 0 else "less sure of itself than it is right"
    sentences = [
        f"The expected calibration error is <strong>{found.error:.4f}</strong> (ECE, {len(found.bins)} of "
        f"15 bins of equal width hold {what}).",
        f"The mean probability is {found.confidence:.4f}, and {found.right:.4f} came true: the model is {verdict}.",
    ]
    if count < FEW_PREDICTIONS:
        sentences.append(f"Of only {count:,} {what} even a perfectly calibrated model has an error above zero.")
    drawn = material.plot("calibration", charts.reliability("reliability", found))
    note = "Each bar is the share that is right, darker where there are more; its dot is at their mean probability, "
    note += "with one standard error. On the dashed line probabilities are what they say."
    return f'<div class="beside">{drawn}<div><p>{" ".join(sentences)}</p><p class="note">{note}</p></div></div>'


def _calibrated(material: Material) -> Calibration | None:
    """Compare probabilities to what came true, where there are probabilities."""
    scored = material.scored
    if scored is None:
        return None
    if _is_class(material) and scored.confidences is not None:
        probabilities, right = scored.confidences, scored.predictions == scored.targets
    elif material.trained.data.target == "labels" and scored.predictions.shape == scored.targets.shape:
        probabilities, right = scored.predictions.flatten(), scored.targets.flatten() > 0.5
    else:
        return None
    in_range = bool(((probabilities >= 0) & (probabilities <= 1 + 1e-6)).all())
    return calibrate(probabilities, right) if in_range else None


# ------------------------------------------------------------------------------------------------------- highest loss


def _highest_loss(material: Material) -> str:
    if not material.examples:
        return f"<p>Not shown: {escape(material.missing)}.</p>"
    lead = "The test examples with the highest loss"
    explains = material.trained.backbone.preprocessing.explains
    key = ""
    if explains:
        key = (
            '. What speaks <span class="for fair">for</span> the predicted class and what '
            '<span class="against fair">against</span> it, by leaving out one word at a time'
        )
        if not all(example.explained for example in material.examples):
            key += "; <code>transfer report</code> explains the rest, which takes longer"
    cards = "".join(map(_example, material.examples))
    kind = "texts" if any("<img" not in example.content for example in material.examples) else "pictures"
    return f'<p>{lead}{key}.</p><div class="examples {kind}">{cards}</div>'


def _example(example: Example) -> str:
    about = {"true": example.true, "said": example.said, "loss": f"{example.loss:.3f}"}
    rows = "".join(f"<dt>{what}</dt><dd>{escape(value)}</dd>" for what, value in about.items())
    end = "/".join(Path(example.name).parts[-2:])  # of a path the end says which file it is
    name = f'<small title="{escape(example.name)}">{escape(end)}</small>'
    return f"<article>{example.content}<dl>{rows}</dl>{name}</article>"


# --------------------------------------------------------------------------------------------------------------- plan


def _plan(material: Material) -> str:
    config, model = material.config, material.trained.model
    phases = [f"phase {number}: {_epochs_of(phase)}" for number, phase in enumerate(material.phases, 1)]
    rows = []
    for stage, module in model.stages.items():
        count = sum(parameter.numel() for parameter in module.parameters())
        cells = [treatment(config, model, phase, stage) for phase in material.phases]
        treated = [
            f'<span class="{"trained" if trained else "frozen"}">{escape(words)}</span>' for words, trained in cells
        ]
        rows.append([escape(stage), f"{count:,}", *treated])
    train = config.train
    optimizer = ", ".join([config.optimizer.name, *(f"{k} {v}" for k, v in config.optimizer.options.items())])
    schedulers = [phase.scheduler.name if phase.scheduler else "none" for phase in material.phases]
    what = {
        "optimizer": f"{optimizer}, {train.step}",
        "scheduler": ", then ".join(dict.fromkeys(schedulers)),
        **({"recipe": train.recipe.name} if train.recipe else {}),
        **({"warm-up": f"{train.warmup_epochs:g} epochs"} if train.warmup_epochs else {}),
        **({"precision": train.precision} if train.precision != "fp32" else {}),
        **({"mix": train.mix.model_dump(exclude_none=True)} if train.mix else {}),
        "preprocessing": dict(material.trained.backbone.preprocessing.describe()),
        **_caches(material.summary),
    }
    return table(["stage", "parameters", *phases], rows) + facts(what)


def _epochs_of(phase: Phase) -> str:
    patience = f", patience {phase.patience}" if phase.patience else ""
    return f"{phase.epochs} epoch{'s' * (phase.epochs > 1)}{patience}"


def _caches(summary: Mapping[str, Any]) -> dict[str, str]:
    """Say of every split whether its features came from the cache."""
    lines = {}
    for entry in summary.get("cache") or ():
        phase = f"phase {entry['phase']}, " if "phase" in entry else ""
        words = {name: value for name, value in entry.items() if name not in ("phase", "split", "cached", "why")}
        how = "" if entry["cached"] else f"none: {entry.get('why')}"
        lines[f"cache, {phase}{entry['split']}"] = how or said(words)
    alike = set(lines.values())
    return {"cache": alike.pop()} if len(alike) == 1 else lines


# --------------------------------------------------------------------------------------------------------------- data


def _data(material: Material) -> str:
    summary = material.summary
    by_class: Mapping[str, Mapping[str, int]] = summary["data"]
    sizes: Mapping[str, int] = summary["examples"]
    names = list(dict.fromkeys(name for counts in by_class.values() for name in counts))
    rows = [["<strong>all</strong>", *(f"<strong>{size:,}</strong>" for size in sizes.values())]]
    rows += [[escape(name), *(_share(by_class[split].get(name, 0), sizes[split]) for split in sizes)] for name in names]
    note = ""
    if len(names) > MAX_LISTED_CLASSES:
        order = sorted(names, key=lambda name: by_class["train"].get(name, 0))
        few = set(order[: MAX_LISTED_CLASSES // 2]) | set(order[-MAX_LISTED_CLASSES // 2 :])
        rows = rows[:1] + [row for name, row in zip(names, rows[1:], strict=True) if name in few]
        note = f"<p>The smallest and the largest of {len(names):,} classes.</p>"
    parts = [table(["examples", *sizes], rows), note]
    if lengths := summary.get("lengths"):
        marks = list(next(iter(lengths.values())))
        rows = [[escape(split), *(f"{of[mark]:,}" for mark in marks)] for split, of in lengths.items()]
        parts.append(f"<h3>Lengths</h3>{table(['split', *marks], rows)}")
    options = {name: value for name, value in material.config.data.resolved.items() if value is not None}
    parts.append(f"<h3>As configured</h3>{facts(options)}")
    for heading, key in (("Learned from the training split", "learned"), ("Pretrained weights", "pretrained")):
        if summary.get(key):
            parts.append(f"<h3>{heading}</h3>{facts(summary[key])}")
    return "".join(parts)


def _share(count: int, size: int) -> str:
    share = count / size if size else 0.0
    return f'<span class="share-bar" style="--share:{share:.3f}">{count:,} <small>{share:.1%}</small></span>'


# -------------------------------------------------------------------------------------------------------- environment


def _environment(material: Material) -> str:
    found = dict(material.environment)
    versions, resumed = found.pop("versions", {}), found.pop("resumed", [])
    for name in ("format", "quick"):
        found.pop(name, None)
    parts = [facts({**found, "versions": versions})]
    parts += [f"<p>Resumed {escape(said(entry))}</p>" for entry in resumed]
    config = escape(dump(material.config.resolved))
    parts.append(f"<details><summary>The whole config</summary><pre>{config}</pre></details>")
    return "".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.3g}"


def _short(count: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)


def _duration(seconds: float) -> str:
    minutes, hours = divmod(int(seconds), 60)[0], int(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds) % 60} s" if minutes else f"{seconds:.1f} s"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}: {name}</title>
<style>
{style}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p><code>{name}</code><br>{about}</p>
{banner}
<div class="cards">{cards}</div>
<nav>{menu}</nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""
