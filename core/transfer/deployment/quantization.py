"""Quantized ONNX graphs: conversion by onnxruntime, and the loss of accuracy that it causes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transfer.data.loader import Loader
from transfer.deployment.formats import input_names
from transfer.errors import ExportError, unknown_name
from transfer.interfaces import Task
from transfer.models.saved_model import LoadedModel

Quantization = Literal["int8", "fp16"]
CALIBRATION_EXAMPLES = 128
"""Number of training examples that determine the range of each activation."""
CALIBRATION_BATCH_SIZE = 32
RESAMPLES = 400
"""Number of bootstrap samples of the interval."""
CONFIDENCE = 0.95
_SEED = 0


@dataclass(frozen=True)
class QuantizationLoss:
    """The loss of accuracy by quantization.

    Args:
        metric: Name of the metric.
        split: Name of the evaluated split.
        examples: Number of examples.
        before: Metric of the run's model.
        after: Metric of the quantized graph on the same examples.
        low: Lower end of the 95 % interval of ``after - before`` (a bootstrap over the examples, in pairs).
        high: Upper end of the interval.
    """

    metric: str
    split: str
    examples: int
    before: float
    after: float
    low: float
    high: float

    def __str__(self) -> str:
        change = f"{self.after - self.before:+.4f}, 95 % interval {self.low:+.4f} to {self.high:+.4f}"
        return (
            f"{self.metric} {self.before:.4f} -> {self.after:.4f} ({change}; {self.examples:,} {self.split} examples)"
        )


def check_quantization(kind: str, format: str) -> None:
    """Refuse an unknown quantization, and formats that have none.

    Raises:
        ExportError: The quantization or its combination with the format does not exist, or a package is missing.
    """
    if kind not in get_args(Quantization):
        raise ExportError.of([unknown_name("quantization", kind, get_args(Quantization))])
    if format != "onnx":
        raise ExportError(f"--quantize applies to the format onnx, not to {format}", fix="choose --format onnx")
    if missing := [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]:
        raise ExportError(
            f"--quantize needs {' and '.join(missing)}, which are not installed", fix="pip install 'transferkit[onnx]'"
        )


def quantize(path: Path, kind: str, batches: Sequence[Any]) -> None:
    """Quantize an ONNX graph, in place. The graph contains ranges of activations, and no examples.

    int8 converts weights. If the graph has convolutions, it also converts activations, whose ranges are calibrated on
    training examples. fp16 halves the size of the weights; inputs and outputs stay float32.

    Args:
        path: Path of the graph.
        kind: ``int8`` or ``fp16``.
        batches: Model inputs of training examples for the calibration.
    """
    import onnx
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        graph = onnx.load(path)
        # Conversions of onnxruntime drop the metadata, which describes labels and preprocessing.
        metadata = [*graph.metadata_props]
        if kind == "fp16":
            onnx.save(convert_float_to_float16(graph, keep_io_types=True), path)
        elif any(node.op_type == "Conv" for node in graph.graph.node):
            quant_pre_process(path, path, skip_symbolic_shape=True)
            # Symmetric weights per channel and 8-bit activations: the setting that onnxruntime recommends for the CPU.
            ort.quantize_static(path, path, _Calibration(path, batches), per_channel=True)
        else:
            ort.quantize_dynamic(path, path)
        graph = onnx.load(path)
        del graph.metadata_props[:]
        graph.metadata_props.extend(metadata)
        graph.metadata_props.add(key="quantization", value=kind)
        onnx.save(graph, path)


class _Calibration:
    """The examples in the form that onnxruntime's calibration reads."""

    def __init__(self, path: Path, batches: Sequence[Any]) -> None:
        self._session = OnnxModel(path)
        self._batches: Iterator[Any] = iter(batches)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """Return the next batch by input name; None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else self._session.named(batch)


class OnnxModel:
    """An ONNX graph in onnxruntime.

    Args:
        path: Path of the graph.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._names = {node.name for node in self._session.get_inputs()}

    def named(self, inputs: Any) -> dict[str, npt.NDArray[Any]]:
        """Return inputs by name. The graph lacks inputs that do not affect the output."""
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        return {
            name: tensor.numpy()
            for name, tensor in zip(input_names(inputs), tensors, strict=True)
            if name in self._names
        }

    def __call__(self, inputs: Any) -> Tensor:
        """Return the outputs (B, out_features) of a batch."""
        return torch.from_numpy(self._session.run(None, self.named(inputs))[0])


def measure(path: Path, loaded: LoadedModel, loader: Loader, split: str) -> QuantizationLoss:
    """Return the loss of accuracy of a quantized graph on a split."""
    graph = OnnxModel(path)
    before, after, targets = [], [], []
    for batch in loader.epoch(0):
        inputs = loaded.backbone.preprocessing.to_device(batch.inputs, torch.device("cpu"))
        with torch.no_grad():
            before.append(loaded.model(inputs))
        after.append(graph(inputs))
        targets.append(batch.targets)
    ours, theirs, expected = torch.cat(before), torch.cat(after), torch.cat(targets)
    name = loaded.task.primary_metric.name
    rng = np.random.default_rng(_SEED)
    changes = []
    for _ in range(RESAMPLES):
        rows = torch.from_numpy(rng.integers(0, len(expected), len(expected)))
        changes.append(
            _metric(loaded.task, name, theirs[rows], expected[rows])
            - _metric(loaded.task, name, ours[rows], expected[rows])
        )
    low, high = np.quantile(changes, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    values = (_metric(loaded.task, name, ours, expected), _metric(loaded.task, name, theirs, expected))
    return QuantizationLoss(name, split, len(expected), *values, float(low), float(high))


def _metric(task: Task, name: str, outputs: Tensor, targets: Tensor) -> float:
    metric = task.metrics()[name]
    metric.update(task.metric_inputs(outputs).get(name, task.predictions(outputs)), targets)
    return float(metric.compute())


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of onnxruntime's tools, and their messages, which they log to the root logger."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)
