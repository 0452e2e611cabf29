"""Check a config without data and without weights."""

from __future__ import annotations

from collections.abc import Sequence

from transfer.config.check import load_config
from transfer.config.run_config import Config, RunConfig
from transfer.training.preflight import CheckedParts, preflight


def check(config: Config, overrides: Sequence[str] = ()) -> tuple[RunConfig, CheckedParts]:
    """Check a config and fit its parts together on the meta device: no data, no weights, seconds.

    Raises:
        UserError: With every problem found.
    """
    checked = load_config(config, overrides)
    return checked, preflight(checked)
