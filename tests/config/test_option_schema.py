"""Constructor signatures as the schema of config blocks."""

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

Share = Annotated[float, Field(ge=0, lt=1)]


class Part:
    """Something with options of every sort.

    Args:
        size: How big it is,
            in two lines.
        share: Of the whole.
        mode: One of two.
    """

    def __init__(
        self,
        from_framework: int = 0,
        *,
        size: int,
        share: Share = 0.5,
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


def test_options_are_the_keyword_only_parameters() -> None:
    names = ["size", "share", "mode", "sizes", "pair", "label", "weights", "on"]
    assert [option.name for option in describe_options(Part)] == names


def test_values_come_out_as_the_annotation_says() -> None:
    model = checked(Part, {"name": "x", "size": 3, "share": 0, "sizes": [4], "pair": [1, 2], "weights": {"a": 1}})
    assert (model.size, model.share, model.sizes, model.pair, model.weights) == (3, 0.0, (4,), (1, 2.0), {"a": 1.0})
    assert type(model.share) is float
    assert model.label is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", "5"),
        ("size", True),
        ("size", 5.0),
        ("size", None),
        ("share", True),
        ("share", "0.5"),
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
    ("option", "value", "complaint"),
    [
        ("share", 1, "part.share is invalid: expected a number < 1, got 1"),
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
def test_complaints_are_in_the_words_of_yaml(option: str, value: Any, complaint: str) -> None:
    assert [p.message for p in problems_of(Part, {"name": "x", "size": 1, option: value})] == [complaint]


def test_an_unknown_key_names_the_nearest() -> None:
    (problem,) = problems_of(Part, {"name": "x", "size": 1, "shere": 0.1})
    assert problem.message == "unknown option 'shere' of part 'x'"
    assert problem.fix == "did you mean 'share'?"
    assert set(problem.available) == {"name", "size", "share", "mode", "sizes", "pair", "label", "weights", "on"}


def test_a_missing_value_says_what_to_add() -> None:
    (problem,) = problems_of(Part, {"name": "x"})
    assert (problem.message, problem.fix) == ("required option 'size' of part 'x' is missing", "add size: ...")


def test_all_problems_of_a_block_are_found_at_once() -> None:
    found = problems_of(Part, {"name": "x", "share": 2, "mode": "c", "shere": 1, "sizes": [0, "a"]})
    assert len(found) == 6


def test_a_long_value_is_shown_in_part() -> None:
    (problem,) = problems_of(Part, {"name": "x", "size": "x" * 500})
    assert len(problem.message) < 120


def test_options_are_described_from_the_docstring() -> None:
    described = {option.name: option for option in describe_options(Part)}
    assert described["size"].description == "How big it is, in two lines."
    assert described["size"].default == "required"
    assert described["sizes"].default == "[1, 2]"
    assert described["mode"].default == '"a"'
    assert described["on"].description == ""


def test_inherited_options_are_described_where_they_are_defined() -> None:
    class Special(Part):
        """Something special, which says nothing of options."""

    assert {o.name: o.description for o in describe_options(Special)}["share"] == "Of the whole."


def test_types_are_named_for_people() -> None:
    assert {option.name: option.type for option in describe_options(Part)} == {
        "size": "int",
        "share": "number >= 0 and < 1",
        "mode": '"a" | "b"',
        "sizes": "list of int >= 1",
        "pair": "[int, number]",
        "label": "text or null",
        "weights": '"balanced" or mapping of text to number > 0 or null',
        "on": "true or false",
    }


def test_more_types_are_named_for_people() -> None:
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


def test_an_option_called_like_a_key_of_the_framework_is_refused() -> None:
    class Greedy:
        def __init__(self, *, name: str = "") -> None: ...

    with pytest.raises(PluginError, match="option 'name' of Greedy has a reserved name") as caught:
        options_model(Greedy, NamedBlock)
    assert "rename it" in caught.value.problems[0].fix


def test_an_option_without_a_type_is_refused() -> None:
    class Untyped:
        def __init__(self, *, size=1) -> None: ...  # type: ignore[no-untyped-def]

    with pytest.raises(PluginError, match="option 'size' of Untyped has no type"):
        options_model(Untyped, NamedBlock)


def test_a_type_that_cannot_be_resolved_is_refused() -> None:
    class Unresolved:
        def __init__(self, *, part: Fraction | None = None) -> None: ...

    with pytest.raises(PluginError, match="Fraction") as caught:
        options_model(Unresolved, NamedBlock)
    assert "TYPE_CHECKING" in caught.value.problems[0].fix


def test_an_option_that_pydantic_cannot_name_is_refused() -> None:
    class Hidden:
        def __init__(self, *, _size: int = 1) -> None: ...

    class Model:
        def __init__(self, *, model_fields: int = 1) -> None: ...

    for component in (Hidden, Model):
        with pytest.raises(PluginError, match="has a reserved name") as caught:
            options_model(component, NamedBlock)
        assert "rename it" in caught.value.problems[0].fix


def test_an_option_may_be_called_like_a_method_of_pydantic() -> None:
    class Copying:
        def __init__(self, *, copy: bool = False, json: str = "") -> None: ...

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = checked(Copying, {"name": "x", "copy": True, "json": "y"})
    assert (model.copy, model.json) == (True, "y")


def test_a_component_without_a_constructor_has_no_options() -> None:
    class Plain:
        """Nothing to set."""

    assert describe_options(Plain) == []
    (problem,) = problems_of(Plain, {"name": "x", "size": 1})
    assert problem.available == ("name",)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_of_torch_has_a_schema(name: str) -> None:
    ours = options_set_by_framework(SCHEDULERS[name])
    fields = options_model(SCHEDULERS[name], NamedBlock, skip=ours).model_fields
    assert not ours & set(fields)


def test_an_iterable_of_torch_is_a_list_that_can_be_read_twice() -> None:
    model = options_model(lr_scheduler.MultiStepLR, NamedBlock, skip=options_set_by_framework(lr_scheduler.MultiStepLR))
    document = make_document({"s": {"name": "multisteplr", "milestones": [2, 4]}})
    block, problems = validate(model, document.data["s"], document, ("s",), "scheduler")
    assert not problems
    assert (list(block.milestones), list(block.milestones)) == ([2, 4], [2, 4])


def test_a_learning_rate_that_may_be_a_tensor_is_a_number() -> None:
    class Tensors:
        def __init__(self, params: Any, rate: float | torch.Tensor = 1.0, both: Callable[[], None] | None = None):
            pass

    model = options_model(Tensors, NamedBlock, skip={"params", "both"})
    assert model.model_fields["rate"].annotation is float
