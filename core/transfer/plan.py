"""The plan of a run as tables: stage by stage, what is frozen and how fast the rest learns, in each phase."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from transfer.build import ASSUMED_CLASSES, Parts
from transfer.config import RunConfig
from transfer.console import facts_table


def render(config: RunConfig, parts: Parts) -> Iterator[RenderableType]:
    """Yield the plan of a checked config."""
    features = parts.backbone.features
    data = parts.dataset.spec
    yield facts_table(
        {
            "data": f"{config.data.plugin.name}: {', '.join(data.fields)} -> {data.target}",
            "classes": ", ".join(data.classes) or f"known when the data is read; {len(ASSUMED_CLASSES)} assumed here",
            "backbone": f"{config.backbone.plugin.name}: {features.layout} of {features.size}",
            "head": f"{config.head.plugin.name}: {features.size} -> {parts.task.out_features}",
            "task": f"{config.task.plugin.name}, best epoch by {parts.task.primary_metric.name}",
            "optimizer": ", ".join([config.optimizer.name, *(f"{k} {v}" for k, v in config.optimizer.options.items())]),
            "batch size": str(config.train.batch_size),
            **{f"preprocessing: {k}": v for k, v in parts.backbone.preprocessing.describe().items()},
        }
    )
    table = Table(title="plan", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("stage")
    table.add_column("parameters", justify="right")
    for number, phase in enumerate(parts.phases, 1):
        table.add_column(f"phase {number}: {phase.epochs} epoch{'s' * (phase.epochs > 1)}")
    for stage, module in parts.model.stages.items():
        cells = []
        count = sum(p.numel() for p in module.parameters())
        for phase in parts.phases:
            groups = [group for group in phase.groups if group.stage == stage]
            if groups:
                trained = sum(len(group.parameters) for group in groups)
                whole = trained == len(list(module.parameters()))
                cells.append(Text(f"lr {groups[0].lr:g}" + ("" if whole else " (partly frozen)"), style="green"))
            else:
                cells.append(Text("frozen" if stage in phase.frozen.stages or count else "-", style="dim"))
        table.add_row(stage, f"{count:,}", *cells)
    yield table
