"""``python -m transfer``: the command line, where its script is not on the PATH."""

from transfer.cli import main

main()
