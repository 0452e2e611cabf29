"""The conformance kit: what keeps its contracts passes, and each broken one is named."""

from __future__ import annotations

import contextlib
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Dense, MeanOfSteps, PointPreprocessing, Points, Steps
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transfer import (
    Data,
    FeatureSpec,
    Head,
    Occlusion,
    PluginError,
    PrimaryMetric,
    Sampler,
    Split,
    WeightsError,
    register,
)
from transfer.builtin.tasks import Classification
from transfer.registry.entry_points import IN_PROCESS, plugins
from transfer.testing import Case, ContractError, contracts, contracts_of
from transfer.testing.suite import quick_check
from transfer.testing.values import variants

POINTS = [[float(i), 1.0, -2.0, 0.5 * i] for i in range(4)]


def failures(case: Case) -> dict[str, str]:
    """Return what is wrong, by contract."""
    found = {}
    for contract in contracts_of(case):
        try:
            contract.check()
        except ContractError as error:
            found[contract.name] = str(error)
        except unittest.SkipTest:  # the options name no weights, or another contract fails for the same reason
            continue
    return found


def broken(kind: Any, cls: type, **options: Any) -> dict[str, str]:
    register(kind, "broken")(cls)
    return failures(Case(kind, "broken", options, POINTS if kind == "backbone" else None))


@pytest.mark.usefixtures("tiny")
def test_what_keeps_its_contracts_passes() -> None:
    checked = contracts(IN_PROCESS, {"dense": [{"width": 4}, {"dropout": 0.5}]}, values={"dense": POINTS})
    assert {contract.case.name for contract in checked} == {
        f"{IN_PROCESS}:{name}" for name in ("points", "dense", "steps", "mean_of_steps")
    }
    for contract in checked:
        with contextlib.suppress(unittest.SkipTest):
            contract.check()
    assert len({str(contract) for contract in checked}) == len(checked)
    assert str(checked[-1]).startswith("head-mean_of_steps-")


def test_failure_names_promise_deviation_and_docstring() -> None:
    class Narrow(Dense):
        """It says eight and gives four."""

        @property
        def features(self) -> FeatureSpec:
            return FeatureSpec("vector", 8)

    message = broken("backbone", Narrow, width=4)["features are as declared on the meta device"]
    first, promised, found, written = message.splitlines()
    assert first == "backbone-broken[width=4] breaks the contract 'features are as declared on the meta device'"
    assert promised.startswith("  promised: The example of the preprocessing runs on the meta device")
    assert found == (
        "  found: forward returns (4, 4) of torch.float32 for FeatureSpec(layout='vector', size=8): "
        "expected (B, D) = (4, 8) of torch.float32"
    )
    assert written.startswith("  written: transfer.interfaces.FeatureSpec (")
    assert "interfaces/backbone.py:" in written


class Outside(Dense):
    """A parameter outside the stages."""

    def __init__(self, *, width: int = 8) -> None:
        super().__init__(width=width)
        self.scale = nn.Parameter(torch.ones(1))


class Drifting(Dense):
    """A buffer moves in eval mode too."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self.stages.first = Counting()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, points: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.linear(points)


class Idle(Dense):
    """A parameter takes no part."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self.stages.third.unused = nn.Linear(4, 4)
        self.stages.third.forward = self.stages.third[0].forward


class Together(Dense):
    """Examples depend on their batch."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self.stages.second.append(Centered())


class Centered(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features - features.mean(0)


class HiddenState(Dense):
    """A random tensor that no state dict holds."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self.stages.first = Shifted()


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.shift = torch.randn(4)

    def forward(self, points: Tensor) -> Tensor:
        return self.linear(points) + self.shift.to(points.device)


class Preprocessed(Dense):
    """Another preprocessing."""

    made: Callable[[], Any]

    @property
    def preprocessing(self) -> Any:
        return type(self).made()


class Unpicklable(PointPreprocessing):
    def __init__(self) -> None:
        self.scale = lambda x: x


class Noisy(PointPreprocessing):
    def encode(self, values: Sequence[Any]) -> list[Tensor]:
        return [tensor + torch.rand(4) for tensor in super().encode(values)]


class Lying(PointPreprocessing):
    """It says that it augments."""

    def augment(self, encoded: Any) -> Any:
        return encoded


class InPlace(PointPreprocessing):
    """It augments the encoded value itself."""

    def augment(self, encoded: Any) -> Any:
        return encoded.add_(torch.rand(4))


def with_preprocessing(cls: type) -> type:
    return type("Other", (Preprocessed,), {"made": cls, "__doc__": "Another preprocessing."})


@pytest.mark.parametrize(
    ("cls", "contract", "found"),
    [
        (Outside, "stages cover every parameter and buffer once", "outside of the stages: scale"),
        (
            Drifting,
            "frozen parameters and buffers are bit identical",
            "these change although frozen until 'first': first.seen",
        ),
        (Idle, "gradients are finite", "has no gradient"),
        (Together, "examples do not depend on their batch", "other examples in the batch change the features"),
        (HiddenState, "the state dict restores the backbone", "neither parameter nor buffer"),
        (with_preprocessing(Unpicklable), "preprocessing survives pickling", "pickle"),
        (with_preprocessing(Noisy), "preprocessing is deterministic", "another batch"),
        (with_preprocessing(Lying), "the same seed gives the same augmentation", "augments should be False"),
        (with_preprocessing(InPlace), "augmentation does not change its argument", "return a new one"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_backbone_is_found(cls: type, contract: str, found: str) -> None:
    wrong = broken("backbone", cls)
    assert found in wrong[contract]


def test_equal_values_are_refused() -> None:
    register("backbone", "broken")(Dense)
    wrong = failures(Case("backbone", "broken", values=[[1.0, 2.0, 3.0, 4.0]] * 4))
    (message,) = wrong.values()
    assert "the raw values 0 and 1, 0 and 2, 0 and 3, 1 and 2, 1 and 3, 2 and 3 are the same input" in message


def test_contracts_ask_for_values_of_unknown_fields() -> None:
    class Record(PointPreprocessing):
        def example(self) -> Any:
            return {"first": 1, "second": "a"}

    register("backbone", "broken")(with_preprocessing(Record))
    wrong = failures(Case("backbone", "broken"))
    assert "give 4 different ones, contracts(values={'broken': [...]})" in wrong["stages chain"]


@pytest.mark.parametrize(
    "example",
    [
        [0.0, 0.0, 0.0],
        (1.0, -2.0),
        np.zeros((2, 3)),
        np.zeros((4, 5, 6), np.uint8),
        torch.ones(3),
        Image.new("L", (4, 5)),
        ([0.5, 1.5], np.ones(2, np.float32)),
    ],
    ids=lambda example: type(example).__name__,
)
def test_variants_differ_and_keep_type(example: Any) -> None:
    made = variants(example)
    assert made is not None
    assert len(made) == 4
    assert {type(value) for value in made} == {type(example)}
    assert len({repr(np.asarray(value).tolist()) for value in made}) == 4


@pytest.mark.parametrize("example", ["a path", [1, 2], {"a": 1.0}, ([1], [0.5]), None])
def test_no_variants_of_values_without_range(example: Any) -> None:
    assert variants(example) is None


class Positional(Dense):
    """A star is missing.

    Args:
        width: Units of each stage.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__(width=width)


class Gathered(Dense):
    """Options are gathered.

    Args:
        width: Units of each stage.
    """

    def __init__(self, *, width: int = 8, **options: float) -> None:
        super().__init__(width=width, **options)


class PositionalHead(MeanOfSteps):
    """A star is missing."""

    def __init__(self, features: FeatureSpec, out_features: int, bias: bool = True) -> None:
        super().__init__(features, out_features)


class WithVocabulary(Dense):
    """A parameter for ``from_assets`` only."""

    def __init__(self, vocabulary: object = None, *, width: int = 8) -> None:
        super().__init__(width=width)

    @classmethod
    def from_assets(cls, assets: Any, **options: Any) -> Any:
        return cls(assets, **options)


@pytest.mark.parametrize(
    ("kind", "cls", "message"),
    [
        ("backbone", Positional, "a config cannot set width: write def __init__(self, *, ...)"),
        ("backbone", Gathered, "a config cannot set the options in **options: write one parameter per option"),
        ("head", PositionalHead, "cannot set bias: write def __init__(self, features, out_features, *, ...)"),
    ],
)
def test_options_that_a_config_cannot_set_are_found(kind: str, cls: type, message: str) -> None:
    assert message in broken(kind, cls)["options are keyword only"]


def test_parameter_for_a_vocabulary_is_no_option() -> None:
    assert "options are keyword only" not in broken("backbone", WithVocabulary)


def test_two_stages_that_share_a_parameter_are_found() -> None:
    class Tied(Dense):
        """The second stage is the third's."""

        def __init__(self) -> None:
            super().__init__(width=4)
            self.stages.third[0].weight = self.stages.second[0].weight

    wrong = broken("backbone", Tied)
    assert "'second' and 'third' share a parameter" in wrong["it is built on the meta device"]


class Undescribed(MeanOfSteps):
    """Says nothing of its option."""

    def __init__(self, features: FeatureSpec, out_features: int, *, size: int = 1, rate: float = "fast") -> None:  # type: ignore[assignment]
        super().__init__(features, out_features)


class Documented(Undescribed):
    """Says it.

    Args:
        size: So big.
        rate: So fast.
    """


class Padded(MeanOfSteps):
    """Takes the mean over padding too."""

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        return self.output(features[0].mean(1))


class TwoDimensional(Head):
    """One output too many."""

    def __init__(self, features: FeatureSpec, out_features: int) -> None:
        super().__init__()
        self.output = nn.Linear(features.size, out_features + 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.output(features)


class Matrix(TwoDimensional):
    """A layout that is none."""

    layouts = frozenset({"matrix"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cls", "contract", "found"),
    [
        (Undescribed, "the schema is complete", "describes size, rate"),
        (Documented, "the schema is complete", "the default of rate is invalid, 'fast'"),
        (Padded, "padding and other examples do not count", "the values at the padding change the outputs"),
        (TwoDimensional, "outputs have the tasks size", "(4, 2) of torch.float32 for a vector: expected (4, 1)"),
        (Matrix, "outputs have the tasks size", "layouts is frozenset({'matrix'})"),
    ],
)
def test_a_broken_head_is_found(cls: type, contract: str, found: str) -> None:
    assert found in broken("head", cls)[contract]


def test_dataset_with_alternative_options_passes() -> None:
    (plugin,) = [plugin for plugin in plugins("dataset") if plugin.name == "huggingface"]
    passed, found = quick_check(plugin)
    assert passed == 3
    assert found == []


class Explained(PointPreprocessing):
    """Preprocessing whose optional methods are wrong."""

    def lengths(self, encoded: Sequence[Any]) -> Any:
        return [4] * len(encoded)

    def read(self, source: str) -> Any:
        return {}["missing"] if source == "" else super().read(source)

    def read_bytes(self, content: bytes) -> Any:
        return [number + 1 for number in super().read_bytes(content)]

    def thumbnail(self, value: Any) -> Any:
        return b"no image"

    def occlusions(self, value: Any) -> Any:
        yield Occlusion({1}, [0.0, *value[1:]])


@pytest.mark.parametrize(
    ("contract", "found"),
    [
        ("lengths agree with length", "lengths returns [4, 4, 4, 4]: expected an array of int64 (4,)"),
        ("read returns valid inputs", "read('') raises KeyError: expected DataError, ValueError or OSError"),
        ("read bytes agrees with read", "is another input than read"),
        ("examples are rendered", "thumbnail returns b'no image': expected the bytes of a JPEG or PNG file, or None"),
        ("occlusions are valid inputs", "a piece is no JSON"),
    ],
)
def test_wrong_optional_method_of_preprocessing_is_found(contract: str, found: str) -> None:
    register("backbone", "broken")(with_preprocessing(Explained))
    sources = [",".join(map(str, point)) for point in POINTS]
    assert found in failures(Case("backbone", "broken", values=POINTS, sources=sources))[contract]


class ByName(PointPreprocessing):
    """Augmentation that an option disables."""

    augments = False

    def augment(self, encoded: Any) -> Any:
        return encoded + torch.rand(4)


def test_disabled_augmentation_is_no_failure() -> None:
    assert broken("backbone", with_preprocessing(ByName)) == {}


def test_one_cause_gives_one_failure() -> None:
    class Unbuildable(Dense):
        """A backbone that cannot be built."""

        def __init__(self) -> None:
            raise KeyError("width")

    wrong = broken("backbone", Unbuildable)
    assert list(wrong) == ["it is built on the meta device"]
    assert "cannot be built: KeyError: 'width'" in wrong["it is built on the meta device"]


class Linearized(MeanOfSteps):
    """A head whose linear layer is another one."""

    layouts = frozenset({"vector"})

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        return self.output(features)

    def as_linear(self) -> nn.Linear:
        return nn.Linear(self.output.in_features, self.output.out_features)


class Reversed(Classification):
    """A metric that is better if it is lower."""

    primary_metric = PrimaryMetric("accuracy", higher_is_better=False)


class Drawn(Sampler):
    """A sampler that draws from the global generator."""

    def order(self, targets: Any, seed: int, epoch: int) -> Any:
        return np.random.permutation(len(targets))


@pytest.mark.parametrize(
    ("kind", "cls", "contract", "found"),
    [
        ("head", Linearized, "as linear computes the same", "compute different outputs"),
        (
            "task",
            Reversed,
            "the direction is that of the metric",
            "higher_is_better is False in primary_metric, and True",
        ),
        ("sampler", Drawn, "the order is a function of seed and epoch", "two different orders for seed 5"),
    ],
)
def test_wrong_part_is_found(kind: str, cls: type, contract: str, found: str) -> None:
    assert found in broken(kind, cls)[contract]


class Weighted(Dense):
    """A backbone that reads weights without accounting for them.

    Args:
        weights: File of weights.
        strict: Whether weights that do not fit are refused.
    """

    def __init__(self, *, weights: str, strict: bool = False) -> None:
        super().__init__(width=4)
        self.weights, self.strict = weights, strict

    def load_pretrained(self) -> dict[str, Any]:
        try:
            self.stages.load_state_dict(load_file(self.weights), strict=self.strict)
        except RuntimeError as error:
            raise WeightsError(str(error)) from error
        return {"weights": self.weights}


@pytest.mark.parametrize(
    ("strict", "found"), [(False, "all names have another prefix, and load_pretrained neither refuses"), (True, None)]
)
def test_weights_that_are_not_accounted_for_are_found(strict: bool, found: str | None, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(Dense(width=4).stages.state_dict(), file)
    register("backbone", "broken")(Weighted)
    wrong = failures(Case("backbone", "broken", {"weights": str(file), "strict": strict}, POINTS))
    assert set(wrong) == ({"every pretrained tensor is accounted for"} if found else set())
    assert found is None or found in wrong["every pretrained tensor is accounted for"]


class Mean(Classification):
    """The loss of the batch."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets).mean()


class Unnamed(Classification):
    """Another primary metric."""

    primary_metric = PrimaryMetric("recall", higher_is_better=True)


class Tensors(Classification):
    """Tensors instead of numbers."""

    def interpret(self, outputs: Tensor) -> list[dict[str, Any]]:
        return [{"scores": row} for row in outputs]


@pytest.mark.parametrize(
    ("cls", "contract", "found"),
    [
        (Mean, "the loss is one finite number per example", "loss returns (): expected (4,), without a mean"),
        (Unnamed, "the primary metric is one of the metrics", "is 'recall': expected one of accuracy, f1_macro"),
        (Tensors, "predictions are json", "Tensor is not JSON serializable"),
    ],
)
def test_a_broken_task_is_found(cls: type, contract: str, found: str) -> None:
    assert found in broken("task", cls)[contract]


class Unseeded(Points):
    """Other points each time."""

    def load(self) -> Data:
        data = super().load()
        splits = {n: Split({"point": np.random.random((len(s), 4))}, s.targets) for n, s in data.splits.items()}
        return Data(data.spec, splits)


class Beyond(Points):
    """A class that is not named."""

    def load(self) -> Data:
        data = super().load()
        return Data(data.spec, {"train": Split(data.splits["train"].fields, data.splits["train"].targets + 1)})


class Floats(Points):
    """Targets of the wrong type."""

    def load(self) -> Data:
        train = super().load().splits["train"]
        return Data(self.spec, {"train": Split(train.fields, train.targets.astype(np.float32))})


@pytest.mark.parametrize(
    ("cls", "contract", "found"),
    [
        (Unseeded, "loading is deterministic", "the field 'point' of the train split differs"),
        (Beyond, "loaded data agrees with the spec", "the number of classes, got 2"),
        (Floats, "loaded data agrees with the spec", "(N, C) for labels and numbers"),
    ],
)
def test_a_broken_dataset_is_found(cls: type, contract: str, found: str) -> None:
    assert found in broken("dataset", cls)[contract]


def test_an_error_of_the_plugin_keeps_its_traceback() -> None:
    class Crashing(MeanOfSteps):
        """Crashes."""

        def forward(self, features: Any) -> Any:
            raise KeyError("gone")

    register("head", "broken")(Crashing)
    with pytest.raises(ContractError, match="KeyError: 'gone'") as caught:
        next(c for c in contracts_of(Case("head", "broken")) if c.name == "gradients are finite").check()
    assert isinstance(caught.value.__cause__, KeyError)


def test_data_that_is_not_here_is_skipped(tmp_path: Path) -> None:
    case = Case("dataset", "text_csv", {"train": str(tmp_path / "nowhere.csv")})
    with pytest.raises(unittest.SkipTest, match=r"its data is missing: .*nowhere\.csv"):
        next(c for c in contracts_of(case) if c.cost == "data").check()


def test_contracts_refuse_unknown_plugin_name() -> None:
    with pytest.raises(PluginError, match="unknown plugin of transferkit 'textcn'") as caught:
        contracts("transferkit", {"textcn": {}})
    assert caught.value.problems[0].fix == "did you mean 'textcnn'?"


def test_a_distribution_without_plugins_is_refused() -> None:
    with pytest.raises(PluginError, match="no plugin of 'transfer-nothing' is installed") as caught:
        contracts("transfer-nothing")
    assert "transferkit" in caught.value.problems[0].available
    assert "pip install --editable ." in str(caught.value.problems[0].fix)


def test_a_config_that_is_wrong_breaks_its_contract(config_file: Path) -> None:
    config_file.write_text(config_file.read_text(encoding="utf-8").replace("dense", "dance"), encoding="utf-8")
    checked = [c for c in contracts("transferkit", configs=[config_file]) if str(c).startswith("config-")]
    assert [c.name for c in checked] == ["it passes the check", "it runs"]
    with pytest.raises(ContractError, match="unknown backbone 'dance'"):
        checked[0].check()


def test_a_config_that_is_right_keeps_its_contracts(config_file: Path) -> None:
    for contract in contracts("transferkit", configs=[config_file])[-2:]:
        contract.check()


def test_the_kit_needs_no_pytest(python: Any) -> None:
    code = "import sys; sys.modules['pytest'] = None; import transfer.testing"
    ended = python("-c", code)
    assert ended.returncode == 0, ended.stderr


def test_steps_keep_their_contracts() -> None:
    register("backbone", "broken")(Steps)
    assert failures(Case("backbone", "broken")) == {}


def test_ids_contain_no_folder_of_an_absolute_path(tmp_path: Path) -> None:
    case = Case("backbone", "somebody:dense", {"weights": str(tmp_path / "a.safetensors"), "width": 3})
    assert str(case) == "backbone-dense[weights=a.safetensors,width=3]"
