"""Pretrained weights: finding the file, reading its tensors, and fitting them to a backbone."""

from __future__ import annotations

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
    DataError,
    SavedBackbone,
    WeightsError,
    data_folder,
    download,
    find_file,
    saved_backbone,
)
from transfer_vision.models.architectures import AUXILIARY, Layout, adapt_input_weight, build, model_names
from transfer_vision.suggestions import unknown_name

FILE_SUFFIXES = (".safetensors", ".pth", ".pt")
KNOWN_PICKLES = frozenset(
    (
        "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",  # resnet18-f37072fd.pth
        "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f",  # resnet34-b627a593.pth
        "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",  # resnet50-0676ba61.pth
    )
)
"""Complete SHA-256 of published files: the eight digits in a file's name can be matched by trial and error."""
_COUNTER = "num_batches_tracked"
_POSITIONS = "encoder.pos_embedding"
_LISTED = 6
_STATE_DICT = "save only the model's state_dict()"
_BUFFERS = 10**6
_CLASSIFIERS = 10**7
"""Upper bounds for the number of values in buffers, and in classifiers, of any model."""
# Names from before torch 0.4 and torchvision 0.13 that published files still contain.
_OLD_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)


# ------------------------------------------------------------------------------------------------- names of weights


def is_file(weights: str) -> bool:
    """Return whether ``weights`` names a file."""
    return weights.endswith(FILE_SUFFIXES)


def is_run(weights: str) -> bool:
    """Return whether ``weights`` names an earlier run: a folder, or a string with the form of a path."""
    return not is_file(weights) and ("/" in weights or Path(weights).is_dir())


def published(weights: str | None, architecture: str) -> WeightsEnum | None:
    """Return torchvision's weights of that name, or None if ``weights`` is a file, a run or None; nothing is read.

    Args:
        weights: ``DEFAULT`` (or ``imagenet``), another name of torchvision's weights, a file, a run or None.
        architecture: Torchvision's name of the model.

    Raises:
        transfer.ConfigError: ``weights`` is neither weights for this architecture nor a file nor a run.
    """
    if weights is None or is_file(weights) or is_run(weights):
        return None
    # Weights without classes are for the backbone of a detection model.
    members = {member.name: member for member in get_model_weights(architecture) if member.meta["categories"]}
    names = {"DEFAULT": default_weights(architecture), "imagenet": default_weights(architecture), **members}
    if weights not in names:
        raise unknown_name(
            f"{architecture} has no weights called {weights!r}",
            weights,
            list(names),
            "name a file, or null to train from scratch",
            available=[*names, "null", *(f"FILE{suffix}" for suffix in FILE_SUFFIXES), "runs/NAME"],
        )
    return names[weights]


def default_weights(architecture: str) -> WeightsEnum:
    """Return the weights of a model that torchvision recommends."""
    return get_model_weights(architecture).DEFAULT


# ------------------------------------------------------------------------------------------------- finding the file


def find_weights(weights: str, architecture: str) -> Path:
    """Return the file of weights, and download published weights if they are missing.

    Published weights are searched in the data folder, its ``weights`` folder and torch.hub's checkpoints. Files are
    searched at their path and then below the data folder.

    Raises:
        transfer.WeightsError: The file is missing and cannot be downloaded, or differs from the published one.
    """
    member = published(weights, architecture)
    if member is None:
        return find_local(weights)
    name = member.url.rsplit("/", 1)[1]
    prefix = _sha256_prefix(member)
    hub = Path(torch.hub.get_dir()) / "checkpoints" / name
    path = find_file(name, f"weights/{name}") or (hub if hub.exists() else None)
    if path is None:
        try:
            return download(member.url, f"weights/{name}", sha256=prefix)
        except DataError as error:
            problem = error.problems[0]
            raise WeightsError(problem.message, fix=problem.fix) from error
    # A file in the data folder may be an interrupted download or other weights of the same name.
    digest = sha256(path)
    if not digest.startswith(prefix):
        raise WeightsError(
            f"this file is not the published one: expected a SHA-256 that starts with {prefix}, got {digest[:16]}...",
            where=str(path),
            fix="remove it; it is then downloaded again",
        )
    return path


def _sha256_prefix(member: WeightsEnum) -> str:
    """Return the prefix of the SHA-256 of published weights, which is the last part of the file's name."""
    return str(Path(member.url).stem.rsplit("-", 1)[1])


def find_local(weights: str) -> Path:
    """Return the file of weights in the working folder or the data folder.

    Raises:
        transfer.WeightsError: There is no such file.
    """
    path = Path(weights).expanduser()
    file = path if path.is_file() else find_file(weights)
    if file is None or not file.is_file():
        folders = [folder for folder in (path.parent, data_folder() / path.parent) if folder.is_dir()]
        raise WeightsError(
            f"there is no file of weights {weights}",
            available=sorted({str(p) for folder in folders for p in folder.iterdir() if p.suffix in FILE_SUFFIXES}),
            fix=f"give a path from the working folder or from {data_folder()}",
        )
    return file


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------- reading the tensors


@dataclass(frozen=True)
class Pretrained:
    """Tensors that were read from a file.

    Args:
        tensors: Tensors by torchvision's names.
        source: Path of the file.
        sha256: SHA-256 of the file.
        left_out: Names of tensors that were not read: those of the head of a run.
    """

    tensors: Mapping[str, Tensor]
    source: Path
    sha256: str
    left_out: tuple[str, ...] = ()


def read_pretrained(weights: str, architecture: str, names: Mapping[str, str]) -> Pretrained:
    """Read the tensors that ``weights`` names, under torchvision's names.

    Args:
        weights: Name of published weights, a file or a run.
        architecture: Torchvision's name of the model.
        names: Torchvision's name of each tensor by the backbone's name, which the files of a run contain.

    Raises:
        transfer.WeightsError: The weights are missing or damaged, or belong to another backbone.
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
    """Return torchvision's name of a run's backbone, or the backbone's own name for any other backbone."""
    name: str | None = saved.options.get("model", saved.options.get("name"))
    return name


def of_another_backbone(saved: SavedBackbone, architecture: str) -> WeightsError:
    """Return the error for a run of another backbone."""
    return WeightsError(
        f"wrong backbone in this run: expected {architecture!r}, got {architecture_of(saved)!r}",
        where=str(saved.folder),
        fix=f"name a run of {architecture}",
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pth`` or ``.pt`` file, by name, on the CPU.

    Raises:
        transfer.WeightsError: The file is damaged, contains other objects than tensors, or is a pickle that this
            version of torch cannot read safely.
    """
    try:
        if path.suffix == ".safetensors":
            content: object = load_file(path)
        else:
            _refuse_unsafe_pickle(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    # The exceptions are safetensors' own, and UnpicklingError, RuntimeError, KeyError ... of torch.load.
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
            raise WeightsError(
                "this file contains more than tensors: a complete model, or code", where=str(path), fix=_STATE_DICT
            ) from error
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise WeightsError(f"these weights cannot be read: {reason}", where=str(path)) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(
            f"this file contains more than tensors by name: {keys[:200]}",
            where=str(path),
            fix=_STATE_DICT,
        )
    return dict(content)


def _refuse_unsafe_pickle(path: Path) -> None:
    # weights_only=True was not safe before torch 2.10 (CVE-2025-32434, CVE-2026-24747).
    if TorchVersion(torch.__version__) >= "2.10":
        return
    if sha256(path) in KNOWN_PICKLES:
        return
    raise WeightsError(
        f"torch {torch.__version__} cannot read a pickle of unknown origin safely",
        where=str(path),
        fix="update torch to 2.10 or later, or convert the file to .safetensors with such a torch",
    )


# --------------------------------------------------------------------------------------------- fitting the tensors


@dataclass(frozen=True)
class Fitted:
    """Pretrained tensors that fit a backbone.

    Args:
        tensors: Tensors by torchvision's names.
        loaded: Number of these tensors that the file contained.
        left_out: Names of the classifier tensors that the backbone does not use.
        adapted: Description of the change by the name of each tensor that was changed to fit.
    """

    tensors: dict[str, Tensor]
    loaded: int
    left_out: list[str]
    adapted: dict[str, str]


def fit_weights(read: Pretrained, expected: Mapping[str, Tensor], layout: Layout) -> Fitted:
    """Fit pretrained tensors to a backbone. Every tensor is either used, or belongs to a classifier, or is an error.

    The first convolution is adapted to another number of channels, and the positions of a vision transformer to another
    image size.

    Args:
        read: Tensors by torchvision's names.
        expected: Tensors of the backbone, by torchvision's names.
        layout: Correspondence between the names of the backbone and torchvision's.

    Raises:
        transfer.WeightsError: Tensors are missing, unknown, not finite or of another shape.
    """
    classifiers = (f"{layout.classifier}.", *AUXILIARY)
    given = {_modern(name): tensor for name, tensor in read.tensors.items()}
    # The head replaces the classifier, whatever its number of classes.
    left_out = [name for name in given if name.startswith(classifiers)]
    given = {name: tensor for name, tensor in given.items() if name not in left_out}
    adapted = _adapt(given, expected, f"{layout.input_layer}.weight")
    # Files from before torch 0.4.1 lack these counters, which are unused unless momentum is None.
    counters = {name: torch.zeros_like(value) for name, value in expected.items() if name.endswith(_COUNTER)}
    loaded = len(given)
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
        if prefix := _common_prefix(given, expected):
            fix = f"remove the prefix {prefix!r} from their names"
        if any(name.startswith("head.") for name in given):
            fix = "these are the weights of a saved model: name its run instead of the file (weights: runs/NAME)"
        if fits not in (None, layout.model):
            fix = f"they are weights of {fits}: use that model, or weights of {layout.model}"
        first = given.get(name := f"{layout.input_layer}.weight")
        if first is not None and first.dim() == 4 and first.shape[1] != expected[name].shape[1]:
            fix = f"set in_channels: {first.shape[1]}, the number of channels in the file"
        raise WeightsError(
            f"these weights do not fit {layout.model}: "
            + "; ".join(f"{kind}: {_abbreviated(names)}" for kind, names in complaints.items() if names),
            where=str(read.source),
            fix=fix,
        )
    return Fitted({name: given[name] for name in expected}, loaded, sorted([*left_out, *read.left_out]), adapted)


def _modern(name: str) -> str:
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _adapt(given: dict[str, Tensor], expected: Mapping[str, Tensor], first: str) -> dict[str, str]:
    """Adapt tensors in place to another number of channels or patches, and return a description of each change."""
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
            interpolate_embeddings(side, 1, given)  # the number of patches is all that counts: one pixel each
            adapted[_POSITIONS] = f"from {math.isqrt(had)} x {math.isqrt(had)} to {side} x {side} patches"
    return adapted


def _fitting_architecture(given: Mapping[str, Tensor]) -> str | None:
    """Return the torchvision model that has exactly tensors of these names and shapes, or None."""
    shapes = {name: tensor.shape for name, tensor in given.items() if not name.endswith(_COUNTER)}
    count = sum(shape.numel() for shape in shapes.values())
    for name in model_names():
        default = default_weights(name)
        # Skip models whose size is too different, because building them takes time.
        if not 0 <= default.meta["num_params"] - count + _BUFFERS <= _CLASSIFIERS:
            continue
        with torch.device("meta"):
            model = build(name, image_size=default.transforms().crop_size[0])
        expected = {
            model.layout.names[f"{stage}.{key}"]: tensor.shape
            for stage, module in model.stages.items()
            for key, tensor in module.state_dict().items()
            if not key.endswith(_COUNTER)
        }
        if expected == shapes:
            return name
    return None


def _abbreviated(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _common_prefix(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Return the prefix with which all expected names are in the file (``module.``), or None."""
    names = [name for name in expected if not name.endswith(_COUNTER)]
    prefixes = (name.removesuffix(names[0]) for name in given if name.endswith(f".{names[0]}"))
    return next((prefix for prefix in prefixes if all(f"{prefix}{name}" in given for name in names)), None)
