"""Train, resume, evaluate, predict and check."""
