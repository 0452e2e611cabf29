"""Weights of an earlier run: every backbone can start from them, and every tensor is accounted for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import transfer
from transfer import UserError, WeightsError

TEXT: dict[str, Any] = {
    "data": {"name": "mini_reviews", "limit": 8},
    "train": {"phases": [{"epochs": 1, "freeze": "backbone"}], "report": False},
}
TEXTCNN = {"name": "textcnn", "filters": 4, "dimensions": 6}
BILSTM = {"name": "bilstm", "hidden_size": 4, "layers": 1, "dimensions": 6}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return transfer.saved_backbone(run).tensors()[0]


@pytest.mark.parametrize("backbone", [TEXTCNN, BILSTM], ids=lambda block: str(block["name"]))
def test_text_backbone_starts_from_run_with_vocabulary(backbone: dict[str, Any], tmp_path: Path) -> None:
    first = transfer.run({**TEXT, "backbone": backbone}, output=tmp_path).folder
    config = {**TEXT, "backbone": {**backbone, "weights": str(first)}, "seed": 5}
    config["data"] = {"name": "mini_reviews", "limit": 4}  # other texts, with another vocabulary
    run = transfer.run(config, output=tmp_path)
    assert (run.folder / "model/vocabulary.json").read_text() == (first / "model/vocabulary.json").read_text()
    assert run.summary["pretrained"]["left_out"] == ["head.output.bias", "head.output.weight"]
    before, after = tensors(first), tensors(run.folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)  # frozen in both runs


def test_run_does_not_need_its_source_run(config: dict[str, Any], tmp_path: Path) -> None:
    first = transfer.run(config, output=tmp_path / "a").folder
    config["backbone"]["weights"] = str(first)
    second = transfer.run(config, output=tmp_path / "b").folder
    first.rename(tmp_path / "away")
    assert transfer.evaluate(second)["loss"] > 0
    assert list(transfer.predict(second, ["1,2,3,4"]))


def test_random_features_do_not_read_the_run(config: dict[str, Any], tmp_path: Path) -> None:
    first = transfer.run(config, output=tmp_path).folder
    del config["train"]["phases"]
    config["backbone"]["weights"] = str(first)
    config["train"]["recipe"] = {"name": "random_features", "epochs": 1}
    assert transfer.run(config, output=tmp_path).summary["pretrained"] == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"do not fit: missing: first\.0\.weight$"),
        ("left over", r"do not fit: left over: fourth\.weight$"),
        ("of another shape", r"of another shape: first\.0\.bias \[7\] for \[8\]$"),
        ("not finite", r"not finite: first\.0\.weight$"),
        ("prefix", r"missing: first\.0\.weight, .*; left over: model\.first"),
    ],
)
def test_weights_of_run_that_do_not_fit(change: str, message: str, config: dict[str, Any], tmp_path: Path) -> None:
    first = transfer.run(config, output=tmp_path).folder
    file = first / "model/weights.safetensors"
    content = load_file(file)
    if change == "missing":
        del content["first.0.weight"]
    elif change == "left over":
        content["fourth.weight"] = torch.zeros(1)
    elif change == "of another shape":
        content["first.0.bias"] = torch.zeros(7)
    elif change == "not finite":
        content["first.0.weight"][0] = torch.nan
    else:
        content = {f"model.{name}": tensor for name, tensor in content.items()}
    save_file(content, file)
    config["backbone"]["weights"] = str(first)
    with pytest.raises(WeightsError) as caught:
        transfer.run(config, output=tmp_path)
    (problem,) = caught.value.problems
    assert problem.where == str(file)
    assert re.search(message, problem.message), problem.message


def test_options_that_differ_from_run_are_named(config: dict[str, Any], tmp_path: Path) -> None:
    first = transfer.run(config, output=tmp_path).folder
    config["backbone"] |= {"weights": str(first), "width": 5}
    with pytest.raises(WeightsError, match=r"first.0.weight \[8, 4\] for \[5, 4\]") as caught:
        transfer.run(config, output=tmp_path)
    assert caught.value.problems[0].fix == 'set the options of the run: "width": 8'


def test_run_of_another_backbone_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    first = transfer.run(config, output=tmp_path).folder
    with pytest.raises(WeightsError, match="wrong backbone in this run: expected 'steps', got 'dense'"):
        transfer.check({**config, "backbone": {"name": "steps", "weights": str(first)}})
    with pytest.raises(UserError, match="there is no run with a model at"):
        transfer.check({**config, "backbone": {"name": "dense", "weights": str(tmp_path / "none")}})


def test_config_without_weights_records_none(config: dict[str, Any], tmp_path: Path) -> None:
    folder = transfer.run(config, output=tmp_path).folder
    assert "\n  weights:" not in (folder / "config.yaml").read_text()
