"""A component's constructor signature as the schema of its config block."""

from __future__ import annotations

import collections.abc
import inspect
import json
import re
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PydanticUserError,
    ValidationError,
    create_model,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticUndefined
from torch import Tensor

from transfer.config.yaml_document import Document, Key
from transfer.errors import PluginError, Problem, nearest


class Block(BaseModel):
    """A part of a config: unknown keys are errors, and no value is silently converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Describe the block and its options in a JSON Schema by the class docstrings."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        if "description" in schema:
            schema["description"] = summary(cls)
        for name, description in descriptions(cls).items():
            if name in schema.get("properties", {}):
                schema["properties"][name].setdefault("description", description)
        return schema


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
    # Torch's schedulers name some of these without importing them.
    ours = None if not skip else vars(collections.abc)
    try:
        hints = typing.get_type_hints(component.__init__, localns=ours, include_extras=True)  # type: ignore[misc]
    except Exception as error:  # whatever a plugin's annotations raise when they are evaluated
        raise PluginError(
            f"the option types of {name} cannot be resolved: {error}",
            where=where,
            fix="import the types of constructor options at run time, not under TYPE_CHECKING",
        ) from error
    fields: dict[str, Any] = {}
    described = descriptions(component)
    for parameter in inspect.signature(component).parameters.values():
        keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        positional = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if parameter.name in skip or not (keyword or (skip and positional)):
            continue
        if parameter.name in base.model_fields:
            fix = f"rename it: {', '.join(base.model_fields)} belong to the framework"
            raise PluginError(f"{name} has an option called {parameter.name!r}", where=where, fix=fix)
        if parameter.name.startswith("_") or (parameter.name.startswith("model_") and hasattr(Block, parameter.name)):
            fix = "rename it: pydantic, which checks it, has another use for that name"
            raise PluginError(f"{name} has an option called {parameter.name!r}", where=where, fix=fix)
        if parameter.name not in hints and not skip:
            fix = "annotate it: the signature is the schema of the config block"
            raise PluginError(f"option {parameter.name!r} of {name} has no type", where=where, fix=fix)
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        hint = hints.get(parameter.name, Any)
        field = Field(default, description=described.get(parameter.name))
        fields[parameter.name] = (_for_a_config(hint) if skip else hint, field)
    try:
        with warnings.catch_warnings():
            # An option may be called what pydantic calls one of a model's methods (copy, json): it is read as data.
            warnings.filterwarnings("ignore", "Field name .* shadows an attribute", UserWarning)
            return create_model(f"{name} options", __base__=base, **fields)
    except (PydanticUserError, TypeError) as error:
        fix = "give options types that JSON can hold"
        raise PluginError(f"the options of {name} make no schema: {error}", where=where, fix=fix) from error


def _for_a_config(hint: Any) -> Any:
    """Reduce torch's types to what a config can write: no Tensor in ``float | Tensor``, a list for an Iterable."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        kept = tuple(_for_a_config(a) for a in arguments if a is not Tensor)
        return Union[kept]  # noqa: UP007  # built from values; the | operator has no such form
    if origin is tuple:
        return tuple[tuple(_for_a_config(a) for a in arguments)]  # type: ignore[misc]
    if origin is collections.abc.Iterable:  # pydantic would hand over a generator, good for one phase only
        return tuple[_for_a_config(arguments[0]), ...]  # type: ignore[misc]
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
        errors = [(one, _locate(value, one["loc"])) for one in error.errors(include_url=False)]
        found: dict[tuple[Key, str], Problem] = {}
        for one, at in errors:
            # What is wrong inside a value is enough: pydantic also says that too few of its items are right, and what
            # every other member of a union would have wanted.
            vague = one["type"] == "too_short" or _is_of_union(one, at)
            if not (vague and any(len(other) > len(at) and other[: len(at)] == at for _, other in errors)):
                extra = one["type"] if one["type"] == "extra_forbidden" else ""
                found.setdefault((at, extra), _problem(model, one, at, document, key, what))
        return None, list(found.values())


def _is_of_union(one: Any, at: Key) -> bool:
    """Say whether this is what one member of a union wants: its place then ends in that member's name."""
    return len(one["loc"]) > len(at) and one["type"] not in ("missing", "extra_forbidden")


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
    where = document.location(key + at)
    name = str(one["loc"][-1]) if one["loc"] else ""
    path = ".".join(map(str, key + at))
    if one["type"] == "extra_forbidden":
        keys = sorted(_keys(model, at[:-1]))
        close = nearest(name, keys)
        owner = what if len(at) == 1 else ".".join(map(str, key + at[:-1]))
        fix = f"did you mean {close!r}?" if close else "remove it"
        return Problem(f"{owner} has no option {name!r}", where, tuple(keys), fix)
    if one["type"] == "missing" and not name.isdigit():
        return Problem(f"{what} needs {'.'.join([*map(str, at), name])!r}", where, fix=f"add {name}: ...")
    complaint = _complaint(one)
    if _is_of_union(one, at) and len(at) == 1:
        field = model.model_fields[str(at[0])]
        complaint = f"it should be {_type_name(field.annotation, field.metadata)}"
    return Problem(f"{path or what} is {_show(one['input'])}: {complaint}", where)


def _complaint(one: Any) -> str:
    """Say what is wrong with a value in the words of YAML, where pydantic uses those of Python and JSON."""
    match one["type"]:
        case "tuple_type" | "list_type" | "set_type" | "frozen_set_type":
            return "it should be a list"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "it should be a mapping"
        case "string_type":
            return "it should be text; quote it" if isinstance(one["input"], int | float) else "it should be text"
        case "bool_type":
            return "it should be true or false"
        case "too_short":
            return f"the least number of items is {one['ctx']['min_length']}"
        case "too_long":
            return f"the greatest number of items is {one['ctx']['max_length']}"
        case "missing":
            return "it should have more items"
    return re.sub(r"^Input should", "it should", re.sub(r"^Value error, ", "", one["msg"]))


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
    """List a component's options with type, default and description, from its signature and class docstrings."""
    return describe_fields(options_model(component, Block))


def describe_fields(model: type[BaseModel]) -> list[Option]:
    """List the keys of a block with type, default and description."""
    described = descriptions(model)
    return [
        Option(
            name,
            _type_name(field.annotation, field.metadata),
            _default(field),
            field.description or described.get(name, ""),
        )
        for name, field in model.model_fields.items()
    ]


_TYPE_NAMES = {int: "int", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any value"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _type_name(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """Name a type for a person: ``number >= 0 and < 1``, ``"a" | "b"``, ``list of int``, ``text or null``."""
    bounds = [f"{sign} {getattr(m, name):g}" for m in limits for name, sign in _BOUNDS.items() if hasattr(m, name)]
    return " ".join([_bare_type_name(annotation), " and ".join(bounds)]).rstrip()


def _bare_type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        limits = [m for a in arguments[1:] for m in (a.metadata if isinstance(a, FieldInfo) else [a])]
        return _type_name(arguments[0], limits)
    if origin is Literal:
        return " | ".join(json.dumps(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_bare_type_name(a) for a in sorted(arguments, key=lambda a: a is type(None)))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"[{', '.join(map(_bare_type_name, arguments))}]"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of {_bare_type_name(arguments[0])} to {_bare_type_name(arguments[1])}"
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
        return f"list of {_bare_type_name(arguments[0])}"
    return _TYPE_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default is PydanticUndefined else json.dumps(field.default, default=str)


def summary(component: type) -> str:
    """Return what a class docstring says before its ``Args:``, in one line; empty where it says nothing of its own."""
    return " ".join(inspect.cleandoc(component.__doc__ or "").partition("Args:")[0].split())


def descriptions(component: type) -> dict[str, str]:
    """Return the description of each option, from the docstrings of a class and of those it derives from."""
    found: dict[str, str] = {}
    for cls in reversed(component.__mro__):  # a constructor is often inherited, and its options' descriptions with it
        found |= _argument_descriptions(inspect.cleandoc(cls.__doc__ or ""))
    return found


def _argument_descriptions(docstring: str) -> dict[str, str]:
    """Return the entries of a Google-style ``Args:`` section."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    if not section:
        return {}
    entries = re.split(r"^ {4}(?=\w)", section[1], flags=re.MULTILINE)
    pairs = (entry.partition(":") for entry in entries if ":" in entry)
    return {name.split("(")[0].strip(): " ".join(text.split()) for name, _, text in pairs}
