"""Taking a trained model elsewhere: written beside its place, reloaded in a fresh process, then moved into place."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from transfer.config.check import load_config
from transfer.data.encoding import encode
from transfer.deployment import verify_export
from transfer.deployment.formats import FORMATS, Foreign, Format, Safetensors, find_format, input_names
from transfer.deployment.model_card import render
from transfer.errors import ExportError, UserError, damaged
from transfer.interfaces import Preprocessing
from transfer.models.model_json import DESCRIPTION
from transfer.models.saved_model import LoadedModel, read_model
from transfer.registry.entry_points import IN_PROCESS
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import read_json, write_atomically
from transfer.system.downloads import no_downloads
from transfer.training.build import read_data

COMPARED_EXAMPLES = 32
LARGEST_DEVIATION = 1e-4
"""Times the largest output, or 1: what another program's order of additions may change, and a wrong layer may not."""
CARD = "README.md"


@dataclass(frozen=True)
class Export:
    """What was exported, or would be.

    Args:
        path: The folder or file.
        format: Its name.
        files: The names of the files in the folder, or of the lone file.
        examples: What the exported model was compared on.
        deviation: The largest absolute difference of an output from the run's own; None for a dry run.
        outputs: How many outputs were compared.
        modules: What the fresh process had imported.
    """

    path: Path
    format: str
    files: Sequence[str]
    examples: str = "nothing yet"
    deviation: float | None = None
    outputs: int = 0
    modules: frozenset[str] = field(default=frozenset(), repr=False)


@dataclass(frozen=True)
class Examples:
    """What an exported model is compared on.

    Args:
        batches: Inputs of the model: all examples together, and the shortest alone.
        what: Where they come from.
    """

    batches: Sequence[Any]
    what: str


def export(
    run: str | Path, format: str, output: str | Path | None = None, *, force: bool = False, dry_run: bool = False
) -> Export:
    """Write a run's model in another format, once a fresh process has given the run's own outputs with it.

    Args:
        run: A run directory; nothing else is needed.
        format: ``safetensors``, ``torch_export``, ``onnx``, or one that the backbone knows (``torchvision``).
        output: A folder; or a file, where its name ends as the format's files do. By default ``RUN/export/FORMAT``.
        force: Replace what an earlier export wrote there.
        dry_run: Only say what would be written.

    Raises:
        UserError: The run is not right, the model does not fit the format, or there is something in the way.
        ExportError: What was exported does not give the run's outputs; nothing is left of it.
    """
    directory = RunDirectory.open(run)
    if output is None:
        directory.refuse_links()
    loaded = read_model(directory.model)
    chosen = find_format(format, loaded)
    described = read_json(directory.model / DESCRIPTION, "there is no model here")
    _refuse_unfindable(chosen, described)
    path = directory.path / "export" / format if output is None else Path(output).expanduser()
    alone = _is_file(chosen, format, path)
    _refuse_existing(path, force, alone=alone)
    files = [path.name] if alone else [chosen.file, DESCRIPTION, *described["assets"], CARD]
    if dry_run:
        return Export(path, format, files)
    examples = _examples(directory, loaded)
    with _beside(path) as temporary:
        weights = temporary / files[0]
        chosen.write(weights, examples.batches[0])
        for name in [] if alone else files[1:-1]:
            shutil.copyfile(directory.model / name, temporary / name)
        deviation, outputs, modules = _compare(chosen, weights, loaded, examples)
        exported = Export(path, format, files, examples.what, deviation, outputs, modules)
        if not alone:
            parity = f"{deviation:.2g} over {outputs:,} outputs for {examples.what}"
            with damaged("the model card cannot be written", str(directory.path), "bring back the run's own files"):
                card = render(directory, described, format, chosen.library, chosen.usage(chosen.file), parity)
            write_atomically(temporary / CARD, card)
        _move(weights if alone else temporary, path)
    return exported


def _refuse_unfindable(chosen: Format, described: dict[str, Any]) -> None:
    here = [kind for kind, plugin in described["plugins"].items() if plugin["distribution"] == IN_PROCESS]
    if isinstance(chosen, Safetensors) and here:
        raise ExportError(
            f"{' and '.join(here)} were registered in the process that trained, and no other finds them",
            fix="put them into a package with entry points, or export a program: torch_export, onnx",
        )


def _is_file(chosen: Format, format: str, path: Path) -> bool:
    """Say whether the path means a lone file; its name must not promise another format."""
    if path.suffix in chosen.suffixes:
        return True
    others = {suffix for other in (*FORMATS.values(), Foreign) for suffix in other.suffixes}
    if path.suffix in others:
        takes = f"a folder, or a file that ends in {' or '.join(chosen.suffixes)}" if chosen.suffixes else "a folder"
        raise ExportError(f"format {format!r} is no {path.suffix} file", where=str(path), fix=f"give {takes}")
    return False


def _refuse_existing(path: Path, force: bool, *, alone: bool) -> None:
    if not os.path.lexists(path):
        return
    if not force:
        raise ExportError("it exists already", where=str(path), fix="choose another --output, or --force to replace it")
    if path.is_dir() == alone:
        what = "a folder, and this export is a file" if alone else "a file, and this export is a folder"
        raise ExportError(f"it is {what}", where=str(path), fix="choose another --output")
    if path.is_dir() and any(path.iterdir()):
        found = {file.name for file in path.iterdir()}
        if not {CARD, DESCRIPTION} <= found or any(file.is_dir() for file in path.iterdir()):
            raise ExportError("no export wrote this folder, so it is not replaced", where=str(path), fix="remove it")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Give an empty folder beside a path, and leave nothing of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise ExportError(
            f"cannot be written: {error.strerror}", where=str(path), fix="choose another --output"
        ) from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(source: Path, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    mode = 0o777 if source.is_dir() else 0o666
    umask = os.umask(0)
    os.umask(umask)
    source.chmod(mode & ~umask)  # a temporary folder is for its owner alone
    source.replace(path)


def _examples(directory: RunDirectory, loaded: LoadedModel) -> Examples:
    """Take examples of the run's own data where that can be read, else the one that the backbone brings."""
    preprocessing = loaded.backbone.preprocessing
    try:
        with no_downloads():
            _, splits = read_data(load_config(directory.config()))
    except UserError as error:
        example = preprocessing.example()
        if example is None:
            fix = "make the run's data available here (TRANSFER_DATA)"
            raise ExportError(f"there is nothing to compare on: {error.problems[0].message}", fix=fix) from error
        what = f"the backbone's own example, for the data is not here ({error.problems[0].message})"
        return Examples(_batches(preprocessing, preprocessing.encode([example])), what)
    name = "test" if "test" in splits else "validation"
    split = splits[name]
    chosen = np.unique(np.linspace(0, len(split) - 1, COMPARED_EXAMPLES).round().astype(int)).tolist()
    encoded = encode(preprocessing, split.column(*loaded.backbone.fields), chosen, split.name)
    return Examples(_batches(preprocessing, encoded), f"{len(chosen)} examples of the {name} split")


def _batches(preprocessing: Preprocessing, encoded: Sequence[Any]) -> list[Any]:
    """Collate all together, and the shortest alone: another batch size, and another length where there are lengths."""
    together = list(encoded) * (2 if len(encoded) == 1 else 1)  # a size of one is no example of a size
    return [preprocessing.collate(together), preprocessing.collate([min(encoded, key=preprocessing.length)])]


def _compare(chosen: Format, path: Path, loaded: LoadedModel, examples: Examples) -> tuple[float, int, frozenset[str]]:
    """Return the largest deviation in a fresh process, the number of outputs, and what that process had imported.

    Raises:
        ExportError: It cannot load or run what was exported, or gives other outputs.
    """
    with torch.no_grad():
        expected = [loaded.model(batch) for batch in examples.batches]
    got, modules = _in_fresh_process(chosen, path, examples.batches)
    largest, scale = 0.0, 1.0
    for own, other in zip(expected, got, strict=True):
        if own.shape != other.shape:
            raise ExportError(f"the exported model returns {tuple(other.shape)}, the run's {tuple(own.shape)}")
        difference = float((own - other).abs().max())
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
        scale = max(scale, float(own.abs().max()))
    if largest > LARGEST_DEVIATION * scale:
        raise ExportError(
            f"the exported model gives other outputs than the run: they differ by up to {largest:.3g} "
            f"(of up to {scale:.3g}), over {examples.what}",
            fix="choose another format, and report this model",
        )
    return largest, sum(outputs.numel() for outputs in expected), modules


def _in_fresh_process(chosen: Format, path: Path, batches: Sequence[Any]) -> tuple[list[Tensor], frozenset[str]]:
    """Load the export and answer for each batch, in a process that begins with nothing of this one."""
    is_tuple = isinstance(batches[0], tuple)
    job = {"path": str(path.resolve()), "inputs": input_names(batches[0]), "tuple": is_tuple, "batches": len(batches)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = {
            f"{number}.{place}": tensor.contiguous()
            for number, batch in enumerate(batches)
            for place, tensor in enumerate(batch if is_tuple else (batch,))
        }
        save_file(tensors, folder / "inputs.safetensors")
        (folder / "job.json").write_text(json.dumps({**job, **chosen.job()}), encoding="utf-8")
        # -P: the folder of reload.py holds modules whose names are not meant to be found.
        command = [sys.executable, "-P", verify_export.__file__, str(folder)]
        # The program is this interpreter, and the two paths are our own.
        ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if ended.returncode:
            lines = [line for line in ended.stderr.splitlines() if line.strip()]
            raise ExportError(
                f"a fresh process cannot use what was exported: {lines[-1] if lines else ended.returncode}",
                fix="choose another format; safetensors takes any model",
            )
        outputs = load_file(folder / "outputs.safetensors")
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    return [outputs[str(number)] for number in range(len(batches))], frozenset(modules)
