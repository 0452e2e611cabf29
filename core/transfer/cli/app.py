"""The command line. Commands import heavy packages only when they run."""

from __future__ import annotations

import errno
import gc
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

from transfer.cli import cache_commands, feature_commands, inspect_commands, plugin_commands, run_commands
from transfer.cli.plugin_subcommands import WithPlugins
from transfer.errors import TransferError, UserError

app = typer.Typer(
    name="transfer",
    cls=WithPlugins,
    help="Transfer learning for images and text: a pretrained backbone, a new head and a freeze policy in one config.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["TRANSFER_DEBUG"] = "1"


# The packages `reports`, `experiments` and `deployment` register their commands through the entry-point group
# `transfer.commands`, like third parties. Each package can therefore be deleted without a change of this file.
app.command()(run_commands.run)
app.command()(run_commands.resume)
app.command()(run_commands.check)
app.command()(inspect_commands.evaluate)
app.command()(inspect_commands.predict)
app.command()(feature_commands.embed)
app.command()(feature_commands.neighbors)
app.command()(inspect_commands.clean)
app.command()(plugin_commands.plugins)
app.command()(plugin_commands.show)
app.command()(plugin_commands.compatibility)
app.command()(plugin_commands.schema)
app.command("new-plugin")(plugin_commands.new_plugin)
app.add_typer(cache_commands.app, name="cache")


OPTIONAL_PACKAGES = ("transfer.deployment", "transfer.experiments", "transfer.reports")
"""Packages that can be deleted from an installation; only their own commands need them."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def main() -> None:
    """Run the command line.

    Exit status: 0 success, 1 failure, 2 wrong input, 130 or 143 interrupted.
    """
    # Importing torch creates half a million objects that stay alive. With the default thresholds of the garbage
    # collector, scanning them takes a quarter of the start time of a command.
    gc.set_threshold(50_000, 20, 100)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may be invalid in the encoding of the terminal
    try:
        app()
    except TransferError as error:
        if os.environ.get("TRANSFER_DEBUG"):
            raise
        _exit_with_panel(error)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL_PACKAGES or os.environ.get("TRANSFER_DEBUG"):
            raise
        _exit_with_panel(_missing_package(error.name))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has exited, as in `transfer plugins | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if not (error.errno in _DISK_FULL or error.filename) or os.environ.get("TRANSFER_DEBUG"):
            raise
        with suppress(OSError):  # the rest of the buffered output cannot be written either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit_with_panel(_failed_file(error))


def _exit_with_panel(error: TransferError) -> NoReturn:
    from transfer.cli.tables import error_panel
    from transfer.system.terminal import Console

    if not error.shown_elsewhere:
        Console(stderr=True).print(error_panel(error))
    sys.exit(error.exit_status)


def _missing_package(package: str) -> TransferError:
    """Return the error of a command whose package was deleted."""
    return UserError(
        f"the command is unavailable: it needs the package {package}, which is not part of this installation",
        fix="reinstall the complete distribution: pip install --force-reinstall --no-deps transferkit",
    )


def _failed_file(error: OSError) -> TransferError:
    """Return the error of a file that the operating system cannot open, read or write."""
    is_full = error.errno in _DISK_FULL
    rerun = "free some space, then run the command again; an interrupted run continues with `transfer resume RUN`"
    return TransferError(
        f"a file operation failed: {error.strerror}",
        where=str(error.filename or "a file, or the output of this command"),
        fix=rerun if is_full else "check the path and its permissions",
    )
