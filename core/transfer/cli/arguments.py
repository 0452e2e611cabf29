"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="Path of a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the config, for example train.batch_size=128."),
]
DataOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="DATA.KEY=VALUE", help="New paths of the data, if it has moved: data.root=/new/folder."),
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")]
OutputFolder = Annotated[Path, typer.Option("--output", help="Folder in which a new folder is created.")]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        show_default=False,
        help="Device to compute on: auto, cpu, cuda, cuda:N or mps. Default: the train.device of the run.",
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]

RUNS = Path("runs")
"""Default of ``--output``."""
