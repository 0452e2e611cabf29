"""Load an exported model as its users will, and answer: run by path in a fresh process.

``python -P reload.py FOLDER``: the folder holds ``job.json`` and ``inputs.safetensors``, and gets
``outputs.safetensors`` and ``modules.json``. This file imports this package for the one format that is its own.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Answer = Callable[[Any], Tensor]


def own(job: Mapping[str, Any]) -> Answer:
    """Load a model folder of this package."""
    from transfer.models.saved_model import read_model

    return read_model(Path(job["path"]).parent).model


def foreign(job: Mapping[str, Any]) -> Answer:
    """Build another library's network and load a state dict into it."""
    path = Path(job["path"])
    module, _, function = job["factory"].partition(":")
    model: torch.nn.Module = getattr(importlib.import_module(module), function)(**job["options"])
    weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def torch_export(job: Mapping[str, Any]) -> Answer:
    """Load an exported program."""
    answer: Answer = torch.export.load(job["path"]).module()
    return answer


def onnx(job: Mapping[str, Any]) -> Answer:
    """Load an ONNX file into onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(job["path"], providers=["CPUExecutionProvider"])
    wanted = {node.name for node in session.get_inputs()}  # an input that changes nothing is left out of the graph

    def answer(inputs: Any) -> Tensor:
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        named = {name: tensor.numpy() for name, tensor in zip(job["inputs"], tensors, strict=True) if name in wanted}
        return torch.from_numpy(session.run(None, named)[0])

    return answer


def main(folder: Path) -> None:
    """Load what the job names, and answer for each of its batches."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    answer = {"own": own, "foreign": foreign, "torch_export": torch_export, "onnx": onnx}[job["loader"]](job)
    tensors = load_file(folder / "inputs.safetensors")
    outputs = {}
    with torch.no_grad():
        for batch in range(job["batches"]):
            found = tuple(tensors[f"{batch}.{place}"] for place in range(len(job["inputs"])))
            outputs[str(batch)] = answer(found if job["tuple"] else found[0]).contiguous()
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "modules.json").write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
