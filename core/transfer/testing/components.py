"""Contracts of plugins of any kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from transfer.config.option_schema import Block, describe_options, options_model
from transfer.interfaces import Backbone
from transfer.registry.entry_points import load
from transfer.testing.cases import Broken, Case, promise, require


@promise("registry.entry_points.load", "quick")
def it_can_be_imported(case: Case) -> None:
    """The entry point is a concrete class of its kind, written for this version of transfer."""
    load(case.kind, case.name)


POSITIONAL_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "dataset": (),
    "backbone": (),
    "head": ("features", "out_features"),
    "task": ("data",),
    "metric": ("data",),
    "sampler": (),
}
"""The arguments that the framework passes by position, by kind."""


@promise("config.option_schema.options_model", "quick")
def options_are_keyword_only(case: Case) -> None:
    """Each option is a keyword-only parameter of the constructor: a config can only set those."""
    cls = load(case.kind, case.name)
    parameters = inspect.signature(cls).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    unnamed = [f"{stars[p.kind]}{p.name}" for p in parameters if p.kind in stars]
    require(not unnamed, f"a config cannot set the options in {', '.join(unnamed)}: write one parameter per option")
    if case.kind not in POSITIONAL_ARGUMENTS:
        return
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    options = positional[len(POSITIONAL_ARGUMENTS[case.kind]) :]
    if case.kind == "backbone" and _has_own_constructors(cls):
        # from_data and from_assets may pass a vocabulary and the like to a parameter that no config can set.
        options = [p for p in options if p.default is not None]
    names = ", ".join(p.name for p in options)
    before = f"def __init__(self, {''.join(f'{name}, ' for name in POSITIONAL_ARGUMENTS[case.kind])}*, ...)"
    require(not options, f"a config cannot set {names}: write {before}, so that options are keyword-only")


def _has_own_constructors(cls: type[Backbone]) -> bool:
    return any(
        getattr(getattr(cls, name), "__func__", None) is not getattr(Backbone, name).__func__ for name in _CONSTRUCTORS
    )


_CONSTRUCTORS = ("from_data", "from_assets")


@promise("config.option_schema.options_model", "quick")
def the_schema_is_complete(case: Case) -> None:
    """Each option has a type and a line under Args, and is required or has a default of its type."""
    cls = load(case.kind, case.name)
    require(inspect.cleandoc(cls.__doc__ or "").strip(), f"{cls.__name__} has no docstring")
    undescribed = [option.name for option in describe_options(cls) if not option.description]
    require(not undescribed, f"no line under Args of {cls.__name__}'s docstring describes {', '.join(undescribed)}")
    for name, option in options_model(cls, Block).model_fields.items():
        if option.is_required():
            continue
        # A default is validated like a value from a config: in strict JSON mode.
        adapter = TypeAdapter(option.rebuild_annotation())
        try:
            adapter.validate_json(to_json(option.get_default(call_default_factory=True)), strict=True)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            raise Broken(f"the default of {name} is invalid, {option.default!r}: {message}") from None
