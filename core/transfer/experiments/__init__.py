"""Several runs: seeds, comparison, search, LR finder."""
