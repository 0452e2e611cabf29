"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values to change, for example train.batch_size=128."),
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
