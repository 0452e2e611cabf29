"""The formats that a trained model can be exported to: the models each can contain, its writer, and its loader."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch

from transfer.errors import ExportError, unknown_name
from transfer.interfaces import ForeignModel, Preprocessing, Task
from transfer.models.saved_model import LoadedModel
from transfer.storage.tensor_files import write_tensors

MAX_ONNX_BYTES = 2**31 - 2**20
"""Size limit of one ONNX file (2 GiB, less some for the graph); larger weights are written to a file next to it."""
STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Metadata key of an ONNX node that contains source lines and paths of the exporting machine."""


class Format(ABC):
    """One export format, for one model.

    Args:
        loaded: The trained model.

    Raises:
        ExportError: The format cannot contain this model, or needs a package that is not installed.
    """

    file: ClassVar[str]
    """Name of the weights or program in an exported folder."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes of a single exported file; empty if the format needs a folder."""
    library: str
    """Library that loads the export, by the name that Hugging Face's hub has for it."""
    loader: ClassVar[str]
    """Function in :mod:`transfer.deployment.verify_export` that loads the export."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    @abstractmethod
    def write(self, path: Path, inputs: Any) -> None:
        """Write the weights or the program.

        Args:
            path: Path of the file.
            inputs: A batch of example inputs to record the program with; the file must not contain them.

        Raises:
            ExportError: The format cannot contain this model.
        """

    def job(self) -> dict[str, Any]:
        """Return the JSON values that the loader needs."""
        return {"loader": self.loader}

    def script(self) -> str | None:
        """Return the code of a function ``run(inputs)`` from a tuple of NumPy arrays to one array of the outputs.

        It runs without this package, in the folder of the export; None if the format has no such code.
        """
        return None

    @abstractmethod
    def usage(self, file: str) -> str:
        """Return the Python code that loads the export, for the model card."""


class Safetensors(Format):
    """The model folder of this package: weights by the names of the stages, and a description of the model."""

    file = "weights.safetensors"
    library = "transfer"
    loader = "own"

    def write(self, path: Path, inputs: Any) -> None:
        """Write the weights."""
        write_tensors(path, self.loaded.model.state_dict())

    def usage(self, file: str) -> str:
        """Return code that predicts with this package."""
        return 'import transfer\n\nfor answer in transfer.predict("THIS FOLDER", ["AN INPUT"]):\n    print(answer)'


class Foreign(Format):
    """A state dict for another library's network.

    Args:
        loaded: The trained model.
        network: The network, as the backbone describes it.
    """

    file = "model.safetensors"
    suffixes = (".safetensors", ".pth", ".pt")
    loader = "foreign"

    def __init__(self, loaded: LoadedModel, network: ForeignModel) -> None:
        super().__init__(loaded)
        self.network = network
        self.library = network.factory.partition(".")[0]
        self.output = loaded.model.head_as_linear()
        # Networks of other libraries end in one linear layer, so that the head must be equivalent to one.
        if self.output is None:
            head = type(loaded.model.stages["head"]).__name__
            raise ExportError(
                f"head {head} does not fit {network.factory.replace(':', '.')}: expected one linear layer, got more",
                available=tuple(FORMATS),
                fix="choose a format that supports any head, or train with head: {name: linear}",
            )

    def write(self, path: Path, inputs: Any) -> None:
        """Write the state dict: as safetensors, or as a pickle if the name of the file ends in .pth or .pt."""
        backbone, head = self.loaded.backbone, f"{self.network.output}."
        weights = {self.network.names[name]: value for name, value in backbone.state_dict().items()}
        assert self.output is not None
        weights |= {f"{head}{name}": value for name, value in self.output.state_dict().items()}
        if path.suffix == ".safetensors":
            write_tensors(path, weights)
        else:
            torch.save({name: value.cpu() for name, value in weights.items()}, path)

    def job(self) -> dict[str, Any]:
        """Return the name of the loader, and the function that builds the network."""
        return super().job() | {"factory": self.network.factory, "options": dict(self.network.options)}

    def script(self) -> str | None:
        """Return code that runs the other library's network."""
        return f"import torch\n{self.usage(self.file)}\n\n\n{_RUN_TORCH}"

    def usage(self, file: str) -> str:
        """Return code that builds the network and loads the state dict."""
        module, _, function = self.network.factory.partition(":")
        options = ", ".join(f"{name}={value!r}" for name, value in self.network.options.items())
        load = f'load_file("{file}")' if file.endswith(".safetensors") else f'torch.load("{file}", weights_only=True)'
        return "\n".join(
            [
                "from safetensors.torch import load_file" if "load_file" in load else "import torch",
                f"from {module} import {function}",
                "",
                f"model = {function}({options})",
                f"model.load_state_dict({load}, strict=True)",
                "model.eval()",
            ]
        )


class TorchExport(Format):
    """A program recorded by ``torch.export``, which runs without this package, on batches of any size."""

    file = "model.pt2"
    suffixes = (".pt2",)
    library = "torch"
    loader = "torch_export"

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        if not hasattr(torch.export.Dim, "AUTO"):
            raise ExportError(
                f"torch {torch.__version__} cannot record a program with dynamic sizes: expected torch 2.6 or later",
                fix="update torch",
            )

    def write(self, path: Path, inputs: Any) -> None:
        """Record the model on a batch, and write the program without the batch."""
        model = self.loaded.model
        with _recording("torch.export"), torch.no_grad():
            program = torch.export.export(model, (inputs,), dynamic_shapes=(self._sizes(inputs),), strict=False)
        self._refuse_fixed_length(program)
        _strip(program)
        torch.export.save(program, path)

    def _sizes(self, inputs: Any) -> Any:
        """Return the dynamic dimensions of the inputs: the batch, and every dimension if examples have lengths."""
        if isinstance(inputs, tuple):
            return tuple(self._sizes(tensor) for tensor in inputs)
        # With Dim.AUTO, a size is dynamic unless the code of the model depends on it.
        count = inputs.dim() if _has_lengths(self.loaded.backbone.preprocessing) else 1
        return dict.fromkeys(range(count), torch.export.Dim.AUTO)

    def _refuse_fixed_length(self, program: Any) -> None:
        # With Dim.AUTO, torch silently fixes a size if the code of the model depends on it.
        names = set(program.graph_signature.user_inputs)
        shapes = [
            node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in names
        ]
        if any(_is_fixed(shape[0]) for shape in shapes):
            raise ExportError("the program would support only one batch size: a stage depends on it", fix=_OTHERS)
        if _has_lengths(self.loaded.backbone.preprocessing) and all(
            _is_fixed(size) for shape in shapes for size in shape[1:]
        ):
            raise ExportError(
                f"the program would support only inputs of length {', '.join(map(str, shapes[0][1:]))}: "
                "torch.export fixes the number of steps of a recurrent layer",
                fix=_OTHERS,
            )

    def script(self) -> str | None:
        """Return code that runs the program."""
        return f"{self.usage(self.file)}\n\n\n{_RUN_TORCH}"

    def usage(self, file: str) -> str:
        """Return code that loads the program."""
        return f'import torch\n\nmodel = torch.export.load("{file}").module()'


class Onnx(TorchExport):
    """An ONNX graph for batches of any size, and for any length if examples have lengths."""

    file = "model.onnx"
    suffixes = (".onnx",)
    library = "onnx"
    loader = "onnx"

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise ExportError(
                f"format 'onnx' needs {' and '.join(missing)}, which are not installed",
                fix="pip install 'transferkit[onnx]'",
            )

    def write(self, path: Path, inputs: Any) -> None:
        """Record the model on a batch, translate it, and write the graph."""
        model = self.loaded.model
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        with _recording("torch.onnx"):
            program: Any = torch.onnx.export(
                model,
                (inputs,),
                input_names=input_names(inputs),
                output_names=["outputs"],
                dynamic_shapes=(self._sizes(inputs),),
                dynamo=True,
                verbose=False,
            )
            for graph in (program.model.graph, *program.model.functions.values()):
                for node in graph.all_nodes():
                    node.metadata_props.pop(STACK_TRACE, None)
            program.model.metadata_props.update(self._metadata())
            # An ONNX file is one protobuf message, which cannot exceed 2 GiB.
            program.save(str(path), external_data=size > MAX_ONNX_BYTES)

    def _metadata(self) -> dict[str, str]:
        """Return the metadata of the graph: strings, most of them JSON."""
        loaded = self.loaded
        described = {
            "labels": list(loaded.data.classes),
            "target": loaded.data.target,
            "fields": list(loaded.data.fields),
            "preprocessing": dict(loaded.backbone.preprocessing.describe()),
        }
        return {
            "outputs": OUTPUTS[activation_of(loaded.task)],
            **{name: json.dumps(value) for name, value in described.items()},
        }

    def script(self) -> str | None:
        """Return code that runs the graph in onnxruntime."""
        return f"{self.usage(self.file)}\n\n\n{_RUN_ONNX}"

    def usage(self, file: str) -> str:
        """Return code that loads the graph into onnxruntime."""
        return f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{file}")'


FORMATS: Mapping[str, type[Safetensors] | type[TorchExport]] = {
    "safetensors": Safetensors,
    "torch_export": TorchExport,
    "onnx": Onnx,
}
"""The formats for any model; a backbone may add formats of other libraries."""
_RUN_TORCH = """def run(inputs):
    with torch.no_grad():
        return model(*map(torch.from_numpy, inputs)).numpy()"""
_RUN_ONNX = """def run(inputs):
    names = [node.name for node in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs)))[0]"""
_OTHERS = "choose another format: onnx supports recurrent layers, safetensors supports any model"


def find_format(name: str, loaded: LoadedModel) -> Format:
    """Return a format for a model.

    Raises:
        ExportError: The format does not exist for this backbone, or cannot contain this model.
    """
    if name in FORMATS:
        return FORMATS[name](loaded)
    networks = loaded.backbone.foreign_models(loaded.task.out_features)
    if name in networks:
        return Foreign(loaded, networks[name])
    backbone = f"backbone {type(loaded.backbone).__name__}"
    raise ExportError.of([unknown_name("export format", name, [*FORMATS, *networks], where=backbone)])


OUTPUTS: Mapping[str | None, str] = {
    "softmax": "logits (B, labels): their softmax gives probabilities",
    "sigmoid": "logits (B, labels): their sigmoid gives probabilities",
    "identity": "numbers (B, labels) in the units of the targets",
    None: "outputs (B, outputs) that the task's plugin interprets",
}
"""Meaning of the outputs by the activation that turns them into scores."""


def activation_of(task: Task) -> str | None:
    """Return the function that turns outputs into the scores of a task: ``softmax``, ``sigmoid``, ``identity``.

    None if it is another one.
    """
    # Compared by values: a task of a plugin does not declare its activation.
    outputs = torch.linspace(-2, 2, 3 * task.out_features).view(3, -1)
    candidates = {"identity": outputs, "softmax": outputs.softmax(-1), "sigmoid": outputs.sigmoid()}
    scores = task.scores(outputs)
    return next(
        (name for name, value in candidates.items() if value.shape == scores.shape and torch.allclose(value, scores)),
        None,
    )


def input_names(inputs: Any) -> list[str]:
    """Return the names of the inputs of an exported graph."""
    return [f"input_{index}" for index in range(len(inputs))] if isinstance(inputs, tuple) else ["inputs"]


def _strip(program: Any) -> None:
    """Remove the example inputs and the source locations from a recorded program.

    Both are written by default: the examples as a pickle, and the stack trace of every node with the absolute paths of
    the exporting machine. Neither is needed to run the program.
    """
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):  # branches and loops are graphs of their own
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _has_lengths(preprocessing: Preprocessing) -> bool:
    return type(preprocessing).length is not Preprocessing.length


def _is_fixed(size: object) -> bool:
    # A size that turned out to be constant may still be a symbol, whose text is then a number.
    return str(size).isdecimal()


@contextmanager
def _recording(recorder: str) -> Iterator[None]:
    """Hide the warnings of a recorder, and turn its errors into an ExportError that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ExportError:
        raise
    # Code that cannot be recorded raises anything: errors of dynamo, of symbolic shapes, of onnxscript.
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise ExportError(f"{recorder} cannot record this model: {reason}", fix=_OTHERS) from error
