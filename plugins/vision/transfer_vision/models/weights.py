"""Pretrained weights: which there are, where they lie, what is in them, and what of it a backbone takes."""

from __future__ import annotations

import difflib
import hashlib
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.torch_version import TorchVersion
from torchvision.models import WeightsEnum, get_model_weights
from torchvision.models.vision_transformer import interpolate_embeddings

from transfer import (
    ConfigError,
    DataError,
    SavedBackbone,
    WeightsError,
    data_folder,
    download,
    find_file,
    saved_backbone,
)
from transfer_vision.models.architectures import AUXILIARY, Layout, adapt_input_weight, build, model_names

FILE_SUFFIXES = (".safetensors", ".pth", ".pt")
KNOWN_PICKLES = frozenset(
    (
        "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",  # resnet18-f37072fd.pth
        "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f",  # resnet34-b627a593.pth
        "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",  # resnet50-0676ba61.pth
    )
)
"""SHA-256 of published files, whole: the eight digits in a file's name can be met by trial and error."""
_COUNTER = "num_batches_tracked"
_POSITIONS = "encoder.pos_embedding"
_LISTED = 6
_STATE_DICT = "save the model's state_dict() alone"
_BUFFERS = 10**6
_CLASSIFIERS = 10**7
"""No model has more numbers than this in buffers, and in its classifiers."""
# Names of before torch 0.4 and torchvision 0.13, which published files still have.
_OLD_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)


# ------------------------------------------------------------------------------------------------------- which weights


def is_file(weights: str) -> bool:
    """Tell whether ``weights`` names a file."""
    return weights.endswith(FILE_SUFFIXES)


def is_run(weights: str) -> bool:
    """Tell whether ``weights`` names an earlier run: a folder, or what looks like the path of one."""
    return not is_file(weights) and ("/" in weights or Path(weights).is_dir())


def published(weights: str | None, architecture: str) -> WeightsEnum | None:
    """Return torchvision's weights of that name, or None where ``weights`` names none of them; nothing is read.

    Args:
        weights: ``DEFAULT`` (or ``imagenet``), another name that torchvision gives them, a file, a run or None.
        architecture: Torchvision's name of the model.

    Raises:
        transfer.ConfigError: It is neither a name of weights for this architecture nor a file nor a run.
    """
    if weights is None or is_file(weights) or is_run(weights):
        return None
    # Weights without classes are those of a part of the network, for detection.
    members = {member.name: member for member in get_model_weights(architecture) if member.meta["categories"]}
    names = {"DEFAULT": default_weights(architecture), "imagenet": default_weights(architecture), **members}
    if weights not in names:
        close = difflib.get_close_matches(weights, names, n=1)
        raise ConfigError(
            f"{architecture} has no weights called {weights!r}",
            available=[*names, "null", *(f"FILE{suffix}" for suffix in FILE_SUFFIXES), "runs/NAME"],
            fix=f"did you mean {close[0]!r}?" if close else "name a file, or null to train from scratch",
        )
    return names[weights]


def default_weights(architecture: str) -> WeightsEnum:
    """Return the weights that torchvision holds for the best of a model."""
    return get_model_weights(architecture).DEFAULT


# ------------------------------------------------------------------------------------------------------ where they lie


def find_weights(weights: str, architecture: str) -> Path:
    """Return the file of weights, downloading published ones that are not there.

    Published ones are looked for in the data folder, its ``weights`` folder and torch.hub's checkpoints; files, at
    their path and then below the data folder.

    Raises:
        transfer.WeightsError: The file is missing and cannot be downloaded, or is not the published one.
    """
    member = published(weights, architecture)
    if member is None:
        return _find_local(weights)
    name = member.url.rsplit("/", 1)[1]
    prefix = _promised(member)
    hub = Path(torch.hub.get_dir()) / "checkpoints" / name
    path = find_file(name, f"weights/{name}") or (hub if hub.exists() else None)
    if path is None:
        try:
            return download(member.url, f"weights/{name}", sha256=prefix)
        except DataError as error:
            problem = error.problems[0]
            raise WeightsError(problem.message, fix=problem.fix) from error
    digest = sha256(path)
    if not digest.startswith(prefix):
        raise WeightsError(
            f"this file is not the published one: its SHA-256 is {digest[:16]}..., and its name promises {prefix}...",
            where=str(path),
            fix="remove it, and it is downloaded again",
        )
    return path


def _promised(member: WeightsEnum) -> str:
    """Return the beginning of the SHA-256 of published weights, in which torchvision lets their file's name end."""
    return str(Path(member.url).stem.rsplit("-", 1)[1])


def _find_local(weights: str) -> Path:
    path = Path(weights).expanduser()
    found = path if path.is_file() else find_file(weights)
    if found is None or not found.is_file():
        folders = [folder for folder in (path.parent, data_folder() / path.parent) if folder.is_dir()]
        raise WeightsError(
            f"there is no file of weights {weights}",
            available=sorted({str(p) for folder in folders for p in folder.iterdir() if p.suffix in FILE_SUFFIXES}),
            fix=f"give a path from the working folder or from {data_folder()}",
        )
    return found


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------- what is in a file


@dataclass(frozen=True)
class Pretrained:
    """Tensors that were read.

    Args:
        tensors: By name.
        source: The file.
        sha256: Of that file.
        left_out: Names of tensors that were not even looked at (the head of a run).
    """

    tensors: Mapping[str, Tensor]
    source: Path
    sha256: str
    left_out: tuple[str, ...] = ()


def read_pretrained(weights: str, architecture: str, names: Mapping[str, str]) -> Pretrained:
    """Read what ``weights`` names, under torchvision's names.

    Args:
        weights: Published weights, a file or a run.
        architecture: Torchvision's name of the model.
        names: Torchvision's name of each tensor by the backbone's own, which a run has.

    Raises:
        transfer.WeightsError: It is missing, damaged, or no run of such a backbone.
    """
    if not is_run(weights):
        path = find_weights(weights, architecture)
        return Pretrained(read_weights(path), path, sha256(path))
    saved = saved_backbone(weights)
    tensors, head = saved.tensors()
    if not names.keys() & tensors.keys():
        raise of_another_backbone(saved, architecture)
    return Pretrained({names.get(k, k): v for k, v in tensors.items()}, saved.file, saved.sha256(), tuple(head))


def architecture_of(saved: SavedBackbone) -> str | None:
    """Return torchvision's name of a run's backbone, or that backbone's own name where it is none of torchvision's."""
    name: str | None = saved.options.get("model", saved.options.get("name"))
    return name


def of_another_backbone(saved: SavedBackbone, architecture: str) -> WeightsError:
    """Return the error that a run's backbone is not this one."""
    return WeightsError(
        f"this run's backbone is {architecture_of(saved)!r}, of which {architecture} can take nothing",
        where=str(saved.folder),
        fix=f"name a run of {architecture}",
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pth`` or ``.pt`` file, by name, on the CPU.

    Raises:
        transfer.WeightsError: It is damaged, holds anything but tensors, or is a pickle that this version of torch
            cannot be trusted to read.
    """
    try:
        if path.suffix == ".safetensors":
            content: object = load_file(path)
        else:
            _refuse_unsafe_pickle(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    # safetensors raises its own error; torch.load UnpicklingError, RuntimeError, KeyError ..., as the damage has it.
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
            raise WeightsError(
                "this file holds more than tensors: a whole model, or code", where=str(path), fix=_STATE_DICT
            ) from error
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise WeightsError(f"these weights cannot be read: {reason}", where=str(path)) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(
            f"this file holds more than tensors by name: {keys[:200]}",
            where=str(path),
            fix=_STATE_DICT,
        )
    return dict(content)


def _refuse_unsafe_pickle(path: Path) -> None:
    # weights_only=True could be broken out of before torch 2.10 (CVE-2025-32434, CVE-2026-24747).
    if TorchVersion(torch.__version__) >= "2.10":
        return
    if sha256(path) in KNOWN_PICKLES:
        return
    raise WeightsError(
        f"torch {torch.__version__} cannot read a pickle of unknown origin safely",
        where=str(path),
        fix="update torch to 2.10 or later, or convert the file to .safetensors where you have such a torch",
    )


# ----------------------------------------------------------------------------------------------- what a backbone takes


@dataclass(frozen=True)
class Fitted:
    """What a backbone takes of pretrained weights.

    Args:
        tensors: By torchvision's names.
        found: How many of them were in the file.
        left_out: Names of those that it does not take: the classifiers.
        adapted: What was changed to fit, by name.
    """

    tensors: dict[str, Tensor]
    found: int
    left_out: list[str]
    adapted: dict[str, str]


def fit_weights(read: Pretrained, expected: Mapping[str, Tensor], layout: Layout) -> Fitted:
    """Choose the tensors that a backbone takes: all but the classifiers'.

    The first convolution is adapted to another number of channels, and the positions of a vision transformer to
    another size of picture.

    Args:
        read: By torchvision's names.
        expected: The backbone's own tensors, by the same names.
        layout: Of the backbone.

    Raises:
        transfer.WeightsError: Tensors are missing, unknown, of another shape or not finite.
    """
    classifiers = (f"{layout.classifier}.", *AUXILIARY)
    given = {_modern(name): tensor for name, tensor in read.tensors.items()}
    left_out = [name for name in given if name.startswith(classifiers)]
    given = {name: tensor for name, tensor in given.items() if name not in left_out}
    adapted = _adapt(given, expected, f"{layout.input_layer}.weight")
    # Files of before torch 0.4.1 lack these counters, and nothing reads them as long as momentum is a number.
    counters = {name: torch.zeros_like(value) for name, value in expected.items() if name.endswith(_COUNTER)}
    found = len(given)
    given = counters | given
    shared = expected.keys() & given.keys()
    complaints = {
        "missing": [name for name in expected if name not in shared],
        "unknown": [name for name in given if name not in shared and not name.endswith(_COUNTER)],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} for {tuple(expected[name].shape)}"
            for name in expected
            if name in shared and given[name].shape != expected[name].shape
        ],
        "not finite": [name for name in expected if name in shared and not given[name].isfinite().all()],
    }
    if any(complaints.values()):
        fits = _fitting_architecture(given)
        fix = f"use weights of torchvision's {layout.model}, under torchvision's names"
        if fits not in (None, layout.model):
            fix = f"they are weights of {fits}: use that model, or weights of {layout.model}"
        first = given.get(name := f"{layout.input_layer}.weight")
        if first is not None and first.dim() == 4 and first.shape[1] != expected[name].shape[1]:
            fix = f"set in_channels: {first.shape[1]}, which they are for"
        raise WeightsError(
            f"these weights do not fit {layout.model}: "
            + "; ".join(f"{what}: {_some(names)}" for what, names in complaints.items() if names),
            where=str(read.source),
            fix=fix,
        )
    return Fitted({name: given[name] for name in expected}, found, sorted([*left_out, *read.left_out]), adapted)


def _modern(name: str) -> str:
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _adapt(given: dict[str, Tensor], expected: Mapping[str, Tensor], first: str) -> dict[str, str]:
    """Change what may differ so that it fits, in place, and say what was done."""
    adapted = {}
    if first in given and given[first].dim() == 4:
        had, channels = given[first].shape[1], expected[first].shape[1]
        if had == 3 != channels:
            given[first] = adapt_input_weight(given[first], channels)
            adapted[first] = f"from 3 to {channels} channels"
    if _POSITIONS in given and _POSITIONS in expected:
        had, count = (tensors[_POSITIONS].shape[1] - 1 for tensors in (given, expected))
        if had != count and math.isqrt(had) ** 2 == had:
            side = math.isqrt(count)
            interpolate_embeddings(side, 1, given)  # as if a patch were one pixel
            adapted[_POSITIONS] = f"from {math.isqrt(had)} x {math.isqrt(had)} to {side} x {side} patches"
    return adapted


def _fitting_architecture(given: Mapping[str, Tensor]) -> str | None:
    """Return the one of torchvision's models that has tensors of just these names and shapes."""
    shapes = {name: tensor.shape for name, tensor in given.items() if not name.endswith(_COUNTER)}
    count = sum(shape.numel() for shape in shapes.values())
    for name in model_names():
        default = default_weights(name)
        if not 0 <= default.meta["num_params"] - count + _BUFFERS <= _CLASSIFIERS:
            continue
        with torch.device("meta"):
            model = build(name, image_size=default.transforms().crop_size[0])
        own = {
            model.layout.names[f"{stage}.{key}"]: tensor.shape
            for stage, module in model.stages.items()
            for key, tensor in module.state_dict().items()
            if not key.endswith(_COUNTER)
        }
        if own == shapes:
            return name
    return None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
