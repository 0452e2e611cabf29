"""One component of a config: a plugin with its options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from transfer.errors import ConfigError, UserError
from transfer.registry import entry_points
from transfer.registry.entry_points import Kind


@dataclass(frozen=True)
class Component:
    """A plugin that a config names, with its options.

    Args:
        kind: Kind of plugin (``backbone``).
        plugin: Name, distribution and version of the plugin.
        cls: Class of the plugin.
        options: Checked options, with defaults filled in.
        resolved: Complete block as JSON values: the name, and the options with defaults filled in.
        where: Location of the block: file and line, or command-line override.
    """

    kind: Kind
    plugin: entry_points.Plugin
    cls: type[Any]
    options: Mapping[str, Any]
    resolved: Mapping[str, Any]
    where: str

    def make(self, *options_set_by_framework: Any) -> Any:
        """Build the component from the framework's arguments and the options; its errors name the block's location."""
        with error_location(self.where):
            return self.cls(*options_set_by_framework, **self.options)

    def without_pretrained(self) -> Component:
        """Return this backbone with the options that start it from random weights."""
        with error_location(self.where):
            changed = self.cls.without_pretrained(self.options)
        return replace(self, options={**self.options, **changed}, resolved={**self.resolved, **changed})


@contextmanager
def error_location(where: str) -> Iterator[None]:
    """Add a location to errors raised in the block that have none; a ValueError or TypeError becomes a ConfigError."""
    try:
        yield
    except UserError as error:
        error.problems = tuple(p if p.where else replace(p, where=where) for p in error.problems)
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error), where=where) from error
