"""The report page: values for its template, computed from the files of a run.

Each function returns the values of one section; ``templates/report.html.j2`` contains all markup.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from transfer.config.component import Component
from transfer.reports import charts
from transfer.reports.evaluation_sections import calibration_section, other_data_section, test_section
from transfer.reports.material import Material
from transfer.reports.setup_sections import data_section, environment_section, setup_section
from transfer.reports.top_losses import Image
from transfer.reports.training_section import training_section
from transfer.system.formatting import format_count, format_duration
from transfer.system.templates import environment
from transfer.training.selection import LAST

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Card:
    """A number at the top of the page.

    Args:
        name: Name of the number.
        value: The number.
        note: Explanation in small print.
    """

    name: str
    value: str
    note: str = ""


def render(material: Material) -> tuple[str, dict[str, str]]:
    """Return the page, and the SVG of the plots on it by name."""
    config = material.config
    sections = {
        "Training": training_section(material),
        "Test": test_section(material),
        "Other data": other_data_section(material),
        "Calibration": calibration_section(material),
        "Top losses": _top_losses(material),
        "Setup": setup_section(material),
        "Data": data_section(material),
        "Environment": environment_section(material),
    }
    page = environment("transfer.reports").get_template("report.html.j2")
    html = page.render(
        style=Markup(charts.STYLE + STYLE),  # noqa: S704  # files of this package
        model_name=_display_name(config.backbone, "model"),
        data_name=_display_name(config.data, "dataset", "root"),
        run_name=material.folder.resolve().name,
        head=config.head.plugin.name,
        task=config.task.plugin.name,
        seed=config.seed,
        started=material.environment.get("started"),
        quick=bool(material.summary.get("quick")),
        warnings=list(map(str, material.summary.get("warnings") or ())),
        cards=_cards(material),
        sections={title: section for title, section in sections.items() if section is not None},
    )
    return html, material.plots


def _display_name(component: Component, *options: str) -> str:
    """Return the name of a model or dataset: the first of these options that is set, otherwise the plugin's name."""
    names = (component.options.get(option) for option in options)
    name = next((name for name in names if isinstance(name, str)), component.plugin.name)
    return Path(name).name or name


def _cards(material: Material) -> list[Card]:
    summary, primary = material.summary, str(material.summary["primary_metric"])
    metric = primary.replace("_", " ")
    cards = []
    if summary.get("test"):
        cards.append(Card(f"test {metric}", f"{summary['test'][primary]:.4f}", _sampling_error(material, primary)))
    validation = summary["validation"]
    if validation:
        cards.append(Card(f"validation {metric}", f"{validation[primary]:.4f}", f"loss {validation['loss']:.4f}"))
    rule = {None: f"by validation {metric}", LAST: "the last one"}
    select = material.config.train.select if validation else LAST
    note = f"of {len(material.metrics)}, {rule.get(select) or f'by validation {select}'.replace('_', ' ')}"
    cards.append(Card("best epoch", f"{summary['best_epoch']}", note))
    total, trainable = summary["parameters"]["total"], summary["parameters"]["trainable"]
    fraction = f"of {format_count(total)}, {trainable / total:.1%}"
    cards.append(Card("trainable parameters", format_count(trainable), fraction))
    speed = f"{summary['examples_per_second']:,.0f} training examples/s"
    cards.append(Card("duration", format_duration(summary["seconds"]), speed))
    cards.append(Card("peak memory", f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB"))
    return cards


def _sampling_error(material: Material, metric: str) -> str:
    """Return the standard error of the accuracy that is due to the number of test examples, as text."""
    count = material.summary["examples"]["test"]
    if metric != "accuracy" or material.trained.data.target != "class":
        return f"{count:,} examples"
    # The standard error of a fraction of independent examples; other metrics have no such simple one.
    value = material.summary["test"][metric]
    return f"± {math.sqrt(value * (1 - value) / count):.4f} (one standard error, {count:,} examples)"


def _top_losses(material: Material) -> dict[str, Any]:
    if not material.examples:
        return {"missing": material.missing}
    examples = material.examples
    with_image = [any(isinstance(part, Image) for part in example.content) for example in examples]
    return {
        "examples": examples,
        "explains": material.trained.backbone.preprocessing.explains,
        "unit": "piece" if any(example.has_other_pieces for example in examples) else "word",
        "all_explained": all(example.explained for example in examples),
        "layout": "images" if all(with_image) else "texts",
        # The last two parts of a path identify a file: class folder and file name.
        "short_names": {example.name: "/".join(Path(example.name).parts[-2:]) for example in examples},
    }
