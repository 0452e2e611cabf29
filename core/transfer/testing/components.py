"""What every plugin promises, whatever its kind."""

from __future__ import annotations

import inspect

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from transfer.config.option_schema import Block, describe_options, options_model
from transfer.registry.entry_points import load
from transfer.testing.cases import Broken, Case, promise, require


@promise("registry.entry_points.load", "quick")
def it_can_be_imported(case: Case) -> None:
    """The entry point leads to a concrete class of its kind, written for this version of transfer."""
    load(case.kind, case.name)


@promise("config.option_schema.options_model", "quick")
def the_schema_is_complete(case: Case) -> None:
    """Each option has a type, a line under Args, and a default that is one of its values, or else is required."""
    cls = load(case.kind, case.name)
    require(inspect.cleandoc(cls.__doc__ or "").strip(), f"{cls.__name__} has no docstring")
    ignore_events = [option.name for option in describe_options(cls) if not option.description]
    require(not ignore_events, f"no line under Args of {cls.__name__}'s docstring describes {', '.join(ignore_events)}")
    for name, option in options_model(cls, Block).model_fields.items():
        if option.is_required():
            continue
        adapter = TypeAdapter(option.rebuild_annotation())
        try:
            adapter.validate_json(to_json(option.get_default(call_default_factory=True)), strict=True)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            raise Broken(f"the default of {name}, {option.default!r}, is none of its values: {message}") from None
