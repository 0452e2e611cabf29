"""Checkpoints of somebody else: nothing of another dtype, shape, name or type reaches a kernel of torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import transfer
from transfer import RunError
from transfer.storage import checkpoint

Edit = Callable[[dict[str, Any]], object]


class Killed(BaseException):
    """Stands in for a signal that nothing can catch."""


_RUNS: dict[tuple[str, ...], Path] = {}


@pytest.fixture
def stopped(
    config: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Return a function that starts a run, kills it in its second epoch, and returns a copy of its folder."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    save, count = checkpoint.save, 0

    def counting(*arguments: Any, **options: Any) -> None:
        nonlocal count
        save(*arguments, **options)
        count += 1
        if count == 6:
            raise Killed

    def start(*overrides: str) -> Path:
        if overrides not in _RUNS:
            output = tmp_path_factory.mktemp("stopped")
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "save", counting)
                with pytest.raises(Killed):
                    transfer.run(config, ["train.checkpoint.every_steps=3", *overrides], output=output)
            (_RUNS[overrides],) = output.iterdir()
            shutil.rmtree(_RUNS[overrides] / "checkpoints" / "last.previous")
        return Path(shutil.copytree(_RUNS[overrides], tmp_path / "run"))

    return start


ADAM = ("train.ema=0.9", "train.optimizer={name: adam}", "train.scheduler={name: cosine}")


def edit_tensors(run: Path, file: str, suffix: str, change: Callable[[Tensor], Tensor]) -> None:
    path = run / "checkpoints" / "last" / f"{file}.safetensors"
    tensors = {n: change(t) if n.endswith(suffix) else t for n, t in load_file(path).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    edit_state(run, lambda state: None)


def edit_state(run: Path, change: Edit, name: str = "last") -> None:
    """Change ``state.json``, and write the digests again, as somebody would who wants the checkpoint to be taken."""
    folder = run / "checkpoints" / name
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    del state["own_sha256"]
    change(state)
    if isinstance(state.get("sha256"), dict):
        state["sha256"] |= {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safet*")
        }
    digest = checkpoint._digest_of(state)
    (folder / "state.json").write_text(json.dumps({**state, "own_sha256": digest}), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "suffix", "change", "message"),
    [
        (
            "optimizer",
            "/exp_avg",
            Tensor.double,
            "exp_avg of .* wrong dtype: expected torch.float32, got torch.float64",
        ),
        ("optimizer", "/exp_avg", lambda t: t.reshape(-1)[:1].clone(), "exp_avg of .* wrong shape"),
        ("optimizer", "/exp_avg_sq", lambda t: t.to(torch.int8), "exp_avg_sq of .* wrong dtype"),
        ("optimizer", "/exp_avg_sq", lambda t: t * torch.nan, "exp_avg_sq of .* not finite"),
        ("optimizer", "/step", lambda t: t.new_zeros(0), "step of .* wrong shape"),
        ("optimizer", "/step", Tensor.long, "step of .* wrong dtype"),
        ("optimizer", "/step", lambda t: t * -1, "step of .* is negative"),
        ("model", "first.0.weight", Tensor.half, "first.0.weight has the wrong dtype"),
        ("model", "first.0.weight", lambda t: t[:1], "first.0.weight has the wrong shape"),
        ("model", "first.0.weight", lambda t: t * torch.inf, "first.0.weight has values that are not finite"),
        ("average", "n_averaged", lambda t: t.double(), "n_averaged has the wrong dtype"),
        ("average", "head.output.bias", lambda t: t[:1], "head.output.bias has the wrong shape"),
        ("metrics", "/tp", lambda t: t.new_zeros(7), "tp has the dtype torch.int64 and the shape"),
        ("metrics", "/tp", Tensor.float, "tp has the dtype torch.float32"),
        ("metrics", "/fp", Tensor.bool, "fp has the dtype torch.bool"),
    ],
)
def test_restored_tensors_of_another_layout_are_refused(
    stopped: Callable[..., Path], file: str, suffix: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    run = stopped(*ADAM)
    edit_tensors(run, file, suffix, change)
    with pytest.raises(RunError, match=message):
        transfer.resume(run)


def at(path: str, value: Any) -> Edit:
    """Return a function that sets a value in nested data."""
    *way, last = path.split(".")

    def change(state: dict[str, Any]) -> None:
        node: Any = state
        for step in way:
            node = node[int(step) if isinstance(node, list) else step]
        node[int(last) if isinstance(node, list) else last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("groups.0.amsgrad", True, "amsgrad is True"),
        ("groups.0.eps", -1.0, "eps is -1.0"),
        ("groups.0.betas", [1.0, 0.9], "betas is"),
        ("groups.0.lr", "1", "lr is '1'"),
        ("schedule.scheduler.T_max", 0, "T_max of the scheduler is 0"),
        ("schedule.scheduler.step", 5, "step of the scheduler is 5"),
        ("schedule.scheduler.last_epoch", "x", "last_epoch of the scheduler is 'x'"),
        ("progress.phase", 0, "progress.phase"),
        ("progress.epoch.batches", None, "progress.epoch.batches"),
        ("progress.best", None, "contradict each other"),
        ("progress.best.validation", {}, "contradict each other"),
        ("progress.trained_seconds", 0, "contradict each other"),
        ("progress.records.0.epoch", "one", "epoch"),
        ("optimizer.first.0.weight", [1], "optimizer"),
        ("metric_updates", {}, "other metrics"),
        ("origin", [], "origin"),
        ("sha256", None, "sha256"),
    ],
)
def test_restored_plain_data_of_another_type_is_refused(
    stopped: Callable[..., Path], path: str, value: Any, message: str
) -> None:
    run = stopped(*ADAM)
    if path.startswith("optimizer."):  # names of parameters contain dots
        edit_state(run, lambda state: state["optimizer"].update({"first.0.weight/x": value}))
    else:
        edit_state(run, at(path, value))
    with pytest.raises(RunError, match=message):
        transfer.resume(run)


def test_optimizer_state_of_untrained_parameter_is_refused(stopped: Callable[..., Path]) -> None:
    run = stopped(*ADAM)
    path = run / "checkpoints" / "last" / "optimizer.safetensors"
    save_file({n.replace("first.0.bias", "other"): t for n, t in load_file(path).items()}, path)
    edit_state(run, lambda state: None)
    with pytest.raises(RunError, match="'other' is no parameter that is trained"):
        transfer.resume(run)


def test_best_weights_of_other_layout_are_refused(stopped: Callable[..., Path]) -> None:
    run = stopped(*ADAM)
    perfect = {"loss": 0.0, "accuracy": 1.0, "f1_macro": 1.0}
    # No later epoch is better, so that the checkpoint is read at the end and not replaced.
    edit_state(run, at("progress.best.validation", perfect))
    edit_state(run, at("progress.records.0.validation", perfect))
    path = run / "checkpoints" / "best" / "model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path)
    edit_state(run, at("validation", perfect), "best")
    with pytest.raises(RunError, match="wrong dtype"):
        transfer.resume(run)


@pytest.mark.parametrize(
    "name", ["adam", "adamw", "sgd", "adagrad", "adadelta", "rmsprop", "nadam", "rprop", "asgd", "adafactor"]
)
def test_the_state_of_every_optimizer_is_restored(stopped: Callable[..., Path], name: str) -> None:
    if name == "adafactor" and torch.__version__ < "2.5":
        pytest.skip("this version of torch has no Adafactor")
    run = stopped(
        f"train.optimizer={{name: {name}}}", "train.scheduler={name: one_cycle}", "train.phases=[{epochs: 2}]"
    )
    assert transfer.resume(run).summary["status"] == "complete"
