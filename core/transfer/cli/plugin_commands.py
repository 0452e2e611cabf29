"""Commands about plugins: plugins, show, compatibility, schema, new-plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transfer.errors import UserError

if TYPE_CHECKING:
    from transfer.registry.entry_points import Plugin

from transfer.cli.arguments import AsJSON
from transfer.cli.plugin_subcommands import own_commands


def plugins(
    context: typer.Context,
    as_json: AsJSON = False,
    check: Annotated[bool, typer.Option("--check", help="Load each and check its quick contracts.")] = False,
) -> None:
    """List what is installed and what cannot be loaded, without importing any of it."""
    from transfer.registry.listing import catalog

    found = catalog(own_commands(context))
    if check:
        _check_plugins([entry.plugin for entry in found])
        return
    if as_json:
        from dataclasses import asdict

        listed = [
            asdict(entry.plugin)
            | {
                "description": entry.description,
                "unavailable": entry.problem and entry.problem.message,
                "fix": entry.problem and entry.problem.fix,
            }
            for entry in found
        ]
        print(json.dumps(listed, indent=2))  # noqa: T201
        return
    from rich.table import Table
    from rich.text import Text

    from transfer.system.terminal import Console

    console = Console()
    rows = [(e.plugin.kind, e.plugin.name, e.plugin.distribution, e.plugin.version) for e in found]
    headings = ("kind", "name", "distribution", "version")
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    # Of names nothing is cut off: what room they leave is the description's.
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading, width in zip(headings, widths, strict=True):
        table.add_column(heading, width=width, no_wrap=True)
    room = max(12, console.width - sum(width + 2 for width in widths) - 2)
    table.add_column("description", width=room, no_wrap=True, overflow="ellipsis")
    for row, entry in zip(rows, found, strict=True):
        said = Text("(unavailable, see below)", style="red") if entry.problem else Text(entry.description)
        table.add_row(*row, said)
    console.print(table)
    for entry in found:
        if entry.problem:
            name, why = f"{entry.plugin.kind} {entry.plugin.name}", entry.problem
            message = f"\n{name} is unavailable: {why.message}\n  fix: {why.fix}"
            console.print(message, markup=False, highlight=False, soft_wrap=True)


def _check_plugins(installed: list[Plugin]) -> None:
    """Load each plugin, check its quick contracts, and end with status 1 where one is broken."""
    from transfer.system.terminal import Console
    from transfer.testing.suite import quick_check

    console, broken = Console(), 0
    for plugin in installed:
        if plugin.extras and plugin.unavailable:  # an extra is a choice, and not to have made it breaks nothing
            console.print(
                f"left out  {plugin.kind} {plugin.qualified_name}: {plugin.unavailable.message}", markup=False
            )
            continue
        kept, wrong = quick_check(plugin)
        mark = "[red]broken[/]" if wrong else "[green]good[/]  "
        console.print(f"{mark}  {plugin.kind} {plugin.qualified_name}: {kept} contracts kept", highlight=False)
        for failure in wrong:
            console.print(failure, markup=False, highlight=False, soft_wrap=True)
        broken += bool(wrong)
    if broken:
        raise typer.Exit(1)


def show(
    kind: Annotated[str, typer.Argument(help="dataset, backbone, head, task, or another that `plugins` lists.")],
    name: Annotated[str, typer.Argument(help="As a config calls it.")],
) -> None:
    """Show the options of a plugin: type, default, description."""
    import inspect

    from rich.table import Table
    from rich.text import Text

    from transfer.config.option_schema import describe_options
    from transfer.registry.entry_points import find, kinds, load
    from transfer.system.terminal import Console

    if kind not in (known := kinds()):
        raise UserError(f"there is no kind of plugin called {kind!r}", available=known)
    plugin, cls = find(kind, name), load(kind, name)
    summary = (inspect.getdoc(cls) or "").partition("Args:")[0].strip()
    console = Console()
    console.print(
        Text(f"{kind} {plugin.name}  ({plugin.distribution} {plugin.version}, {plugin.target})", style="bold")
    )
    console.print(Text(summary))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("option", "type", "default", "description"):
        table.add_column(heading, overflow="fold")
    for option in describe_options(cls):
        table.add_row(option.name, Text(option.type), Text(option.default), Text(option.description))
    console.print(table)


def compatibility(as_json: AsJSON = False) -> None:
    """Show which datasets, backbones, heads and tasks fit together, of all that is installed."""
    from rich.table import Table
    from rich.text import Text

    from transfer.config.compatibility import compatibility_tables as declared
    from transfer.system.terminal import Console

    tables, problems = declared()
    if as_json:
        print(json.dumps({table.title: table.cells for table in tables}, indent=2))  # noqa: T201
    console = Console(stderr=as_json)
    for fits in tables if not as_json else ():
        table = Table(title=fits.title, title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
        for row, cells in fits.cells.items():
            named = [name if cell == "yes" else f"{name} ({cell})" for name, cell in cells.items() if cell]
            table.add_row(row, Text(", ".join(named) or "nothing"))
        console.print(table, "")
    for problem in problems:
        console.print(f"left out: {problem}", markup=False, highlight=False, soft_wrap=True)


def schema(
    output: Annotated[Path | None, typer.Option(help="The file to write; else it is printed.")] = None,
) -> None:
    """Write the JSON Schema of a config, for editors: every installed plugin's options."""
    from transfer.config.json_schema import config_schema
    from transfer.system.terminal import Console

    whole, problems = config_schema()
    text = json.dumps(whole, indent=1)
    for problem in problems:
        Console(stderr=True).print(f"left out: {problem}", markup=False, highlight=False, soft_wrap=True)
    if output is None:
        print(text)  # noqa: T201
    else:
        output.write_text(text + "\n", encoding="utf-8")
        print(output)  # noqa: T201


def new_plugin(
    name: Annotated[str, typer.Argument(help="What the plugin is called; its package becomes transfer-NAME.")],
    output: Annotated[Path, typer.Option(help="The folder in which the package makes its own.")] = Path(),
) -> None:
    """Write a plugin package that installs, passes its own tests and trains."""
    import transfer
    from transfer.registry.scaffold import new_plugin as write

    folder = write(name, output, version=transfer.__version__)
    (config,) = folder.glob("*.yaml")
    for line in (f"cd {folder}", "pip install --editable . pytest", "pytest", f"transfer run {config.name}"):
        print(line)  # noqa: T201  # plain, to be copied
