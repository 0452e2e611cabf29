"""Check a config without reading weights: its components, and on request its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transfer.config.check import load_config
from transfer.config.component import error_location
from transfer.config.run_config import Config, RunConfig
from transfer.data.inspection import inspect_data
from transfer.data.splits import count_classes
from transfer.training.build import read_data
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


def check_data(config: RunConfig, parts: CheckedParts) -> tuple[dict[str, Mapping[str, int]], dict[str, str]]:
    """Read the data of a checked config.

    Args:
        config: Checked config.
        parts: Components of the config.

    Returns:
        The number of examples of each class in each split (a single number, called ``examples``, if there are no
        classes), and warnings about the data by subject.

    Raises:
        DataError: The data is wrong.
    """
    data, splits = read_data(config)
    with error_location(config.data.where):
        warnings = inspect_data(data, splits, parts.backbone.fields)
    counts = {name: count_classes(split, data.spec) or {"examples": len(split)} for name, split in splits.items()}
    return counts, warnings
