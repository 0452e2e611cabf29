"""The process of the command ``transfer``, also as ``python -m transfer``."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress

from transfer.cli.app import main


def command() -> None:
    """Run the command line and end the process.

    Python would take apart, one by one, the half a million objects that torch has made, which takes a second. The
    system takes back the memory of a process at once.
    """
    status: object = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # whoever read it has gone
                stream.flush()
        os._exit(status if isinstance(status, int) else 1)

    # What is registered first is called last: everything that packages do at the end of a process has been done.
    atexit.register(leave)
    try:
        main()
        status = 0
    except SystemExit as end:
        status = 0 if end.code is None else end.code
        raise


if __name__ == "__main__":
    command()
