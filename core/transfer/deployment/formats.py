"""The formats that a trained model can be exported to: what each can hold, how it is written, how it is loaded."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from transfer.errors import ExportError, nearest
from transfer.interfaces import ForeignModel, Preprocessing
from transfer.models.saved_model import LoadedModel

ONE_FILE_BYTES = 2**31 - 2**20
"""An ONNX file holds less than 2 GiB; larger weights go into a file beside it."""


class Format(ABC):
    """One format, for one model.

    Args:
        loaded: The trained model.

    Raises:
        ExportError: The format cannot hold this model, or needs something that is not installed.
    """

    file: ClassVar[str]
    """The name of the weights or program in an exported folder."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Of a lone file; none where a folder is needed."""
    library: str
    """What loads it, by the name that Hugging Face's hub has for it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    @abstractmethod
    def write(self, path: Path, inputs: Any) -> None:
        """Write the weights or the program.

        Args:
            path: The file.
            inputs: A batch to record the program with.

        Raises:
            ExportError: The format cannot hold this model after all.
        """

    @abstractmethod
    def job(self) -> Mapping[str, Any]:
        """Return what :mod:`transfer.deployment.verify_export` must know to load it; JSON alone."""

    @abstractmethod
    def usage(self, file: str) -> str:
        """Return the Python code that loads it, for the model card."""


class Safetensors(Format):
    """The model folder of this package: weights under the stages' names, and what describes the model beside them."""

    file = "weights.safetensors"
    library = "transfer"

    def write(self, path: Path, inputs: Any) -> None:
        """Write the weights."""
        _save(self.loaded.model.state_dict(), path)

    def job(self) -> Mapping[str, Any]:
        """Nothing but which loader."""
        return {"loader": "own"}

    def usage(self, file: str) -> str:
        """Predict with this package."""
        return 'import transfer\n\nfor answer in transfer.predict("THIS FOLDER", ["AN INPUT"]):\n    print(answer)'


class Foreign(Format):
    """A state dict for another library's network.

    Args:
        loaded: The trained model.
        network: The network that its backbone names.
    """

    file = "model.safetensors"
    suffixes = (".safetensors", ".pth", ".pt")

    def __init__(self, loaded: LoadedModel, network: ForeignModel) -> None:
        super().__init__(loaded)
        self.network = network
        self.library = network.factory.partition(".")[0]
        head = loaded.model.stages["head"]
        self.output = head.as_linear()  # type: ignore[operator]
        if self.output is None:
            raise ExportError(
                f"head {type(head).__name__} is more than one linear layer, and {network.factory.replace(':', '.')} "
                "ends in one",
                available=tuple(FORMATS),
                fix="choose a format that takes any head, or train with head: {name: linear}",
            )

    def write(self, path: Path, inputs: Any) -> None:
        """Write the state dict, as a pickle only where the name of the file asks for one."""
        backbone, head = self.loaded.backbone, f"{self.network.output}."
        weights = {self.network.names[name]: value for name, value in backbone.state_dict().items()}
        weights |= {f"{head}{name}": value for name, value in self.output.state_dict().items()}
        if path.suffix == ".safetensors":
            _save(weights, path)
        else:
            torch.save({name: value.cpu() for name, value in weights.items()}, path)

    def job(self) -> Mapping[str, Any]:
        """Name the function that builds the network."""
        return {"loader": "foreign", "factory": self.network.factory, "options": dict(self.network.options)}

    def usage(self, file: str) -> str:
        """Build the network and load the state dict."""
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
    """A program that ``torch.export`` recorded, which runs without this package; any batch size."""

    file = "model.pt2"
    suffixes = (".pt2",)
    library = "torch"

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        if not hasattr(torch.export.Dim, "AUTO"):
            raise ExportError(
                f"torch {torch.__version__} cannot record a program whose sizes are found out while recording",
                fix="update torch to 2.6 or later",
            )

    def write(self, path: Path, inputs: Any) -> None:
        """Record the model on a batch, and write the program."""
        model = self.loaded.model
        with _recording("torch.export"), torch.no_grad():
            program = torch.export.export(model, (inputs,), dynamic_shapes=(self._sizes(inputs),), strict=False)
        self._refuse_fixed_length(program)
        torch.export.save(program, path)

    def _sizes(self, inputs: Any) -> Any:
        """Say which sizes may vary: that of the batch, and any size where examples have lengths."""
        if isinstance(inputs, tuple):
            return tuple(self._sizes(tensor) for tensor in inputs)
        count = inputs.dim() if _has_lengths(self.loaded.backbone.preprocessing) else 1
        return dict.fromkeys(range(count), torch.export.Dim.AUTO)

    def _refuse_fixed_length(self, program: Any) -> None:
        # torch fixes a size without a word where the model's own code depends on it.
        names = set(program.graph_signature.user_inputs)
        shapes = [
            node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in names
        ]
        if any(_is_fixed(shape[0]) for shape in shapes):
            raise ExportError("the program would take one batch size alone: a stage depends on it", fix=_OTHERS)
        if _has_lengths(self.loaded.backbone.preprocessing) and all(
            _is_fixed(size) for shape in shapes for size in shape[1:]
        ):
            raise ExportError(
                f"the program would take inputs of one length alone, {', '.join(map(str, shapes[0][1:]))}: "
                "torch.export fixes the number of steps of a recurrent layer",
                fix=_OTHERS,
            )

    def job(self) -> Mapping[str, Any]:
        """Nothing but which loader."""
        return {"loader": "torch_export"}

    def usage(self, file: str) -> str:
        """Load the program."""
        return f'import torch\n\nmodel = torch.export.load("{file}").module()'


class Onnx(TorchExport):
    """An ONNX graph; any batch size, and any length where examples have lengths."""

    file = "model.onnx"
    suffixes = (".onnx",)
    library = "onnx"

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
            torch.onnx.export(
                model,
                (inputs,),
                str(path),
                input_names=input_names(inputs),
                output_names=["outputs"],
                dynamic_shapes=(self._sizes(inputs),),
                dynamo=True,
                external_data=size > ONE_FILE_BYTES,
                verbose=False,
            )

    def job(self) -> Mapping[str, Any]:
        """Nothing but which loader."""
        return {"loader": "onnx"}

    def usage(self, file: str) -> str:
        """Load the graph into onnxruntime."""
        return f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{file}")'


FORMATS: Mapping[str, type[Safetensors] | type[TorchExport]] = {
    "safetensors": Safetensors,
    "torch_export": TorchExport,
    "onnx": Onnx,
}
"""The formats that any model may take; a backbone may name more of its own."""
_OTHERS = "choose another format: onnx keeps recurrent layers whole, safetensors takes any model"


def find_format(name: str, loaded: LoadedModel) -> Format:
    """Return a format by its name, for a model.

    Raises:
        ExportError: There is none of that name for this backbone, or it cannot hold this model.
    """
    if name in FORMATS:
        return FORMATS[name](loaded)
    networks = loaded.backbone.foreign_models(loaded.task.out_features)
    if name in networks:
        return Foreign(loaded, networks[name])
    known = (*FORMATS, *networks)
    close = nearest(name, known)
    raise ExportError(
        f"backbone {type(loaded.backbone).__name__} cannot be exported as {name!r}",
        available=known,
        fix=f"did you mean {close!r}?" if close else None,
    )


def input_names(inputs: Any) -> list[str]:
    """Return what an exported graph calls its inputs."""
    return [f"input_{place}" for place in range(len(inputs))] if isinstance(inputs, tuple) else ["inputs"]


def _has_lengths(preprocessing: Preprocessing) -> bool:
    return type(preprocessing).length is not Preprocessing.length


def _is_fixed(size: object) -> bool:
    # A size that was found to be a constant may still be a symbol, which then reads as a number.
    return str(size).isdecimal()


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)


@contextmanager
def _recording(what: str) -> Iterator[None]:
    """Keep the recorder's own warnings from the user, and say which of the two could not record."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ExportError:
        raise
    # What a model does that cannot be recorded raises anything: errors of dynamo, of symbolic shapes, of onnxscript.
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise ExportError(f"{what} cannot record this model: {reason}", fix=_OTHERS) from error
