"""Check a config without reading data or weights."""

from __future__ import annotations

from collections.abc import Sequence

from transfer.config.check import load_config
from transfer.config.run_config import Config, RunConfig
from transfer.training.preflight import CheckedParts, preflight


def check(config: Config, overrides: Sequence[str] = ()) -> tuple[RunConfig, CheckedParts]:
    """Check a config and build its model on the meta device, without reading data or weights.

    Args:
        config: Path of a YAML file, or the config as a mapping.
        overrides: Changes to the config, each ``path.to.key=value``.

    Returns:
        The checked config and the components built from it.

    Raises:
        UserError: The config has problems; the error contains all of them.
    """
    checked = load_config(config, overrides)
    return checked, preflight(checked)
