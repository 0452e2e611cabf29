"""Transfer learning for images and text: any backbone, head and freeze policy, one engine, every component a plugin.

The public names are listed in ``__init__.pyi``. They are imported on first use: ``import transfer`` imports no torch.
"""

from __future__ import annotations

import warnings
from typing import Any

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"

# Names of version 0.1 with their new names.
_OLD_NAMES = {
    "class_indices": "encode_labels",
    "cut": "split_off",
    "label_sets": "multi_hot",
    "look": "preview_batch",
    "look_at_predictions": "preview_predictions",
    "measure_value": "pretraining_gain",
    "resume_value": "resume_pretraining_gain",
}


def __getattr__(name: str) -> Any:
    if name in _OLD_NAMES:
        warnings.warn(
            f"transfer.{name} is deprecated: use transfer.{_OLD_NAMES[name]}. It will be removed in version 0.3.",
            DeprecationWarning,
            stacklevel=2,
        )
        name = _OLD_NAMES[name]
    return _load(name)
