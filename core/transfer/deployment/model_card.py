"""The model card of an export: Markdown with Hugging Face's front matter, computed from the files of a run.

The functions compute the values; ``templates/model_card.md.j2`` contains the text.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer.config.yaml_document import dump
from transfer.errors import UserError
from transfer.storage.run_directory import RunDirectory
from transfer.system.templates import environment

MAX_COLUMNS = 12
"""Number of classes up to which the table of examples has a column for each class."""
FEW_EXAMPLES = 1000
"""Number of scored examples below which the card warns that small differences mean nothing."""


@dataclass(frozen=True)
class _Score:
    """A metric of the model.

    Args:
        name: Name of the metric.
        value: Value of this model.
        standard_error: Standard error of an accuracy over the examples; None for other metrics.
        spread: Mean and standard deviation over seeds; None if there is one seed.
    """

    name: str
    value: float
    standard_error: float | None
    spread: tuple[float, float] | None


def render(
    run: RunDirectory,
    model: Mapping[str, Any],
    format: str,
    library: str,
    usage: str,
    parity: str,
    *,
    scripts: bool = False,
) -> str:
    """Return the model card.

    Args:
        run: The run that trained the model.
        model: Content of the model's ``model.json``.
        format: Name of the export format.
        library: Library that loads the format, by the name that Hugging Face's hub has for it.
        usage: Python code that loads the export.
        parity: Largest deviation from the run's outputs, and the examples it was measured on.
        scripts: Whether the export contains ``predict.py``.
    """
    config, summary, environment_ = run.config(), run.summary(), run.environment()
    split, metrics = _scored(summary)
    others = dict(_other_seeds(run, config, summary))
    count = _sizes(summary).get(split, 0)  # 0: no validation split
    by_class: Mapping[str, Mapping[str, int]] = summary["data"]
    classes = list(dict.fromkeys(name for counts in by_class.values() for name in counts))
    pretrained = summary.get("pretrained") or {}
    weights = next((str(pretrained[key]) for key in ("weights", "vectors") if pretrained.get(key)), None)
    template = environment("transfer.deployment").get_template("model_card.md.j2")
    return template.render(
        front_matter=dump(_front_matter(config, summary, model, format, library)).strip(),
        names={kind: config[kind]["name"] for kind in ("backbone", "head", "task", "data")},
        pretrained=Path(weights).name if weights else None,
        model=model,
        parameters=summary["parameters"],
        format=format,
        usage=usage,
        parity=parity,
        scripts=scripts,
        data_options=[f"{name}: {value}" for name, value in _publishable(config["data"]).items() if name != "name"],
        sizes=_sizes(summary),
        classes=classes if len(classes) <= MAX_COLUMNS else [],
        by_class=by_class,
        config=dump(_publishable(config)).strip(),
        split=split,
        count=count,
        scores=_scores(metrics, others, count, model),
        seeds=sorted({config["seed"], *others}),
        quick=bool(summary.get("quick")),
        limit=config["data"].get("limit"),
        few_examples=count < FEW_EXAMPLES,
        environment=environment_,
    )


def _front_matter(
    config: Mapping[str, Any], summary: Mapping[str, Any], model: Mapping[str, Any], format: str, library: str
) -> dict[str, Any]:
    backbone, task, data = (config[kind]["name"] for kind in ("backbone", "task", "data"))
    tag, (split, metrics) = _pipeline_tag(model), _scored(summary)
    result = {
        "task": {"type": tag or task},
        "dataset": {"name": data, "type": data, "split": split},
        "metrics": [{"type": name, "value": value} for name, value in metrics.items()],
    }
    return {
        "library_name": library,
        **({"pipeline_tag": tag} if tag else {}),
        "tags": ["transfer-learning", backbone, format],
        "datasets": [data],
        "metrics": [summary["primary_metric"]],
        "model-index": [{"name": f"{backbone} on {data}", "results": [result]}],
    }


def _pipeline_tag(model: Mapping[str, Any]) -> str | None:
    """Return the hub's name of the task, such as ``text-classification``; None if the hub has none."""
    fields, target = model["data"]["fields"], model["data"]["target"]
    return f"{fields[0]}-classification" if len(fields) == 1 and target in ("class", "labels") else None


def _scored(summary: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """Return the split that the card reports, and its metrics without the loss."""
    split = "test" if summary.get("test") else "validation"
    return split, {name: value for name, value in summary[split].items() if name != "loss"}


def _sizes(summary: Mapping[str, Any]) -> Mapping[str, int]:
    """Return the number of examples of each split."""
    by_class: Mapping[str, Mapping[str, int]] = summary["data"]
    return summary.get("examples") or {split: sum(counts.values()) for split, counts in by_class.items()}


def _scores(
    metrics: Mapping[str, float], others: Mapping[int, Mapping[str, float]], count: int, model: Mapping[str, Any]
) -> list[_Score]:
    """Return the metrics of the model with their standard errors and their spread over seeds."""
    scores = []
    for name, value in metrics.items():
        values = [value, *(other[name] for other in others.values() if name in other)]
        spread = (statistics.mean(values), statistics.stdev(values)) if len(values) > 1 else None
        # An accuracy is a fraction of independent examples; other metrics have no such simple standard error.
        is_accuracy = name == "accuracy" and model["data"]["target"] == "class"
        standard_error = math.sqrt(value * (1 - value) / count) if is_accuracy else None
        scores.append(_Score(name, value, standard_error, spread))
    return scores


def _other_seeds(
    run: RunDirectory, config: Mapping[str, Any], summary: Mapping[str, Any]
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield seed and metrics of the complete runs in the same folder whose config differs only in the seed."""
    here = run.path.resolve()
    for file in sorted(here.parent.glob("*/config.yaml")):
        if file.parent == here:
            continue
        other = RunDirectory(file.parent)
        try:
            other_config, other_summary = other.config(), other.summary()
        except UserError:  # an interrupted or damaged run has no metrics
            continue
        # Runs with other options would show the effect of these options as noise.
        same = {**other_config, "seed": None} == {**config, "seed": None}
        complete = other_summary.get("status") == "complete" and other_summary.get("quick") == summary.get("quick")
        if same and complete and other_config["seed"] != config["seed"]:
            yield other_config["seed"], _scored(other_summary)[1]


def _publishable(value: Any) -> Any:
    """Return a part of a config without unset options, and with absolute paths cut to their last part.

    A card is published: the folders of the machine that trained the model are of no use there.
    """
    if isinstance(value, Mapping):
        return {key: _publishable(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_publishable(item) for item in value]
    if isinstance(value, str) and os.path.isabs(os.path.expanduser(value)):
        return Path(value).name
    return value
