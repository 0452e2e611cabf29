"""Subcommands that plugins add to the command line: listed without importing any, imported when they are called."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from transfer.errors import PluginError
from transfer.registry.entry_points import Plugin, core_first, import_target, origin, plugins
from transfer.registry.listing import description

KIND = "command"
"""Entries of the group ``transfer.commands``: a function, or a ``typer.Typer`` app."""
OLD_SPELLINGS = {"look": "preview", "value": "pretraining-gain", "matrix": "compatibility"}
"""Commands of version 0.1 that have another name now; the old name keeps working."""


# What is of click is Any here: typer brings a copy of click or needs it, as its version is.
class WithPlugins(TyperGroup):
    """Core's own commands, and after them those of plugins; a plugin cannot replace one of core's."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        own = super().list_commands(ctx)
        return [*own, *sorted({plugin.name for plugin in plugins(KIND)} - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by name, without importing a command that comes from an entry point."""
        name = OLD_SPELLINGS.get(cmd_name, cmd_name)
        own = super().get_command(ctx, name)
        claims = core_first([plugin for plugin in plugins(KIND) if plugin.name == name])
        return own if own is not None or not claims else _NotImported(claims)


def own_commands(context: typer.Context) -> set[str]:
    """Return the names that no entry point can take: the commands registered in ``transfer.cli.app``."""
    root = context.find_root()
    return set(TyperGroup.list_commands(root.command, root))  # type: ignore[arg-type]  # the root is a WithPlugins


class _NotImported(TyperCommand):
    """A plugin's command that is imported when it is called."""

    def __init__(self, claims: list[Plugin]) -> None:
        super().__init__(claims[0].name, help=description(claims[0]) or f"A command of {claims[0].distribution}.")
        self.claims = claims

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command and let it read its arguments."""
        if len(self.claims) > 1:
            owners = " and ".join(f"{plugin.distribution} {plugin.version}" for plugin in self.claims)
            raise PluginError(f"command {self.name!r} is claimed by {owners}", fix="uninstall one of them")
        return _command(self.claims[0]).make_context(info_name, args, parent, **extra)


def _command(plugin: Plugin) -> Any:
    loaded = import_target(plugin)
    if isinstance(loaded, typer.Typer):
        return typer.main.get_command(loaded)
    if isinstance(loaded, type) or not callable(loaded):
        raise PluginError(
            f"command {plugin.name!r} is {loaded!r}, which is neither a function nor a typer.Typer",
            where=origin(plugin),
            fix="let the entry point name a function or a typer.Typer",
        )
    app = typer.Typer(add_completion=False)
    app.command(plugin.name)(loaded)
    return typer.main.get_command(app)
