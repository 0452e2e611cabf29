"""Linear heads solved by L-BFGS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import POINT_SIZE, Dense, PointPreprocessing

import transfer
from transfer import ConfigError, Preprocessing, register
from transfer.config.check import load_config
from transfer.runs.train import Run
from transfer.training.build import build
from transfer.training.events import Note
from transfer.training.experiment import Experiment
from transfer.training.solver import Solution, head_inputs, solve

SOLVED = "train.phases=[{epochs: 1, freeze: backbone, solver: lbfgs}]"


def solution(config: dict[str, Any], *overrides: str) -> tuple[Experiment, Solution, torch.Tensor]:
    """Return the solution and the features (N, D) of the training examples."""
    experiment = build(load_config(config, [SOLVED, *overrides]), lambda _: None).experiment
    sources = {
        name: experiment.batches_for(loader, len(experiment.model) - 1)
        for name, loader in (("train", experiment.train), ("validation", experiment.validation))
        if loader is not None
    }
    return experiment, solve(experiment, sources), head_inputs(experiment, sources["train"])[0]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.validation=0"],
        ["task.class_weights=balanced", "task.label_smoothing=0.1"],
        ["data.target=number", "task={name: regression}"],
    ],
    ids=["softmax", "no-validation", "weighted", "regression"],
)
def test_solution_minimizes_the_penalized_loss(config: dict[str, Any], overrides: list[str]) -> None:
    experiment, solved, features = solution(config, *overrides)
    scale = (features - features.mean(0)).square().sum(1).mean().sqrt()
    weight, bias = solved.weight.clone().requires_grad_(), solved.bias.clone().requires_grad_()
    outputs = features @ weight.T + bias
    if (scaling := experiment.model.output_scaling) is not None:
        outputs = scaling[0] + scaling[1] * outputs
    loss = experiment.task.loss(outputs, solved.targets).mean()
    penalty = solved.strength / 2 * (scale * weight).square().sum()
    for gradient in torch.autograd.grad(loss + penalty, [weight, bias]):
        assert float(gradient.abs().max()) < 1e-4 * float(scale)
    assert torch.allclose(outputs.detach().float(), solved.outputs, atol=1e-5)


def recipe(config: dict[str, Any], text: str, *overrides: str) -> tuple[Any, list[str]]:
    """Return the built experiment of a recipe, and the notes."""
    del config["train"]["phases"]
    notes: list[str] = []
    checked = load_config(config, [f"train.recipe={text}", *overrides])
    built = build(checked, lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    return built, [note for note in notes if "gradient steps" in note]


def test_feature_extraction_is_an_ordinary_run(config: dict[str, Any], tmp_path: Path) -> None:
    del config["train"]["phases"]
    run: Run = transfer.run(config, ["train.recipe={name: feature_extraction, epochs: 9}"], output=tmp_path)
    (record,) = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    assert record["l2"] > 0
    assert record["train"]["accuracy"] > 0.6
    assert run.summary["epochs"] == 1
    assert transfer.evaluate(run.folder) == run.summary["test"]
    assert "solver: lbfgs" in (run.folder / "config.yaml").read_text()


def test_lp_ft_tunes_after_the_solved_head(config: dict[str, Any]) -> None:
    built, notes = recipe(config, "{name: lp_ft, epochs: 4}")
    solved, tuned = built.experiment.phases
    assert (solved.epochs, solved.solver, tuned.epochs, tuned.solver) == (1, "lbfgs", 3, "gradient")
    assert (solved.frozen.batch_norm, tuned.frozen.batch_norm) == ("frozen", "eval")
    assert tuned.scheduler.name == "cosine"
    assert built.config.resolved["train"]["recipe"]["batch_norm"] == "eval"
    assert not notes


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["head.dropout=0.5"], "without dropout"),
        (["head={name: mlp}"], "not one linear layer"),
        (["train.ema=0.9"], "train.ema"),
        (["data.target=number", "task={name: regression, loss: absolute}"], "not convex and smooth"),
    ],
)
def test_other_heads_are_trained_by_gradient_steps(config: dict[str, Any], overrides: list[str], reason: str) -> None:
    built, notes = recipe(config, "{name: feature_extraction, epochs: 2}", *overrides)
    assert [(phase.epochs, phase.solver) for phase in built.experiment.phases] == [(2, "gradient")]
    assert len(notes) == 1
    assert reason in notes[0]
    with pytest.raises(ConfigError, match=reason) as caught:
        transfer.check(config, ["train.recipe={name: feature_extraction, epochs: 2, solver: lbfgs}", *overrides])
    assert (
        caught.value.problems[0].where == "override 'train.recipe={name: feature_extraction, epochs: 2, solver: lbfgs}'"
    )


def test_solved_phase_refuses_gradient_settings(config: dict[str, Any]) -> None:
    for text in ("{epochs: 2, freeze: backbone, solver: lbfgs}", "{epochs: 1, solver: lbfgs}"):
        with pytest.raises(ConfigError, match="needs epochs: 1 and freeze: backbone"):
            transfer.check(config, [f"train.phases=[{text}]"])
    with pytest.raises(ConfigError, match="no effect with solver: lbfgs"):
        transfer.check(config, ["train.phases=[{epochs: 1, freeze: backbone, solver: lbfgs, lr: 0.1}]"])
    del config["train"]["phases"]
    with pytest.raises(ConfigError, match="solver of the recipe 'fine_tune' has no effect"):
        transfer.check(config, ["train.recipe={name: fine_tune, epochs: 2, solver: lbfgs}"])


class Jitter(Dense):
    """Dense stages whose preprocessing adds noise to training examples."""

    @property
    def preprocessing(self) -> Preprocessing:
        return Noisy()


class Noisy(PointPreprocessing):
    """Points with noise in training."""

    augments = True

    def augment(self, encoded: Any) -> Any:
        return encoded + torch.randn(POINT_SIZE)


@pytest.mark.parametrize(
    ("name", "views", "solvers"),
    [
        ("feature_extraction", None, ["gradient"]),
        ("feature_extraction", "auto", ["lbfgs"]),
        ("feature_extraction", 2, ["lbfgs"]),
        ("lp_ft", None, ["lbfgs", "gradient"]),
    ],
)
def test_augmented_examples(
    config: dict[str, Any], tmp_path: Path, name: str, views: int | str | None, solvers: list[str]
) -> None:
    register("backbone", "jitter")(Jitter)
    del config["train"]["phases"]
    config["train"]["views"] = views
    overrides = ["backbone.name=jitter", f"train.recipe={{name: {name}, epochs: 2}}"]
    _, parts = transfer.check(config, overrides)
    assert [phase.solver for phase in parts.phases] == solvers
    run = transfer.run(config, overrides, output=tmp_path)
    report = run.summary["cache"][0]
    assert report["cached"] == (solvers[0] == "lbfgs")
    assert report.get("views") == (None if views == "auto" else views)
