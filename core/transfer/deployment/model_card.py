"""The model card of an export: Markdown with Hugging Face's front matter, filled from the run directory alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transfer.config.yaml_document import dump
from transfer.errors import UserError
from transfer.storage.run_directory import RunDirectory

MAX_COLUMNS = 12
"""A table of examples by class is no wider than so many classes."""
FEW_EXAMPLES = 1000
"""A test split of fewer examples is worth a warning."""
FOR_THE_AUTHOR = "*for the author to fill in*"
LICENCES = "https://huggingface.co/docs/hub/repositories-licenses"


def render(run: RunDirectory, model: Mapping[str, Any], format: str, library: str, usage: str, parity: str) -> str:
    """Return the card.

    Args:
        run: The run that trained the model.
        model: Its ``model.json``.
        format: The format of the export.
        library: What loads it, by the hub's name.
        usage: Python code that loads it.
        parity: The largest deviation from the run's own outputs, and what it was measured on.
    """
    config, summary, environment = run.config(), run.summary(), run.environment()
    parts = [
        _front_matter(config, summary, model, format, library),
        _what(config, model, summary),
        f"## How to load it\n\n```python\n{usage}\n```\n\n{_inputs(model)}\n\n"
        f"Format `{format}`. In a fresh process the largest deviation from the run's own outputs was {parity}.",
        _data(config, summary),
        f"## Plan\n\nThe run's config, with defaults filled in:\n\n```yaml\n{dump(_without_null(config)).strip()}\n```",
        _figures(run, config, summary, model),
        _limits(config, summary, model),
        _licences(),
        _made_with(environment),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _front_matter(
    config: Mapping[str, Any], summary: Mapping[str, Any], model: Mapping[str, Any], format: str, library: str
) -> str:
    backbone, task, data = (config[kind]["name"] for kind in ("backbone", "task", "data"))
    result = {
        "task": {"type": _pipeline(model) or task},
        "dataset": {"name": data, "type": data, "split": _scored(summary)[0]},
        "metrics": [{"type": name, "value": value} for name, value in _scored(summary)[1].items()],
    }
    known = {
        "library_name": library,
        **({"pipeline_tag": tag} if (tag := _pipeline(model)) else {}),
        "tags": ["transfer-learning", backbone, format],
        "datasets": [data],
        "metrics": [summary["primary_metric"]],
        "model-index": [{"name": f"{backbone} on {data}", "results": [result]}],
    }
    licence = f"license:  # for the author: an identifier from {LICENCES}\n"
    return f"---\n{licence}license_name:  # for the author, where license is other\nlicense_link:\n{dump(known)}---"


def _pipeline(model: Mapping[str, Any]) -> str | None:
    """Return the hub's name of the task, which is the modality and what is done; None where there is none."""
    fields, target = model["data"]["fields"], model["data"]["target"]
    return f"{fields[0]}-classification" if len(fields) == 1 and target in ("class", "labels") else None


def _scored(summary: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    split = "test" if summary.get("test") else "validation"
    return split, {name: value for name, value in summary[split].items() if name != "loss"}


def _what(config: Mapping[str, Any], model: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    backbone, head, task, data = (config[kind]["name"] for kind in ("backbone", "head", "task", "data"))
    classes = model["data"]["classes"]
    pretrained = summary.get("pretrained") or {}
    begun = next((str(pretrained[key]) for key in ("weights", "vectors") if pretrained.get(key)), None)
    parameters = summary["parameters"]
    lines = [
        f"# {backbone} on {data}",
        "",
        f"`{backbone}` with head `{head}` for {task}, trained on `{data}`"
        + (f" from the pretrained `{Path(begun).name}`." if begun else " from random weights."),
        "",
        f"* Input: {' and '.join(model['data']['fields'])}. Outputs, in this order: "
        + ", ".join(f"`{name}`" for name in classes),
        f"* Parameters: {parameters['total']:,}, of which {parameters['trainable']:,} were trained",
        f"* Intended use: {FOR_THE_AUTHOR}",
    ]
    return "\n".join(lines)


def _inputs(model: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {name} | `{value}` |" for name, value in model["preprocessing"].items())
    files = ", ".join(f"`{name}`" for name in model["assets"])
    assets = f" What was learned from the training split is in {files}." if files else ""
    return (
        "The model takes what its preprocessing makes of an example, the batch first, and gives a row of "
        f"{len(model['data']['classes'])} outputs for each; `model.json` holds all settings.{assets}\n\n"
        f"| preprocessing | |\n|---|---|\n{rows}"
    )


def _data(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    by_class: Mapping[str, Mapping[str, int]] = summary["data"]
    names = list(dict.fromkeys(name for counts in by_class.values() for name in counts))
    names = names if len(names) <= MAX_COLUMNS else []
    rows = [
        f"| {' | '.join([split, f'{size:,}', *(f'{by_class[split].get(name, 0):,}' for name in names)])} |"
        for split, size in _sizes(summary).items()
    ]
    table = "\n".join([f"| {' | '.join(['split', 'examples', *names])} |", "|---|" + "---|" * (len(names) + 1), *rows])
    return f"## Data\n\n`{config['data']['name']}`, with {_options(config['data'])}.\n\n{table}"


def _sizes(summary: Mapping[str, Any]) -> Mapping[str, int]:
    """Return the number of examples in each split."""
    by_class: Mapping[str, Mapping[str, int]] = summary["data"]
    return summary.get("examples") or {split: sum(counts.values()) for split, counts in by_class.items()}


def _options(block: Mapping[str, Any]) -> str:
    options = [f"`{name}: {value}`" for name, value in block.items() if name != "name" and value is not None]
    return ", ".join(options) or "default options"


def _figures(run: RunDirectory, config: Mapping[str, Any], summary: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    split, own = _scored(summary)
    seeds = {config["seed"]: own} | dict(_other_seeds(run, config, summary))
    count = _sizes(summary)[split]
    rows = []
    for name, value in own.items():
        values = [found[name] for _, found in sorted(seeds.items()) if name in found]
        spread = (
            f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else "one seed alone"
        )
        rows.append(f"| {name} | {value:.4f} | {_standard_error(name, value, count, model)} | {spread} |")
    seen = ", ".join(map(str, sorted(seeds)))
    about = (
        f"Mean and standard deviation are over the seeds {seen}: the runs beside this one with the same config."
        if len(seeds) > 1
        else f"This is one run (seed {seen}): how far another seed lies from it was not measured. Run the config with "
        "other seeds into the same folder and export again, and the spread is here."
    )
    chosen = "The best epoch was picked on the validation split, and the test split was scored once, at the end."
    if split == "validation":
        chosen = "There is no test split: the figures are those of the validation split, which also picked the epoch."
    return (
        f"## Figures\n\nOf the {split} split ({count:,} examples). {chosen}\n\n"
        f"| metric | this model | standard error of the sample | over seeds |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\n{about}"
    )


def _standard_error(name: str, value: float, count: int, model: Mapping[str, Any]) -> str:
    """Return that of a share of examples; other metrics have none so simple."""
    if name != "accuracy" or model["data"]["target"] != "class":
        return ""
    return f"{math.sqrt(value * (1 - value) / count):.4f}"


def _other_seeds(
    run: RunDirectory, config: Mapping[str, Any], summary: Mapping[str, Any]
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield seed and metrics of the complete runs beside this one whose config differs in nothing but the seed."""
    here = run.path.resolve()
    for file in sorted(here.parent.glob("*/config.yaml")):
        if file.parent == here:
            continue
        other = RunDirectory(file.parent)
        try:
            their_config, their_summary = other.config(), other.summary()
        except UserError:  # interrupted, or damaged: no figure of this model's
            continue
        same = {**their_config, "seed": None} == {**config, "seed": None}
        complete = their_summary.get("status") == "complete" and their_summary.get("quick") == summary.get("quick")
        if same and complete and their_config["seed"] != config["seed"]:
            yield their_config["seed"], _scored(their_summary)[1]


def _limits(config: Mapping[str, Any], summary: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    split, _ = _scored(summary)
    count = _sizes(summary)[split]
    limits = [f"It was trained and scored on `{config['data']['name']}` alone; on other data nothing was measured."]
    if model["data"]["target"] == "class":
        limits.append(
            f"It always answers with one of its {len(model['data']['classes'])} classes, whatever it is shown, "
            "and its probabilities were not calibrated."
        )
    if summary.get("quick"):
        limits.insert(
            0, "**It comes from a quick try over a few batches: it is not trained, and its figures say nothing.**"
        )
    elif config["data"].get("limit"):
        limits.append(f"It saw at most {config['data']['limit']:,} examples of each class.")
    if count < FEW_EXAMPLES:
        limits.append(f"{count:,} examples were scored: small differences between such figures mean nothing.")
    limits.append(f"Known biases, and uses that are out of scope: {FOR_THE_AUTHOR}")
    return "## Limits\n\n" + "\n".join(f"* {limit}" for limit in limits)


def _licences() -> str:
    rows = ["this model (`license` above)", "the training data", "the pretrained weights or vectors"]
    return "## Licences\n\n| of | licence |\n|---|---|\n" + "\n".join(f"| {row} | {FOR_THE_AUTHOR} |" for row in rows)


def _made_with(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    how = (f"Python {environment['python']}", environment["device"], environment["started"])
    return f"## Made with\n\n{versions}; {'; '.join(how)}."


def _without_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_null(item) for item in value]
    return value
