"""Assembly of a model from a backbone, a head and a task."""

from __future__ import annotations

from transfer.config.component import Component
from transfer.interfaces import Backbone, DataSpec, Task
from transfer.models.model import Model


def assemble(backbone: Backbone, head: Component, task: Component, data: DataSpec) -> tuple[Task, Model]:
    """Build the task for this data, and the model of the backbone and a head for this task."""
    the_task: Task = task.make(data)
    return the_task, Model(backbone, head.make(backbone.features, the_task.out_features))
