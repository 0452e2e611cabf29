"""Optimizers, schedulers, metrics and samplers of plugins, each a few lines, in a config."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.optim import SGD, lr_scheduler

import transfer
from transfer import ConfigError, DataSpec, PluginError, Sampler, register
from transfer.builtin.metrics import MeanOf
from transfer.builtin.samplers import Balanced


class Sign(torch.optim.Optimizer):
    """Steps of equal size in the direction of the sign of the gradient.

    Args:
        lr: Size of a step.
        shrink: Factor of the parameters in each step.
    """

    def __init__(self, params: Any, lr: float = 0.1, shrink: float = 1.0) -> None:
        if shrink <= 0:
            raise ValueError(f"expected shrink > 0, got {shrink}")
        super().__init__(params, {"lr": lr, "shrink": shrink})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(group["shrink"]).sub_(parameter.grad.sign(), alpha=group["lr"])


class Triangle(lr_scheduler.LRScheduler):
    """Linear decrease to zero over the steps of a phase."""

    steps_per_batch = True

    def __init__(self, optimizer: Any, total_steps: int, power: float = 1.0, last_epoch: int = -1) -> None:
        self.total_steps, self.power = total_steps, power
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        rest = max(0.0, 1 - self.last_epoch / self.total_steps)
        return [rate * rest**self.power for rate in self.base_lrs]


class Errors(MeanOf):
    """Fraction of wrong predictions, times a factor.

    Args:
        factor: Factor of the fraction.
    """

    higher_is_better = False

    def __init__(self, data: DataSpec, *, factor: float = 1.0) -> None:
        super().__init__(lambda predictions, targets: factor * (predictions != targets).float())


class EveryOther(Sampler):
    """Every second example, from the first or the second on by turns."""

    def order(self, targets: npt.NDArray[Any], seed: int, epoch: int) -> npt.NDArray[np.int64]:
        return np.arange(epoch % 2, len(targets), 2)


@pytest.fixture
def kinds(config: dict[str, Any]) -> dict[str, Any]:
    """Register one plugin of each kind, and return a config."""
    register("optimizer", "sign")(Sign)
    register("scheduler", "triangle")(Triangle)
    register("metric", "errors")(Errors)
    register("sampler", "every_other")(EveryOther)
    return config


def test_each_kind_is_used_by_a_run(kinds: dict[str, Any], tmp_path: Any) -> None:
    kinds["task"]["metrics"] = ["errors"]
    kinds["train"] |= {
        "optimizer": {"name": "sign", "lr": {"head": 0.01, "backbone": 0.001}, "shrink": 0.99},
        "scheduler": {"name": "triangle", "power": 2.0},
        "sampler": {"name": "every_other"},
    }
    run = transfer.run(kinds, output=tmp_path)
    for record in (run.summary["validation"], run.summary["test"]):
        assert record["errors"] == pytest.approx(1 - record["accuracy"], abs=1e-6)
    first, second = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    assert (first["lr"]["head"], first["lr"]["first"]) == (0.01, 0.001)
    assert second["lr"]["head"] == pytest.approx(0.01 * 0.5**2, rel=0.15)  # half of the steps are done
    assert transfer.evaluate(run.folder) == {
        k: run.summary["test"][k] for k in ("loss", "accuracy", "f1_macro", "errors")
    }


def test_resume_continues_plugin_scheduler_and_sampler(kinds: dict[str, Any], tmp_path: Any) -> None:
    kinds["train"] |= {"scheduler": {"name": "triangle"}, "sampler": {"name": "balanced"}, "phases": [{"epochs": 4}]}
    complete = transfer.run(kinds, output=tmp_path / "a")

    def stop(event: Any) -> None:
        if type(event).__name__ == "EpochEnded" and event.record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.run(kinds, output=tmp_path / "b", observe=stop)
    (folder,) = (tmp_path / "b").iterdir()
    assert transfer.resume(folder).summary["test"] == complete.summary["test"]


@pytest.mark.parametrize(
    ("section", "block", "message"),
    [
        ("optimizer", {"name": "sing"}, "unknown optimizer 'sing'"),
        ("optimizer", {"name": "sign", "shrnk": 2.0}, "unknown option 'shrnk' of optimizer 'sign'"),
        ("optimizer", {"name": "sign", "shrink": -1.0}, "Sign of a plugin refuses its options: expected shrink > 0"),
        ("scheduler", {"name": "triangle", "total_steps": 3}, "unknown option 'total_steps' of scheduler 'triangle'"),
        ("scheduler", {"name": "triangel"}, "did you mean 'triangle'?"),
        ("sampler", {"name": "balancd"}, "did you mean 'balanced'?"),
    ],
)
def test_wrong_block_is_named(section: str, block: dict[str, Any], message: str, kinds: dict[str, Any]) -> None:
    kinds["train"][section] = block
    with pytest.raises(transfer.UserError) as caught:
        transfer.check(kinds)
    assert message in str(caught.value)


def test_wrong_metrics_are_named(kinds: dict[str, Any]) -> None:
    kinds["task"]["metrics"] = ["eror", {"name": "errors", "factr": 1.0}]
    with pytest.raises(ConfigError) as caught:
        transfer.check(kinds)
    assert [problem.message for problem in caught.value.problems] == [
        "unknown metric 'eror'",
        "unknown option 'factr' of metric 'errors'",
    ]
    kinds["task"]["metrics"] = ["errors", {"name": "errors", "factor": 2.0}]
    with pytest.raises(ConfigError, match=r"task\.metrics adds 'errors', which exists already"):
        transfer.check(kinds)


def test_order_with_wrong_indices_is_refused(kinds: dict[str, Any], tmp_path: Any) -> None:
    class Beyond(EveryOther):
        """One index too many."""

        def order(self, targets: npt.NDArray[Any], seed: int, epoch: int) -> npt.NDArray[np.int64]:
            return np.arange(len(targets) + 1)

    register("sampler", "beyond")(Beyond)
    kinds["train"]["sampler"] = {"name": "beyond"}
    with pytest.raises(PluginError, match="the order of sampler Beyond is wrong: expected int64 indices"):
        transfer.run(kinds, output=tmp_path)


def test_torchs_classes_keep_their_names(kinds: dict[str, Any]) -> None:
    register("optimizer", "sgd")(Sign)
    kinds["train"]["optimizer"] = {"name": "sgd", "momentum": 0.5}
    checked, _ = transfer.check(kinds)
    assert checked.optimizer.cls is SGD


def test_balanced_sampler_draws_classes_equally() -> None:
    targets = np.repeat([0, 1], [950, 50])
    one, again, other = (Balanced().order(targets, 3, epoch) for epoch in (0, 0, 1))
    assert len(one) == 1000
    assert 0.4 < targets[one].mean() < 0.6
    assert (one == again).all()
    assert (one != other).any()


@pytest.mark.usefixtures("kinds")
def test_schema_and_list_contain_them(call: Callable[..., tuple[int, str, str]]) -> None:
    assert "balanced" in call("plugins")[1]
    assert "shrink" in call("show", "optimizer", "sign")[1]
    status, out, _ = call("show", "sampler", "balanced")
    assert (status, "Draws classes with equal probability" in out) == (0, True)
