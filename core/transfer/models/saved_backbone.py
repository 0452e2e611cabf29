"""The trained backbone of an earlier run, as pretrained weights for a new run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from transfer.config.component import Component, error_location, require_complete
from transfer.errors import RunError, WeightsError, damaged
from transfer.interfaces import Backbone
from transfer.models.model_json import WEIGHTS, has_adapter, read_assets, read_description
from transfer.models.saved_model import read_model
from transfer.storage.tensor_files import load_tensors

_HEAD = "head."
_SHAPES = re.compile(r"size mismatch for (\S+): .*?torch.Size\((.*?)\) .*torch.Size\((.*?)\)")
"""Name, shape in the file and shape in the model of a tensor, in torch's message."""
_MAX_NAMES = 6
"""Maximum number of names that an error lists."""


@dataclass(frozen=True)
class SavedBackbone:
    """A trained backbone on disk; its tensors are read on demand.

    Args:
        folder: Model folder of the run.
        options: Config block of the backbone in its run, ``name`` included.
        preprocessing: Settings of its preprocessing.
        assets: Text files that it learned from its training split, by name.
        is_adapted: Whether the run trained an adapter.
    """

    folder: Path
    options: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    assets: Mapping[str, str]
    is_adapted: bool = False

    @property
    def file(self) -> Path:
        """Path of the file of tensors."""
        return self.folder / WEIGHTS

    def tensors(self) -> tuple[dict[str, Tensor], list[str]]:
        """Return the tensors of the backbone by name (``layer1.0.conv1.weight``), and the names of those of the head.

        The additions of an adapter are merged into the weights.

        Raises:
            WeightsError: The file is missing or damaged.
        """
        try:
            # Only the adapter can merge its additions, so its model has to be built; otherwise the file is enough.
            tensors = (
                read_model(self.folder, merged=True).model.state_dict() if self.is_adapted else load_tensors(self.file)
            )
        except RunError as error:
            raise WeightsError.of(error.problems) from error
        backbone = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
        return backbone, sorted(tensors.keys() - backbone.keys())

    def sha256(self) -> str:
        """Return the SHA-256 of the file of tensors, in hexadecimal."""
        with self.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def saved_backbone(run: str | Path, name: str | None = None) -> SavedBackbone:
    """Return the backbone of a run without reading its tensors.

    Args:
        run: Path of a run directory, or of its model folder.
        name: Name of the backbone that the run must have. None accepts any.

    Raises:
        WeightsError: The path does not contain a complete run, or the run has another backbone.
    """
    path = Path(run).expanduser()
    folder = path / "model" if (path / "model").is_dir() else path
    try:
        described = read_description(folder, f"there is no run with a model at {path}", "name a run that has ended")
        assets = read_assets(folder, described)
    except RunError as error:
        raise WeightsError.of(error.problems) from error
    # The config may name the distribution too: `distribution:name`.
    found = str(described["backbone"]["name"]).rpartition(":")[2]
    if name is not None and found != name:
        raise WeightsError(
            f"wrong backbone in this run: expected {name!r}, got {found!r}",
            where=str(folder),
            fix=f"name a run of {name}",
        )
    return SavedBackbone(
        folder, described["backbone"], described["preprocessing"], assets, is_adapted=has_adapter(described)
    )


def build_backbone(component: Component, values: Sequence[Any] | None = None) -> Backbone:
    """Build a backbone with random weights.

    With ``weights: runs/NAME`` it gets the assets of the run, such as its vocabulary, because the weights belong to
    them. Nothing is learned from the data then.

    Args:
        component: Backbone in a config.
        values: Raw values of the training split; None builds the backbone without data, to check a config.

    Raises:
        UserError: An option is refused, or the run does not exist or is of another backbone.
    """
    backbone: Backbone
    with error_location(component.where):
        if component.weights is not None:
            saved = _saved(component)
            # The run may come from somebody else: a vocabulary that was edited can raise anything.
            with (
                damaged("the run cannot be read", str(saved.folder), "name a run that has ended"),
                error_location(component.where),
            ):
                backbone = component.cls.from_assets(saved.assets, **component.options)
            require_complete(component, backbone)
        elif values is None:
            backbone = component.make()
        else:
            backbone = component.cls.from_data(values, **component.options)
    return backbone


def load_pretrained(component: Component, backbone: Backbone) -> dict[str, Any]:
    """Load the pretrained weights that a config names, and return their description; empty if there are none.

    Raises:
        WeightsError: The weights are missing or do not fit.
    """
    with error_location(component.where):
        if component.weights is None:
            return dict(backbone.load_pretrained())
        loaded = load_saved_backbone(backbone, _saved(component), component.resolved)
        return {"weights": component.weights, **loaded}


def _saved(component: Component) -> SavedBackbone:
    assert component.weights is not None
    return saved_backbone(component.weights, component.plugin.name)


def load_saved_backbone(
    backbone: Backbone, saved: SavedBackbone, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Copy the weights of an earlier run into a backbone of the same architecture.

    Every tensor of the backbone must be in the run and every tensor of the run in the backbone. Only the head of the
    run is left out.

    Args:
        backbone: Backbone that the weights are copied into.
        saved: Backbone of the earlier run.
        options: Config block of the backbone. The error names the options in which it differs from the run's.

    Returns:
        ``source`` (the file), ``sha256``, ``tensors`` (the number of loaded tensors) and ``left_out`` (the names of the
        tensors of the head).

    Raises:
        WeightsError: Tensors are missing, left over, not finite or of another shape.
    """
    tensors, head = saved.tensors()
    # In a state dict of the backbone, the dots in the names of stages are slashes, and the stages have a common prefix.
    stages = {f"{name}.": f"stages.{name.replace('.', '/')}." for name in backbone.stage_names}
    renamed = {}
    for name, tensor in tensors.items():
        stage = next((stage for stage in stages if name.startswith(stage)), "")
        renamed[stages.get(stage, "") + name.removeprefix(stage)] = tensor
    try:
        result = backbone.load_state_dict(renamed, strict=False)
        differences = {"missing": result.missing_keys, "left over": result.unexpected_keys}
    except RuntimeError as error:  # tensors of another shape, which torch names
        differences = {
            "of another shape": [f"{name} {got} for {want}" for name, got, want in _SHAPES.findall(str(error))]
            or [str(error)]
        }
    # Checked here, because training would only report that the loss is not finite.
    differences["not finite"] = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if any(differences.values()):
        listed = "; ".join(f"{kind}: {_abbreviated(names)}" for kind, names in differences.items() if names)
        # Options that differ from those of the run are the likely reason.
        other = {key: value for key, value in saved.options.items() if value != (options or saved.options).get(key)}
        other = {key: value for key, value in other.items() if key not in ("name", "weights")}
        fix = f"set the options of the run: {json.dumps(other)[1:-1]}" if other else "name a run of the same backbone"
        raise WeightsError(
            f"the weights of this run do not fit: {listed.replace('stages.', '')}", where=str(saved.file), fix=fix
        )
    return {"source": str(saved.file), "sha256": saved.sha256(), "tensors": len(tensors), "left_out": head}


def _abbreviated(names: Sequence[str]) -> str:
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")
