"""The command line: thin commands over :mod:`transfer.runs.train`, which import nothing heavy before they need it."""

from __future__ import annotations

import errno
import gc
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from transfer.cli.plugin_subcommands import WithPlugins
from transfer.errors import DataError, TransferError, UserError

if TYPE_CHECKING:
    from transfer.registry.entry_points import Plugin

if TYPE_CHECKING:
    from transfer.runs.train import Run
    from transfer.training.events import Observer

_T = TypeVar("_T")

app = typer.Typer(
    name="transfer",
    cls=WithPlugins,
    help="Take a pretrained backbone, put a head on it, freeze what should stay, train the rest on your task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values to change, for example train.batch_size=128."),
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["TRANSFER_DEBUG"] = "1"


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="The folder in which the run makes its own.")] = Path("runs"),
    quick: Annotated[bool, typer.Option("--quick", help="A few batches of every part, to prove a config.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Train with so many seeds, into one folder of runs.")] = None,
) -> None:
    """Train what CONFIG says; the last line printed is the run's folder."""
    from transfer.runs.train import run as run_config

    if seeds is not None:
        from transfer.experiments.seeds import run_seeds

        _train_seeds(
            lambda observe: run_seeds(config, overrides or [], seeds=seeds, output=output, quick=quick, observe=observe)
        )
        return
    _train(lambda observe: run_config(config, overrides or [], output=output, quick=quick, observe=observe))


@app.command()
def resume(run: RunFolder) -> None:
    """Go on with a run that was interrupted, to the result that it would have had."""
    from transfer.experiments.pretraining_gain import VALUE, resume_value
    from transfer.experiments.seeds import MANIFEST, resume_seeds
    from transfer.runs.train import resume as resume_run

    if (Path(run) / MANIFEST).is_file():
        _train_seeds(lambda observe: resume_seeds(run, observe=observe))
    elif (Path(run) / VALUE).is_file():
        _train_arms(lambda observe: resume_value(run, observe=observe))
    else:
        _train(lambda observe: resume_run(run, observe=observe))


def _train(start: Callable[[Observer], Run]) -> None:
    """Show a run as it goes and say what comes next."""
    from transfer.system.ranks import place
    from transfer.system.terminal import Console, printable

    ended = _shown(start)
    if place().rank:
        return
    Console().print(
        f"next: transfer predict {ended.folder} INPUT...   or   transfer evaluate {ended.folder}",
        highlight=False,
        soft_wrap=True,
    )
    if (report := ended.folder / "report.html").is_file():
        Console().print(f"report: {report}", highlight=False, markup=False, soft_wrap=True)
    print(printable(str(ended.folder)))  # noqa: T201  # plain, so that a script can take the last line


def _train_seeds(start: Callable[[Observer], Run]) -> None:
    """Show runs as they go, then mean and spread."""
    from transfer.cli.progress import seeds_table
    from transfer.system.terminal import Console, printable

    ended = _shown(start)
    Console().print(seeds_table(ended.summary))
    print(printable(str(ended.folder)))  # noqa: T201  # plain, so that a script can take the last line


def _train_arms(start: Callable[[Observer], Run]) -> None:
    """Show the arms as they go, then what pretraining is worth."""
    from transfer.cli.progress import value_table
    from transfer.system.terminal import Console, printable

    ended = _shown(start)
    Console().print(value_table(ended.summary))
    print(printable(str(ended.folder)))  # noqa: T201  # plain, so that a script can take the last line


def _shown(start: Callable[[Observer], _T]) -> _T:
    """Show training as it goes, or leave with 130 or 143 where it was interrupted."""
    from transfer.cli.progress import RunConsole
    from transfer.system.ranks import place
    from transfer.system.signals import Interrupted
    from transfer.system.terminal import Console

    try:
        with RunConsole(Console(quiet=place().rank > 0)) as observe:
            return start(observe)
    except Interrupted as interruption:
        # Typer would make a 1 or 130 of it.
        raise typer.Exit(interruption.exit_status) from interruption


@app.command()
def value(
    config: ConfigFile,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="How many seeds each arm is trained with.")] = 5,
    output: Annotated[Path, typer.Option(help="The folder in which the runs get one of their own.")] = Path("runs"),
) -> None:
    """Say what pretraining is worth here: CONFIG from scratch, frozen, probed and fine-tuned, with several seeds."""
    from transfer.experiments.pretraining_gain import measure_value

    _train_arms(lambda observe: measure_value(config, overrides or [], seeds=seeds, output=output, observe=observe))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run directories and folders of seeds; the first is the reference."),
    ],
    metric: Annotated[str | None, typer.Option(help="Another metric than the task's primary one.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write it as a page that needs nothing beside itself.")] = None,
    different_data: Annotated[
        bool, typer.Option("--different-data", help="Compare although the examples scored were not the same.")
    ] = False,
) -> None:
    """Put runs beside each other and say which differences are no more than noise."""
    from transfer.cli.progress import comparison_table
    from transfer.experiments.comparison import compare as compare_runs
    from transfer.system.terminal import Console

    comparison = compare_runs(runs, metric=metric, different_data=different_data)
    Console().print(comparison_table(comparison))
    comparison.write(csv=csv, html=html)


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Show what CONFIG would do, stage by stage, without data and without weights."""
    from transfer.cli.plan import render
    from transfer.runs.train import check as check_config
    from transfer.system.terminal import Console

    checked, parts = check_config(config, overrides or [])
    for part in render(checked, parts):
        Console().print(part)


@app.command()
def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Draw predictions that are right, wrong and least sure.")
    ] = False,
    as_json: AsJSON = False,
) -> None:
    """Score a split with a run's model."""
    from transfer.cli.progress import RunConsole, facts_table
    from transfer.runs.train import evaluate as evaluate_run
    from transfer.system.terminal import Console

    with RunConsole(Console(stderr=as_json)) as observe:
        metrics = evaluate_run(run, split, observe=observe)
    if as_json:
        print(json.dumps({split: metrics}))  # noqa: T201
    else:
        Console().print(facts_table({"split": split, **{name: repr(value) for name, value in metrics.items()}}))
    if pictures:
        from transfer.reports.preview import look_at_predictions

        Console(stderr=as_json).print(
            f"predictions: {look_at_predictions(run, split).path}", highlight=False, soft_wrap=True
        )


@app.command()
def report(run: RunFolder) -> None:
    """Write RUN/report.html: one page with the plan, curves, mistakes, calibration and data of a run."""
    from transfer.reports.report import report as report_run
    from transfer.system.terminal import printable

    print(printable(str(report_run(run))))  # noqa: T201


@app.command()
def sweep(
    config: ConfigFile,
    space: Annotated[str, typer.Argument(metavar="SPACE", help="A YAML file: keys of the config and their values.")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="The folder in which the sweep makes its own.")] = Path("runs"),
    processes: Annotated[int, typer.Option(min=1, help="That work on the study together.")] = 1,
) -> None:
    """Try out configs of a SPACE; the same command again goes on where it was stopped."""
    from transfer.cli.progress import RunConsole
    from transfer.experiments.sweep import sweep as run_sweep
    from transfer.system.signals import Interrupted
    from transfer.system.terminal import Console

    console = Console()
    try:
        with RunConsole(console) as observe:
            ended = run_sweep(config, space, overrides or [], output=output, processes=processes, observe=observe)
    except Interrupted as interruption:
        print("stopped; the same command goes on", file=sys.stderr)  # noqa: T201
        raise typer.Exit(interruption.exit_status) from interruption
    from rich.markdown import Markdown

    report = ended.folder / "report.md"
    console.print(Markdown(report.read_text(encoding="utf-8")))
    print(report)  # noqa: T201


@app.command("find-lr")
def find_lr(
    config: ConfigFile,
    overrides: Overrides = None,
    lowest: Annotated[float, typer.Option(help="The learning rate of the first step.")] = 1e-7,
    highest: Annotated[float, typer.Option(help="The learning rate of the last step.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 100,
    output: Annotated[Path | None, typer.Option(help="The SVG file; by default NAME-find-lr.svg.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Suggest a learning rate: train the first phase of CONFIG at rates that rise, and draw the loss."""
    from transfer.cli.progress import RunConsole, range_test_table
    from transfer.experiments.lr_finder import find_learning_rate
    from transfer.system.terminal import Console

    with RunConsole(Console(stderr=as_json)) as observe:
        found = find_learning_rate(
            config, overrides or [], lowest=lowest, highest=highest, steps=steps, output=output, observe=observe
        )
    if as_json:
        from dataclasses import asdict

        print(json.dumps(asdict(found) | {"plot": str(found.plot)}))  # noqa: T201
        return
    console = Console()
    console.print(range_test_table(found.rates, found.losses, found.smoothed))
    console.print(
        f"suggestion: {found.steepest:.2g}, where the smoothed loss falls fastest; "
        f"a tenth of the rate at its lowest point is {found.tenth_of_lowest:.2g}\n"
        f"next: transfer run {config} {shlex.join([*(overrides or []), found.assignment])}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    print(found.plot)  # noqa: T201


@app.command()
def look(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write it; by default a picture goes to NAME-batch.png.")
    ] = None,
) -> None:
    """Show a training batch of CONFIG as the model sees it: augmented, with labels."""
    from transfer.reports.preview import look as look_at
    from transfer.system.terminal import printable

    seen = look_at(config, overrides or [], output=output)
    if isinstance(seen.content, str):
        print(printable(seen.content))  # noqa: T201
    if seen.path is not None:
        print(seen.path)  # noqa: T201


@app.command()
def predict(
    run: RunFolder,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="A path, a pattern, a text, or - for lines on standard input."),
    ],
    as_json: AsJSON = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show which words moved the score, by leaving out one at a time.")
    ] = False,
) -> None:
    """Say what a run's model makes of some inputs."""
    from rich.table import Table
    from rich.text import Text

    from transfer.cli.progress import explanation_text, facts_table
    from transfer.runs.train import predict as predict_with
    from transfer.system.terminal import Console

    if as_json:
        for answer in predict_with(run, _lines(inputs), explain=explain):
            print(json.dumps(answer, ensure_ascii=False), flush=True)  # noqa: T201
        return
    if explain:
        for answer in predict_with(run, _lines(inputs), explain=True):
            explanation = answer.pop("explanation")
            Console().print(facts_table({name: _cell(value) for name, value in answer.items()}))
            Console().print(explanation_text(explanation))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, answer in enumerate(predict_with(run, _lines(inputs))):
        if not number:
            for name in answer:
                table.add_column(name, overflow="fold")
        table.add_row(*(Text(_cell(value)) for value in answer.values()))
    Console().print(table)


def _lines(inputs: list[str]) -> Iterator[str]:
    for source in inputs:
        if source == "-":
            if isinstance(sys.stdin, TextIOWrapper):  # read as arguments are, whatever the locale says
                sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
            for number, line in enumerate(sys.stdin, 1):
                if any("\udc80" <= character <= "\udcff" for character in line):  # how a byte that is none is read
                    where = f"standard input, line {number}"
                    raise DataError("this line is not UTF-8", where=where, fix="give lines in UTF-8")
                if line.strip():
                    yield line.rstrip("\n")
        else:
            yield source


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, dict):
        return "  ".join(f"{name} {_cell(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


@app.command()
def serve(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run directories; NAME=RUN gives a model a name of its own.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on; by default only this machine is answered.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8000,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that go through a model together.")] = 32,
    wait_milliseconds: Annotated[
        float, typer.Option(min=0, max=1000, help="How long the first of a batch waits for others.")
    ] = 2.0,
    max_megabytes: Annotated[float, typer.Option(min=0.001, help="The largest request.")] = 10.0,
    timeout_seconds: Annotated[float, typer.Option(min=0.1, help="In which a request must have arrived.")] = 10.0,
) -> None:
    """Answer requests over HTTP with the models of runs: a page to try them on, and a JSON API."""
    from transfer.registry.requirements import unmet

    if problem := unmet("transfer", ("serve",)):
        raise UserError(f"a server is an extra: {problem.message}", fix=problem.fix)
    from rich.console import Console

    from transfer.deployment.serving.app import Batching
    from transfer.deployment.serving.reading import MEBIBYTE, Limits
    from transfer.deployment.serving.server import is_loopback
    from transfer.deployment.serving.server import serve as serve_models
    from transfer.system.signals import Interrupted

    console = Console()

    def started(address: str, names: list[str]) -> None:
        if not is_loopback(host):
            warning = f"{host} can be reached from other machines: there is no password and no encryption"
            console.print(f"[yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)
        for name in names:
            console.print(f"{address}/models/{name}/predict", highlight=False, soft_wrap=True)
        console.print(f"page: {address}   API: {address}/openapi.json   Ctrl-C ends", highlight=False, soft_wrap=True)

    limits = Limits(body_bytes=int(max_megabytes * MEBIBYTE), seconds=timeout_seconds)
    batching = Batching(most=batch_size, wait_seconds=wait_milliseconds / 1000)
    try:
        serve_models(runs, host=host, port=port, limits=limits, batching=batching, started=started)
    except Interrupted as interruption:
        raise typer.Exit(interruption.exit_status) from interruption


@app.command()
def export(
    run: RunFolder,
    format: Annotated[
        str, typer.Option("--format", help="safetensors, torch_export, onnx, or the backbone's own: torchvision.")
    ],
    output: Annotated[Path | None, typer.Option(help="A folder, or a file; by default RUN/export/FORMAT.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier export wrote.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
) -> None:
    """Write a run's model in another format, checked in a fresh process, with a model card."""
    from transfer.cli.progress import facts_table
    from transfer.deployment.export import export as export_run
    from transfer.system.terminal import Console

    exported = export_run(run, format, output, force=force, dry_run=dry_run)
    facts: dict[str, object] = {"would write" if dry_run else "written": str(exported.path)}
    facts["files"] = list(exported.files)
    if not dry_run:
        facts["compared"] = f"{exported.outputs:,} outputs for {exported.examples}, in a fresh process"
        facts["largest deviation"] = exported.deviation
    Console().print(facts_table(facts))


@app.command()
def plugins(
    as_json: AsJSON = False,
    check: Annotated[bool, typer.Option("--check", help="Load each and check its quick contracts.")] = False,
) -> None:
    """List what is installed and what cannot be loaded, without importing any of it."""
    from transfer.registry.listing import catalogue

    own = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    found = catalogue(own | {group.name for group in app.registered_groups if group.name})
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


@app.command()
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


@app.command()
def matrix(as_json: AsJSON = False) -> None:
    """Show which datasets, backbones, heads and tasks fit together, of all that is installed."""
    from rich.table import Table
    from rich.text import Text

    from transfer.config.compatibility import matrix as declared
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


@app.command()
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


@app.command("new-plugin")
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


cache = typer.Typer(help="The stored features of frozen stages.", no_args_is_help=True)
app.add_typer(cache, name="cache")


@cache.command("list")
def list_cache() -> None:
    """List what is stored, the entry used last first."""
    from datetime import datetime

    from rich.table import Table

    from transfer.feature_cache.loader import FeatureCache
    from transfer.system.terminal import Console

    stored = FeatureCache(limit_bytes=0)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("key", "MiB", "examples", "view", "stages", "used"):
        table.add_column(heading)
    total = 0
    for entry in stored.entries():
        total += entry["bytes"]
        used = datetime.fromtimestamp(entry["used"]).astimezone().isoformat(sep=" ", timespec="minutes")
        view = "-" if entry["view"] is None else str(entry["view"])
        stages = " > ".join(entry["stages"])
        table.add_row(entry["key"][:12], f"{entry['bytes'] / 2**20:.1f}", f"{entry['examples']:,}", view, stages, used)
    console = Console()
    console.print(table)
    console.print(f"{total / 2**20:,.1f} MiB in {stored.folder}", highlight=False, soft_wrap=True)


@cache.command("clear")
def clear_cache() -> None:
    """Drop everything that is stored; it is computed again when a run needs it."""
    from transfer.feature_cache.loader import FeatureCache
    from transfer.system.terminal import Console

    stored = FeatureCache(limit_bytes=0)
    freed = stored.clear()
    Console().print(f"freed {freed / 2**20:,.1f} MiB in {stored.folder}", highlight=False, soft_wrap=True)


_FULL = (errno.ENOSPC, errno.EDQUOT)


def _show(error: TransferError) -> None:
    from transfer.cli.progress import error_panel
    from transfer.system.terminal import Console

    Console(stderr=True).print(error_panel(error))


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 it failed, 2 the user's input is wrong, 130 or 143 interrupted."""
    # Importing torch makes half a million objects that stay: looking for garbage among them every 700 new ones, as is
    # the default, takes a quarter of a command's start.
    gc.set_threshold(50_000, 20, 100)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be in no encoding at all
    try:
        app()
    except TransferError as error:
        if os.environ.get("TRANSFER_DEBUG"):
            raise
        if not error.shown_elsewhere:
            _show(error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        full = error.errno in _FULL
        if not (full or error.filename) or os.environ.get("TRANSFER_DEBUG"):
            raise
        with suppress(OSError):  # what is still to be written finds no room either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        again = "make room, then run the command again; a run that has begun goes on with `transfer resume RUN`"
        refused = TransferError(
            f"the system refuses a file: {error.strerror}",
            where=str(error.filename or "a file, or the output of this command"),
            fix=again if full else "check the path, and who may use it",
        )
        _show(refused)
        sys.exit(refused.exit_status)
