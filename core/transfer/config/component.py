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
    """A plugin that a config names, and the options it gives.

    Args:
        kind: Its kind.
        plugin: Where it comes from.
        cls: Its class.
        options: Checked options, defaults filled in.
        resolved: The whole block as JSON, name included.
        where: File and line of its block.
    """

    kind: Kind
    plugin: entry_points.Plugin
    cls: type[Any]
    options: Mapping[str, Any]
    resolved: Mapping[str, Any]
    where: str

    def make(self, *options_set_by_framework: Any) -> Any:
        """Build it from what the framework hands over and its options; its mistakes name the line of its block."""
        with error_location(self.where):
            return self.cls(*options_set_by_framework, **self.options)

    def without_pretrained(self) -> Component:
        """Return this backbone as it begins from random weights."""
        with error_location(self.where):
            changed = self.cls.without_pretrained(self.options)
        return replace(self, options={**self.options, **changed}, resolved={**self.resolved, **changed})


@contextmanager
def error_location(where: str) -> Iterator[None]:
    """Give an error raised inside a place, where it does not know better; a plain ValueError becomes a ConfigError."""
    try:
        yield
    except UserError as error:
        error.problems = tuple(p if p.where else replace(p, where=where) for p in error.problems)
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error), where=where) from error
