"""Commands that train: run, resume, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transfer.cli.arguments import RUNS, ConfigFile, DataOverrides, OutputFolder, Overrides, RunFolder
from transfer.cli.follow import follow_arms, follow_folds, follow_run, follow_seeds

# Names of the files by which `resume` recognizes folders of `transfer.experiments`. They are repeated here because that
# package may be deleted: it is imported only if a folder contains its file.
SEEDS_MANIFEST = "seeds.json"
FOLDS_MANIFEST = "folds.json"
PRETRAINING_GAIN_MANIFEST = "value.json"


def run(
    config: ConfigFile,
    overrides: Overrides = None,
    output: OutputFolder = RUNS,
    into: Annotated[
        Path | None,
        typer.Option(help="Run directory: the same command starts or resumes the run in it.", show_default=False),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a few batches of every phase and split only, to test a config.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(help="Number of seeds to train with, in one folder of runs.", show_default=False)
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(help="Number of folds of a cross-validation, in one folder of runs.", show_default=False),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Number of repetitions of the cross-validation, each with other folds.")
    ] = 1,
) -> None:
    """Train CONFIG. The last line of the output is the run directory."""
    from transfer.errors import UserError
    from transfer.runs.train import run as run_config

    several = {"--seeds": seeds, "--folds": folds, "--into": into}
    given = [option for option, value in several.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other", fix="remove all of these options but one")
    if repeats > 1 and folds is None:
        raise UserError("--repeats has no effect without --folds", fix="add --folds 5, for example")
    if folds is not None:
        from transfer.experiments.folds import run_folds

        follow_folds(
            lambda observe: run_folds(
                config, overrides or [], folds=folds, repeats=repeats, output=output, quick=quick, observe=observe
            )
        )
        return
    if seeds is not None:
        from transfer.experiments.seeds import run_seeds

        follow_seeds(
            lambda observe: run_seeds(config, overrides or [], seeds=seeds, output=output, quick=quick, observe=observe)
        )
        return
    follow_run(
        lambda observe: run_config(config, overrides or [], output=output, into=into, quick=quick, observe=observe)
    )


def resume(run: RunFolder, overrides: DataOverrides = None) -> None:
    """Resume an interrupted run, with the same result as without the interruption."""
    if (Path(run) / SEEDS_MANIFEST).is_file():
        from transfer.experiments.seeds import resume_seeds

        follow_seeds(lambda observe: resume_seeds(run, overrides or [], observe=observe))
    elif (Path(run) / FOLDS_MANIFEST).is_file():
        from transfer.experiments.folds import resume_folds

        follow_folds(lambda observe: resume_folds(run, overrides or [], observe=observe))
    elif (Path(run) / PRETRAINING_GAIN_MANIFEST).is_file():
        from transfer.experiments.pretraining_gain import resume_pretraining_gain

        follow_arms(lambda observe: resume_pretraining_gain(run, overrides or [], observe=observe))
    else:
        from transfer.runs.train import resume as resume_run

        follow_run(lambda observe: resume_run(run, overrides or [], observe=observe))


def check(
    config: ConfigFile,
    overrides: Overrides = None,
    data: Annotated[
        bool,
        typer.Option("--data", help="Read the data as well: examples per class, duplicates, contradictory labels."),
    ] = False,
) -> None:
    """Show the setup of CONFIG stage by stage, without reading weights; data is read only with --data."""
    from transfer.cli.plan import render, render_data
    from transfer.runs.check import check as check_config, check_data
    from transfer.system.terminal import Console

    checked, parts = check_config(config, overrides or [])
    for table in render(checked, parts):
        Console().print(table)
    if data:
        for table in render_data(*check_data(checked, parts)):
            Console().print(table)
