"""A YAML file as plain data that remembers the file and line of every value."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from transfer.errors import ConfigError, Problem

Key = tuple[str | int, ...]

MAX_VALUES = 100_000
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """YAML's safe types, with the scalars of YAML 1.2: ``1e-3`` is a number, ``off`` and ``no`` are strings."""


_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]{1,300}",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), None)
_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in (*_SCALARS, "str", "seq", "map"))


@dataclass
class Document:
    """Plain data and where each value came from.

    Args:
        data: Nested dicts, lists and scalars.
        source: What the data was read from, for messages about the whole.
        places: File and line (or command-line override) by path.
    """

    data: dict[str, Any]
    source: str
    places: dict[Key, str] = field(default_factory=dict)

    def location(self, key: Key) -> str:
        """Return where the value at ``key`` was written, or the nearest thing around it that was."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.source)

    def is_set(self, key: Key) -> bool:
        """Tell whether there is a value at ``key``."""
        at: Any = self.data
        for part in key:
            if isinstance(at, dict) and part in at:
                at = at[str(part)]
            elif isinstance(at, list) and isinstance(part, int) and part < len(at):
                at = at[part]
            else:
                return False
        return at is not None

    def override(self, assignment: str) -> None:
        """Set one value from ``path.to.key=value``; the value is parsed as YAML, a number in the path indexes a list.

        Raises:
            ConfigError: It is no assignment, or the path runs through a value that holds nothing.
        """
        where = f"override {assignment!r}"
        path, equals, text = assignment.partition("=")
        parts = path.split(".")
        if not equals or not all(parts):
            raise ConfigError("an override is written key=value", where=where, fix="for example train.batch_size=128")
        value, places = _parse(text, where, lines=False)
        at: Any = self.data
        key: Key = ()
        for depth, part in enumerate(parts):
            last = depth == len(parts) - 1
            step: str | int
            if isinstance(at, list):
                if not part.isdigit() or int(part) >= len(at):
                    raise ConfigError(
                        f"{'.'.join(map(str, key))} is a list of {len(at)} items, and {part!r} is none of them",
                        where=where,
                        available=[str(i) for i in range(len(at))],
                    )
                step = int(part)
            elif isinstance(at, dict):
                step = part
                if not last and at.get(step) is None:
                    at[step] = {}
                    self.places[(*key, step)] = where
            else:
                raise ConfigError(f"{'.'.join(map(str, key))} is {at!r}, which holds no {part!r}", where=where)
            key = (*key, step)
            if last:
                at[step] = value
            else:
                at = at[step]
        for old in [k for k in self.places if k[: len(key)] == key]:
            del self.places[old]
        self.places.update({key + k: v for k, v in places.items()})


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read a YAML file, fill in environment variables and apply command-line overrides.

    ``${NAME}`` is replaced by the environment's value and ``${NAME:-default}`` by the default where there is none; a
    value that is not quoted is then read as YAML reads it (``${EPOCHS:-5}`` is a number).

    Raises:
        ConfigError: The file is missing or not YAML, a variable is not set, a key stands twice, an override is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folder = path.parent if path.parent.is_dir() else Path()
        siblings = sorted(p.name for p in folder.glob("*.y*ml"))
        close = difflib.get_close_matches(path.name, siblings, n=1)
        raise ConfigError(
            f"there is no config file {path}",
            available=siblings,
            fix=f"did you mean {folder / close[0]}?" if close else "give the path of a YAML file",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config: {error}", where=str(path), fix="give a UTF-8 YAML file") from error
    data, places = _parse(text, str(path), lines=True)
    if not isinstance(data, dict):
        raise ConfigError(
            "a config is a mapping of data, backbone, head, task and train",
            where=str(path),
            fix="see configs/quickstart_text.yaml",
        )
    document = Document(data, str(path), places)
    _apply(document, overrides)
    return document


def read_plain(path: Path) -> dict[str, Any]:
    """Read a YAML file that this framework wrote, and somebody may have edited; no variables are filled in.

    Raises:
        ConfigError: It is missing, not YAML, or no mapping.
    """
    try:
        data, _ = _parse(path.read_text(encoding="utf-8"), str(path), lines=True, variables=False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config cannot be read: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise ConfigError("the config is not a mapping", where=str(path))
    return data


def make_document(data: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "config") -> Document:
    """Take a config that is already plain data (in a script or notebook).

    Raises:
        ConfigError: A value is none that YAML could hold, or an override is wrong.
    """
    problems: list[Problem] = []
    document = Document(_copy(data, source, (), problems), source)
    if problems:
        raise ConfigError.of(problems)
    _apply(document, overrides)
    return document


def _copy(value: Any, source: str, key: Key, problems: list[Problem]) -> Any:
    if isinstance(value, Mapping):
        if odd := [name for name in value if not isinstance(name, str)]:
            problems.append(Problem(f"a key is a word, not {odd[0]!r}", _place(source, key)))
        return {name: _copy(item, source, (*key, name), problems) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item, source, (*key, index), problems) for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is not None and not isinstance(value, bool | int | float | str):
        problems.append(
            Problem(f"a value of type {type(value).__name__} cannot stand in a config", _place(source, key))
        )
    return value


def _place(source: str, key: Key) -> str:
    return f"{source}: {'.'.join(map(str, key))}" if key else source


class _Dumper(yaml.SafeDumper):
    """Quotes every string that is not a plain word: YAML 1.1 and 1.2 then read the same."""


_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", text) and text.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def dump(data: Mapping[str, Any]) -> str:
    """Return plain data as YAML that :func:`read_document` reads back as it was."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _apply(document: Document, overrides: Sequence[str]) -> None:
    problems: list[Problem] = []
    for assignment in overrides:
        try:
            document.override(assignment)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError.of(problems)


def _parse(text: str, source: str, *, lines: bool, variables: bool = True) -> tuple[Any, dict[Key, str]]:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        reader = _Reader(loader, source, lines, variables)
        data = None if node is None else reader.value(node, ())
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None and lines else source
        what = "too deeply nested" if isinstance(error, RecursionError) else getattr(error, "problem", None) or error
        raise ConfigError(
            f"this is not YAML: {what}", where=where, fix="check indentation, quotes and brackets"
        ) from error
    if reader.problems:
        raise ConfigError.of(reader.problems)
    return data, reader.places


class _Reader:
    """Turns YAML's nodes into plain data, noting places and problems on the way."""

    def __init__(self, loader: _Loader, source: str, lines: bool, variables: bool) -> None:
        self.loader = loader
        self.source = source
        self.lines = lines
        self.variables = variables
        self.places: dict[Key, str] = {}
        self.problems: list[Problem] = []

    def value(self, node: yaml.Node, key: Key, place: str | None = None) -> Any:
        place = place or self.place(node)
        self.places[key] = place
        if len(self.places) > MAX_VALUES:  # aliases of aliases make a small file a huge one
            raise yaml.YAMLError(f"more than {MAX_VALUES} values")
        if node.tag not in _PLAIN_TAGS:
            self.problems.append(Problem(f"the tag {node.tag!r} is not allowed", place, fix="write plain YAML"))
            return None
        if isinstance(node, yaml.MappingNode):
            data: dict[str, Any] = {}
            for name, item in node.value:
                at = self.place(name)
                if not isinstance(name, yaml.ScalarNode):
                    self.problems.append(Problem("a key is a word", at))
                elif name.value in data:
                    self.problems.append(Problem(f"the key {name.value!r} stands twice", at, fix="keep one of them"))
                else:
                    data[name.value] = self.value(item, (*key, name.value), at)
            return data
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode), "YAML has no fourth kind of node"
        return self.scalar(node, place)

    def scalar(self, node: yaml.ScalarNode, place: str) -> Any:
        text = node.value
        if self.variables:
            text = _VARIABLE.sub(lambda match: self.variable(match, place), text)
        plain = node.style is None  # neither quoted nor a block of text
        tag = node.tag
        if text != node.value and plain:
            tag = self.loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        kind = tag.rpartition(":")[2]
        if kind in _SCALARS and not re.fullmatch(_SCALARS[kind], text):
            self.problems.append(Problem(f"{text!r} is no {kind}", place, fix=f"leave out the tag !!{kind}"))
            return None
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return text

    def variable(self, match: re.Match[str], place: str) -> str:
        name, default = match.groups()
        value = os.environ.get(name) or default  # as in a shell, ":-" also stands in for an empty variable
        if value is None:
            self.problems.append(
                Problem(
                    f"the environment variable {name} is not set",
                    place,
                    fix=f"export {name}=..., or write ${{{name}:-default}}",
                )
            )
            return ""
        return value

    def place(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.lines else self.source
