"""Export of a trained model: written to a temporary folder, verified in a fresh process, then moved into place."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from transfer.data.encoding import encode
from transfer.deployment import verify_export
from transfer.deployment.formats import FORMATS, Foreign, Format, Safetensors, activation_of, find_format, input_names
from transfer.deployment.model_card import render
from transfer.deployment.quantization import (
    CALIBRATION_BATCH_SIZE,
    CALIBRATION_EXAMPLES,
    QuantizationLoss,
    check_quantization,
    measure,
    quantize as quantize_graph,
)
from transfer.errors import ExportError, UserError, damaged
from transfer.interfaces import Preprocessing
from transfer.models.model_json import DESCRIPTION
from transfer.models.recorded_plugins import load_run_config
from transfer.models.saved_model import ADAPTER, LoadedModel, read_model
from transfer.registry.entry_points import IN_PROCESS
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import read_json, write_atomically, write_json
from transfer.system.downloads import no_downloads
from transfer.system.templates import environment
from transfer.training.build import make_loader, read_data

COMPARED_EXAMPLES = 32
MAX_RELATIVE_DEVIATION = 1e-4
"""Largest deviation of an output, relative to the largest output (at least 1). Another order of floating-point
additions stays below it, and a wrong layer does not."""
CARD = "README.md"


@dataclass(frozen=True)
class Export:
    """A written export, or the files that a dry run would write.

    Args:
        path: Path of the exported folder or file.
        format: Name of the format.
        files: Names of the files in the folder, or of the single file.
        examples: Description of the examples that the outputs were compared on.
        deviation: Largest absolute difference of an output from that of the run; None for a dry run.
        outputs: Number of outputs that were compared.
        modules: Names of the modules that the fresh process had imported.
        quantization_loss: Loss of accuracy by quantization; None without quantization.
        has_head: Whether the export contains the head. Otherwise the features were compared.
    """

    path: Path
    format: str
    files: Sequence[str]
    examples: str = "nothing yet"
    deviation: float | None = None
    outputs: int = 0
    modules: frozenset[str] = field(default=frozenset(), repr=False)
    quantization_loss: QuantizationLoss | None = None
    has_head: bool = True


@dataclass(frozen=True)
class Examples:
    """The examples that the outputs of an export are compared on.

    Args:
        batches: Two batches of model inputs: all examples, and only the shortest.
        description: Description of the examples for the model card.
        reason: Reason why they are not examples of the run's data; empty if they are.
    """

    batches: Sequence[Any]
    description: str
    reason: str = ""


def export(
    run: str | Path,
    format: str,
    output: str | Path | None = None,
    *,
    quantize: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Export:
    """Write a run's model in another format, after a fresh process has reproduced the run's outputs with it.

    Models are exported on the CPU, so that the exported program does not depend on a device.

    Args:
        run: Run directory.
        format: Name of the format: ``safetensors``, ``torch_export``, ``onnx``, or one that the backbone adds
            (``torchvision``, ``transformers``).
        output: Path of a folder, or of a file if its suffix is one of the format's. The default is
            ``RUN/export/FORMAT``.
        quantize: Smaller numbers in an ONNX graph: ``int8`` or ``fp16``. None keeps float32. The loss of accuracy is
            measured on the test split, or the validation split if there is none.
        force: Whether to replace an earlier export at the path.
        dry_run: Whether to return the files that would be written without writing them.

    Raises:
        UserError: The run is invalid, the model does not fit the format, or the path exists.
        ExportError: The export does not reproduce the outputs of the run; nothing is written.
    """
    directory = RunDirectory.open(run)
    if quantize is not None:
        check_quantization(quantize, format)
    if output is None:
        directory.refuse_links()
    loaded = read_model(directory.model)
    # An export contains merged weights and no adapter. Its outputs are compared with those of the run's own model.
    chosen = find_format(format, read_model(directory.model, merged=True) if loaded.is_adapted else loaded)
    described = read_json(directory.model / DESCRIPTION, "there is no model here")
    described.pop(ADAPTER, None)
    described["plugins"].pop(ADAPTER, None)
    _refuse_unfindable(chosen, described)
    path = directory.path / "export" / format if output is None else Path(output).expanduser()
    single_file = _is_file(chosen, format, path)
    folders = {Path(name).parts[0] for name in chosen.files() if len(Path(name).parts) > 1}
    _refuse_existing(path, force, folders=folders, single_file=single_file)
    scripts = {} if single_file else _scripts(chosen)
    files = [path.name] if single_file else [*chosen.files(), DESCRIPTION, *described["assets"], *scripts, CARD]
    files = list(dict.fromkeys(files))  # some assets are files of the format, too
    if dry_run:
        return Export(path, format, files, has_head=chosen.has_head)
    examples = _examples(directory, loaded)
    with _temporary_folder(path) as temporary:
        weights = temporary / files[0]
        for name in [] if single_file else described["assets"]:
            shutil.copyfile(directory.model / name, temporary / name)
        chosen.write(weights, examples.batches[0])  # it may replace an asset by its own file of that name
        loss = None if quantize is None else _quantized(weights, quantize, directory, loaded)
        if not single_file:
            write_json(temporary / DESCRIPTION, described)
        for name, text in scripts.items():
            write_atomically(temporary / name, text)
        deviation, outputs, modules = _compare(chosen, weights, loaded, examples, is_exact=quantize is None)
        # The card states the deviation, so it is written after the comparison.
        if not single_file:
            parity = f"{deviation:.2g} over {outputs:,} outputs for {examples.description}"
            parity += f". Quantization to {quantize}: {loss}" if loss else ""
            fix = "restore the original files of the run"
            with damaged("the model card cannot be written", str(directory.path), fix):
                card = render(
                    directory,
                    described,
                    format,
                    chosen.library,
                    chosen.usage(chosen.file),
                    parity,
                    scripts=bool(scripts),
                )
            write_atomically(temporary / CARD, card)
        _move(weights if single_file else temporary, path)
    compared_on = f"{examples.description} ({examples.reason})" if examples.reason else examples.description
    return Export(path, format, files, compared_on, deviation, outputs, modules, loss, chosen.has_head)


def _refuse_unfindable(chosen: Format, described: dict[str, Any]) -> None:
    here = [kind for kind, plugin in described["plugins"].items() if plugin["distribution"] == IN_PROCESS]
    if isinstance(chosen, Safetensors) and here:
        raise ExportError(
            f"{' and '.join(here)} were registered only in the process that trained: no other process finds them",
            fix="move them to a package with entry points, or export a program: torch_export, onnx",
        )


def _scripts(chosen: Format) -> dict[str, str]:
    """Return scripts by file name that predict with an export without this package; empty if that is not possible."""
    code, preparation = chosen.script(), chosen.loaded.backbone.preprocessing.standalone_code()
    if code is None or preparation is None:
        return {}
    template = environment("transfer.deployment").get_template("predict.py.j2")
    return {
        "predict.py": template.render(code=code, activation=activation_of(chosen.loaded.task)),
        "prepare.py": preparation,
    }


def _is_file(chosen: Format, format: str, path: Path) -> bool:
    """Return whether the path names a single file of the format, by its suffix."""
    if path.suffix in chosen.suffixes:
        return True
    other_suffixes = {suffix for other in (*FORMATS.values(), Foreign) for suffix in other.suffixes}
    if path.suffix in other_suffixes:
        expected = f"a folder, or a file that ends in {' or '.join(chosen.suffixes)}" if chosen.suffixes else "a folder"
        raise ExportError(
            f"format {format!r} does not write {path.suffix} files: expected {expected}",
            where=str(path),
            fix="choose another --output",
        )
    return False


def _refuse_existing(path: Path, force: bool, *, folders: Collection[str], single_file: bool) -> None:
    if not os.path.lexists(path):  # a link to a missing file is in the way, too
        return
    if not force:
        raise ExportError(
            "the path exists already", where=str(path), fix="choose another --output, or --force to replace it"
        )
    if path.is_dir() == single_file:
        kinds = "a folder, and this export is a file" if single_file else "a file, and this export is a folder"
        raise ExportError(f"the path is {kinds}", where=str(path), fix="choose another --output")
    if path.is_dir() and any(path.iterdir()):
        # A wrong --output with --force must not delete somebody's folder: only exports have these two files.
        names = {file.name for file in path.iterdir()}
        if not {CARD, DESCRIPTION} <= names or any(
            file.is_dir() and file.name not in folders for file in path.iterdir()
        ):
            raise ExportError(
                "the folder is not an earlier export, so it is not replaced", where=str(path), fix="remove it"
            )


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Create a folder on the file system of a path, and remove it when the block ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        # The export is moved out of the private folder, whose mode is 0700; a folder within has the umask's mode.
        folder = private / "export"
        folder.mkdir()
    except OSError as error:
        raise ExportError(
            f"the export cannot be written: {error.strerror}", where=str(path), fix="choose another --output"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _move(source: Path, path: Path) -> None:
    # A rename replaces a file, but not a folder.
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    source.replace(path)


def _examples(directory: RunDirectory, loaded: LoadedModel) -> Examples:
    """Return examples of the run's data, or the backbone's own example if the data cannot be read."""
    preprocessing = loaded.backbone.preprocessing
    try:
        with no_downloads():
            _, splits = read_data(load_run_config(directory))
    except UserError as error:
        example, reason = preprocessing.example(), error.problems[0].message
        if example is None:
            fix = "make the data of the run available (TRANSFER_DATA)"
            raise ExportError(f"there are no examples to compare outputs on: {reason}", fix=fix) from error
        batches = _batches(preprocessing, preprocessing.encode([example]))
        return Examples(batches, "the backbone's own example", f"the data is not available: {reason}")
    name = next(name for name in ("test", "validation", "train") if name in splits)
    split = splits[name]
    chosen = _evenly_spaced(len(split), COMPARED_EXAMPLES)
    encoded = encode(preprocessing, split.column(*loaded.backbone.fields), chosen, split.name)
    return Examples(_batches(preprocessing, encoded), f"{len(chosen)} examples of the {name} split")


def _evenly_spaced(count: int, number: int) -> list[int]:
    """Return up to ``number`` indices over a split of ``count`` examples, which may be sorted by class."""
    return [int(index) for index in np.unique(np.linspace(0, count - 1, number).round())]


def _batches(preprocessing: Preprocessing, encoded: Sequence[Any]) -> list[Any]:
    """Return a batch of all examples and one of only the shortest: they differ in batch size and in length."""
    # torch.export treats a size of one as a constant, so the batch to record with has at least two examples.
    together = list(encoded) * (2 if len(encoded) == 1 else 1)
    batches = (together, [min(encoded, key=preprocessing.length)])
    return [preprocessing.model_inputs(batch) for batch in batches]


def _quantized(path: Path, kind: str, directory: RunDirectory, loaded: LoadedModel) -> QuantizationLoss:
    """Quantize a graph with examples of the training split, and return its loss of accuracy.

    Raises:
        ExportError: The data of the run cannot be read, or all examples were trained on.
    """
    config = load_run_config(directory)
    try:
        with no_downloads():
            _, splits = read_data(config)
    except UserError as error:
        raise ExportError(
            f"--quantize needs the data of the run: {error.problems[0].message}",
            fix="make it available (TRANSFER_DATA)",
        ) from error
    name = next((name for name in ("test", "validation") if name in splits), None)
    if name is None:
        raise ExportError("--quantize needs a test or validation split to measure the loss of accuracy")
    preprocessing, train = loaded.backbone.preprocessing, splits["train"]
    chosen = _evenly_spaced(len(train), CALIBRATION_EXAMPLES)
    encoded = encode(preprocessing, train.column(*loaded.backbone.fields), chosen, train.name)
    starts = range(0, len(encoded), CALIBRATION_BATCH_SIZE)
    batches = [preprocessing.model_inputs(encoded[start : start + CALIBRATION_BATCH_SIZE]) for start in starts]
    quantize_graph(path, kind, batches)
    return measure(path, loaded, make_loader(config, splits[name], loaded.backbone), name)


def _compare(
    chosen: Format, path: Path, loaded: LoadedModel, examples: Examples, *, is_exact: bool = True
) -> tuple[float, int, frozenset[str]]:
    """Return the largest deviation in a fresh process, the number of outputs, and the modules the process imported.

    Args:
        chosen: Format of the export.
        path: Path of the exported file.
        loaded: Model whose outputs are reproduced.
        examples: Inputs.
        is_exact: Whether a deviation beyond rounding is an error.

    Raises:
        ExportError: The process cannot load or run the export, or its outputs deviate.
    """
    with torch.no_grad():
        expected = [_outputs(chosen, loaded, batch) for batch in examples.batches]
    actual, modules = _in_fresh_process(chosen, path, examples.batches)
    # The tolerance is relative to the outputs of the head: an offset must not hide a difference between predictions.
    scaling = loaded.model.output_scaling if chosen.has_head else None
    offset, unit = scaling or (torch.zeros(()), torch.ones(()))
    largest, relative, scale, rounding = 0.0, 0.0, 1.0, 0.0
    for ours, theirs in zip(expected, actual, strict=True):
        if ours.shape != theirs.shape:
            raise ExportError(
                f"the outputs of the export have the wrong shape: expected {tuple(ours.shape)}, "
                f"got {tuple(theirs.shape)}"
            )
        # Not a number is the largest deviation of all; max() alone would drop it.
        difference = float((ours - theirs).abs().max())
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
        relative = max(relative, float(((ours - theirs) / unit).abs().max()) if math.isfinite(difference) else math.inf)
        scale = max(scale, float(((ours - offset) / unit).abs().max()))
        # The last bits of a float32 number are those of its offset.
        rounding = max(rounding, float((ours / unit).abs().max()) * torch.finfo(torch.float32).eps)
    if is_exact and relative > MAX_RELATIVE_DEVIATION * scale + rounding:
        raise ExportError(
            f"the outputs of the export differ from those of the run by up to {largest:.3g}, for "
            f"{examples.description}",
            fix="choose another format, and report this model",
        )
    return largest, sum(outputs.numel() for outputs in expected), modules


def _outputs(chosen: Format, loaded: LoadedModel, batch: Any) -> Tensor:
    """Return the outputs that an export reproduces: those of the model, or features if it does not contain the head."""
    outputs = loaded.model(batch) if chosen.has_head else loaded.backbone(batch)
    if isinstance(outputs, tuple):
        states, mask = outputs
        return states * mask[:, :, None]  # type: ignore[no-any-return]
    return outputs  # type: ignore[no-any-return]


def _in_fresh_process(chosen: Format, path: Path, batches: Sequence[Any]) -> tuple[list[Tensor], frozenset[str]]:
    """Load the export in a new process and return its outputs for each batch, with the modules it imported."""
    is_tuple = isinstance(batches[0], tuple)
    job = {"path": str(path.resolve()), "inputs": input_names(batches[0]), "tuple": is_tuple, "batches": len(batches)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = {
            f"{number}.{index}": tensor.contiguous()
            for number, batch in enumerate(batches)
            for index, tensor in enumerate(batch if is_tuple else (batch,))
        }
        save_file(tensors, folder / "inputs.safetensors")
        (folder / "job.json").write_text(json.dumps({**job, **chosen.job()}), encoding="utf-8")
        # -P keeps the folder of the script off sys.path: its modules would shadow packages of the same name.
        command = [sys.executable, "-P", verify_export.__file__, str(folder)]
        # The program is this interpreter, and the two paths are our own.
        ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if ended.returncode:
            # The last line of a traceback is the error.
            lines = [line for line in ended.stderr.splitlines() if line.strip()]
            raise ExportError(
                f"a fresh process cannot use the export: {lines[-1] if lines else ended.returncode}",
                fix="choose another format; safetensors supports any model",
            )
        outputs = load_file(folder / "outputs.safetensors")
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    return [outputs[str(number)] for number in range(len(batches))], frozenset(modules)
