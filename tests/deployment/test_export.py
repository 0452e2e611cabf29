"""Exports: every format reproduces the outputs of the run, and contains no data and no local paths."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import PointPreprocessing
from PIL import Image
from safetensors.torch import load_file

import transfer
from transfer import ExportError, RunError
from transfer.builtin.heads import MLP
from transfer.deployment import export as exporting, verify_export
from transfer.deployment.formats import find_format
from transfer.models.model import Model
from transfer.models.saved_model import LoadedModel, read_model
from transfer.registry import entry_points as registry
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import write_json

TEXTS = ["a warm, funny film", "two hours of my life that I will never get back"]
recorded = pytest.mark.skipif(not hasattr(torch.export.Dim, "AUTO"), reason="dynamic sizes need torch 2.6")


def made_of(data: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "data": dict(data),
        "backbone": dict(backbone),
        "head": {"name": "linear"},
        "task": {"name": "classification"},
        "train": {"batch_size": 8, "phases": [{"epochs": 1}]},
    }


SHAPES = {"name": "shapes", "per_class": 8, "image_size": 32}
RESNET = {"name": "resnet18", "weights": None, "image_size": 32, "resize": 32}
REVIEWS = {"name": "mini_reviews", "limit": 12}
TEXTCNN = {"name": "textcnn", "vectors": "mini", "kernel_sizes": [2, 3], "filters": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def images(runs: Path) -> Path:
    return transfer.run(made_of(SHAPES, RESNET), output=runs / "images").folder


@pytest.fixture(scope="module")
def texts(runs: Path) -> Path:
    return transfer.run(made_of(REVIEWS, TEXTCNN), output=runs / "texts").folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the fresh process, for tests that are about something else."""

    def run_here(chosen: Any, path: Path, batches: Any) -> Any:
        with torch.no_grad():
            return [chosen.loaded.model(batch) for batch in batches], frozenset()

    monkeypatch.setattr(exporting, "_in_fresh_process", run_here)


@pytest.fixture
def loaded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the export as the fresh process does, but in this process, which has imported torch already."""

    def run(command: Sequence[str], **options: Any) -> Any:
        verify_export.main(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(exporting.subprocess, "run", run)


def inputs(loaded: LoadedModel, count: int) -> Any:
    preprocessing = loaded.backbone.preprocessing
    return preprocessing.model_inputs(preprocessing.encode([preprocessing.example()] * count))


def front_matter(card: Path) -> dict[str, Any]:
    opened, front, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    assert not opened
    return dict(yaml.safe_load(front))


def test_torchvision_export_loads_strictly_with_equal_logits(images: Path, tmp_path: Path) -> None:
    exported = transfer.export(images, "torchvision", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(exported.files)
    assert exported.deviation is not None
    assert exported.deviation < 1e-5
    assert "torchvision" in exported.modules
    assert "transfer" not in exported.modules
    assert exported.examples == "6 examples of the test split"

    theirs = torchvision.models.resnet18(num_classes=3)
    theirs.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    loaded = read_model(images / "model")
    with torch.no_grad():
        assert torch.equal(theirs.eval()(inputs(loaded, 2)), loaded.model(inputs(loaded, 2)))


def test_export_to_pth_is_a_single_state_dict(images: Path, tmp_path: Path, here: None) -> None:
    exported = transfer.export(images, "torchvision", tmp_path / "ants.pth")
    assert list(tmp_path.iterdir()) == [tmp_path / "ants.pth"]
    assert list(exported.files) == ["ants.pth"]
    weights = torch.load(tmp_path / "ants.pth", weights_only=True)
    assert weights.keys() == torchvision.models.resnet18(num_classes=3).state_dict().keys()


def test_export_refuses_the_suffix_of_another_format(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"format 'safetensors' does not write \.pt2 files: expected a folder"):
        transfer.export(texts, "safetensors", tmp_path / "model.pt2")


def test_safetensors_export_predicts_as_the_run(texts: Path, tmp_path: Path, loaded_here: None) -> None:
    exported = transfer.export(texts, "safetensors", tmp_path / "out")
    assert exported.deviation == 0
    assert list(transfer.predict(tmp_path / "out", TEXTS)) == list(transfer.predict(texts, TEXTS))


@recorded
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11, reading its own archive
def test_torch_export_supports_any_batch_size_and_length(texts: Path, tmp_path: Path, loaded_here: None) -> None:
    transfer.export(texts, "torch_export", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    loaded = read_model(texts / "model")
    for shape in ((1, 1), (5, 2), (3, 90)):
        words = torch.randint(1, 40, shape)
        with torch.no_grad():
            torch.testing.assert_close(program(words), loaded.model(words))


@recorded
def test_onnx_export_supports_any_batch_size_and_length(texts: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    exported = transfer.export(texts, "onnx", tmp_path / "out")
    assert "onnxruntime" in exported.modules
    assert "transfer" not in exported.modules
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    loaded = read_model(texts / "model")
    for shape in ((1, 1), (3, 90)):
        words = torch.randint(1, 40, shape)
        (got,) = session.run(None, {"inputs": words.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), loaded.model(words))


@recorded
def test_torch_export_refuses_a_fixed_length(runs: Path, tmp_path: Path) -> None:
    backbone = {"name": "bilstm", "dimensions": 4, "hidden_size": 3, "layers": 1}
    run = transfer.run(made_of(REVIEWS, backbone), output=runs / "bilstm").folder
    with pytest.raises(ExportError, match="would support only inputs of length") as caught:
        transfer.export(run, "torch_export", tmp_path / "out")
    assert "onnx" in str(caught.value.problems[0].fix)
    assert list(tmp_path.iterdir()) == []


def test_export_of_an_unknown_format_lists_the_formats(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="unknown export format 'torchvision'") as caught:
        transfer.export(texts, "torchvision", tmp_path / "out")
    assert caught.value.problems[0].where == "backbone TextCNN"
    assert caught.value.problems[0].available == ("onnx", "safetensors", "torch_export")


def test_torchvision_export_refuses_a_head_of_several_layers(images: Path) -> None:
    loaded = read_model(images / "model")
    model = Model(loaded.backbone, MLP(loaded.backbone.features, 3))
    with pytest.raises(ExportError, match="head MLP does not fit torchvision"):
        find_format("torchvision", replace(loaded, model=model))


def test_export_refuses_deviating_outputs_and_writes_nothing(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(chosen: Any, path: Path, batches: Any) -> Any:
        with torch.no_grad():
            return [chosen.loaded.model(batch) + 0.01 for batch in batches], frozenset()

    monkeypatch.setattr(exporting, "_in_fresh_process", answer)
    with pytest.raises(ExportError, match=r"differ from those of the run by up to 0\.01"):
        transfer.export(texts, "safetensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_reports_the_error_of_the_fresh_process(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('no such operator')", encoding="utf-8")
    monkeypatch.setattr(verify_export, "__file__", str(tmp_path / "broken.py"))
    with pytest.raises(ExportError, match="a fresh process cannot use the export: RuntimeError: no such operator"):
        transfer.export(texts, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_dry_run_writes_nothing(texts: Path, tmp_path: Path) -> None:
    before = sorted(texts.rglob("*"))
    exported = transfer.export(texts, "safetensors", tmp_path / "deep" / "out", dry_run=True)
    assert list(exported.files) == [
        "weights.safetensors",
        "model.json",
        "embedding.json",
        "vocabulary.json",
        "README.md",
    ]
    assert exported.deviation is None
    assert list(tmp_path.iterdir()) == []
    assert sorted(texts.rglob("*")) == before


def test_export_replaces_an_earlier_export_only_by_force(texts: Path, tmp_path: Path, here: None) -> None:
    out = tmp_path / "out"
    transfer.export(texts, "safetensors", out)
    (out / "README.md").write_text("filled in by the author", encoding="utf-8")
    for dry_run in (False, True):
        with pytest.raises(ExportError, match="the path exists already"):
            transfer.export(texts, "safetensors", out, dry_run=dry_run)
    assert (out / "README.md").read_text(encoding="utf-8") == "filled in by the author"
    transfer.export(texts, "safetensors", out, force=True)
    assert (out / "README.md").read_text(encoding="utf-8").startswith("---\n")


def test_export_force_keeps_a_folder_that_is_no_export(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ExportError, match="the folder is not an earlier export"):
        transfer.export(texts, "safetensors", tmp_path, force=True)
    assert (tmp_path / "thesis.tex").exists()


def test_export_force_does_not_replace_a_file_by_a_folder(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    (tmp_path / "model.onnx").mkdir()
    for format, name in (("safetensors", "notes"), ("onnx", "model.onnx")):
        with pytest.raises(ExportError, match=r"the path is a (file|folder), and this export is a"):
            transfer.export(texts, format, tmp_path / name, force=True)
    assert (tmp_path / "notes").read_text(encoding="utf-8") == "mine"


def test_export_without_data_compares_the_backbones_example(texts: Path, tmp_path: Path, here: None) -> None:
    run = tmp_path / "run"
    shutil.copytree(texts, run)
    plain = RunDirectory(run).config()
    plain["data"] = {"name": "text_csv", "train": "gone.csv", "text": "text", "label": "label"}
    RunDirectory(run).write_config(plain)
    exported = transfer.export(run, "safetensors")
    assert exported.path == run / "export" / "safetensors"
    assert exported.examples.startswith("the backbone's own example (the data is not available: ")


def test_safetensors_export_refuses_plugins_of_this_process(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, output=tmp_path).folder
    with pytest.raises(ExportError, match="backbone were registered only in the process that trained"):
        transfer.export(run, "safetensors", tmp_path / "out")


def test_model_card_front_matter_contains_metrics_and_an_empty_license(
    images: Path, tmp_path: Path, here: None
) -> None:
    transfer.export(images, "torchvision", tmp_path / "out")
    front = front_matter(tmp_path / "out" / "README.md")
    assert front["license"] is None
    assert front["library_name"] == "torchvision"
    assert front["pipeline_tag"] == "image-classification"
    (result,) = front["model-index"][0]["results"]
    summary = RunDirectory(images).summary()
    assert {m["type"]: m["value"] for m in result["metrics"]} == {
        k: v for k, v in summary["test"].items() if k != "loss"
    }
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "model = resnet18(num_classes=3)" in card
    assert "| test | 6 | 2 | 2 | 2 |" in card
    assert "| one seed |" in card


def test_model_card_states_the_spread_over_seeds(texts: Path, tmp_path: Path, here: None) -> None:
    for seed, accuracy in enumerate((0.6, 0.7, 0.8)):
        run = tmp_path / f"run-{seed}"
        shutil.copytree(texts, run)
        RunDirectory(run).write_config({**RunDirectory(run).config(), "seed": seed})
        summary = RunDirectory(run).summary()
        write_json(run / "summary.json", {**summary, "test": {**summary["test"], "accuracy": accuracy}})
    summary = RunDirectory(run).summary()
    write_json(run / "summary.json", {**summary, "status": "interrupted"})  # an incomplete run does not count
    transfer.export(tmp_path / "run-0", "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    error = math.sqrt(0.6 * 0.4 / summary["examples"]["test"])
    assert f"| accuracy | 0.6000 | {error:.4f} | 0.6500 ± 0.0707 |" in card
    assert "The seeds are 0, 1:" in card


def test_export_refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run directory"):
        transfer.export(tmp_path, "safetensors")


class Masked(PointPreprocessing):
    """Points of up to four numbers and a mask, as a tuple."""

    def encode(self, values: Sequence[Any]) -> list[Any]:
        return [torch.tensor(value[: 2 + int(value[0] > 0)]) for value in values]

    def collate(self, encoded: Sequence[Any]) -> Any:
        padded = torch.nn.utils.rnn.pad_sequence(list(encoded), batch_first=True)
        return padded, torch.nn.utils.rnn.pad_sequence([torch.ones_like(e) for e in encoded], batch_first=True) > 0

    def length(self, encoded: Any) -> int:
        return len(encoded)


class MeanOfPairs(torch.nn.Module):
    """(B, T) and a mask (B, T) -> (B, 1)."""

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        values, mask = pair
        return ((values * mask).sum(1) / mask.sum(1)).unsqueeze(1)


class Pairs(transfer.Backbone):
    """The mean of a point's numbers."""

    field = "point"

    def __init__(self) -> None:
        super().__init__({"mean": MeanOfPairs()})

    @property
    def features(self) -> transfer.FeatureSpec:
        return transfer.FeatureSpec("vector", 1)

    @property
    def preprocessing(self) -> Masked:
        return Masked()


@recorded
def test_torch_export_supports_a_tuple_of_inputs(config: dict[str, Any], tmp_path: Path, loaded_here: None) -> None:
    registry.register("backbone", "pairs")(Pairs)
    run = transfer.run(config | {"backbone": {"name": "pairs"}}, output=tmp_path / "runs").folder
    exported = transfer.export(run, "torch_export", tmp_path / "model.pt2")
    assert exported.deviation is not None
    assert exported.deviation < 1e-5


# ------------------------------------------------------------------------------------------------- private information

REVIEWS_OF_A_FILE = [
    {"text": f"the {word} film number {number} was shown only here", "label": label}
    for number in range(8)
    for word, label in (("bright", "good"), ("dull", "bad"))
]


@pytest.fixture(scope="module")
def private(runs: Path) -> Path:
    """Return a run on a file whose path and content must not be published."""
    file = runs / "private-reviews.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in REVIEWS_OF_A_FILE), encoding="utf-8")
    data = {"name": "text_csv", "train": str(file), "text": "text", "label": "label", "test_fraction": 0.25}
    return transfer.run(made_of(data, TEXTCNN), output=runs / "private").folder


def members(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield a file and, if it is a ZIP archive, all files within."""
    yield name, content
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                yield from members(f"{name}!{member}", archive.read(member))


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {name: content for file in files for name, content in members(file.name, file.read_bytes())}


def example_bytes(run: Path) -> list[bytes]:
    """Return the raw and the encoded examples of a run as bytes."""
    loaded = read_model(run / "model")
    _, splits = exporting.read_data(exporting.load_run_config(RunDirectory(run)))
    preprocessing = loaded.backbone.preprocessing
    values = [value for split in splits.values() for value in split.column(*loaded.backbone.fields)]
    raw = [value.encode() for value in values if isinstance(value, str)]
    return raw + [preprocessing.model_inputs([one]).numpy().tobytes() for one in preprocessing.encode(values)]


EXPORTS = [
    ("private", "safetensors", "out", set()),
    pytest.param("private", "torch_export", "out", set(), marks=recorded),
    pytest.param("private", "onnx", "out", set(), marks=recorded),
    pytest.param("images", "torch_export", "model.pt2", set(), marks=recorded),
    ("images", "torchvision", "out", set()),
    # A state dict for torch.load, which the user asked for by the suffix.
    ("images", "torchvision", "model.pth", {"model.pth!model/data.pkl"}),
]


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize(("name", "format", "output", "pickles"), EXPORTS)
def test_export_contains_no_examples_and_no_local_paths(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    loaded_here: None,
    name: str,
    format: str,
    output: str,
    pickles: set[str],
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    run: Path = request.getfixturevalue(name)
    transfer.export(run, format, tmp_path / output)
    files = contents(tmp_path / output)
    examples = example_bytes(run)
    assert len(examples) >= 20
    local = [
        sys.prefix,
        str(Path(transfer.__file__).parents[1]),
        str(run.parent.parent),
        str(Path.cwd()),
        str(tmp_path),
    ]
    for file, content in files.items():
        assert not [example for example in examples if example in content], file
        assert not [path for path in local if path.encode() in content], file
    # Older versions of torch write the weights of a .pt2 file as a pickle; with the current one nothing else is.
    if not (format == "torch_export" and not hasattr(torch.export, "pt2_archive")):
        assert {file for file, content in files.items() if content.startswith(b"\x80\x02")} == pickles


def test_export_permissions_follow_the_umask(texts: Path, tmp_path: Path, here: None) -> None:
    before = os.umask(0o027)
    try:
        transfer.export(texts, "safetensors", tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o640}


WITHOUT_TRANSFER = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transfer", "transfer_text", "transfer_vision"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
sys.argv = ["predict.py", *sys.argv[2:]]
runpy.run_path(sys.path[0] + "/predict.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "format", "packages"),
    [
        pytest.param("texts", "onnx", ["onnxruntime"], marks=recorded),
        pytest.param("images", "onnx", ["onnxruntime"], marks=pytest.mark.slow),
        ("images", "torchvision", []),
        pytest.param("texts", "torch_export", [], marks=[pytest.mark.slow, recorded]),
    ],
)
def test_script_of_an_export_predicts_without_this_package(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    loaded_here: None,
    python: Any,
    name: str,
    format: str,
    packages: list[str],
) -> None:
    for package in packages:
        pytest.importorskip(package)
    run: Path = request.getfixturevalue(name)
    exported = transfer.export(run, format, tmp_path / "out")
    assert {"predict.py", "prepare.py"} <= set(exported.files)
    values = [*TEXTS, "a film " * 400]
    if name == "images":
        values = [str(tmp_path / f"{width}.png") for width in (40, 64)]
        for path, width in zip(values, (40, 64), strict=True):
            pixels = np.random.default_rng(width).integers(0, 255, (50, width, 3), np.uint8)
            Image.fromarray(pixels).save(path)
    inputs = [*values[:-1], "missing.png", values[-1]] if name == "images" else values
    ended = python("-c", WITHOUT_TRANSFER, tmp_path / "out", *inputs)
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    if name == "images":
        assert (ended.returncode, ended.stderr.count("missing.png: cannot be read")) == (2, 1)
        assert "Traceback" not in ended.stderr
    expected = transfer.predict(run, [Path(value) for value in values] if name == "images" else values)
    tolerance = 0.02 if name == "images" else 1e-4  # Pillow resizes, not torch
    for answer, prediction in zip(answers, expected, strict=True):
        assert answer["scores"] == pytest.approx(prediction["probabilities"], abs=tolerance)


@recorded
def test_onnx_metadata_describes_inputs_and_outputs(texts: Path, tmp_path: Path, here: None) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    transfer.export(texts, "onnx", tmp_path / "model.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(metadata["labels"]) == ["negative", "positive"]
    assert metadata["outputs"].startswith("logits")
    assert json.loads(metadata["preprocessing"]) == read_model(texts / "model").backbone.preprocessing.describe()


@recorded
@pytest.mark.parametrize(
    ("name", "kind", "smaller"),
    [
        ("texts", "int8", 0.5),
        pytest.param("images", "int8", 0.4, marks=pytest.mark.slow),
        pytest.param("images", "fp16", 0.6, marks=pytest.mark.slow),
    ],
)
def test_quantized_graph_is_smaller_and_its_loss_is_measured(
    request: pytest.FixtureRequest, tmp_path: Path, loaded_here: None, name: str, kind: str, smaller: float
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    run: Path = request.getfixturevalue(name)
    exact = transfer.export(run, "onnx", tmp_path / "exact.onnx")
    exported = transfer.export(run, "onnx", tmp_path / "small.onnx", quantize=kind)
    assert exact.path.stat().st_size * smaller > exported.path.stat().st_size
    loss = exported.quantization_loss
    assert loss is not None
    test = RunDirectory(run).summary()["test"]
    assert (loss.metric, loss.before) == ("accuracy", pytest.approx(test["accuracy"]))
    assert loss.low <= loss.after - loss.before <= loss.high
    assert exported.deviation is not None
    assert exported.deviation > 0
    metadata = {entry.key: entry.value for entry in onnx.load(exported.path).metadata_props}
    assert metadata["quantization"] == kind
    assert {"labels", "outputs"} <= metadata.keys()
    content = exported.path.read_bytes()
    assert not [example for example in example_bytes(run) if example in content]
    assert str(tmp_path).encode() not in content


def test_quantization_of_another_format_is_refused(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--quantize applies to the format onnx"):
        transfer.export(texts, "torch_export", tmp_path / "out", quantize="int8")
    with pytest.raises(ExportError, match="int4"):
        transfer.export(texts, "onnx", tmp_path / "out", quantize="int4")
