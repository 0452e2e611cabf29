"""Assembly of a model from a backbone, a head and a task."""

from __future__ import annotations

from torch import nn

from transfer.config.component import Component, error_location, plugin_errors
from transfer.interfaces import Adapter, Backbone, DataSpec, Task
from transfer.models.model import Model


def assemble(
    backbone: Backbone, head: Component, task: Component, data: DataSpec, adapter: Component | None = None
) -> tuple[Task, Model]:
    """Build the task for this data, and the model of the backbone and a head for this task.

    Args:
        backbone: Backbone with its pretrained weights. An adapter changes it in place.
        head: Head component.
        task: Task component.
        data: Specification of the data.
        adapter: Adapter component; None leaves the backbone as it is.
    """
    the_task: Task = task.make(data)
    base: list[nn.Parameter] = []
    if adapter is not None:
        # Listed before the injection, because the parameters that the adapter adds are trained.
        base = list(backbone.parameters())
        part: Adapter = adapter.make()
        with error_location(adapter.where), plugin_errors(f"adapter {adapter.plugin.name!r} failed"):
            part.inject(backbone)
    return the_task, Model(backbone, head.make(backbone.features, the_task.out_features), base)
