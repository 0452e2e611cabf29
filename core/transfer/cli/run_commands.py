"""Commands that train: run, resume, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transfer.cli.arguments import ConfigFile, Overrides, RunFolder
from transfer.cli.follow import follow_arms, follow_run, follow_seeds


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

        follow_seeds(
            lambda observe: run_seeds(config, overrides or [], seeds=seeds, output=output, quick=quick, observe=observe)
        )
        return
    follow_run(lambda observe: run_config(config, overrides or [], output=output, quick=quick, observe=observe))


def resume(run: RunFolder) -> None:
    """Go on with a run that was interrupted, to the result that it would have had."""
    from transfer.experiments.pretraining_gain import VALUE, resume_pretraining_gain
    from transfer.experiments.seeds import MANIFEST, resume_seeds
    from transfer.runs.train import resume as resume_run

    if (Path(run) / MANIFEST).is_file():
        follow_seeds(lambda observe: resume_seeds(run, observe=observe))
    elif (Path(run) / VALUE).is_file():
        follow_arms(lambda observe: resume_pretraining_gain(run, observe=observe))
    else:
        follow_run(lambda observe: resume_run(run, observe=observe))


def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Show what CONFIG would do, stage by stage, without data and without weights."""
    from transfer.cli.plan import render
    from transfer.runs.check import check as check_config
    from transfer.system.terminal import Console

    checked, parts = check_config(config, overrides or [])
    for part in render(checked, parts):
        Console().print(part)
