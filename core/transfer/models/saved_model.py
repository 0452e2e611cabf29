"""The folder ``model/`` of a run, enough to predict wherever the plugins are installed. It contains no pickle."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from transfer.config.check import load_component
from transfer.config.component import Component, error_location
from transfer.config.run_config import RunConfig
from transfer.errors import PluginError, RunError, damaged
from transfer.interfaces import Backbone, DataSpec, Task
from transfer.models import recorded_plugins
from transfer.models.assemble import assemble
from transfer.models.model import Model
from transfer.models.model_json import DESCRIPTION, WEIGHTS, has_adapter, read_assets, read_description
from transfer.registry.entry_points import Kind
from transfer.storage.run_directory import FORMAT, RunDirectory
from transfer.storage.tensor_files import load_tensors, require_same_layout, write_tensors
from transfer.system.atomic_files import atomic_folder, write_atomically, write_json
from transfer.system.formatting import quote_for_shell

PARTS: tuple[Kind, ...] = ("backbone", "head", "task")
ADAPTER: Kind = "adapter"


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, read from its folder.

    Args:
        model: Model in eval mode, on the CPU.
        backbone: Backbone with its preprocessing and its assets.
        task: Task that interprets the outputs.
        data: Specification of the data that the model was trained on.
        is_adapted: Whether the model contains an adapter that is not merged.
    """

    model: Model
    backbone: Backbone
    task: Task
    data: DataSpec
    is_adapted: bool = False


def write_model(folder: Path, config: RunConfig, data: DataSpec, backbone: Backbone, task: Task, model: Model) -> None:
    """Write a trained model atomically, in place of an older one: weights, config blocks, classes, preprocessing."""
    components = {"backbone": config.backbone, "head": config.head, "task": config.task}
    if config.adapter is not None:
        components[ADAPTER] = config.adapter
    with atomic_folder(folder, make_room=lambda: shutil.rmtree(folder, ignore_errors=True)) as temporary:
        write_tensors(temporary / WEIGHTS, model.state_dict())
        assets = backbone.assets()
        for name, text in assets.items():
            write_atomically(temporary / name, text)
        write_json(
            temporary / DESCRIPTION,
            {
                "format": FORMAT,
                **{kind: dict(component.resolved) for kind, component in components.items()},
                "task_state": task.state(),
                "data": {"fields": data.fields, "target": data.target, "classes": data.classes},
                "features": asdict(backbone.features),
                "preprocessing": dict(backbone.preprocessing.describe()),
                "assets": sorted(assets),
                "plugins": recorded_plugins.record(components.values()),
            },
        )


def find_model(path: str | Path) -> Path:
    """Return the model folder of a path: the path itself if it is a model folder, otherwise the one of a run.

    Raises:
        RunError: The path is neither a model folder nor a run directory.
    """
    path = Path(path)
    return path if os.path.isfile(path / DESCRIPTION) else RunDirectory.open(path).model


def read_model(folder: Path, *, merged: bool = False) -> LoadedModel:
    """Build a trained model from its folder.

    Args:
        folder: Model folder.
        merged: Whether the additions of an adapter are merged into the weights of the backbone.

    Raises:
        RunError: The folder is incomplete or damaged, or a plugin that it needs is not installed.
    """
    described = _read_description(folder)
    file = folder / DESCRIPTION
    backbone_block, head, task = (_component(kind, described, file) for kind in PARTS)
    adapter = _component(ADAPTER, described, file) if has_adapter(described) else None
    data = described["data"]
    spec = DataSpec(tuple(data["fields"]), data["target"], tuple(data["classes"]))
    backbone_class: type[Backbone] = backbone_block.cls
    again = "copy the folder again from the run that trained it"
    # A plugin may raise any exception if somebody has edited its files.
    with damaged("the model cannot be built", str(file), again):
        with error_location(str(file)):
            backbone = backbone_class.from_assets(read_assets(folder, described), **backbone_block.options)
            the_task, model = assemble(backbone, head, task, spec, adapter)
            backbone.preprocessing.restore(described["preprocessing"])
        # Before output_scaling(), which reads the state.
        the_task.load_state(described["task_state"])
        model.scale_outputs(the_task.output_scaling())
    _load_weights(model, folder / WEIGHTS)
    model.eval()
    # Both contain the adapted layers, and a merge replaces them in the modules that it is given.
    if adapter is not None and merged:
        adapter.make().merge(nn.ModuleList([backbone, model]))
    return LoadedModel(model, backbone, the_task, spec, is_adapted=adapter is not None and not merged)


def _read_description(folder: Path) -> dict[str, Any]:
    run = quote_for_shell(folder.parent)
    return read_description(
        folder, "there is no model here: the run did not end", f"finish the run: transfer resume {run}"
    )


def _load_weights(model: Model, file: Path) -> None:
    tensors = load_tensors(file)
    fix = "copy the folder again from the run that trained it"
    # load_state_dict would convert tensors of another dtype silently.
    require_same_layout(tensors, model.state_dict(), "the weights do not fit the model", str(file), fix)
    model.load_state_dict(tensors)


def read_task(folder: Path) -> Task:
    """Build only the task of a trained model.

    Raises:
        RunError: The folder is incomplete or damaged, or the task's plugin is not installed.
    """
    described = _read_description(folder)
    data = described["data"]
    spec = DataSpec(tuple(data["fields"]), data["target"], tuple(data["classes"]))
    task: Task = _component("task", described, folder / DESCRIPTION).make(spec)
    return task


def plugin_changes(folder: Path) -> list[str]:
    """Return a line for each plugin of a trained model that has another version or other code than in training.

    Raises:
        RunError: The folder is incomplete or damaged, or a plugin that it needs is not installed.
    """
    described = _read_description(folder)
    kinds = (*PARTS, ADAPTER) if described.get(ADAPTER) else PARTS
    components = [_component(kind, described, folder / DESCRIPTION) for kind in kinds]
    return recorded_plugins.changes(described["plugins"], components)


def _component(kind: Kind, described: dict[str, Any], file: Path) -> Component:
    block, recorded = described[kind], described["plugins"].get(kind)
    # Another distribution may claim the same name by now: the recorded one is used.
    if isinstance(name := block.get("name"), str):
        block = {**block, "name": recorded_plugins.resolve(kind, name, recorded)}
    try:
        return load_component(kind, block, str(file))
    except PluginError as error:  # it is installed, and cannot be imported
        raise RunError.of(error.problems) from error
