"""Run directory, checkpoints and tensor files."""
