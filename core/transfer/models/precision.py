"""Precision, memory format and kernels with which a model computes on a device."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Literal

import torch

from transfer.config.train_settings import Precision
from transfer.models.model import Model


def resolve_precision(precision: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Return the precision that ``auto`` selects on a device: bf16 on a GPU that computes in it, otherwise fp32."""
    if precision != "auto":
        return precision
    # Since compute capability 8.0 (Ampere), GPUs compute in bfloat16 as fast as in float16.
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context of a precision; weights stay float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def place(model: Model, device: torch.device, *, deterministic: bool = False) -> None:
    """Move a model to its device. On a CUDA device, choose its memory format, and the kernels of the process.

    Args:
        model: Model, moved in place.
        device: Device to compute on.
        deterministic: Whether a CUDA device uses only kernels that give the same result in every run, in full float32.
            Otherwise it uses the fastest ones: cuDNN measures them for every new shape, and float32 products are
            computed in TF32, with 10 bits of mantissa. Has no effect on other devices.
    """
    if device.type != "cuda":
        model.to(device)
        return
    # Convolutions in mixed precision are up to twice as fast if the channels of a pixel are adjacent in memory.
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic
    torch.set_float32_matmul_precision("highest" if deterministic else "high")
    if deterministic:
        # cuBLAS reads the variable when it is first used. Operations without a deterministic kernel only warn.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
