"""Contracts of pretrained weights: every tensor of a file is accounted for."""

from __future__ import annotations

import json
import shutil
import tempfile
import unittest
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from transfer.errors import UserError
from transfer.interfaces import Backbone
from transfer.testing.backbones import Subject
from transfer.testing.cases import Case, promise, require

SUFFIX = ".safetensors"


@promise("interfaces.Backbone", "weights")
def every_pretrained_tensor_is_accounted_for(case: Case) -> None:
    """``load_pretrained`` loads all tensors of the backbone, names those that it leaves out, and refuses all others."""
    built = Subject(case)
    if type(built.backbone).load_pretrained is Backbone.load_pretrained:
        return
    weights = next(((key, file) for key, value in case.options.items() if (file := _weights_in(value))), None)
    if weights is None:
        fix = f"give an option that names a {SUFFIX} file, or a folder with one"
        raise unittest.SkipTest(f"no option of this case names weights: {fix}")
    option, file = weights
    tensors = load_file(file)
    facts = built.backbone.load_pretrained()
    require(facts, "load_pretrained loads weights and returns no description")
    loaded = {name: tensor.clone() for name, tensor in built.backbone.state_dict().items()}
    used = _used_name(tensors, loaded)
    # Each change must be refused or named: pretrained weights that are ignored only show as bad metrics.
    damaged: dict[str, dict[str, Tensor]] = {
        "all names have another prefix": {f"prefix.{name}": tensor for name, tensor in tensors.items()},
        f"{used!r} is missing": {name: tensor for name, tensor in tensors.items() if name != used},
        "there is another tensor": tensors | {"another.weight": torch.zeros(2)},
    }
    for change, content in damaged.items():
        with tempfile.TemporaryDirectory() as folder:
            changed = _copy(Path(str(case.options[option])), file, content, Path(folder))
            # Other initial weights, so that a tensor which was not loaded differs.
            other = Subject(replace(case, options={**case.options, option: str(changed)}), seed=1).backbone
            try:
                facts = other.load_pretrained()
            except UserError:
                continue
        complete = all(torch.equal(tensor, loaded[name]) for name, tensor in other.state_dict().items())
        require(complete, f"{change}, and load_pretrained neither refuses the weights nor loads all of them")
        named = "another.weight" not in content or "another.weight" in json.dumps(dict(facts))
        require(named, f"{change}, and load_pretrained neither refuses it nor names it in its description")


def _weights_in(value: object) -> Path | None:
    """Return the file of weights that an option names: a file, or the only one in a folder."""
    if not isinstance(value, str):
        return None
    path = Path(value)
    if path.suffix == SUFFIX and path.is_file():
        return path
    files = list(path.glob(f"*{SUFFIX}")) if path.is_dir() else []
    return files[0] if len(files) == 1 else None


def _used_name(tensors: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> str:
    """Return the name of a tensor of a file that the backbone contains after loading."""
    for name, tensor in tensors.items():
        # A tensor of equal values (biases of zero) could be equal to one that was never loaded.
        distinct = tensor.numel() > 1 and bool((tensor != tensor.flatten()[0]).any())
        if distinct and any(torch.equal(tensor, other) for other in loaded.values()):
            return name
    require(False, "load_pretrained has loaded no tensor of the file")
    raise AssertionError


def _copy(path: Path, file: Path, tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """Return the path of a copy of a file, or of a folder with a file, with other tensors."""
    target = folder / path.name
    if path.is_dir():
        shutil.copytree(path, target)
    save_file(dict(tensors), target / file.name if path.is_dir() else target, metadata={"format": "pt"})
    return target
