"""Precision, memory format, kernels and compiled code with which a model computes on a device."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transfer.config.train_settings import Compile, Precision
from transfer.models.model import Model


def resolve_precision(precision: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Return the precision that ``auto`` selects on a device: bf16 on a GPU that computes in it, otherwise fp32."""
    if precision != "auto":
        return precision
    # Since compute capability 8.0 (Ampere), GPUs compute in bfloat16 as fast as in float16.
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context of a precision; weights stay float32."""
    # A disabled context takes several microseconds per batch, and is needed inside another one only. Older versions of
    # torch have another signature of the test for that.
    if precision == "fp32" and torch.__version__ >= "2.4" and not torch.is_autocast_enabled(device.type):
        return nullcontext()
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


def compiled(model: Model, option: Compile, *, varied: bool) -> Callable[..., Tensor]:
    """Return the forward pass of a model (:meth:`Model.forward`), compiled if the option says so.

    Args:
        model: Model on its device. Its parameters and its mode stay those of the compiled code.
        option: The option ``train.compile``.
        varied: Whether examples vary in length. Code for any size is then compiled, instead of new code for each size.
    """
    if not option:
        return model
    # None: torch compiles for fixed sizes, which is faster for images, until it meets a second size.
    options: dict[str, Any] = {"dynamic": True if varied else None}
    if option == "reduce-overhead":
        options["mode"] = option
    forward: Callable[..., Tensor]
    if any(_is_recurrent(stage) for stage in model):
        # torch.compile would unroll a recurrent layer over its steps, with new code for each length.
        stages = [stage if _is_recurrent(stage) else torch.compile(stage, **options) for stage in model]
        forward = partial(_run_stages, stages)
    else:
        forward = torch.compile(model, **options)
    return partial(_replay, forward) if option == "reduce-overhead" else forward


def _is_recurrent(stage: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase) for module in stage.modules())


def _run_stages(stages: Sequence[Callable[[Any], Any]], inputs: Any, first_stage: int = 0) -> Any:
    for stage in stages[first_stage:]:
        inputs = stage(inputs)
    return inputs


def _replay(forward: Callable[..., Tensor], inputs: Any, first_stage: int = 0) -> Tensor:
    """Run a forward pass whose CUDA graphs overwrite the tensors of the batch before."""
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    return forward(inputs, first_stage).clone()  # metrics may keep the outputs
