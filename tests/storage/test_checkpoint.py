"""Checkpoints that are never half there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Dense

from transfer import RunError
from transfer.builtin.heads import Linear
from transfer.models.model import Model
from transfer.storage import checkpoint
from transfer.storage.checkpoint import load, save
from transfer.storage.tensor_files import load_tensors
from transfer.training.optimizer_state import optimizer_tensors


def weights(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((3, 2), value), "b": torch.tensor([1, 2])}}


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """Return the folder of a checkpoint of epoch 2, beside that of epoch 1."""
    folder = tmp_path / "last"
    for epoch in (1, 2):
        save(folder, weights(epoch), {"epoch": epoch})
    return folder


def test_a_checkpoint_comes_back(last: Path) -> None:
    tensors, state = load(last)
    assert torch.equal(tensors["model"]["a"], torch.full((3, 2), 2.0))
    assert tensors["model"]["b"].dtype == torch.int64
    assert state["epoch"] == 2
    assert "recovered" not in state


def test_save_leaves_no_temporary_files(last: Path) -> None:
    assert sorted(p.name for p in last.parent.iterdir()) == ["last", "last.previous"]
    assert sorted(p.name for p in last.iterdir()) == ["model.safetensors", "state.json"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "state", "folder"])
def test_damaged_checkpoint_falls_back_to_previous(last: Path, damage: str) -> None:
    file = last / "model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-8])
    elif damage == "remove":
        file.unlink()
    elif damage == "state":
        (last / "state.json").write_text("{", encoding="utf-8")
    else:
        last.rename(last.parent / "gone")
    tensors, state = load(last)
    assert state["epoch"] == 1
    assert tensors["model"]["a"][0, 0] == 1.0
    assert state["recovered"]


def test_two_damaged_checkpoints_are_an_error(last: Path) -> None:
    for folder in (last, last.parent / "last.previous"):
        (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="damaged"):
        load(last)


def test_no_checkpoint_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no complete checkpoint"):
        load(tmp_path / "last")


def test_digest_with_path_stays_in_folder(last: Path) -> None:
    state = json.loads((last / "state.json").read_text(encoding="utf-8"))
    state["sha256"] = {"../last.previous/model.safetensors": state["sha256"]["model.safetensors"]}
    del state["own_sha256"]
    state["own_sha256"] = checkpoint._digest_of(state)  # whoever edits a file can do that too
    (last / "state.json").write_text(json.dumps(state), encoding="utf-8")
    tensors, _ = load(last)
    assert tensors["model"]["a"][0, 0] == 2.0


def test_edited_state_falls_back_to_previous(last: Path) -> None:
    state = json.loads((last / "state.json").read_text(encoding="utf-8"))
    (last / "state.json").write_text(json.dumps(state | {"epoch": 7}), encoding="utf-8")
    _, state = load(last)
    assert state["epoch"] == 1
    assert "edited" in state["recovered"]


def test_save_views_and_shared_tensors(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    save(tmp_path / "last", {"model": {"t": whole.T, "row": whole[1]}}, {})
    tensors, _ = load(tmp_path / "last")
    assert torch.equal(tensors["model"]["t"], whole.T)
    assert torch.equal(tensors["model"]["row"], whole[1])


def test_no_pickle_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(RunError, match="cannot be read"):
        load_tensors(tmp_path / "weights.safetensors")


def test_optimizer_state_is_keyed_by_parameter_names() -> None:
    backbone = Dense()
    model = Model(backbone, Linear(backbone.features, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    tensors, rest = optimizer_tensors(model, optimizer)
    assert tensors["head.output.weight/exp_avg"].shape == (2, 8)
    assert {name.partition("/")[0] for name in tensors} == {name for name, _ in model.named_parameters()}
    json.dumps(rest)
