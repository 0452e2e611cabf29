"""Mixed precision: what the forward pass computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from transfer.config.train_settings import Precision


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a model runs in this precision; its weights stay float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")
