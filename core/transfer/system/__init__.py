"""Services of the operating system: ranks, memory, signals, files, terminal."""
