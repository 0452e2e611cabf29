"""A component's constructor signature as the schema of its config block."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Union

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from torch import Tensor

from transfer.document import Document, Key
from transfer.errors import PluginError, Problem, nearest


class Block(BaseModel):
    """A part of a config: unknown keys are errors, and no value is silently converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


@dataclass(frozen=True)
class Option:
    """One option of a component, for a person."""

    name: str
    type: str
    default: str
    description: str


_Model = typing.TypeVar("_Model", bound=BaseModel)


def options_model(component: type, base: type[_Model], *, skip: Iterable[str] = ()) -> type[_Model]:
    """Return the model of the config block that names a component: the fields of ``base`` and its own options.

    For a class of ours its options are the keyword-only parameters of its constructor. For torch's optimizers and
    schedulers, which know no such custom, ``skip`` names what the framework hands over and all the rest is an option.

    Raises:
        PluginError: An option has no type annotation, one that cannot be resolved, or the name of a field of ``base``.
    """
    skip = frozenset(skip)
    name = component.__name__
    where = f"{component.__module__}.{name}"
    try:
        hints = typing.get_type_hints(component.__init__, include_extras=True)  # type: ignore[misc]
    except Exception as error:  # whatever a plugin's annotations raise when they are evaluated
        raise PluginError(
            f"the option types of {name} cannot be resolved: {error}",
            where=where,
            fix="import the types of constructor options at run time, not under TYPE_CHECKING",
        ) from error
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(component).parameters.values():
        keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        positional = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if parameter.name in skip or not (keyword or (skip and positional)):
            continue
        if parameter.name in base.model_fields:
            fix = f"rename it: {', '.join(base.model_fields)} belong to the framework"
            raise PluginError(f"{name} has an option called {parameter.name!r}", where=where, fix=fix)
        if parameter.name not in hints and not skip:
            fix = "annotate it: the signature is the schema of the config block"
            raise PluginError(f"option {parameter.name!r} of {name} has no type", where=where, fix=fix)
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (_without_tensors(hints.get(parameter.name, Any)), default)
    return create_model(f"{name} options", __base__=base, **fields)


def _without_tensors(hint: Any) -> Any:
    """Drop Tensor from unions: torch's optimizers take ``float | Tensor``, a config only the number."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        kept = tuple(_without_tensors(a) for a in typing.get_args(hint) if a is not Tensor)
        return Union[kept]  # noqa: UP007  # built from values; the | operator has no such form
    if typing.get_origin(hint) is tuple:
        return tuple[tuple(_without_tensors(a) for a in typing.get_args(hint))]  # type: ignore[misc]
    return hint


def validate(
    model: type[_Model], value: Any, document: Document, key: Key, what: str
) -> tuple[_Model | None, list[Problem]]:
    """Check one block of a document.

    Args:
        model: What the block should be.
        value: The block's plain data.
        document: Where the block stands, for file and line.
        key: The block's path in the document.
        what: What the block belongs to, for messages (``backbone 'textcnn'``).

    Returns:
        The model's instance, or None and every problem found.
    """
    try:
        # JSON mode is strict about types and still reads a list as a tuple, which is what a YAML file needs.
        return model.model_validate_json(json.dumps(value), strict=True), []
    except ValidationError as error:
        found: dict[tuple[Key, str], Problem] = {}
        for one in error.errors(include_url=False):
            at = _locate(value, one["loc"])
            problem = _problem(model, one, at, document, key, what)
            # Each member of a union reports the same place; the first one says enough.
            found.setdefault((at, one["type"] if one["type"] == "extra_forbidden" else ""), problem)
        return None, list(found.values())


def _locate(value: Any, location: tuple[int | str, ...]) -> Key:
    """Return the part of pydantic's location that exists in the data: the rest names members of unions."""
    key: list[int | str] = []
    for part in location:
        if isinstance(value, Mapping) and part in value:
            value = value[str(part)]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        key.append(part)
    return tuple(key)


def _problem(model: type[BaseModel], one: Any, at: Key, document: Document, key: Key, what: str) -> Problem:
    where = document.where(key + at)
    name = str(one["loc"][-1]) if one["loc"] else ""
    path = ".".join(map(str, key + at))
    if one["type"] == "extra_forbidden":
        keys = sorted(_keys(model, at[:-1]))
        close = nearest(name, keys)
        owner = what if len(at) == 1 else ".".join(map(str, key + at[:-1]))
        fix = f"did you mean {close!r}?" if close else "remove it"
        return Problem(f"{owner} has no option {name!r}", where, tuple(keys), fix)
    if one["type"] == "missing":
        return Problem(f"{what} needs {'.'.join([*map(str, at), name])!r}", where, fix=f"add {name}: ...")
    message = re.sub(
        r"^(Input should|Value error, )", lambda m: "it should" if m[1] == "Input should" else "", one["msg"]
    )
    given = one["input"]
    return Problem(f"{path or what} is {_show(given)}: {message}", where)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys(model: type[BaseModel], at: Key) -> Iterable[str]:
    """Return the keys that the block at ``at`` inside ``model`` takes, as far as models are nested plainly."""
    for part in at:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = (
            [a for a in _flatten(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)] if field else []
        )
        if not inner:
            return ()
        model = inner[0]
    return model.model_fields


def _flatten(annotation: Any) -> list[Any]:
    arguments = typing.get_args(annotation)
    return [annotation, *(b for a in arguments for b in _flatten(a))]


def describe_options(component: type) -> list[Option]:
    """List a component's options with type, default and description, from its signature and class docstring."""
    described = _argument_descriptions(inspect.getdoc(component) or "")
    return [
        Option(name, _type_name(field), _default(field), described.get(name, ""))
        for name, field in options_model(component, Block).model_fields.items()
    ]


def _type_name(field: FieldInfo) -> str:
    name = inspect.formatannotation(field.annotation)
    name = re.sub(r"typing\.|collections\.abc\.|Annotated\[", "", name) if "Annotated" in name else name
    name = name.replace("typing.", "").replace("NoneType", "null").replace("None", "null")
    bounds = {"Gt": (">", "gt"), "Ge": (">=", "ge"), "Lt": ("<", "lt"), "Le": ("<=", "le")}
    limits = [
        f"{bounds[type(m).__name__][0]} {getattr(m, bounds[type(m).__name__][1])}"
        for m in field.metadata
        if type(m).__name__ in bounds
    ]
    return f"{name} ({', '.join(limits)})" if limits else name


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default is PydanticUndefined else json.dumps(field.default, default=str)


def _argument_descriptions(docstring: str) -> dict[str, str]:
    """Return the entries of a Google-style ``Args:`` section."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    if not section:
        return {}
    entries = re.split(r"^ {4}(?=\w)", section[1], flags=re.MULTILINE)
    pairs = (entry.partition(":") for entry in entries if ":" in entry)
    return {name.split("(")[0].strip(): " ".join(text.split()) for name, _, text in pairs}
