"""Commands from entry points. They are listed without an import, and imported when they are called."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from transfer.errors import PluginError
from transfer.registry.entry_points import Plugin, core_first, import_target, origin, plugins
from transfer.registry.listing import description
from transfer.registry.requirements import CORE_DISTRIBUTION

KIND = "command"
"""Kind of the entry points in ``transfer.commands``. Each is a function or a ``typer.Typer`` app."""
OLD_SPELLINGS = {"look": "preview", "value": "pretraining-gain", "matrix": "compatibility"}
"""Command names of version 0.1 with their new names. They work, but ``--help`` does not list them."""


# The types of click are Any here: some versions of typer depend on click, others contain a copy of it.
class WithPlugins(TyperGroup):
    """Group of core's commands, followed by the commands of plugins. A plugin cannot replace a command of core."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        core = super().list_commands(ctx)
        return [*core, *sorted({plugin.name for plugin in plugins(KIND)} - set(core))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by name, without importing a command that comes from an entry point."""
        # Old names are resolved here only: `list_commands` does not contain them, so `--help` does not either.
        name = OLD_SPELLINGS.get(cmd_name, cmd_name)
        command = super().get_command(ctx, name)
        claims = core_first([plugin for plugin in plugins(KIND) if plugin.name == name])
        return command if command is not None or not claims else _NotImported(claims)


def own_commands(context: typer.Context) -> set[str]:
    """Return the names of the commands that ``transfer.cli.app`` registers, which no entry point can take."""
    root = context.find_root()
    # Of the base class, because WithPlugins adds the commands of plugins.
    return set(TyperGroup.list_commands(root.command, root))  # type: ignore[arg-type]  # the root is a WithPlugins


class _NotImported(TyperCommand):
    """Command from an entry point that is imported when it is called."""

    def __init__(self, claims: list[Plugin]) -> None:
        # Read from the source: an import of every plugin would make `transfer --help` slow.
        super().__init__(claims[0].name, help=description(claims[0]) or f"A command of {claims[0].distribution}.")
        self.claims = claims

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command, and parse its arguments."""
        if len(self.claims) > 1:
            owners = " and ".join(f"{plugin.distribution} {plugin.version}" for plugin in self.claims)
            raise PluginError(f"command {self.name!r} is claimed by {owners}", fix="uninstall one of them")
        return load_command(self.claims[0]).make_context(info_name, args, parent, **extra)


def load_command(plugin: Plugin) -> Any:
    """Import the command of an entry point, and return it as a click command."""
    loaded = import_target(plugin)
    if isinstance(loaded, typer.Typer):
        return typer.main.get_command(loaded)
    if isinstance(loaded, type) or not callable(loaded):
        raise PluginError(
            f"command {plugin.name!r} is wrong: expected a function or a typer.Typer, got {loaded!r}",
            where=origin(plugin),
            fix="change the entry point to a function or a typer.Typer",
        )
    # Typer converts a function to a click command only as part of an app.
    app = typer.Typer(add_completion=False)
    app.command(plugin.name)(loaded)
    return typer.main.get_command(app)


def all_commands(group: Any) -> dict[str, Any]:
    """Return the commands of ``transfer`` by name, those of this distribution's entry points included and imported."""
    entry_points = (plugin for plugin in plugins(KIND) if plugin.distribution == CORE_DISTRIBUTION)
    return {**group.commands, **{plugin.name: load_command(plugin) for plugin in entry_points}}
