"""The learning-rate range test."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transfer
from transfer import ConfigError, RunError, find_learning_rate
from transfer.config.check import load_config
from transfer.experiments import lr_finder as learning_rate

QUICK = {"steps": 40, "lowest": 1e-5, "highest": 1e3}


def test_rates_rise_evenly_on_a_logarithmic_scale_until_training_diverges(
    config: dict[str, Any], tmp_path: Path
) -> None:
    overrides = ["train.optimizer={name: sgd, lr: 0.1}", "data.distance=8"]
    found = find_learning_rate(config, overrides, output=tmp_path / "curve.svg", **QUICK)
    ratios = [b / a for a, b in zip(found.rates[:-1], found.rates[1:], strict=True)]
    assert ratios == pytest.approx([1e8 ** (1 / 39)] * len(ratios))
    assert len(found.rates) == len(found.losses) == len(found.smoothed) >= learning_rate.MIN_STEPS
    assert found.rates[0] == 1e-5
    assert found.rates[0] < found.steepest <= 10 * found.tenth_of_lowest


def test_the_suggestion_trains_and_names_where_the_rate_stands(config: dict[str, Any], tmp_path: Path) -> None:
    found = find_learning_rate(config, output=tmp_path / "curve.svg", **QUICK)
    assert load_config(config, [found.assignment]).optimizer_options.lr == pytest.approx(found.suggestion, rel=0.05)


def test_a_default_optimizer_is_named_too(config: dict[str, Any], tmp_path: Path) -> None:
    del config["train"]["optimizer"]
    found = find_learning_rate(config, output=tmp_path / "curve.svg", **QUICK)
    checked = load_config(config, [found.assignment])
    assert checked.optimizer.name == "adam"
    assert checked.optimizer_options.lr == pytest.approx(found.suggestion, rel=0.05)


def test_groups_keep_their_proportion(config: dict[str, Any], tmp_path: Path) -> None:
    overrides = ["train.phases=[{epochs: 1, lr: {head: 0.02, backbone: 0.01, layer_decay: 0.5}}]"]
    found = find_learning_rate(config, overrides, output=tmp_path / "curve.svg", **QUICK)
    key, _, value = found.assignment.partition("=")
    rates = json.loads(value)
    assert key == "train.phases.0.lr"
    assert rates["head"] == pytest.approx(found.suggestion, rel=0.05)
    assert rates["backbone"] == pytest.approx(found.suggestion / 2, rel=0.1)
    assert rates["layer_decay"] == 0.5


def test_the_steepest_descent_of_a_curve_that_is_known() -> None:
    logs = [-6 + 0.1 * i for i in range(60)]
    # Flat, then falling along a logistic curve whose middle is at 1e-3, then rising.
    losses = [1 / (1 + math.exp(4 * (x + 3))) + (max(0.0, x + 1.5) ** 2) for x in logs]
    assert learning_rate._steepest([10**x for x in logs], losses) == pytest.approx(1e-3, rel=0.3)


@pytest.mark.parametrize("seed", range(4))
def test_suggestion_for_a_noisy_curve_is_below_divergence(seed: int) -> None:
    rates = np.geomspace(1e-7, 10, 100)
    # Noise only, then divergence from 0.01 on: the slope means nothing, the rise does.
    losses = 0.69 + np.maximum(0, np.log10(rates) + 2) + 0.03 * np.random.default_rng(seed).normal(size=100)
    smoothed = learning_rate._centered(losses.tolist(), learning_rate.WIDTH)
    rate, falls = learning_rate._highest_safe(rates.tolist(), losses.tolist(), smoothed, learning_rate.WIDTH)
    assert 1e-4 < rate < 1e-2
    assert not falls


@pytest.mark.parametrize("part", ["points", "textcnn"])
def test_suggestion_trains_as_well_as_the_default(config: dict[str, Any], tmp_path: Path, part: str) -> None:
    if part == "textcnn":
        config |= {"data": {"name": "mini_reviews", "limit": 150}, "backbone": {"name": "textcnn"}}
        del config["head"]
    config["train"] = {"phases": [{"epochs": 1}], "score_test": False, "report": False}
    found = find_learning_rate(config, output=tmp_path / "curve.svg")
    suggested, default = (
        transfer.run(config, overrides, output=tmp_path).summary["validation"]["loss"]
        for overrides in ([found.assignment], [])
    )
    assert suggested < 1.05 * default


def test_solved_head_has_no_learning_rate(config: dict[str, Any], tmp_path: Path) -> None:
    del config["train"]["phases"]
    with pytest.raises(RunError, match="solved by L-BFGS"):
        find_learning_rate(config, ["train.recipe={name: lp_ft, epochs: 2}"], output=tmp_path / "curve.svg")


def test_the_moving_average_of_a_constant_is_that_constant() -> None:
    assert learning_rate._smooth([2.0] * 5, 0.98) == pytest.approx([2.0] * 5)


def test_the_curve_is_drawn(config: dict[str, Any], tmp_path: Path) -> None:
    found = find_learning_rate(config, output=tmp_path / "curve.svg", **QUICK)
    root = ElementTree.parse(found.plot).getroot()
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [len(found.rates)] * 2


def test_range_test_refuses_descending_bounds(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the range test is invalid: expected .*, got 1 to 0\.1 in 100 steps"):
        find_learning_rate(config, lowest=1.0, highest=0.1, output=tmp_path / "curve.svg")


def test_a_wrong_config_is_told_as_ever(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        find_learning_rate(config, ["train.batch_size=none"])


def test_find_lr_command_refuses_a_missing_config(tmp_path: Path, call: Any) -> None:
    assert call("find-lr", tmp_path / "missing.yaml")[0] == 2


def test_find_lr_command_prints_the_next_command(tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[2] / "configs" / "quickstart_text.yaml"
    status, out, err = call("find-lr", config, "data.limit=40", "--steps", "12", "--highest", "1")
    assert status == 0, err
    assert "suggestion: " in out
    assert "data.limit=40 train.optimizer.lr=" in out
    assert out.splitlines()[-1] == "quickstart_text-find-lr.svg"
    assert (tmp_path / "quickstart_text-find-lr.svg").is_file()
