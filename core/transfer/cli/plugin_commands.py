"""Commands for plugins: plugins, show, compatibility, schema, new-plugin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transfer.cli.arguments import AsJSON
from transfer.cli.plugin_subcommands import own_commands
from transfer.errors import PluginError, unknown_name

if TYPE_CHECKING:
    from transfer.registry.entry_points import Plugin
    from transfer.registry.listing import Entry

MIN_DESCRIPTION_WIDTH = 30
"""If less remains for the descriptions, the table of plugins has no columns for the version and the distribution."""
MAX_NEAR_NAMES = 6
"""Maximum number of similar names to suggest if no model matches a pattern."""
MIN_MODELS_SHOWN = 10
"""Number of models that are listed even if the screen has fewer lines."""


def plugins(
    context: typer.Context,
    as_json: AsJSON = False,
    check: Annotated[
        bool, typer.Option("--check", help="Import each plugin, and run its quick contract checks.")
    ] = False,
) -> None:
    """List the installed plugins, and those that cannot be loaded, without importing them."""
    from transfer.registry.listing import catalog

    entries = catalog(own_commands(context))
    if check:
        _check_plugins([entry.plugin for entry in entries])
    elif as_json:
        _print_json(entries)
    else:
        _print_table(entries)


def _print_json(entries: Sequence[Entry]) -> None:
    from dataclasses import asdict

    listed = [
        asdict(entry.plugin)
        | {
            "description": entry.description,
            "unavailable": entry.problem and entry.problem.message,
            "fix": entry.problem and entry.problem.fix,
        }
        for entry in entries
    ]
    print(json.dumps(listed, indent=2))  # noqa: T201


def _print_table(entries: Sequence[Entry]) -> None:
    """Print names completely, and fold descriptions into the remaining width."""
    from rich.table import Table
    from rich.text import Text

    from transfer.system.terminal import Console

    console = Console()
    headings = ("kind", "name", "distribution", "version")
    rows = [(e.plugin.kind, e.plugin.name, e.plugin.distribution, e.plugin.version) for e in entries]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    columns = len(headings)
    # Each column is followed by a padding of two characters.
    while columns > 2 and console.width - sum(width + 2 for width in widths[:columns]) < MIN_DESCRIPTION_WIDTH:
        columns -= 1
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading, width in list(zip(headings, widths, strict=True))[:columns]:
        table.add_column(heading, width=width, no_wrap=True)
    table.add_column("description", overflow="fold")
    for row, entry in zip(rows, entries, strict=True):
        description = Text("(unavailable, see below)", style="red") if entry.problem else Text(entry.description)
        table.add_row(*row[:columns], description)
    console.print(table)
    for entry in entries:
        if entry.problem:
            name = f"{entry.plugin.kind} {entry.plugin.name}"
            message = f"\n{name} is unavailable: {entry.problem.message}\n  fix: {entry.problem.fix}"
            console.print(message, markup=False, highlight=False, soft_wrap=True)


def _check_plugins(installed: Sequence[Plugin]) -> None:
    """Run the quick contract checks of each plugin, and exit with status 1 if one fails."""
    from transfer.system.terminal import Console
    from transfer.testing.suite import quick_check

    console, broken = Console(), 0
    for plugin in installed:
        # A plugin whose extra is not installed is not broken: extras are optional.
        if plugin.extras and plugin.unavailable:
            message = f"skipped   {plugin.kind} {plugin.qualified_name}: {plugin.unavailable.message}"
            console.print(message, markup=False, highlight=False, soft_wrap=True)
            continue
        passed, failures = quick_check(plugin)
        mark = "[red]broken[/]" if failures else "[green]good[/]  "
        console.print(f"{mark}  {plugin.kind} {plugin.qualified_name}: {passed} contracts kept", highlight=False)
        for failure in failures:
            console.print(failure, markup=False, highlight=False, soft_wrap=True)
        broken += bool(failures)
    if broken:
        raise typer.Exit(1)


def show(
    kind: Annotated[
        str, typer.Argument(help="Kind of plugin: dataset, backbone, head, task, or another kind that `plugins` lists.")
    ],
    name: Annotated[str, typer.Argument(help="Name of the plugin, as in a config.")],
    models: Annotated[
        str | None,
        typer.Option(help="List the models of a backbone whose names match this pattern, such as 'convnext*'."),
    ] = None,
) -> None:
    """Show the options of a plugin with their types, defaults and descriptions, or the models of a backbone."""
    import inspect

    from rich.table import Table
    from rich.text import Text

    from transfer.config.check import block_base
    from transfer.config.option_schema import Block, describe_fields, describe_options, options_model
    from transfer.config.torch_classes import RESERVED_OPTIONS, options_set_by_framework
    from transfer.registry.entry_points import find, kinds, load
    from transfer.system.terminal import Console

    if kind not in kinds():
        raise PluginError.of([unknown_name("kind of plugin", kind, kinds())])
    plugin, cls = find(kind, name), load(kind, name)
    if models is not None:
        _print_models(kind, plugin.name, cls, models)
        return
    summary = (inspect.getdoc(cls) or "").partition("Args:")[0].strip()
    console = Console()
    console.print(
        Text(f"{kind} {plugin.name}  ({plugin.distribution} {plugin.version}, {plugin.target})", style="bold")
    )
    console.print(Text(summary))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("option", "type", "default", "description"):
        table.add_column(heading, overflow="fold")
    framework = [option for option in describe_fields(block_base(kind, cls)) if option.name != "name"]
    options = describe_options(cls)
    if kind in ("optimizer", "scheduler"):  # as in torch's classes, all parameters are options
        reserved = RESERVED_OPTIONS if kind == "optimizer" else options_set_by_framework(cls)
        options = describe_fields(options_model(cls, Block, skip=reserved))
    for option in (*options, *framework):
        table.add_row(option.name, Text(option.type), Text(option.default), Text(option.description))
    console.print(table)


def _print_models(kind: str, name: str, cls: type, pattern: str) -> None:
    """Print the models of a backbone that match a pattern, as many as fit on the screen, and their number."""
    import difflib
    import fnmatch

    from rich.table import Table
    from rich.text import Text

    from transfer.interfaces import Backbone
    from transfer.system.formatting import format_value
    from transfer.system.terminal import Console

    names = cls.model_names() if issubclass(cls, Backbone) else ()
    if not names:
        raise PluginError(f"{kind} {name!r} has no list of models", fix=f"see its options: transfer show {kind} {name}")
    matching = fnmatch.filter(names, pattern)
    if not matching:
        near = difflib.get_close_matches(pattern.strip("*?").lower(), names, n=MAX_NEAR_NAMES, cutoff=0.5)
        raise PluginError(
            f"no model of {name} matches {pattern!r}",
            available=near,
            fix="use * for any characters, as in '*resnet50*'",
        )
    console = Console()
    # Properties of a model take a moment to find out, so only those of the visible rows are.
    shown = matching[: max(MIN_MODELS_SHOWN, console.height - 4)]
    rows = [cls.describe_model(model) for model in shown]  # type: ignore[attr-defined]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("model", *dict.fromkeys(heading for row in rows for heading in row)):
        table.add_column(heading, overflow="fold")
    for model, row in zip(shown, rows, strict=True):
        table.add_row(model, *(Text(format_value(value)) for value in row.values()))
    console.print(table)
    rest = "" if len(shown) == len(matching) else "; a narrower pattern shows the others"
    console.print(f"{len(shown)} of {len(matching):,} models that match{rest}", highlight=False)


def compatibility(as_json: AsJSON = False) -> None:
    """Show which of the installed datasets, backbones, heads and tasks are compatible."""
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
            compatible = [name if cell == "yes" else f"{name} ({cell})" for name, cell in cells.items() if cell]
            table.add_row(row, Text(", ".join(compatible) or "none"))
        console.print(table, "")
    for problem in problems:
        console.print(f"skipped: {problem}", markup=False, highlight=False, soft_wrap=True)


def schema(
    output: Annotated[
        Path | None, typer.Option(help="File to write. Default: standard output.", show_default=False)
    ] = None,
) -> None:
    """Write the JSON Schema of a config with the options of all installed plugins, for editors."""
    from transfer.config.json_schema import config_schema
    from transfer.system.terminal import Console

    document, problems = config_schema()
    text = json.dumps(document, indent=1)
    for problem in problems:
        Console(stderr=True).print(f"skipped: {problem}", markup=False, highlight=False, soft_wrap=True)
    if output is None:
        print(text)  # noqa: T201
    else:
        output.write_text(text + "\n", encoding="utf-8")
        print(output)  # noqa: T201


def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the plugin; the package is called transfer-NAME.")],
    output: Annotated[Path, typer.Option(help="Folder in which the folder of the package is created.")] = Path(),
) -> None:
    """Create a plugin package with a backbone, a dataset, a config and tests."""
    import transfer
    from transfer.registry.scaffold import new_plugin as write
    from transfer.system.formatting import quote_for_shell

    folder = write(name, output, version=transfer.__version__)
    (config,) = folder.glob("*.yaml")
    for line in (
        f"cd {quote_for_shell(folder)}",
        "pip install --editable . pytest",
        "pytest",
        f"transfer run {config.name}",
    ):
        print(line)  # noqa: T201  # without style, to be copied
