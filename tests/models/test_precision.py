"""What the forward pass computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import transfer
from transfer import ConfigError
from transfer.builtin.fusion import _FusionPreprocessing
from transfer.builtin.heads import Linear
from transfer.models.model import Model
from transfer.models.precision import autocast, compiled, resolve_precision
from transfer.models.saved_model import read_model
from transfer_text.models.bilstm import BiLSTM
from transfer_text.models.embedding import TextBackbone
from transfer_text.models.textcnn import TextCNN
from transfer_vision.models.resnet import ResNet18

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
def test_precision_auto_by_device(
    precision: Any, device: str, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision(precision, torch.device(device)) == expected


def test_summary_contains_the_precision(config: dict[str, Any], tmp_path: Path) -> None:
    assert transfer.run(config, ["train.device=cpu"], output=tmp_path, quick=True).summary["precision"] == "fp32"


# -------------------------------------------------------------------------------------------------------- compiled code


class Compilations:
    """A backend of torch.compile that runs the recorded graphs as they are, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs = 0
        self.options: list[dict[str, Any]] = []
        compile_ = torch.compile

        def patched(module: Any, **options: Any) -> Any:
            self.options.append(options)
            return compile_(module, backend=self._run, dynamic=options["dynamic"])

        monkeypatch.setattr(torch, "compile", patched)

    def _run(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.mark.filterwarnings("ignore")  # every torch release has other warnings
@pytest.mark.parametrize(("backbone_class", "graphs"), [(TextCNN, 2), (BiLSTM, 3)], ids=["textcnn", "bilstm"])
def test_compiled_text_model_does_not_recompile_per_length(
    backbone_class: type[TextBackbone], graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations = Compilations(monkeypatch)
    torch._dynamo.reset()
    size = {"filters": 2} if backbone_class is TextCNN else {"hidden_size": 2}
    backbone = backbone_class.from_data(["a fine but slow film"], dimensions=4, **size)
    model = Model(backbone, Linear(backbone.features, 2))
    forward = compiled(model, True, varied=backbone.preprocessing.varies_in_length)
    for length in range(5, 25):
        ids = torch.randint(1, 7, (7 if length == 20 else 16, length))
        torch.testing.assert_close(forward(ids), model(ids))
    assert compilations.graphs <= graphs
    torch._dynamo.reset()


def test_outputs_of_cuda_graphs_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, Any]] = []
    outputs = torch.ones(2, 3)

    def compile_(model: Model, **chosen: Any) -> Any:
        options.append(chosen)
        return lambda inputs, first_stage=0: outputs

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: options.append({}))
    backbone = TextCNN(dimensions=4, filters=2)
    forward = compiled(Model(backbone, Linear(backbone.features, 2)), "reduce-overhead", varied=True)
    result = forward(torch.ones(2, 7, dtype=torch.int64))
    outputs.zero_()  # as the graphs of the next batch do
    assert result.all()
    assert options == [{"dynamic": True, "mode": "reduce-overhead"}, {}]


def test_cuda_graphs_with_accumulated_gradients_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="reduce-overhead needs accumulate: 1"):
        transfer.check(config, ["train.compile=reduce-overhead", "train.accumulate=2"])
    with pytest.raises(ConfigError, match="expected true, false or reduce-overhead"):
        transfer.check(config, ["train.compile=fast"])


def test_varies_in_length_for_texts_but_not_images() -> None:
    text, image = TextCNN().preprocessing, ResNet18().preprocessing
    assert text.varies_in_length
    assert not image.varies_in_length
    assert _FusionPreprocessing({"image": image, "text": text}).varies_in_length
    assert not _FusionPreprocessing({"left": image, "right": image}).varies_in_length
