"""Tables of ``transfer check``: components, frozen stages and learning rates of each phase, feature cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from transfer.cli.tables import facts_table
from transfer.config.run_config import RunConfig
from transfer.data.inspection import DATA_WARNINGS_TITLE
from transfer.feature_cache.loader import reason_not_cached
from transfer.training.experiment import views_of_phase
from transfer.training.freezing import prefix_length
from transfer.training.preflight import PLACEHOLDER_CLASSES, CheckedParts, describe_preprocessing, treatment

MAX_CLASSES_SHOWN = 8
"""Maximum number of classes in a row of the table of the data."""
MAX_PHASES_PER_TABLE = 3
"""More phases are shown in further tables, because a console of 80 columns has no room for them."""


def render(config: RunConfig, parts: CheckedParts) -> Iterator[RenderableType]:
    """Yield the tables of a checked config: its components, the stages in each phase, and the feature cache."""
    features, data, train = parts.backbone.features, parts.dataset.spec, config.train
    optimizer = ", ".join([config.optimizer.name, *(f"{k} {v}" for k, v in config.optimizer.options.items())])
    reason = " (default for pretrained weights)" if config.is_fine_tuned_by_default else ""
    yield facts_table(
        {
            "data": f"{config.data.plugin.name}: {', '.join(data.fields)} -> {data.target}",
            "classes": ", ".join(data.classes) or f"unknown until the data is read; {len(PLACEHOLDER_CLASSES)} assumed",
            "backbone": f"{_written(config)}: {features.layout} of {features.size}",
            "head": f"{config.head.plugin.name}: {features.size} -> {parts.task.out_features}",
            **_adapter(config, parts),
            "task": f"{config.task.plugin.name}, best epoch by {parts.task.primary_metric.name}",
            "training": f"{optimizer}, {train.step}"
            + (f", recipe {train.recipe.name}{reason}" if train.recipe else ""),
            **({"trackers": ", ".join(tracker.plugin.name for tracker in config.trackers)} if config.trackers else {}),
            **{f"preprocessing: {k}": v for k, v in describe_preprocessing(config, parts.backbone).items()},
        }
    )
    yield from _stages(config, parts)
    yield _cache(config, parts)


def render_data(counts: Mapping[str, Mapping[str, int]], warnings: Mapping[str, str]) -> Iterator[RenderableType]:
    """Yield the table of the examples in each split, and the warnings about the data if there are any.

    Args:
        counts: Number of examples by class, by split.
        warnings: Warnings by subject.
    """
    table = Table(title="data", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("split")
    table.add_column("examples", justify="right")
    table.add_column("by class", overflow="fold")
    for split, by_class in counts.items():
        shown = [f"{name} {count:,}" for name, count in list(by_class.items())[:MAX_CLASSES_SHOWN]]
        more = len(by_class) - len(shown)
        by_class_text = ", ".join(shown) + (f" and {more} more" if more else "") if len(by_class) > 1 else ""
        table.add_row(split, f"{sum(by_class.values()):,}", Text(by_class_text))
    yield table
    if warnings:
        yield Panel(facts_table(warnings), title=DATA_WARNINGS_TITLE, title_align="left")


def _adapter(config: RunConfig, parts: CheckedParts) -> dict[str, str]:
    """Return a row with the size of the adapter, if there is one."""
    if config.adapter is None:
        return {}
    head = sum(parameter.numel() for parameter in parts.model.stages["head"].parameters())
    sizes = {name: parameter.numel() for name, parameter in parts.model.named_parameters()}
    added = sum(size for name, size in sizes.items() if name not in parts.model.fixed) - head
    total = sum(sizes.values())
    return {"adapter": f"{config.adapter.plugin.name}: {added:,} parameters, {added / total:.2%} of the model's"}


def _written(config: RunConfig) -> str:
    """Return the name of the backbone with the short options that the config sets."""
    options = {
        key: value for key, value in config.backbone.resolved.items() if config.document.is_set(("backbone", key))
    }
    words = [
        f"{key} {value}" for key, value in options.items() if key != "name" and isinstance(value, str | int | None)
    ]
    return config.backbone.plugin.name + (f" ({', '.join(words)})" if words else "")


def _stages(config: RunConfig, parts: CheckedParts) -> Iterator[Table]:
    """Yield tables of the treatment of each stage in each phase."""
    phases = list(enumerate(parts.phases, 1))
    unsized = {*parts.backbone.unsized_stages, *(() if parts.dataset.spec.classes else ("head",))}
    for first in range(0, len(phases), MAX_PHASES_PER_TABLE):
        table = Table(title="stages" if not first else None, title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("stage")
        table.add_column("parameters", justify="right")
        if parts.shapes:
            table.add_column("returns")
        shown = phases[first : first + MAX_PHASES_PER_TABLE]
        for number, phase in shown:
            table.add_column(f"phase {number}: {phase.epochs} epoch{'s' * (phase.epochs > 1)}")
        for stage, names in parts.model.layers.items():
            count = sum(parts.model.get_parameter(name).numel() for name in names)
            # Layers of a single stage have no shapes of their own.
            shapes = [parts.shapes.get(stage, "")] if parts.shapes else []
            treatments = [treatment(config, parts.model, phase, stage) for _, phase in shown]
            cells = [Text(text, style="green" if trained else "dim") for text, trained in treatments]
            # A placeholder was built for a stage whose size depends on the data: its count would be misleading.
            size = "not known yet" if count and stage in unsized else f"{count:,}"
            table.add_row(stage, size, *shapes, *cells)
        if config.optimizer_options.no_weight_decay:
            table.caption = f"* except parameters of kind {' and '.join(config.optimizer_options.no_weight_decay)}"
            table.caption_justify = "left"
        yield table


def _cache(config: RunConfig, parts: CheckedParts) -> Table:
    """Return the table of the cached features in each phase, with the reasons why features are not cached."""
    table = Table(title="feature cache", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("phase", "training examples", "validation examples"):
        table.add_column(heading, overflow="fold")
    train, stages = config.train, list(parts.model.stages)
    for number, phase in enumerate(parts.phases, 1):
        # A head is solved on several views of each example, or on the examples without augmentation.
        solved = phase.solver == "lbfgs"
        count = prefix_length(parts.model, phase.frozen)
        views = views_of_phase(
            train.views, None if solved else phase.epochs, frozen_backbone=count == len(parts.model) - 1
        )
        augments = parts.backbone.preprocessing.augments and train.augment and not (solved and views is None)
        cells = []
        for training in (True, False):
            reason = reason_not_cached(
                count,
                cache=train.cache != "off",
                augments=augments and training,
                views=views,
                mixed=train.mix is not None and training and not solved,
                batch_norm=parts.model.has_batch_norm,
            )
            text = f"after {stages[count - 1]}"
            if augments and training:
                text += f", {views} views each"
                if train.views == "auto":
                    text += f" (train.views: auto, because {phase.epochs} epochs use the frozen backbone)"
            cells.append(Text(f"no: {reason}") if reason else Text(text, style="green"))
        table.add_row(str(number), *cells)
    return table
