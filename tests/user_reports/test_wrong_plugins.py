"""Mistakes in the class of a plugin: one message that names the mistake, never another library's exception."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MeanOfSteps, PointPreprocessing, Points
from torch import Tensor, nn

from transfer import Backbone, ConfigError, FeatureSpec, Head, PluginError, UserError, check, register
from transfer.builtin.tasks import Classification


class Base(Backbone):
    """A backbone whose subclasses differ in their constructor."""

    field = "point"

    @property
    def features(self) -> FeatureSpec:
        return FeatureSpec("vector", 4)

    @property
    def preprocessing(self) -> PointPreprocessing:
        return PointPreprocessing()


class WithoutField(Base):
    field = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__({"one": nn.Linear(4, 4)})


class WithoutInit(Base):
    def __init__(self) -> None:
        self.width = 4


class OnlyModuleInit(Base):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer = nn.Linear(4, 4)


class AssignsFirst(Base):
    def __init__(self) -> None:
        self.layer = nn.Linear(4, 4)
        super().__init__({"one": self.layer})


class SameModule(Base):
    def __init__(self) -> None:
        layer = nn.Linear(4, 4)
        super().__init__({"one": layer, "two": layer})


class SharedParameter(Base):
    def __init__(self) -> None:
        layer = nn.Linear(4, 4)
        super().__init__({"one": nn.Sequential(layer), "two": nn.Sequential(layer)})


class ListOfStages(Base):
    def __init__(self) -> None:
        super().__init__([nn.Linear(4, 4)])  # type: ignore[arg-type]


class StageAndGroup(Base):
    def __init__(self) -> None:
        super().__init__({"one": nn.Linear(4, 4), "one.a": nn.Linear(4, 4)})


class WrongWidth(Base):
    def __init__(self) -> None:
        super().__init__({"one": nn.Linear(5, 4)})


EXISTING = nn.Linear(4, 4)


class ExistingModule(Base):
    def __init__(self) -> None:
        super().__init__({"one": EXISTING})


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = torch.ones(4, device="cpu")

    def forward(self, points: Tensor) -> Tensor:
        return points + self.by


class ConstantTensor(Base):
    def __init__(self) -> None:
        super().__init__({"one": Shift()})


class Raises(Base):
    def __init__(self) -> None:
        raise KeyError("width")


class WithoutFeatures(Base):
    features = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__({"one": nn.Linear(4, 4)})


class HeadWithoutForward(Head):
    def __init__(self, features: FeatureSpec, out_features: int) -> None:
        super().__init__()


class HeadWithoutInit(Head):
    def __init__(self, features: FeatureSpec, out_features: int) -> None:
        self.out = out_features

    def forward(self, features: Any) -> Any:
        return features


class TaskWithoutOutputs(Classification):
    def __init__(self, data: Any) -> None:
        pass


class DatasetWithoutSpec(Points):
    spec = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "cls", "message"),
    [
        ("backbone", WithoutField, "the class attribute field is None: expected the name of a field"),
        ("backbone", WithoutInit, "its constructor does not call super().__init__"),
        ("backbone", OnlyModuleInit, "its constructor does not call super().__init__ with the stages"),
        ("backbone", AssignsFirst, "fix: call super().__init__ before modules are assigned to attributes"),
        ("backbone", SameModule, "the stages 'one' and 'two' are the same module"),
        ("backbone", SharedParameter, "the stages 'one' and 'two' share a parameter"),
        ("backbone", ListOfStages, "the stages are invalid: expected modules by name"),
        ("backbone", StageAndGroup, "the stages 'one' and 'one.a' overlap"),
        ("backbone", WrongWidth, "stage 'one', cannot process the shape (B, 4): RuntimeError"),
        ("backbone", ExistingModule, "contains parameters that its constructor did not create"),
        ("backbone", ConstantTensor, "fix: register constant tensors as buffers"),
        ("backbone", Raises, "cannot be built: KeyError: 'width' ("),
        ("backbone", WithoutFeatures, "features is None: expected a transfer.FeatureSpec"),
        ("head", HeadWithoutForward, "it does not define forward"),
        ("head", HeadWithoutInit, "its constructor does not call super().__init__"),
        ("task", TaskWithoutOutputs, "its constructor does not set out_features"),
        ("dataset", DatasetWithoutSpec, "spec is None: expected a transfer.DataSpec"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_mistake_in_a_class_is_named(kind: str, cls: type, message: str, config: dict[str, Any]) -> None:
    register(kind, "wrong")(cls)
    with pytest.raises(UserError) as caught:
        check({**config, "data" if kind == "dataset" else kind: {"name": "wrong"}})
    assert isinstance(caught.value, PluginError | ConfigError)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("kind", "attribute", "base"), [("head", "layouts", MeanOfSteps), ("task", "targets", Classification)]
)
def test_load_refuses_declaration_of_wrong_type(kind: str, attribute: str, base: type) -> None:
    cls = type("Wrong", (base,), {attribute: "vector"})
    with pytest.raises(
        PluginError, match=f"class attribute {attribute} of {kind} 'wrong' is 'vector': expected a froz"
    ):
        register(kind, "wrong")(cls)
