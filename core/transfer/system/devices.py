"""The device that a command computes on."""

from __future__ import annotations

import os

import torch

from transfer.errors import UserError


def resolve_device(name: str = "auto", *, where: str | None = None) -> torch.device:
    """Return the device that a name stands for.

    Args:
        name: ``auto`` (CUDA, then MPS, then the CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. With ``auto`` and
            ``cuda``, a process that a launcher started uses the GPU of its local rank.
        where: The config line or option that names the device, for errors.

    Raises:
        UserError: The name is not one of these, or this machine does not have the device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), *(["mps"] if mps else [])]
    if name == "cuda" and cuda:
        local_rank = os.environ.get("LOCAL_RANK", "")
        # Without a launcher, the current device: a notebook may have chosen one with torch.cuda.set_device.
        index = int(local_rank) % torch.cuda.device_count() if local_rank.isdigit() else torch.cuda.current_device()
        name = f"cuda:{index}"
    if name not in available:
        is_valid = name in ("cuda", "mps") or (name.startswith("cuda:") and name.removeprefix("cuda:").isdigit())
        raise UserError(
            f"device {name!r} is not on this machine" if is_valid else f"device {name!r} is unknown",
            where=where,
            available=["auto", *available],
            fix="use auto, or one of the available devices",
        )
    return torch.device(name)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """Return the name of a device for people and records: the model of a GPU, otherwise ``cpu`` or ``mps``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def slow_precision_warning(precision: str, device: torch.device) -> str | None:
    """Return a warning if the CPU has no instructions for bf16 (AVX512-BF16 or AMX), otherwise None."""
    if precision != "bf16" or device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return (
        "this CPU has no bf16 instructions: bf16 is slower than fp32 (train.precision), and the LSTM of a bilstm is "
        "computed in fp32"
    )


def busy_cores_warning(device: torch.device) -> str | None:
    """Return a warning if other programs use the cores that torch's threads need, otherwise None.

    The threads of OpenMP wait for each other in a busy loop. If a thread has no core, the others only burn time.

    Args:
        device: Device to compute on; on a GPU, the threads of the CPU matter little.
    """
    is_set = any(variable in os.environ for variable in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"))
    if device.type != "cpu" or is_set or torch.get_num_threads() == 1 or not hasattr(os, "getloadavg"):
        return None
    try:
        load = os.getloadavg()[0]
    except OSError:  # the system does not measure it
        return None
    # All cores of the machine, not those of this process: the load is that of the machine.
    cores = os.cpu_count() or 1
    if load <= cores:
        return None
    return (
        f"other programs use the cores: the load average is {load:.1f} on {cores} cores; training may be many times "
        "faster with OMP_WAIT_POLICY=passive or OMP_NUM_THREADS=1 in the environment"
    )
