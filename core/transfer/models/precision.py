"""Precision of the forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from transfer.config.train_settings import Precision


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context of a precision; weights stay float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")
