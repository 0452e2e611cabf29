"""The command line: thin commands that import nothing heavy before they need it."""

from __future__ import annotations

import errno
import gc
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated

import typer

from transfer.cli import cache_commands, inspect_commands, plugin_commands, run_commands
from transfer.cli.plugin_subcommands import WithPlugins
from transfer.errors import TransferError

app = typer.Typer(
    name="transfer",
    cls=WithPlugins,
    help="Take a pretrained backbone, put a head on it, freeze what should stay, train the rest on your task.",
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


# The packages `reports`, `experiments` and `deployment` add their commands through the entry-point group
# `transfer.commands`, as third parties do: each can be deleted without touching this file.
app.command()(run_commands.run)
app.command()(run_commands.resume)
app.command()(run_commands.check)
app.command()(inspect_commands.evaluate)
app.command()(inspect_commands.predict)
app.command()(plugin_commands.plugins)
app.command()(plugin_commands.show)
app.command()(plugin_commands.compatibility)
app.command()(plugin_commands.schema)
app.command("new-plugin")(plugin_commands.new_plugin)
app.add_typer(cache_commands.app, name="cache")


_FULL = (errno.ENOSPC, errno.EDQUOT)


def _show(error: TransferError) -> None:
    from transfer.cli.tables import error_panel
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
