"""Commands of the package experiments: pretraining-gain, compare, sweep, find-lr."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from transfer.cli.arguments import AsJSON, ConfigFile, Overrides
from transfer.cli.follow import follow_arms


def pretraining_gain(
    config: ConfigFile,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="How many seeds each arm is trained with.")] = 5,
    output: Annotated[Path, typer.Option(help="The folder in which the runs get one of their own.")] = Path("runs"),
) -> None:
    """Say what pretraining is worth here: CONFIG from scratch, frozen, probed and fine-tuned, with several seeds."""
    from transfer.experiments.pretraining_gain import pretraining_gain

    follow_arms(lambda observe: pretraining_gain(config, overrides or [], seeds=seeds, output=output, observe=observe))


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
    from transfer.cli.tables import comparison_table
    from transfer.experiments.comparison import compare as compare_runs
    from transfer.system.terminal import Console

    comparison = compare_runs(runs, metric=metric, different_data=different_data)
    Console().print(comparison_table(comparison))
    comparison.write(csv=csv, html=html)


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
    from transfer.cli.progress import RunConsole
    from transfer.cli.tables import range_test_table
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
