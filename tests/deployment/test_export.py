"""Exports: each format gives the run's own outputs elsewhere, and nothing is written that does not."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from conftest import PointPreprocessing
from safetensors.torch import load_file

import transfer
from transfer import ExportError, RunError
from transfer.builtin.heads import MLP
from transfer.deployment import export as exporting
from transfer.deployment import verify_export as reload
from transfer.deployment.formats import find_format
from transfer.models.model import Model
from transfer.models.saved_model import LoadedModel, read_model
from transfer.registry import entry_points as registry
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import write_json

TEXTS = ["a warm, funny film", "two hours of my life that I will never get back"]
recorded = pytest.mark.skipif(not hasattr(torch.export.Dim, "AUTO"), reason="torch finds sizes out from 2.6 on")


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
def pictures(runs: Path) -> Path:
    return transfer.run(made_of(SHAPES, RESNET), output=runs / "pictures").folder


@pytest.fixture(scope="module")
def texts(runs: Path) -> Path:
    return transfer.run(made_of(REVIEWS, TEXTCNN), output=runs / "texts").folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer in this process, for tests that are about something else."""

    def answer(chosen: Any, path: Path, batches: Any) -> Any:
        with torch.no_grad():
            return [chosen.loaded.model(batch) for batch in batches], frozenset()

    monkeypatch.setattr(exporting, "_in_fresh_process", answer)


@pytest.fixture
def loaded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load what was exported as the fresh process does, but in this one, which has imported torch already."""

    def run(command: Sequence[str], **options: Any) -> Any:
        reload.main(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(exporting.subprocess, "run", run)


def inputs(loaded: LoadedModel, count: int) -> Any:
    preprocessing = loaded.backbone.preprocessing
    return preprocessing.collate(preprocessing.encode([preprocessing.example()] * count))


def front_matter(card: Path) -> dict[str, Any]:
    opened, front, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    assert not opened
    return dict(yaml.safe_load(front))


def test_torchvision_loads_the_state_dict_strictly_and_gives_the_same_logits(pictures: Path, tmp_path: Path) -> None:
    exported = transfer.export(pictures, "torchvision", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(exported.files)
    assert exported.deviation is not None
    assert exported.deviation < 1e-5
    assert "torchvision" in exported.modules
    assert "transfer" not in exported.modules
    assert exported.examples == "6 examples of the test split"

    theirs = torchvision.models.resnet18(num_classes=3)
    theirs.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    loaded = read_model(pictures / "model")
    with torch.no_grad():
        assert torch.equal(theirs.eval()(inputs(loaded, 2)), loaded.model(inputs(loaded, 2)))


def test_a_name_that_ends_in_pth_is_a_lone_state_dict(pictures: Path, tmp_path: Path, here: None) -> None:
    exported = transfer.export(pictures, "torchvision", tmp_path / "ants.pth")
    assert list(tmp_path.iterdir()) == [tmp_path / "ants.pth"]
    assert list(exported.files) == ["ants.pth"]
    weights = torch.load(tmp_path / "ants.pth", weights_only=True)
    assert weights.keys() == torchvision.models.resnet18(num_classes=3).state_dict().keys()


def test_a_name_that_promises_another_format_is_refused(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"format 'safetensors' is no \.pt2 file") as caught:
        transfer.export(texts, "safetensors", tmp_path / "model.pt2")
    assert caught.value.problems[0].fix == "give a folder"


def test_safetensors_predict_as_the_run_does(texts: Path, tmp_path: Path, loaded_here: None) -> None:
    exported = transfer.export(texts, "safetensors", tmp_path / "out")
    assert exported.deviation == 0
    assert list(transfer.predict(tmp_path / "out", TEXTS)) == list(transfer.predict(texts, TEXTS))


@recorded
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11, reading its own archive
def test_a_recorded_program_takes_any_batch_and_any_length(texts: Path, tmp_path: Path, loaded_here: None) -> None:
    transfer.export(texts, "torch_export", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    loaded = read_model(texts / "model")
    for shape in ((1, 1), (5, 2), (3, 90)):
        words = torch.randint(1, 40, shape)
        with torch.no_grad():
            torch.testing.assert_close(program(words), loaded.model(words))


@recorded
def test_onnx_takes_any_batch_and_any_length(texts: Path, tmp_path: Path) -> None:
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
def test_a_program_of_one_length_alone_is_refused(runs: Path, tmp_path: Path) -> None:
    backbone = {"name": "bilstm", "dimensions": 4, "hidden_size": 3, "layers": 1}
    run = transfer.run(made_of(REVIEWS, backbone), output=runs / "bilstm").folder
    with pytest.raises(ExportError, match="inputs of one length alone") as caught:
        transfer.export(run, "torch_export", tmp_path / "out")
    assert "onnx" in str(caught.value.problems[0].fix)
    assert list(tmp_path.iterdir()) == []


def test_what_a_backbone_cannot_be_is_said_with_what_it_can(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="TextCNN cannot be exported as 'torchvision'") as caught:
        transfer.export(texts, "torchvision", tmp_path / "out")
    assert caught.value.problems[0].available == ("safetensors", "torch_export", "onnx")


def test_a_head_of_several_layers_has_no_place_in_torchvisions_network(pictures: Path) -> None:
    loaded = read_model(pictures / "model")
    model = Model(loaded.backbone, MLP(loaded.backbone.features, 3))
    with pytest.raises(ExportError, match="head MLP is more than one linear layer"):
        find_format("torchvision", replace(loaded, model=model))


def test_other_outputs_are_refused_and_nothing_is_left(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(chosen: Any, path: Path, batches: Any) -> Any:
        with torch.no_grad():
            return [chosen.loaded.model(batch) + 0.01 for batch in batches], frozenset()

    monkeypatch.setattr(exporting, "_in_fresh_process", answer)
    with pytest.raises(ExportError, match=r"differ by up to 0\.01"):
        transfer.export(texts, "safetensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_fresh_process_cannot_load_is_said(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('no such operator')", encoding="utf-8")
    monkeypatch.setattr(reload, "__file__", str(tmp_path / "broken.py"))
    with pytest.raises(ExportError, match="cannot use what was exported: RuntimeError: no such operator"):
        transfer.export(texts, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(texts: Path, tmp_path: Path) -> None:
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


def test_what_exists_is_replaced_by_force_alone(texts: Path, tmp_path: Path, here: None) -> None:
    out = tmp_path / "out"
    transfer.export(texts, "safetensors", out)
    (out / "README.md").write_text("filled in by the author", encoding="utf-8")
    for dry_run in (False, True):
        with pytest.raises(ExportError, match="it exists already"):
            transfer.export(texts, "safetensors", out, dry_run=dry_run)
    assert (out / "README.md").read_text(encoding="utf-8") == "filled in by the author"
    transfer.export(texts, "safetensors", out, force=True)
    assert (out / "README.md").read_text(encoding="utf-8").startswith("---\n")


def test_force_does_not_replace_what_no_export_wrote(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ExportError, match="no export wrote this folder"):
        transfer.export(texts, "safetensors", tmp_path, force=True)
    assert (tmp_path / "thesis.tex").exists()


def test_force_does_not_make_a_folder_of_a_file(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    (tmp_path / "model.onnx").mkdir()
    for format, name in (("safetensors", "notes"), ("onnx", "model.onnx")):
        with pytest.raises(ExportError, match=r"it is a (file|folder), and this export is a"):
            transfer.export(texts, format, tmp_path / name, force=True)
    assert (tmp_path / "notes").read_text(encoding="utf-8") == "mine"


def test_without_the_data_the_backbones_own_example_is_compared(texts: Path, tmp_path: Path, here: None) -> None:
    run = tmp_path / "run"
    shutil.copytree(texts, run)
    plain = RunDirectory(run).config()
    plain["data"] = {"name": "text_csv", "train": "gone.csv", "text": "text", "label": "label"}
    RunDirectory(run).write_config(plain)
    exported = transfer.export(run, "safetensors")
    assert exported.path == run / "export" / "safetensors"
    assert exported.examples.startswith("the backbone's own example, for the data is not here")


def test_plugins_of_this_process_alone_cannot_be_found_in_another(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, output=tmp_path).folder
    with pytest.raises(ExportError, match="backbone were registered in the process that trained"):
        transfer.export(run, "safetensors", tmp_path / "out")


def test_the_cards_front_matter_holds_the_runs_figures_and_leaves_the_licence(
    pictures: Path, tmp_path: Path, here: None
) -> None:
    transfer.export(pictures, "torchvision", tmp_path / "out")
    front = front_matter(tmp_path / "out" / "README.md")
    assert front["license"] is None
    assert front["library_name"] == "torchvision"
    assert front["pipeline_tag"] == "image-classification"
    (result,) = front["model-index"][0]["results"]
    summary = RunDirectory(pictures).summary()
    assert {m["type"]: m["value"] for m in result["metrics"]} == {
        k: v for k, v in summary["test"].items() if k != "loss"
    }
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "model = resnet18(num_classes=3)" in card
    assert "| test | 6 | 2 | 2 | 2 |" in card
    assert "one seed alone" in card


def test_the_card_gives_the_spread_over_runs_of_other_seeds(texts: Path, tmp_path: Path, here: None) -> None:
    for seed, accuracy in enumerate((0.6, 0.7, 0.8)):
        run = tmp_path / f"run-{seed}"
        shutil.copytree(texts, run)
        RunDirectory(run).write_config({**RunDirectory(run).config(), "seed": seed})
        summary = RunDirectory(run).summary()
        write_json(run / "summary.json", {**summary, "test": {**summary["test"], "accuracy": accuracy}})
    summary = RunDirectory(run).summary()
    write_json(run / "summary.json", {**summary, "status": "interrupted"})  # the last one is not counted
    transfer.export(tmp_path / "run-0", "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| accuracy | 0.6000 | 0.1000 | 0.6500 ± 0.0707 |" in card
    assert "over the seeds 0, 1:" in card


def test_no_run_is_an_error_that_says_so(tmp_path: Path) -> None:
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
def test_inputs_may_be_a_tuple_of_tensors(config: dict[str, Any], tmp_path: Path, loaded_here: None) -> None:
    registry.register("backbone", "pairs")(Pairs)
    run = transfer.run(config | {"backbone": {"name": "pairs"}}, output=tmp_path / "runs").folder
    exported = transfer.export(run, "torch_export", tmp_path / "model.pt2")
    assert exported.deviation is not None
    assert exported.deviation < 1e-5
