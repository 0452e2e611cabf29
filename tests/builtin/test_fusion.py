"""Two fields at once: addressed by part, frozen by part, and worth more than either alone."""

from __future__ import annotations

import copy
import json
import shutil
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import transfer
from transfer import ConfigError, Data, Dataset, DataSpec, Split

PARTS = {"left": {"name": "dense"}, "right": {"name": "other"}}


class Pairs(Dataset):
    """Two points per example; the class is ``same`` where both lie on the same side of the origin.

    Args:
        count: Examples in all; a quarter of them is the test split.
    """

    def __init__(self, *, count: int = 400) -> None:
        self.count = count

    @property
    def spec(self) -> DataSpec:
        """Fields ``point`` and ``second``."""
        return DataSpec(("point", "second"), "class", ("different", "same"))

    def load(self) -> Data:
        """Draw them; one point alone says nothing of the class."""
        generator = np.random.default_rng(0)
        points = generator.normal(size=(2, self.count, 4))
        points += np.sign(points[:, :, :1])
        same = (points[0, :, 0] > 0) == (points[1, :, 0] > 0)
        whole = Split({"point": points[0].tolist(), "second": points[1].tolist()}, same.astype(np.int64))
        test = self.count // 4
        splits = {"train": whole.select(np.arange(test, self.count)), "test": whole.select(np.arange(test))}
        return Data(self.spec, splits)


@pytest.fixture
def fused(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a fusion of two dense backbones over two fields."""
    dense = transfer.registry.entry_points.load("backbone", "dense")

    class Other(dense):  # type: ignore[misc,valid-type]
        """The same over the field ``second``."""

        field: ClassVar[str] = "second"

    transfer.register("dataset", "pairs")(Pairs)
    transfer.register("backbone", "other")(Other)
    config |= {"data": {"name": "pairs"}, "backbone": {"name": "fusion", "parts": copy.deepcopy(PARTS)}}
    config["head"] = {"name": "mlp"}
    config["train"]["phases"] = [{"epochs": 12}]
    config["train"]["optimizer"] = {"name": "adam", "lr": 0.02}
    return config


def test_stages_go_by_the_name_of_their_part(fused):
    _, parts = transfer.check(fused)
    stages = [f"{part}.{stage}" for part in ("left", "right") for stage in ("first", "second", "third")]
    assert list(parts.model.stages) == [*stages, "join", "head"]
    assert "right.third.0.0.weight" in dict(parts.model.named_parameters())
    assert parts.shapes["join"] == "(B, 16)"


@pytest.mark.parametrize("join", ["concatenate", "gate"])
def test_fusion_beats_each_single_field(fused, tmp_path, join):
    fused["backbone"]["join"] = join
    both = transfer.run(fused, output=tmp_path).summary["test"]["accuracy"]
    alone = [
        transfer.run(fused | {"backbone": block}, output=tmp_path).summary["test"]["accuracy"]
        for block in PARTS.values()
    ]
    assert both > 0.9 > 0.65 > max(alone)


def test_freeze_by_part_name(fused, tmp_path):
    fused["train"]["phases"] = [{"epochs": 1, "freeze": ["left", "right.first"]}]
    _, parts = transfer.check(fused)
    (phase,) = parts.phases
    assert phase.frozen.stages == {"left.first", "left.second", "left.third", "right.first"}
    cached = transfer.run(fused, output=tmp_path).summary
    assert cached["cache"][0]["stages"] == ["left.first", "left.second", "left.third", "right.first"]
    fused["train"]["cache"] = "off"
    assert transfer.run(fused, output=tmp_path).summary["test"] == pytest.approx(cached["test"], rel=1e-5)


def test_learning_rate_by_part_name(fused):
    fused["train"]["optimizer"]["lr"] = {"head": 0.01, "backbone": 0.002, "left": 0.005, "left.third": 0.007}
    _, parts = transfer.check(fused)
    rates = {group.stage: group.lr for group in parts.phases[0].groups}
    assert (rates["left.first"], rates["left.third"], rates["right.first"]) == (0.005, 0.007, 0.002)


def test_a_model_comes_back_and_predicts(fused, tmp_path):
    run = transfer.run(fused, output=tmp_path)
    assert transfer.evaluate(run.folder) == run.summary["test"]
    text = json.dumps({"left": "3,0,0,0", "right": "2,0,0,0"})
    (answer,) = transfer.predict(run.folder, [text])
    assert answer["label"] == "same"


def test_features_of_all_parts_are_cached(fused, tmp_path):
    fused["train"]["phases"] = [{"epochs": 2, "freeze": "backbone"}]
    cached = transfer.run(fused, output=tmp_path).summary
    assert cached["cache"][0]["cached"]
    fused["train"]["cache"] = "off"
    assert transfer.run(fused, output=tmp_path).summary["test"] == pytest.approx(cached["test"], rel=1e-5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"left": {"name": "dense"}, "right": {"name": "steps"}}, "returns a sequence: expected a vector"),
        ({"left": {"name": "dense"}, "right": {"name": "fusion", "parts": PARTS}}, "is itself a fusion"),
        ({"left": {"name": "dense"}, "a b": {"name": "other"}}, "cannot be called 'a b'"),
        ({"left": {"name": "dense"}, "right": {"name": "other", "widht": 3}}, "widht"),
        ({"left": {"name": "dense"}}, "parts"),
    ],
)
def test_what_cannot_be_fused_is_refused(fused, parts, message):
    fused["backbone"]["parts"] = parts
    with pytest.raises(ConfigError, match=message):
        transfer.check(fused)


def test_a_field_that_the_data_lacks_is_named(fused):
    fused["data"] = {"name": "points"}
    with pytest.raises(ConfigError, match="takes the field 'second'"):
        transfer.check(fused)


def test_gates_are_those_of_the_paper():
    from transfer.builtin.fusion import _Gates

    torch.manual_seed(0)
    gates = _Gates([3, 5], 4)
    one, two = torch.randn(2, 3), torch.randn(2, 5)
    weights = gates.gates(torch.cat([one, two], 1)).view(2, 2, 4).softmax(1)
    expected = weights[:, 0] * gates.projections[0](one).tanh() + weights[:, 1] * gates.projections[1](two).tanh()
    torch.testing.assert_close(gates((one, two)), expected)


def test_a_part_starts_from_a_run(fused, tmp_path):
    fused["train"]["phases"] = [{"epochs": 1}]
    run = transfer.run(fused | {"backbone": PARTS["left"]}, output=tmp_path / "a").folder
    fused["backbone"]["parts"]["left"]["weights"] = str(run)
    fused["train"]["phases"] = [{"epochs": 1, "freeze": ["left"]}]
    summary = (done := transfer.run(fused, output=tmp_path / "b")).summary
    assert summary["pretrained"]["left"]["weights"] == str(run)
    one, other = (load_file(folder / "model/weights.safetensors") for folder in (run, done.folder))
    for name, tensor in one.items():
        stage, _, rest = name.partition(".")
        assert stage == "head" or torch.equal(other[f"left.{stage}.0.{rest}"], tensor), name
    shutil.rmtree(run)  # the saved model does not need the run
    assert transfer.evaluate(done.folder) == summary["test"]
    fused["backbone"]["parts"] = {"left": PARTS["left"], "right": {**PARTS["right"], "weights": str(done.folder)}}
    with pytest.raises(transfer.WeightsError, match="wrong backbone in this run: expected 'other', got 'fusion'"):
        transfer.check(fused)
    transfer.check(fused | {"train": {"recipe": {"name": "scratch", "epochs": 1}}})
