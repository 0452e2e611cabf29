"""The sections of the report page on the inputs of a run: setup, data and environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer.config.tracker_variables import mask_trackers
from transfer.config.yaml_document import dump
from transfer.reports.material import MAX_LISTED_CLASSES, Material, Table
from transfer.system.formatting import format_value
from transfer.training.experiment import Phase
from transfer.training.preflight import describe_preprocessing, treatment


def setup_section(material: Material) -> dict[str, Any]:
    """Return the values of the section on the setup: phases, stages and settings."""
    config, model = material.config, material.trained.model
    stages = [
        {
            "name": name,
            "parameters": f"{sum(parameter.numel() for parameter in module.parameters()):,}",
            "phases": [treatment(config, model, phase, name) for phase in material.phases],
        }
        for name, module in model.stages.items()
    ]
    train = config.train
    # One line for each setting; defaults that change nothing are left out.
    optimizer = ", ".join([config.optimizer.name, *(f"{k} {v}" for k, v in config.optimizer.options.items())])
    schedulers = [phase.scheduler.name if phase.scheduler else "none" for phase in material.phases]
    facts = {
        "optimizer": f"{optimizer}, {train.step}",
        "scheduler": ", then ".join(dict.fromkeys(schedulers)),
        **({"recipe": train.recipe.name} if train.recipe else {}),
        **({"warm-up": f"{train.warmup_epochs:g} epochs"} if train.warmup_epochs else {}),
        **({"precision": precision} if (precision := material.summary.get("precision", "fp32")) != "fp32" else {}),
        **({"mix": train.mix.model_dump(exclude_none=True)} if train.mix else {}),
        "preprocessing": describe_preprocessing(config, material.trained.backbone),
        **_caches(material.summary),
    }
    return {"phases": list(map(_phase_length, material.phases)), "stages": stages, "facts": facts}


def _phase_length(phase: Phase) -> str:
    patience = f", patience {phase.patience}" if phase.patience else ""
    return f"{phase.epochs} epoch{'s' * (phase.epochs > 1)}{patience}"


def _caches(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return for every split whether its features came from the cache; one entry if all are the same."""
    entries = {}
    for entry in summary.get("cache") or ():
        phase = f"phase {entry['phase']}, " if "phase" in entry else ""
        details = {name: value for name, value in entry.items() if name not in ("phase", "split", "cached", "why")}
        text = format_value(details) if entry["cached"] else f"none: {entry.get('why')}"
        entries[f"cache, {phase}{entry['split']}"] = text
    distinct = set(entries.values())
    return {"cache": distinct.pop()} if len(distinct) == 1 else entries


def data_section(material: Material) -> dict[str, Any]:
    """Return the values of the section on the data: sizes, classes and options."""
    summary = material.summary
    by_class: Mapping[str, Mapping[str, int]] = summary["data"]
    sizes: Mapping[str, int] = summary["examples"]
    names = list(dict.fromkeys(name for counts in by_class.values() for name in counts))
    listed, note = names, ""
    if len(names) > MAX_LISTED_CLASSES:
        ranked = sorted(names, key=lambda name: by_class["train"].get(name, 0))
        extremes = {*ranked[: MAX_LISTED_CLASSES // 2], *ranked[-MAX_LISTED_CLASSES // 2 :]}
        # Imbalance shows at both ends; the classes between them are left out.
        listed, note = [name for name in names if name in extremes], f"The smallest and largest of {len(names):,}."
    # A class without an example has a count of 0 of a split that may be empty too.
    classes = {
        name: [(count := by_class[split].get(name, 0), count / max(size, 1)) for split, size in sizes.items()]
        for name in listed
    }
    lengths = None
    if by_split := summary.get("lengths"):
        statistics = list(next(iter(by_split.values())))
        rows = [[split, *(f"{values[name]:,}" for name in statistics)] for split, values in by_split.items()]
        lengths = Table(["split", *statistics], rows)
    return {
        "sizes": {split: f"{size:,}" for split, size in sizes.items()},
        "classes": classes,
        "note": note,
        "warnings": summary.get("data_warnings"),
        "lengths": lengths,
        "options": {name: value for name, value in material.config.data.resolved.items() if value is not None},
        "learned": summary.get("learned"),
        "pretrained": summary.get("pretrained"),
    }


def environment_section(material: Material) -> dict[str, Any]:
    """Return the values of the section on the environment, with the config."""
    # Versions come last because they are long; `format` and `quick` concern only this package.
    hidden = ("format", "quick", "resumed", "versions")
    facts = {name: value for name, value in material.environment.items() if name not in hidden}
    return {
        "facts": {**facts, "versions": material.environment.get("versions", {})},
        "resumed": [format_value(entry) for entry in material.environment.get("resumed", [])],
        "config": dump(mask_trackers(material.config.resolved)),
    }
