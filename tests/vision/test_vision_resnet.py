from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from transfer import ConfigError, DataError, WeightsError
from transfer_vision.models import weights as weights_module
from transfer_vision.models.backbones import TorchvisionModel
from transfer_vision.models.resnet import ResNet18, ResNet34, ResNet50, ResNet101, ResNet152

ALL = (ResNet18, ResNet34, ResNet50, ResNet101, ResNet152)
STAGES = ["stem", "layer1", "layer2", "layer3", "layer4", "pool"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=7)


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRANSFER_DATA", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def saved(model: nn.Module, path: Path, **changes: Tensor | None) -> str:
    """Save a state dict, with some tensors replaced (None: left out), and return the path."""
    state = {k.replace(".", "_"): (k, v) for k, v in model.state_dict().items()}
    state |= {k: (k, v) for k, v in changes.items() if k not in state}
    tensors = {name: changes.get(key, value) for key, (name, value) in state.items()}
    tensors = {k: v.contiguous() for k, v in tensors.items() if v is not None}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return str(path)


def torchvision_state_dict(backbone: TorchvisionModel) -> dict[str, Tensor]:
    """Return a backbone's tensors under torchvision's names."""
    names = backbone.foreign_models(2)["torchvision"].names
    return {names[name]: value for name, value in backbone.state_dict().items()}


# ------------------------------------------------------------------------------------------------------- architecture


@pytest.mark.parametrize("cls", ALL)
def test_every_architecture_builds_on_meta(cls: type) -> None:
    with torch.device("meta"):
        backbone = cls()
        expected = torchvision.models.get_model(cls.architecture, weights=None)
    assert all(p.is_meta for p in backbone.parameters())
    assert [name for name, _ in backbone.stages.named_children()] == STAGES
    without_classifier = {k: v.shape for k, v in expected.state_dict().items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in torchvision_state_dict(backbone).items()} == without_classifier
    assert backbone.features.size == expected.fc.in_features
    assert backbone.features.layout == "vector"


def test_stages_hold_every_parameter_once() -> None:
    backbone = ResNet18(weights=None)
    held = [id(p) for stage in backbone.stages.children() for p in stage.parameters()]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in backbone.parameters()}
    assert sum(p.numel() for p in backbone.parameters()) == 11_176_512


@pytest.mark.parametrize("cls", [ResNet18, ResNet50])
def test_forward_is_torchvisions_up_to_the_classifier(cls: type) -> None:
    torch.manual_seed(0)
    reference = torchvision.models.get_model(cls.architecture, weights=None).eval()
    backbone = cls(weights=None).eval()
    names = backbone.foreign_models(2)["torchvision"].names
    backbone.load_state_dict({own: reference.state_dict()[name] for own, name in names.items()})
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = backbone(inputs)
        torch.testing.assert_close(reference.fc(features), reference(inputs), atol=1e-5, rtol=1e-5)
    assert features.shape == (2, backbone.features.size)


def test_random_initialisation_is_torchvisions() -> None:
    torch.manual_seed(3)
    reference = torchvision.models.resnet18()
    torch.manual_seed(3)
    assert torch.equal(ResNet18(weights=None).stages.layer4[0].conv1.weight, reference.layer4[0].conv1.weight)


def test_preprocessing_follows_the_weights() -> None:
    with torch.device("meta"):
        default = ResNet50().preprocessing.describe()
        first = ResNet50(weights="IMAGENET1K_V1").preprocessing.describe()
        small = ResNet50(image_size=112).preprocessing.describe()
        own = ResNet50(weights="own.pth", image_size=112, resize=112).preprocessing.describe()
    assert (default["image_size"], default["resize"]) == (224, 232)
    assert (first["image_size"], first["resize"]) == (224, 256)
    assert (small["image_size"], small["resize"]) == (112, 116)
    assert (own["image_size"], own["resize"]) == (112, 112)


def test_listed_augmentation_is_checked_on_meta() -> None:
    with torch.device("meta"):
        ResNet18(augmentation=[{"name": "ColorJitter", "brightness": 0.2}])
        with pytest.raises(ConfigError):
            ResNet18(augmentation=[{"name": "ColourJitter"}])


# ------------------------------------------------------------------------------------------------------- which weights


@pytest.mark.parametrize(
    ("name", "hint"),
    [("imagnet", "imagenet"), ("IMAGENET1K_V2", "IMAGENET1K_V1"), ("weights.ckpt", "FILE.safetensors")],
)
def test_unknown_names_of_weights_are_refused_at_once(name: str, hint: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="has no weights called") as caught:
        ResNet18(weights=name)
    assert hint in str(caught.value)


def test_missing_weights_fail_only_on_load(data_folder: Path) -> None:
    (data_folder / "other.pth").touch()
    with torch.device("meta"):
        backbone = ResNet18(weights="absent.pth")
    with pytest.raises(WeightsError, match=r"no file of weights absent\.pth") as caught:
        backbone.load_pretrained()
    assert "other.pth" in str(caught.value)


def test_no_weights_read_nothing() -> None:
    assert ResNet18(weights=None).load_pretrained() == {}


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_weights_round_trip(model: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = saved(model, tmp_path / f"own{suffix}")
    backbone = ResNet18(weights=path)
    report = backbone.load_pretrained()
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    got = torchvision_state_dict(backbone)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert report == {
        "weights": path,
        "source": path,
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "tensors": 120,
        "left_out": ["fc.bias", "fc.weight"],
    }
    assert json.loads(json.dumps(report)) == report


def test_weights_under_torchvision_names_round_trip(data_folder: Path) -> None:
    first = ResNet18(weights=None)
    save_file(torchvision_state_dict(first), data_folder / "exported.safetensors")
    second = ResNet18(weights="exported.safetensors")
    assert second.load_pretrained()["left_out"] == []
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_files_without_batch_counters_are_read(model: nn.Module, tmp_path: Path) -> None:
    counters = {k.replace(".", "_"): None for k in model.state_dict() if k.endswith("num_batches_tracked")}
    backbone = ResNet18(weights=saved(model, tmp_path / "old.pth", **counters))
    assert backbone.load_pretrained()["tensors"] == 100
    assert torch.equal(torchvision_state_dict(backbone)["bn1.weight"], model.state_dict()["bn1.weight"])


def test_weights_of_another_architecture_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = saved(torchvision.models.resnet34(), tmp_path / "unknown.safetensors")
    with pytest.raises(WeightsError, match="do not fit resnet18") as caught:
        ResNet18(weights=path).load_pretrained()
    assert "weights of resnet34" in str(caught.value)
    assert "unknown: layer1.2." in str(caught.value)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv1_weight": None}, r"missing: conv1\.weight"),
        (
            {"conv1_weight": torch.zeros(64, 1, 7, 7)},
            r"another shape: conv1\.weight \(64, 1, 7, 7\) for \(64, 3, 7, 7\)",
        ),
        ({"conv1_weight": torch.full((64, 3, 7, 7), torch.nan)}, r"not finite: conv1\.weight"),
        ({"extra": torch.zeros(2)}, "unknown: extra"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(
    model: nn.Module, tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    path = saved(model, tmp_path / "odd.safetensors", **changes)
    backbone = ResNet18(weights=path)
    before = [p.clone() for p in backbone.parameters()]
    with pytest.raises(WeightsError, match=message):
        backbone.load_pretrained()
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.parameters(), strict=True))


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


def bad_file(kind: str, folder: Path, model: nn.Module) -> Path:
    path = folder / f"bad{'.safetensors' if 'tensors' in kind else '.pth'}"
    if kind in ("empty .safetensors", "empty .pth"):
        path.touch()
    elif kind in ("text .safetensors", "text .pth"):
        path.write_text("<html>404 not found</html>")
    elif kind.startswith("truncated"):
        saved(model, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "harmful":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"conv1.weight": Harmful()}))
            archive.writestr("archive/version", "3")
    elif kind == "checkpoint":
        torch.save({"model": model.state_dict(), "epoch": 3}, path)
    elif kind == "list":
        torch.save([torch.zeros(2)], path)
    elif kind == "whole model":
        torch.save(model, path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty .safetensors", "cannot be read"),
        ("empty .pth", "cannot be read"),
        ("text .safetensors", "cannot be read"),
        ("text .pth", "cannot be read"),
        ("truncated .safetensors", "cannot be read"),
        ("truncated .pth", "cannot be read"),
        ("harmful", "cannot be read"),
        ("checkpoint", "more than tensors by name: model, epoch"),
        ("list", "more than tensors by name: list"),
        ("whole model", "more than tensors: a complete model, or code"),
    ],
)
def test_bad_files_are_refused(
    kind: str, message: str, model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bad_file(kind, tmp_path, model)
    with pytest.raises(WeightsError, match=message) as caught:
        ResNet18(weights=str(path)).load_pretrained()
    assert str(path) in str(caught.value)
    assert "executed" not in capsys.readouterr().out


def test_old_torch_reads_no_unknown_pickle(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(model, tmp_path / "own.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(WeightsError, match="safely"):
        ResNet18(weights=path).load_pretrained()
    # It takes seconds to make a file whose digest begins as a published one's.
    monkeypatch.setattr(weights_module, "sha256", lambda path: "f37072fd" + "0" * 56)
    with pytest.raises(WeightsError, match="safely"):
        ResNet18(weights=path).load_pretrained()
    published = "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec"
    monkeypatch.setattr(weights_module, "sha256", lambda path: published)
    assert ResNet18(weights=path).load_pretrained()["tensors"] == 120


# -------------------------------------------------------------------------------------------------- published weights


@pytest.mark.parametrize("place", [".", "weights", "torch/hub/checkpoints"])
def test_published_weights_are_found_under_their_usual_name(
    place: str, model: nn.Module, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = data_folder / place / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    saved(model, path)
    monkeypatch.setattr(weights_module, "sha256", lambda path: "f37072fd" + "0" * 56)
    backbone = ResNet18()
    assert Path(backbone.load_pretrained()["source"]) == path
    assert torch.equal(torchvision_state_dict(backbone)["conv1.weight"], model.state_dict()["conv1.weight"])


def test_unpublished_file_is_refused(model: nn.Module, data_folder: Path) -> None:
    path = saved(model, data_folder / "resnet18-f37072fd.pth")
    with pytest.raises(WeightsError, match="starts with f37072fd") as caught:
        ResNet18().load_pretrained()
    assert path in str(caught.value)


def test_error_without_network_names_file_and_path(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(url: str, name: str, sha256: str) -> Path:
        assert sha256 == "11ad3fa6"
        asked.append((url, name))
        raise DataError(
            f"{name} cannot be downloaded", fix=f"download {url} elsewhere and put it at {data_folder / name}"
        )

    monkeypatch.setattr(weights_module, "download", offline)
    with pytest.raises(WeightsError) as caught:
        ResNet50().load_pretrained()
    assert asked == [("https://download.pytorch.org/models/resnet50-11ad3fa6.pth", "weights/resnet50-11ad3fa6.pth")]
    assert str(data_folder / "weights" / "resnet50-11ad3fa6.pth") in str(caught.value)
