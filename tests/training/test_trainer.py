"""The Trainer outside of runs: single steps, precision, device and phases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Points
from torch import Tensor, nn

import transfer
from transfer import ConfigError, Data, DataSpec, FeatureSpec, Head, UserError, register
from transfer.config.check import load_config
from transfer.training import build as build_module
from transfer.training.build import build
from transfer.training.engine import Trainer
from transfer.training.events import ignore_events
from transfer.training.experiment import Experiment
from transfer.training.optimizer import learning_rates


def experiment(config: dict[str, Any], *overrides: str, **options: Any) -> Experiment:
    built = build(load_config(config, ["backbone.dropout=0.0", *overrides]), ignore_events).experiment
    return replace(built, options=replace(built.options, **options))


def step(trainer: Trainer, phase: int = 0) -> float:
    """Make a step with the first batch; return its mean loss."""
    trainer.prepare_phase(trainer.experiment.phases[phase])
    batch = next(iter(trainer.experiment.train.epoch(0)))
    (loss,) = trainer.train_step([batch], examples=len(batch.indices))
    return loss.item() / len(batch.indices)


def test_train_step_in_fp16_scales_gradients(config: dict[str, Any]) -> None:
    """torch supports fp16 and its gradient scaler on the CPU too; only the config asks for a GPU."""
    exact, scaled = (Trainer(experiment(config, precision=precision, clip_norm=0.5)) for precision in ("fp32", "fp16"))
    assert [trainer.state.scaler.is_enabled() for trainer in (exact, scaled)] == [False, True]
    assert step(scaled) == pytest.approx(step(exact), rel=0.01)
    assert scaled.state.scaler.get_scale() == 65536
    for one, other in zip(exact.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=0.02, atol=0.002)


def test_checkpoint_contains_scaler_state_in_fp16_only(config: dict[str, Any]) -> None:
    states: list[Any] = []
    for precision in ("fp32", "fp16"):
        trainer = Trainer(experiment(config, precision=precision))
        step(trainer)
        states.append(trainer.state.contents()[1])
    assert states[0]["scaler"] is None
    assert states[1]["scaler"]["scale"] == 65536


def test_train_step_reports_indices_and_rates(config: dict[str, Any]) -> None:
    trainer = Trainer(experiment(config))
    trainer.prepare_phase(trainer.experiment.phases[0])
    batches = [batch for batch, _ in zip(trainer.experiment.train.epoch(0), range(2), strict=False)]
    losses = trainer.train_step(batches, examples=sum(len(batch.indices) for batch in batches))
    assert [loss.step for loss in losses] == [1, 2]
    assert [loss.indices.tolist() for loss in losses] == [batch.indices.tolist() for batch in batches]
    assert losses[0].rates == learning_rates(trainer.state.optimizer)


def test_dry_run_step_counts_nothing(config: dict[str, Any]) -> None:
    trainer = Trainer(experiment(config))
    trainer.prepare_phase(trainer.experiment.phases[0])
    batch = trainer.experiment.train.largest_batch(4)
    for _ in range(2):
        trainer.dry_run_step(batch, batch)
    assert trainer.state.progress.epoch.batches == 1


def test_missing_device_is_refused_with_its_config_line(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="'cuda:99' is not on this machine") as caught:
        transfer.check(config, ["train.device=cuda:99"])
    assert caught.value.problems[0].where == "override 'train.device=cuda:99'"


def test_numbered_device_is_refused_in_distributed_training(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match="expected auto or cuda in distributed training"):
        transfer.check(config, ["train.device=cuda:0"])


def test_device_is_in_the_summary(config: dict[str, Any], tmp_path: Any) -> None:
    assert transfer.run(config, ["train.device=cpu"], output=tmp_path).summary["device"] == "cpu"


def test_phases_of_preflight_are_not_resolved_again(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "resolve_phases", lambda *arguments: pytest.fail("resolved again"))
    assert len(experiment(config, "train.phases=[{epochs: 1, freeze: backbone}, {epochs: 1}]").phases) == 2


class HeadPerClass(Head):
    """Head with a layer per output, so that the number of parameters depends on the classes."""

    layouts = frozenset({"vector"})

    def __init__(self, features: FeatureSpec, out_features: int) -> None:
        super().__init__()
        self.outputs = nn.ModuleList([nn.Linear(features.size, 1) for _ in range(out_features)])

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([output(features) for output in self.outputs], dim=1)


class PointsOfUnknownClasses(Points):
    """Points whose classes are known only after they have been read. There are three."""

    @property
    def spec(self) -> DataSpec:
        return DataSpec(("point",), "class")

    def load(self) -> Data:
        return Data(DataSpec(("point",), "class", ("near", "far", "farther")), super().load().splits)


def test_phases_are_resolved_again_for_new_parameters(config: dict[str, Any]) -> None:
    """Preflight assumes two classes, so that its phases do not name the parameters of the third."""
    register("head", "per_class")(HeadPerClass)
    register("dataset", "unknown_classes")(PointsOfUnknownClasses)
    trained = experiment(config, "head.name=per_class", "data={name: unknown_classes}")
    names = {name for group in trained.phases[0].groups for name in group.parameters}
    assert "head.outputs.2.weight" in names
    assert names == {name for name, _ in trained.model.named_parameters()}
