"""What the forward pass computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import transfer
from transfer import ConfigError
from transfer.models.precision import autocast, resolve_precision
from transfer.models.saved_model import read_model

CPU = torch.device("cpu")


def test_fp32_computes_in_fp32() -> None:
    with autocast("fp32", CPU):
        assert torch.nn.Linear(3, 2)(torch.randn(4, 3)).dtype == torch.float32


def test_bf16_computes_in_bf16_and_keeps_the_weights() -> None:
    layer = torch.nn.Linear(3, 2)
    with autocast("bf16", CPU):
        assert layer(torch.randn(4, 3)).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32


def test_inner_autocast_context_applies() -> None:
    with autocast("bf16", CPU), autocast("fp32", CPU):
        assert torch.nn.Linear(3, 2)(torch.randn(4, 3)).dtype == torch.float32


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_bf16_run_is_close_to_fp32_run(config: dict[str, Any], tmp_path: Path, cache: str) -> None:
    phases = "train.phases=[{epochs: 1, freeze: {until: first}}, {epochs: 2}]"
    exact, rounded = (
        transfer.run(config, [phases, f"train.cache={cache}", f"train.precision={precision}"], output=tmp_path)
        for precision in ("fp32", "bf16")
    )
    assert rounded.summary["test"]["loss"] == pytest.approx(exact.summary["test"]["loss"], rel=0.05)
    assert rounded.summary["test"]["loss"] != exact.summary["test"]["loss"]
    weights = read_model(rounded.folder / "model").model.state_dict()
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
    assert transfer.evaluate(rounded.folder) == rounded.summary["test"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU scales gradients")
def test_fp16_needs_a_gpu(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        transfer.run(config, ["train.precision=fp16"], output=tmp_path)


@pytest.mark.gpu
def test_fp16_trains_over_phases_with_clipping(config: dict[str, Any], tmp_path: Path) -> None:
    phases = "train.phases=[{epochs: 1, freeze: backbone}, {epochs: 2}]"
    exact, rounded = (
        transfer.run(config, [phases, "train.clip_norm=0.5", f"train.precision={precision}"], output=tmp_path)
        for precision in ("fp32", "fp16")
    )
    assert rounded.summary["test"]["loss"] == pytest.approx(exact.summary["test"]["loss"], rel=0.05)


@pytest.mark.parametrize(
    ("precision", "device", "capability", "expected"),
    [
        ("auto", "cpu", (0, 0), "fp32"),
        ("auto", "cuda:0", (8, 0), "bf16"),
        ("auto", "cuda:0", (7, 5), "fp32"),
        ("fp16", "cuda:0", (9, 0), "fp16"),
        ("bf16", "cpu", (0, 0), "bf16"),
    ],
)
def test_precision_auto_is_bf16_only_on_gpus_that_compute_in_it(
    precision: Any, device: str, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision(precision, torch.device(device)) == expected


def test_summary_contains_the_precision(config: dict[str, Any], tmp_path: Path) -> None:
    assert transfer.run(config, ["train.device=cpu"], output=tmp_path, quick=True).summary["precision"] == "fp32"
