"""YAML as nested dicts and lists, with the file and line of every value, variables and overrides."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from transfer.errors import ConfigError, Problem, nearest
from transfer.system.atomic_files import read_text

Key = tuple[str | int, ...]
"""Path of a value in a document: keys of mappings and indices of lists."""

MAX_VALUES = 100_000
"""Maximum number of values in a document: nested aliases can make a small file expand to billions."""
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
substituted: dict[str, str] = {}
"""Values of the environment variables that configs have used in this process, by name."""


class _Loader(yaml.SafeLoader):
    """Safe loader with the scalars of YAML 1.2: ``1e-3`` is a number, ``off`` and ``no`` are strings."""


# Integers have at most 300 digits, so that they can be converted to a float (less than 1.8e308). Longer ones are text.
_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]{1,300}",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
# PyYAML resolves the scalars of YAML 1.1 (off, 12:30, 1_000): all its resolvers are replaced.
_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), None)
_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in (*_SCALARS, "str", "seq", "map"))


@dataclass
class Document:
    """Plain data with the location of each value.

    Args:
        data: Nested dicts, lists and scalars.
        source: Path of the file that was read, or another name of the data, for errors about the complete document.
        locations: Location of each value by its path: file and line, or command-line override.
    """

    data: dict[str, Any]
    source: str
    locations: dict[Key, str] = field(default_factory=dict)

    def location(self, key: Key) -> str:
        """Return the location of the value at ``key``, or of the innermost block around it that has a location."""
        while key and key not in self.locations:
            key = key[:-1]
        return self.locations.get(key, self.source)

    def is_set(self, key: Key) -> bool:
        """Return whether there is a value other than null at ``key``."""
        node: Any = self.data
        for part in key:
            if isinstance(node, dict) and part in node:
                node = node[str(part)]
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                node = node[part]
            else:
                return False
        return node is not None

    def override(self, assignment: str) -> None:
        """Set one value from an assignment.

        Args:
            assignment: ``path.to.key=value``. The value is parsed as YAML, and a number in the path indexes a list.

        Raises:
            ConfigError: The assignment is malformed, or its path leads through a value that is no mapping or list.
        """
        where = f"override {assignment!r}"
        path, equals, text = assignment.partition("=")
        parts = path.split(".")
        if not equals or not all(parts):
            raise ConfigError(
                "the override is malformed: expected key=value", where=where, fix="for example train.batch_size=128"
            )
        # YAML gives these a meaning of its own, and the shell removes quotes: `#` would be null.
        fix = f"quote the value: {path}={shlex.quote(json.dumps(text, ensure_ascii=False))}"
        if _INDICATOR.fullmatch(text) or _comment_in(text):
            raise ConfigError(
                f"the value {text!r} contains a special character of YAML",
                where=where,
                fix=fix,
            )
        value, locations = _parse(text, where, lines=False, fix=fix)
        node: Any = self.data
        key: Key = ()
        for depth, part in enumerate(parts):
            # Missing mappings on the path are created: the schema check reports keys that do not exist.
            last = depth == len(parts) - 1
            step: str | int
            if isinstance(node, list):
                if not part.isdigit() or int(part) >= len(node):
                    raise ConfigError(
                        f"index {part!r} of {'.'.join(map(str, key))} is invalid: the list has {len(node)} items",
                        where=where,
                        available=[str(i) for i in range(len(node))],
                    )
                step = int(part)
            elif isinstance(node, dict):
                step = part
                if not last and node.get(step) is None:
                    node[step] = {}
                    self.locations[(*key, step)] = where
            else:
                raise ConfigError(
                    f"{'.'.join(map(str, key))} has no {part!r}: expected a mapping, got {node!r}", where=where
                )
            key = (*key, step)
            if last:
                node[step] = value
            else:
                node = node[step]
        # The old value's locations, and those of everything in it, no longer apply.
        for old in [k for k in self.locations if k[: len(key)] == key]:
            del self.locations[old]
        self.locations.update({key + k: v for k, v in locations.items()})


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read a YAML file, substitute environment variables and apply command-line overrides.

    ``${NAME}`` is replaced by the value of the environment variable, and ``${NAME:-default}`` by the default if the
    variable is unset or empty. An unquoted value is then parsed as YAML (``${EPOCHS:-5}`` is a number).

    Raises:
        ConfigError: The file is missing or not YAML, a variable is not set, a key is duplicated, or an override is
            wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folder = path.parent if path.parent.is_dir() else Path()
        siblings = sorted(p.name for p in folder.glob("*.y*ml"))
        close = nearest(path.name, siblings)
        raise ConfigError(
            f"config file {path} does not exist",
            available=siblings,
            fix=f"did you mean {folder / close}?" if close else "give the path of a YAML file",
        ) from error
    except IsADirectoryError as error:
        inside = path / "config.yaml"
        raise ConfigError(
            f"{path} is a folder: expected a YAML file",
            fix=f"give {inside}, the config of the run" if inside.is_file() else "give the path of a YAML file",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the config cannot be read: {error}", where=str(path), fix="give a UTF-8 YAML file"
        ) from error
    data, locations = _parse(text, str(path), lines=True)
    if not isinstance(data, dict):
        raise ConfigError(
            "the config is malformed: expected a mapping of data, backbone, head, task and train",
            where=str(path),
            fix="see configs/quickstart_text.yaml",
        )
    document = Document(data, str(path), locations)
    apply_overrides(document, overrides)
    return document


def read_plain(path: Path) -> dict[str, Any]:
    """Read a YAML file that this framework wrote (it may have been edited), without substituting variables.

    Raises:
        ConfigError: The file is missing, not YAML, or contains no mapping.
    """
    try:
        data, _ = _parse(read_text(path), str(path), lines=True, variables=False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config cannot be read: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise ConfigError("the config is malformed: expected a mapping", where=str(path))
    return data


def make_document(data: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "config") -> Document:
    """Return a document of a config that is plain data already, as in a script or notebook.

    Raises:
        ConfigError: A value cannot be represented in YAML, or an override is wrong.
    """
    problems: list[Problem] = []
    document = Document(_copy(data, source, (), problems), source)
    if problems:
        raise ConfigError.of(problems)
    apply_overrides(document, overrides)
    return document


def _copy(value: Any, source: str, key: Key, problems: list[Problem]) -> Any:
    if isinstance(value, Mapping):
        if wrong := [name for name in value if not isinstance(name, str)]:
            problems.append(Problem(f"a key is invalid: expected text, got {wrong[0]!r}", _location(source, key)))
        return {name: _copy(item, source, (*key, name), problems) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item, source, (*key, index), problems) for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is not None and not isinstance(value, bool | int | float | str):
        problems.append(
            Problem(f"a value of type {type(value).__name__} is not allowed in a config", _location(source, key))
        )
    return value


def _location(source: str, key: Key) -> str:
    return f"{source}: {'.'.join(map(str, key))}" if key else source


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes every string that is not a plain word, so that YAML 1.1 and 1.2 read it alike."""


_KEYWORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", text) and text.lower() not in _KEYWORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def dump(data: Mapping[str, Any]) -> str:
    """Return plain data as YAML that :func:`read_document` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Set values from assignments ``path.to.key=value``.

    Raises:
        ConfigError: Assignments are wrong; the error contains all of them.
    """
    problems: list[Problem] = []
    for assignment in overrides:
        try:
            document.override(assignment)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError.of(problems)


_INDICATOR = re.compile(r"\s*[#|>&*!%@`?:,-]\s*|\s+")


def _comment_in(text: str) -> bool:
    """Return whether YAML would ignore the end of a text as a comment."""
    try:
        node = _Loader(text).get_single_node()
    except (yaml.YAMLError, RecursionError):
        return False  # the error is reported when the text is parsed
    return text[node.end_mark.index if node else 0 :].lstrip().startswith("#")


def _parse(
    text: str,
    source: str,
    *,
    lines: bool,
    variables: bool = True,
    fix: str = "check indentation, quotes and brackets",
) -> tuple[Any, dict[Key, str]]:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()  # composed only: constructing would lose the lines, and resolve tags
        reader = _Reader(loader, source, lines, variables)
        data = None if node is None else reader.value(node, ())
    except (yaml.YAMLError, RecursionError) as error:
        # Only errors of PyYAML's parser have a position.
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None and lines else source
        what = "too deeply nested" if isinstance(error, RecursionError) else getattr(error, "problem", None) or error
        raise ConfigError(f"the text is not YAML: {what}", where=where, fix=fix) from error
    if reader.problems:
        raise ConfigError.of(reader.problems)
    return data, reader.locations


def _is_bare_hash(key: yaml.Node, value: yaml.Node) -> bool:
    """Return whether the line of a key without a value ends in ``: #``, as if the character were the value."""
    if not isinstance(value, yaml.ScalarNode) or value.value or value.style is not None:
        return False
    mark = key.end_mark  # of text that is a str, a mark contains all of it
    return mark.buffer is not None and bool(_BARE_HASH.match(mark.buffer, mark.pointer))


_BARE_HASH = re.compile(r"[ \t]*:[ \t]+#[ \t]*(?=[\r\n\0]|$)")


class _Reader:
    """Converts YAML nodes to plain data, and collects their locations and problems.

    Args:
        loader: Loader that resolves the types of scalars.
        source: Path of the file, or name of the text, for locations.
        lines: Whether locations contain the line.
        variables: Whether environment variables are substituted.
    """

    def __init__(self, loader: _Loader, source: str, lines: bool, variables: bool) -> None:
        self.loader = loader
        self.source = source
        self.lines = lines
        self.variables = variables
        self.locations: dict[Key, str] = {}
        self.problems: list[Problem] = []

    def value(self, node: yaml.Node, key: Key, location: str | None = None) -> Any:
        """Return a node as plain data.

        Args:
            node: Node to convert.
            key: Path of the node in the document.
            location: Location to record, if it is not that of the node: the key's line for values in a mapping.
        """
        location = location or self.location(node)
        self.locations[key] = location
        if len(self.locations) > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES} values")
        if node.tag not in _PLAIN_TAGS:
            self.problems.append(Problem(f"the tag {node.tag!r} is not allowed", location, fix="write plain YAML"))
            return None
        if isinstance(node, yaml.MappingNode):
            data: dict[str, Any] = {}
            for name, item in node.value:
                where = self.location(name)
                if not isinstance(name, yaml.ScalarNode):
                    self.problems.append(Problem("a key is invalid: expected text, got a list or mapping", where))
                elif name.value in data:
                    self.problems.append(Problem(f"the key {name.value!r} is duplicated", where, fix="remove one"))
                elif _is_bare_hash(name, item):
                    problem = f"{name.value} has no value: # starts a comment"
                    self.problems.append(Problem(problem, where, fix=f'write {name.value}: "#" or {name.value}: null'))
                else:
                    data[name.value] = self.value(item, (*key, name.value), where)
            return data
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode), "YAML has no fourth kind of node"
        return self.scalar(node, location)

    def scalar(self, node: yaml.ScalarNode, location: str) -> Any:
        """Return a scalar as a Python value, with environment variables substituted."""
        text = node.value
        if self.variables:
            text = VARIABLE.sub(lambda match: self.variable(match, location), text)
        is_plain = node.style is None  # neither quoted nor a block of text
        tag = node.tag
        if text != node.value and is_plain:  # the substituted text may be of another type
            tag = self.loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        kind = tag.rpartition(":")[2]
        if kind in _SCALARS and not re.fullmatch(_SCALARS[kind], text):
            self.problems.append(
                Problem(f"a value is invalid: expected {kind}, got {text!r}", location, fix=f"remove the tag !!{kind}")
            )
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

    def variable(self, match: re.Match[str], location: str) -> str:
        """Return the value of an environment variable, or its default."""
        name, default = match.groups()
        value = os.environ.get(name) or default  # as in a shell, ":-" also replaces an empty variable
        if os.environ.get(name):
            substituted[name] = os.environ[name]
        if value is None:
            self.problems.append(
                Problem(
                    f"the environment variable {name} is not set",
                    location,
                    fix=f"export {name}=..., or write ${{{name}:-default}}",
                )
            )
            return ""
        return value

    def location(self, node: yaml.Node) -> str:
        """Return the file and line of a node."""
        return f"{self.source}:{node.start_mark.line + 1}" if self.lines else self.source
