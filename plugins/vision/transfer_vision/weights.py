"""Pretrained weights in torchvision's layout: which there are, where they lie, what is in them."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.torch_version import TorchVersion
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models

from transfer import ConfigError, DataError, WeightsError, data_folder, download, find_file

FILE_SUFFIXES = (".safetensors", ".pth", ".pt")
PREFIX_DIGITS = 8  # torchvision's file names end in this much of their SHA-256
_FAMILY = ("resnet*", "resnext*", "wide_resnet*")
_COUNTER = "num_batches_tracked"
_LISTED = 6


def published(weights: str | None, architecture: str) -> WeightsEnum | None:
    """Return torchvision's weights of that name, or None where ``weights`` is None or a file; nothing is read.

    Args:
        weights: ``imagenet`` (torchvision's default), a name that torchvision gives them, or a file.
        architecture: Torchvision's name of the model.

    Raises:
        transfer.ConfigError: It is neither a name of weights for this architecture nor a file of weights.
    """
    if weights is None or weights.endswith(FILE_SUFFIXES):
        return None
    members = get_model_weights(architecture)
    names = {"imagenet": "DEFAULT", "DEFAULT": "DEFAULT"} | {member.name: member.name for member in members}
    if weights not in names:
        close = difflib.get_close_matches(weights, names, n=1)
        raise ConfigError(
            f"{architecture} has no weights called {weights!r}",
            available=[*names, "null", *(f"FILE{suffix}" for suffix in FILE_SUFFIXES)],
            fix=f"did you mean {close[0]!r}?" if close else "name a file, or null to train from scratch",
        )
    return members[names[weights]]


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
    hub = Path(torch.hub.get_dir()) / "checkpoints" / name
    path = find_file(name, f"weights/{name}") or (hub if hub.exists() else None)
    if path is None:
        try:
            path = download(member.url, f"weights/{name}")
        except DataError as error:
            problem = error.problems[0]
            raise WeightsError(problem.message, fix=problem.fix) from error
    prefix = Path(name).stem.rsplit("-", 1)[1]
    digest = sha256(path)
    if not digest.startswith(prefix):
        raise WeightsError(
            f"this file is not the published one: its SHA-256 is {digest[:16]}..., and its name promises {prefix}...",
            where=str(path),
            fix="remove it, and it is downloaded again",
        )
    return path


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
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise WeightsError(f"these weights cannot be read: {reason}", where=str(path)) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(
            f"this file holds more than tensors by name: {keys[:200]}",
            where=str(path),
            fix="save the model's state_dict() alone",
        )
    return dict(content)


def _refuse_unsafe_pickle(path: Path) -> None:
    # weights_only=True could be broken out of before torch 2.10 (CVE-2025-32434, CVE-2026-24747).
    if TorchVersion(torch.__version__) >= "2.10":
        return
    digest = sha256(path)
    published_files = (member.url for name in list_models(include=_FAMILY) for member in get_model_weights(name))
    if any(digest.startswith(Path(url).stem.rsplit("-", 1)[1]) for url in published_files):
        return
    raise WeightsError(
        f"torch {torch.__version__} cannot read a pickle of unknown origin safely",
        where=str(path),
        fix="update torch to 2.10 or later, or convert the file to .safetensors",
    )


def fit_weights(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, classifier: str, architecture: str, where: Path
) -> dict[str, Tensor]:
    """Return the tensors of a file that a backbone takes: all but the classifier's.

    Args:
        tensors: What the file holds, by torchvision's names.
        expected: The backbone's own tensors, by the same names.
        classifier: The name of torchvision's final layer, whose width may be any.
        architecture: Torchvision's name of the model.
        where: The file, for messages.

    Raises:
        transfer.WeightsError: Tensors are missing, unknown, of another shape or not finite.
    """
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{classifier}.")}
    # Files of before torch 0.4.1 lack these counters, and nothing reads them as long as momentum is a number.
    counters = {name: torch.zeros_like(value) for name, value in expected.items() if name.endswith(_COUNTER)}
    given = counters | given
    shared = expected.keys() & given.keys()
    wrong = [
        f"{name} {tuple(given[name].shape)} for {tuple(expected[name].shape)}"
        for name in expected
        if name in shared and given[name].shape != expected[name].shape
    ]
    complaints = {
        "missing": [name for name in expected if name not in shared],
        "unknown": [name for name in given if name not in shared and not name.endswith(_COUNTER)],
        "of another shape": wrong,
        "not finite": [name for name in expected if name in shared and not given[name].isfinite().all()],
    }
    if any(complaints.values()):
        fits = _fitting_architecture(given, classifier)
        raise WeightsError(
            f"these weights do not fit {architecture}: "
            + "; ".join(f"{what}: {_some(names)}" for what, names in complaints.items() if names),
            where=str(where),
            fix=f"they are weights of {fits}: use that backbone, or weights of {architecture}"
            if fits not in (None, architecture)
            else f"use weights of torchvision's {architecture}, under torchvision's names",
        )
    return given


def _fitting_architecture(tensors: Mapping[str, Tensor], classifier: str) -> str | None:
    shapes = {name: tensor.shape for name, tensor in tensors.items() if not name.endswith(_COUNTER)}
    for architecture in list_models(include=_FAMILY):
        with torch.device("meta"):
            model = get_model(architecture, weights=None)
        if shapes == {
            name: tensor.shape
            for name, tensor in model.state_dict().items()
            if not name.startswith(f"{classifier}.") and not name.endswith(_COUNTER)
        }:
            return str(architecture)
    return None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
