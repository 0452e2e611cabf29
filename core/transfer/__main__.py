"""Entry point of the command ``transfer`` and of ``python -m transfer``."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress

from transfer.cli.app import main


def command() -> None:
    """Run the command line and exit the process without destroying its objects.

    Python would free the half a million objects that torch has created one by one, which takes a second. The operating
    system frees the memory of a process at once.
    """
    status: object = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the reader of the output may have exited
                stream.flush()
        os._exit(status if isinstance(status, int) else 1)

    # The handler that is registered first is called last: after the exit handlers of all packages.
    atexit.register(leave)
    try:
        main()
        status = 0
    except SystemExit as end:
        status = 0 if end.code is None else end.code
        raise


if __name__ == "__main__":
    command()
