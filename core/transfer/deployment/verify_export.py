"""Load an exported model as its users do, and compute its outputs: run by path in a fresh process.

``python -P verify_export.py FOLDER`` reads ``job.json`` and ``inputs.safetensors`` in the folder, and writes
``outputs.safetensors`` and ``modules.json``. Only the format of this package imports this package.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Loaded = Callable[[Any], Tensor]
"""A loaded export: it returns the outputs for a batch of inputs."""


def own(job: Mapping[str, Any]) -> Loaded:
    """Load a model folder of this package."""
    from transfer.models.saved_model import read_model

    return read_model(Path(job["path"]).parent).model


def foreign(job: Mapping[str, Any]) -> Loaded:
    """Build another library's network and load a state dict into it."""
    path = Path(job["path"])
    module, _, function = job["factory"].partition(":")
    model: torch.nn.Module = getattr(importlib.import_module(module), function)(**job["options"])
    weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def torch_export(job: Mapping[str, Any]) -> Loaded:
    """Load an exported program."""
    program: Loaded = torch.export.load(job["path"]).module()
    return program


def onnx(job: Mapping[str, Any]) -> Loaded:
    """Load an ONNX file into onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(job["path"], providers=["CPUExecutionProvider"])
    # The graph lacks inputs that do not affect the output.
    names = {node.name for node in session.get_inputs()}

    def run(inputs: Any) -> Tensor:
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        named = {name: tensor.numpy() for name, tensor in zip(job["inputs"], tensors, strict=True) if name in names}
        return torch.from_numpy(session.run(None, named)[0])

    return run


def code(job: Mapping[str, Any]) -> Loaded:
    """Run the code that loads a folder of another library."""
    names: dict[str, Any] = {}
    os.chdir(Path(job["path"]).parent)
    exec(job["code"], names)  # noqa: S102  # the backbone's own code, which the model card shows
    return lambda inputs: torch.from_numpy(names["run"](tuple(tensor.numpy() for tensor in inputs)))


def main(folder: Path) -> None:
    """Load the export that the job names, and write its outputs for each batch."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    loaded = {"own": own, "foreign": foreign, "torch_export": torch_export, "onnx": onnx, "code": code}[job["loader"]](
        job
    )
    tensors = load_file(folder / "inputs.safetensors")
    outputs = {}
    with torch.no_grad():
        for batch in range(job["batches"]):
            inputs = tuple(tensors[f"{batch}.{index}"] for index in range(len(job["inputs"])))
            outputs[str(batch)] = loaded(inputs if job["tuple"] else inputs[0]).contiguous()
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "modules.json").write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
