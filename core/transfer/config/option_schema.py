"""Schema of a config block from the constructor signature of the component that it names."""

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
from transfer.errors import PluginError, Problem, unknown_name

MAX_VALUE_CHARACTERS = 60
"""Length to which a wrong value is shortened in an error."""


class Block(BaseModel):
    """Base of all blocks of a config. Unknown keys are errors, and no value is silently converted to another type."""

    # strict: "5" is not 5, and 1 is not true. Arbitrary types let plugins declare types that pydantic does not know.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the JSON Schema of the block, with descriptions from the class docstrings."""
        # pydantic does not read the Args section of docstrings.
        schema = handler.resolve_ref_schema(handler(core_schema))
        if "description" in schema:
            schema["description"] = summary(cls)
        for name, description in descriptions(cls).items():
            if name in schema.get("properties", {}):
                schema["properties"][name].setdefault("description", description)
        return schema


@dataclass(frozen=True)
class Option:
    """One option of a component, as text for tables and documentation.

    Args:
        name: Name of the option.
        type: Type in words (``number >= 0``).
        default: Default as JSON, or ``required``.
        description: Entry of the option under ``Args:`` in the class docstring.
    """

    name: str
    type: str
    default: str
    description: str


_Model = typing.TypeVar("_Model", bound=BaseModel)


def options_model(component: type, base: type[_Model], *, skip: Iterable[str] = ()) -> type[_Model]:
    """Return the model of a config block: the fields of ``base`` and the component's own options.

    The options of a plugin are the keyword-only parameters of its constructor. torch's optimizers and schedulers do not
    follow that convention: all their parameters are options, except those in ``skip``.

    Args:
        component: Class of the component.
        base: Model of the framework's own options in the block.
        skip: Parameters of one of torch's classes that are not options. Empty for plugins.

    Raises:
        PluginError: An option has no type annotation, a type that cannot be resolved, or a reserved name.
    """
    skip = frozenset(skip)
    name = component.__name__
    where = f"{component.__module__}.{name}"
    # torch's schedulers use Callable and Iterable in annotations without importing them at run time.
    extra_names = vars(collections.abc) if skip else None
    try:
        hints = typing.get_type_hints(component.__init__, localns=extra_names, include_extras=True)  # type: ignore[misc]
    except Exception as error:  # evaluating a plugin's annotations may raise anything
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
            fix = f"rename it: the framework reserves {', '.join(base.model_fields)}"
            raise PluginError(f"option {parameter.name!r} of {name} has a reserved name", where=where, fix=fix)
        if parameter.name.startswith("_") or (parameter.name.startswith("model_") and hasattr(Block, parameter.name)):
            fix = "rename it: pydantic, which checks the options, reserves that name"
            raise PluginError(f"option {parameter.name!r} of {name} has a reserved name", where=where, fix=fix)
        if parameter.name not in hints and not skip:
            fix = "add a type annotation: the signature is the schema of the config block"
            raise PluginError(f"option {parameter.name!r} of {name} has no type", where=where, fix=fix)
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        hint = hints.get(parameter.name, Any)
        field = Field(default, description=described.get(parameter.name))
        fields[parameter.name] = (_config_type(hint) if skip else hint, field)
    try:
        with warnings.catch_warnings():
            # An option may have the name of a method of pydantic's models (copy, json): it is only read as data.
            warnings.filterwarnings("ignore", "Field name .* shadows an attribute", UserWarning)
            return create_model(f"{name} options", __base__=base, **fields)
    except (PydanticUserError, TypeError) as error:
        fix = "use option types that JSON can represent"
        raise PluginError(f"the options of {name} have no schema: {error}", where=where, fix=fix) from error


def has_option(component: type, name: str) -> bool:
    """Return whether the constructor of a plugin has an option of this name."""
    parameter = inspect.signature(component).parameters.get(name)
    return parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY


def _config_type(hint: Any) -> Any:
    """Return the part of one of torch's types that a config can contain.

    Tensor is removed from a union such as ``float | Tensor``, and an Iterable becomes a tuple.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        members = tuple(_config_type(a) for a in arguments if a is not Tensor)
        return Union[members]  # noqa: UP007  # the | operator cannot be applied to a tuple of types
    if origin is tuple:
        return tuple[tuple(_config_type(a) for a in arguments)]  # type: ignore[misc]
    if origin is collections.abc.Iterable:  # pydantic would return a generator, which the second phase finds empty
        return tuple[_config_type(arguments[0]), ...]  # type: ignore[misc]
    return hint


def validate(
    model: type[_Model], value: Any, document: Document, key: Key, what: str
) -> tuple[_Model | None, list[Problem]]:
    """Check one block of a document against a model.

    Args:
        model: Model of the block.
        value: Block as plain data.
        document: Document that contains the block, for file and line.
        key: Path of the block in the document.
        what: Owner of the block for messages (``backbone 'textcnn'``).

    Returns:
        The model's instance, or None with all problems.
    """
    try:
        # JSON mode is strict about types but accepts a list for a tuple: YAML has no tuples.
        return model.model_validate_json(json.dumps(value), strict=True), []
    except ValidationError as error:
        errors = [(one, _locate(value, one["loc"])) for one in error.errors(include_url=False)]
        problems: dict[tuple[Key, str], Problem] = {}
        for one, at in errors:
            # pydantic adds errors for the value that contains a wrong one: too few valid items, and one error for
            # each member of a union. The error at the inner value is the specific one, so these are dropped.
            vague = one["type"] == "too_short" or _is_of_union(one, at)
            if not (vague and any(len(other) > len(at) and other[: len(at)] == at for _, other in errors)):
                # An unknown key and a wrong value can have the same location; both are reported.
                extra = one["type"] if one["type"] == "extra_forbidden" else ""
                problems.setdefault((at, extra), _problem(model, one, at, document, key, what))
        return None, list(problems.values())


def _is_of_union(one: Any, at: Key) -> bool:
    """Return whether an error is about one member of a union: pydantic's location then ends with the member's name."""
    return len(one["loc"]) > len(at) and one["type"] not in ("missing", "extra_forbidden")


def _locate(value: Any, location: tuple[int | str, ...]) -> Key:
    """Return pydantic's location without the names of union members, which are not keys of the data."""
    # Follow the location through the data, and skip parts that are not there.
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
        owner = what if len(at) == 1 else ".".join(map(str, key + at[:-1]))
        return unknown_name("option", name, _keys(model, at[:-1]), owner=owner, where=where, fix="remove it")
    if one["type"] == "missing" and not name.isdigit():
        required = ".".join([*map(str, at), name])
        return Problem(f"required option {required!r} of {what} is missing", where, fix=f"add {name}: ...")
    expected = _expected(one)
    if _is_of_union(one, at) and len(at) == 1:
        field = model.model_fields[str(at[0])]
        expected = f"expected {_type_name(field.annotation, field.metadata)}"
    # An error of the complete block is about a combination of its options: its value is not shown.
    got = f", got {_json(one['input'])}" if at or one["type"] != "value_error" else ""
    quote = one["type"] == "string_type" and isinstance(one["input"], int | float)
    return Problem(f"{path or what} is invalid: {expected}{got}", where, fix="quote the value" if quote else None)


# Expected values by pydantic's type of error, in terms of YAML instead of Python and JSON.
_EXPECTED = {
    **dict.fromkeys(("tuple_type", "list_type", "set_type", "frozen_set_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping"),
    **dict.fromkeys(("int_type", "int_from_float"), "an integer"),
    "string_type": "text",
    "bool_type": "true or false",
    "float_type": "a number",
    "greater_than": "a number > {gt:g}",
    "greater_than_equal": "a number >= {ge:g}",
    "less_than": "a number < {lt:g}",
    "less_than_equal": "a number <= {le:g}",
    "too_short": "at least {min_length} item(s)",
    "too_long": "at most {max_length} item(s)",
    "missing": "more items",
}


def _expected(one: Any) -> str:
    """Return the expected value of one of pydantic's errors."""
    if one["type"] not in _EXPECTED:
        return re.sub(r"^Input should be", "expected", re.sub(r"^Value error, ", "", one["msg"]))
    context = one.get("ctx", {})
    count = context.get("min_length", context.get("max_length"))
    text = _EXPECTED[one["type"]].format(**context)
    return "expected " + text.replace("item(s)", "item" if count == 1 else "items")


def _json(value: Any) -> str:
    """Return a value as JSON, which is also YAML, shortened if it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 3] + "..."


def _keys(model: type[BaseModel], at: Key) -> Iterable[str]:
    """Return the keys of the block at ``at`` inside ``model``; empty if ``at`` is not a block with its own model."""
    for part in at:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        annotations = _flatten(field.annotation) if field else []
        models = [a for a in annotations if isinstance(a, type) and issubclass(a, BaseModel)]
        if not models:
            return ()
        model = models[0]
    return model.model_fields


def _flatten(annotation: Any) -> list[Any]:
    """Return an annotation and all annotations nested in it."""
    arguments = typing.get_args(annotation)
    return [annotation, *(b for a in arguments for b in _flatten(a))]


def describe_options(component: type) -> list[Option]:
    """Return the options of a component, from its constructor signature and class docstrings."""
    return describe_fields(options_model(component, Block))


def describe_fields(model: type[BaseModel]) -> list[Option]:
    """Return the keys of a block as options."""
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
    """Return a type in words: ``number >= 0 and < 1``, ``"a" | "b"``, ``list of int``, ``text or null``."""
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
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"  # a user writes the keys, never the name of the class
    return _TYPE_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default is PydanticUndefined else json.dumps(field.default, default=str)


def summary(component: type) -> str:
    """Return the text of a class docstring before ``Args:`` in one line; empty if the class has no docstring."""
    return " ".join(inspect.cleandoc(component.__doc__ or "").partition("Args:")[0].split())


def descriptions(component: type) -> dict[str, str]:
    """Return the description of each option, from the docstrings of a class and its base classes."""
    described: dict[str, str] = {}
    for cls in reversed(component.__mro__):  # an inherited constructor is described in the class that defines it
        described |= _argument_descriptions(inspect.cleandoc(cls.__doc__ or ""))
    return described


def _argument_descriptions(docstring: str) -> dict[str, str]:
    """Return the entries of a Google-style ``Args:`` section."""
    # The section ends at the first line that is not indented; an entry starts at exactly four spaces.
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    if not section:
        return {}
    entries = re.split(r"^ {4}(?=\w)", section[1], flags=re.MULTILINE)
    pairs = (entry.partition(":") for entry in entries if ":" in entry)
    return {name.split("(")[0].strip(): " ".join(text.split()) for name, _, text in pairs}
