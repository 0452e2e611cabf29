"""Commands of the package experiments: pretraining-gain, compare, probe, sweep, find-lr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transfer.cli.arguments import RUNS, AsJSON, ConfigFile, Device, OutputFolder, Overrides
from transfer.cli.follow import follow_arms

if TYPE_CHECKING:
    from transfer.experiments.lr_finder import RangeTest


def pretraining_gain(
    config: ConfigFile,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds of each arm, 2 or more.")] = 5,
    output: OutputFolder = RUNS,
) -> None:
    """Measure the gain of pretraining: train CONFIG from scratch, frozen and fine-tuned, with several seeds."""
    from transfer.experiments.pretraining_gain import pretraining_gain

    follow_arms(lambda observe: pretraining_gain(config, overrides or [], seeds=seeds, output=output, observe=observe))


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Run directories and folders of seeds. The first is the reference."),
    ],
    metric: Annotated[
        str | None, typer.Option(help="Metric to compare. Default: the primary metric of the task.", show_default=False)
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write.", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option(help="HTML page to write.", show_default=False)] = None,
    different_data: Annotated[
        bool, typer.Option("--different-data", help="Compare runs that were scored on different examples.")
    ] = False,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="NAME",
            show_default=False,
            help="Other data that the runs were evaluated on, by the name that evaluate --on printed.",
        ),
    ] = None,
) -> None:
    """Compare runs to the first one, and show which differences are within noise."""
    from transfer.cli.tables import comparison_table
    from transfer.experiments.comparison import compare as compare_runs
    from transfer.system.terminal import Console

    comparison = compare_runs(runs, metric=metric, different_data=different_data, on=on)
    Console().print(comparison_table(comparison))
    comparison.write(csv=csv, html=html)


def probe(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE...]", help="Paths of YAML files, and changes to each of these configs."
        ),
    ],
    shots: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N...",
            show_default=False,
            help="Numbers of labeled examples of each class, and full for all. Default: 1 4 16 full.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of draws of the labeled examples.")] = 5,
    keep: Annotated[
        bool, typer.Option("--keep", help="Write a run of the best backbone with a linear head on all examples.")
    ] = False,
    output: OutputFolder = RUNS,
    device: Device = None,
    as_json: AsJSON = False,
) -> None:
    """Compare the backbones of configs by simple classifiers on their frozen features, with few and with all labels."""
    from transfer.cli.progress import RunConsole
    from transfer.cli.tables import probe_table
    from transfer.experiments.probe import parse_shots, probe
    from transfer.system.terminal import Console, printable

    # An option of click takes one value: the numbers after the first one arrive among the arguments.
    numbers = [text for text in arguments if shots and (text == "full" or text.isdecimal())]
    overrides = [text for text in arguments if "=" in text and not Path(text).is_file()]
    configs = [text for text in arguments if text not in numbers and text not in overrides]
    levels = parse_shots([*shots, *numbers]) if shots else None
    with RunConsole(Console(stderr=as_json)) as observe:
        result = probe(
            configs, overrides, shots=levels, seeds=seeds, keep=keep, output=output, device=device, observe=observe
        )
    if as_json:
        print(result.json())  # noqa: T201
        return
    Console().print(probe_table(result))
    if result.folder is not None:
        print(printable(str(result.folder)))  # noqa: T201


def audit(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="CSV file to write. Default: NAME-audit.csv.", show_default=False)
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Number of folds for the out-of-fold probabilities.")] = 5,
    similarity: Annotated[float, typer.Option(help="Smallest cosine of the features of near duplicates.")] = 0.97,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of an earlier audit.")] = False,
) -> None:
    """Look for wrong labels, near duplicates and outliers in the data of CONFIG, by the features of its backbone."""
    from transfer.cli.progress import RunConsole
    from transfer.cli.tables import audit_table
    from transfer.errors import UserError
    from transfer.experiments.audit import audit as audit_data
    from transfer.system.formatting import quote_for_shell
    from transfer.system.terminal import Console

    path = output or Path(f"{Path(str(config)).stem}-audit.csv")
    if path.exists() and not force:  # the user may have reviewed it
        raise UserError("the file exists", where=str(path), fix="choose another --output, or replace it by --force")
    with RunConsole(Console()) as observe:
        audited = audit_data(
            config, overrides or [], folds=folds, similarity=similarity, device=device, observe=observe
        )
    audited.write_csv(path)
    Console().print(audit_table(audited))
    command = f"transfer run {quote_for_shell(str(config))} data.exclude={quote_for_shell(str(path))}"
    next_line = f"next: review {path}; without the rows with exclude = yes: {command}"
    Console().print(next_line, highlight=False, markup=False, soft_wrap=True)


def sweep(
    config: ConfigFile,
    space: Annotated[
        str, typer.Argument(metavar="SPACE", help="Path of a YAML file with config keys and their values.")
    ],
    overrides: Overrides = None,
    output: OutputFolder = RUNS,
    processes: Annotated[
        int, typer.Option(min=1, help="Number of processes that run trials, each on its own GPU if there are several.")
    ] = 1,
) -> None:
    """Search the hyperparameters of SPACE. The same command resumes an interrupted sweep."""
    from transfer.cli.progress import RunConsole
    from transfer.experiments.sweep import sweep as run_sweep
    from transfer.system.signals import Interrupted
    from transfer.system.terminal import Console

    console = Console()
    try:
        with RunConsole(console) as observe:
            ended = run_sweep(config, space, overrides or [], output=output, processes=processes, observe=observe)
    except Interrupted as interruption:
        print("interrupted; the same command resumes the sweep", file=sys.stderr)  # noqa: T201
        raise typer.Exit(interruption.exit_status) from interruption
    from rich.markdown import Markdown

    report = ended.folder / "report.md"
    console.print(Markdown(report.read_text(encoding="utf-8")))
    print(report)  # noqa: T201


def find_lr(
    config: ConfigFile,
    overrides: Overrides = None,
    lowest: Annotated[float, typer.Option(help="Learning rate of the first step.")] = 1e-7,
    highest: Annotated[float, typer.Option(help="Learning rate of the last step.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Number of optimizer steps.")] = 100,
    output: Annotated[
        Path | None, typer.Option(help="SVG file to write. Default: NAME-find-lr.svg.", show_default=False)
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Suggest a learning rate: train the first phase of CONFIG at increasing rates, and plot the loss."""
    from transfer.cli.progress import RunConsole
    from transfer.experiments.lr_finder import find_learning_rate
    from transfer.system.terminal import Console

    with RunConsole(Console(stderr=as_json)) as observe:
        result = find_learning_rate(
            config, overrides or [], lowest=lowest, highest=highest, steps=steps, output=output, observe=observe
        )
    if as_json:
        from dataclasses import asdict

        print(json.dumps(asdict(result) | {"plot": str(result.plot)}))  # noqa: T201
    else:
        _print_range_test(result, config, overrides or [])


def _print_range_test(result: RangeTest, config: str, overrides: list[str]) -> None:
    from transfer.cli.tables import range_test_table
    from transfer.system.formatting import quote_for_shell
    from transfer.system.terminal import Console

    console = Console()
    console.print(range_test_table(result.rates, result.losses, result.smoothed))
    reason = "a quarter of the highest rate at which the smoothed loss has not risen"
    if result.suggestion == result.steepest:
        reason = "the rate at which the smoothed loss falls fastest"
    elif not result.falls:
        reason += ", because the loss falls by less than its noise (more --steps or a larger batch may show more)"
    console.print(
        f"suggestion: {result.suggestion:.2g}, {reason}; a tenth of the rate at its minimum is "
        f"{result.tenth_of_lowest:.2g}\n"
        f"next: transfer run {' '.join(map(quote_for_shell, [config, *overrides, result.assignment]))}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    print(result.plot)  # noqa: T201
