"""Schema of config blocks from constructor signatures."""

from __future__ import annotations

import collections.abc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
import torch
from pydantic import Field
from torch.optim import lr_scheduler

from transfer import PluginError
from transfer.config.option_schema import describe_options, options_model, validate
from transfer.config.torch_classes import SCHEDULERS, options_set_by_framework
from transfer.config.train_settings import NamedBlock
from transfer.config.yaml_document import make_document
from transfer.errors import Problem

if TYPE_CHECKING:
    from fractions import Fraction

Fraction01 = Annotated[float, Field(ge=0, lt=1)]


class Part:
    """A component with options of many types.

    Args:
        size: Number of units,
            in two lines.
        fraction: Fraction of the total.
        mode: One of two modes.
    """

    def __init__(
        self,
        from_framework: int = 0,
        *,
        size: int,
        fraction: Fraction01 = 0.5,
        mode: Literal["a", "b"] = "a",
        sizes: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2),
        pair: tuple[int, float] = (1, 2.0),
        label: str | None = None,
        weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None,
        on: bool = False,
    ) -> None:
        self.size = size


def problems_of(component: type, block: dict[str, Any]) -> list[Problem]:
    document = make_document({"part": block})
    _, problems = validate(options_model(component, NamedBlock), document.data["part"], document, ("part",), "part 'x'")
    return problems


def checked(component: type, block: dict[str, Any]) -> Any:
    document = make_document({"part": block})
    model, problems = validate(
        options_model(component, NamedBlock), document.data["part"], document, ("part",), "part 'x'"
    )
    assert not problems
    return model


def test_options_are_keyword_only_parameters() -> None:
    names = ["size", "fraction", "mode", "sizes", "pair", "label", "weights", "on"]
    assert [option.name for option in describe_options(Part)] == names


def test_values_have_annotated_types() -> None:
    model = checked(Part, {"name": "x", "size": 3, "fraction": 0, "sizes": [4], "pair": [1, 2], "weights": {"a": 1}})
    assert (model.size, model.fraction, model.sizes, model.pair, model.weights) == (3, 0.0, (4,), (1, 2.0), {"a": 1.0})
    assert type(model.fraction) is float
    assert model.label is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", "5"),
        ("size", True),
        ("size", 5.0),
        ("size", None),
        ("fraction", True),
        ("fraction", "0.5"),
        ("on", 1),
        ("on", "true"),
        ("label", 5),
        ("label", False),
        ("sizes", 5),
        ("sizes", ["1"]),
        ("mode", 1),
    ],
)
def test_no_value_is_silently_converted(option: str, value: Any) -> None:
    (problem,) = problems_of(Part, {"name": "x", "size": 1, option: value})
    assert problem.message.startswith(f"part.{option}")
    assert "is invalid: expected " in problem.message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("fraction", 1, "part.fraction is invalid: expected a number < 1, got 1"),
        ("mode", "c", "part.mode is invalid: expected 'a' or 'b', got \"c\""),
        ("sizes", [1, 0], "part.sizes.1 is invalid: expected a number >= 1, got 0"),
        ("sizes", 5, "part.sizes is invalid: expected a list, got 5"),
        ("label", 5, "part.label is invalid: expected text, got 5"),
        ("on", "off", 'part.on is invalid: expected true or false, got "off"'),
        ("pair", [1], "part.pair is invalid: expected more items, got [1]"),
        ("pair", [1, 2, 3], "part.pair is invalid: expected at most 2 items, got [1, 2, 3]"),
        (
            "weights",
            "all",
            'part.weights is invalid: expected "balanced" or mapping of text to number > 0 or null, got "all"',
        ),
        ("weights", {"a": -1}, "part.weights.a is invalid: expected a number > 0, got -1"),
    ],
)
def test_wrong_value_names_expected_value_in_yaml_terms(option: str, value: Any, message: str) -> None:
    assert [p.message for p in problems_of(Part, {"name": "x", "size": 1, option: value})] == [message]


def test_unknown_option_names_nearest() -> None:
    (problem,) = problems_of(Part, {"name": "x", "size": 1, "fractoin": 0.1})
    assert problem.message == "unknown option 'fractoin' of part 'x'"
    assert problem.fix == "did you mean 'fraction'?"
    assert set(problem.available) == {"name", "size", "fraction", "mode", "sizes", "pair", "label", "weights", "on"}


def test_missing_option_names_fix() -> None:
    (problem,) = problems_of(Part, {"name": "x"})
    assert (problem.message, problem.fix) == ("required option 'size' of part 'x' is missing", "add size: ...")


def test_problems_of_block_are_reported_together() -> None:
    problems = problems_of(Part, {"name": "x", "fraction": 2, "mode": "c", "fractoin": 1, "sizes": [0, "a"]})
    assert len(problems) == 6


def test_long_value_is_shortened() -> None:
    (problem,) = problems_of(Part, {"name": "x", "size": "x" * 500})
    assert len(problem.message) < 120


def test_descriptions_come_from_docstring() -> None:
    described = {option.name: option for option in describe_options(Part)}
    assert described["size"].description == "Number of units, in two lines."
    assert described["size"].default == "required"
    assert described["sizes"].default == "[1, 2]"
    assert described["mode"].default == '"a"'
    assert described["on"].description == ""


def test_descriptions_of_inherited_options() -> None:
    class Special(Part):
        """A subclass without descriptions of options."""

    assert {o.name: o.description for o in describe_options(Special)}["fraction"] == "Fraction of the total."


def test_type_names() -> None:
    assert {option.name: option.type for option in describe_options(Part)} == {
        "size": "int",
        "fraction": "number >= 0 and < 1",
        "mode": '"a" | "b"',
        "sizes": "list of int >= 1",
        "pair": "[int, number]",
        "label": "text or null",
        "weights": '"balanced" or mapping of text to number > 0 or null',
        "on": "true or false",
    }


def test_type_names_of_nested_types() -> None:
    class Odd:
        def __init__(
            self,
            *,
            anything: Any = 1,
            place: Path = Path(),
            many: list[dict[str, Any]] = [],  # noqa: B006
            either: int | tuple[int, ...] = 1,
            rows: collections.abc.Sequence[str | None] = (),
        ) -> None: ...

    assert {option.name: option.type for option in describe_options(Odd)} == {
        "anything": "any value",
        "place": "Path",
        "many": "list of mapping of text to any value",
        "either": "int or list of int",
        "rows": "list of text or null",
    }


def test_option_with_name_of_framework_is_refused() -> None:
    class Greedy:
        def __init__(self, *, name: str = "") -> None: ...

    with pytest.raises(PluginError, match="option 'name' of Greedy has a reserved name") as caught:
        options_model(Greedy, NamedBlock)
    assert "rename it" in caught.value.problems[0].fix


def test_option_without_type_is_refused() -> None:
    class Untyped:
        def __init__(self, *, size=1) -> None: ...  # type: ignore[no-untyped-def]

    with pytest.raises(PluginError, match="option 'size' of Untyped has no type"):
        options_model(Untyped, NamedBlock)


def test_unresolvable_type_is_refused() -> None:
    class Unresolved:
        def __init__(self, *, part: Fraction | None = None) -> None: ...

    with pytest.raises(PluginError, match="Fraction") as caught:
        options_model(Unresolved, NamedBlock)
    assert "TYPE_CHECKING" in caught.value.problems[0].fix


def test_option_with_name_of_pydantic_is_refused() -> None:
    class Hidden:
        def __init__(self, *, _size: int = 1) -> None: ...

    class Model:
        def __init__(self, *, model_fields: int = 1) -> None: ...

    for component in (Hidden, Model):
        with pytest.raises(PluginError, match="has a reserved name") as caught:
            options_model(component, NamedBlock)
        assert "rename it" in caught.value.problems[0].fix


def test_option_with_name_of_pydantic_method_is_accepted() -> None:
    class Copying:
        def __init__(self, *, copy: bool = False, json: str = "") -> None: ...

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = checked(Copying, {"name": "x", "copy": True, "json": "y"})
    assert (model.copy, model.json) == (True, "y")


def test_component_without_constructor_has_no_options() -> None:
    class Plain:
        """A component without options."""

    assert describe_options(Plain) == []
    (problem,) = problems_of(Plain, {"name": "x", "size": 1})
    assert problem.available == ("name",)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_scheduler_has_schema(name: str) -> None:
    ours = options_set_by_framework(SCHEDULERS[name])
    fields = options_model(SCHEDULERS[name], NamedBlock, skip=ours).model_fields
    assert not ours & set(fields)


def test_iterable_of_scheduler_can_be_read_twice() -> None:
    model = options_model(lr_scheduler.MultiStepLR, NamedBlock, skip=options_set_by_framework(lr_scheduler.MultiStepLR))
    document = make_document({"s": {"name": "multisteplr", "milestones": [2, 4]}})
    block, problems = validate(model, document.data["s"], document, ("s",), "scheduler")
    assert not problems
    assert (list(block.milestones), list(block.milestones)) == ([2, 4], [2, 4])


def test_tensor_is_removed_from_union() -> None:
    class Tensors:
        def __init__(self, params: Any, rate: float | torch.Tensor = 1.0, both: Callable[[], None] | None = None):
            pass

    model = options_model(Tensors, NamedBlock, skip={"params", "both"})
    assert model.model_fields["rate"].annotation is float
