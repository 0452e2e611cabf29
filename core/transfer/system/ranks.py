"""Rank and world size of this process, read from the environment variables that launchers set.

Launchers are torchrun, ``accelerate launch`` and MPI.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from transfer.errors import UserError

# torchrun and accelerate, then the MPIs that `accelerate launch --mpirun_hostfile` starts.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_LOCAL_COUNT = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron",
}


@dataclass(frozen=True)
class Rank:
    """The position of this process among the processes that a launcher started.

    Args:
        index: Rank of this process over all machines, from 0.
        world_size: Number of processes on all machines.
        local_rank: Rank of this process on its machine, from 0.
        local_world_size: Number of processes on this machine.
    """

    index: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def rank_from_environment() -> Rank:
    """Return the rank of this process: rank 0 of 1 without a launcher, or if MASTER_ADDR is not set."""
    count, rank = _number(_COUNT, 1), _number(_RANK, 0)
    if count == 1 or "MASTER_ADDR" not in os.environ:
        return Rank()
    return Rank(rank, count, _number(_LOCAL_RANK, rank), _number(_LOCAL_COUNT, count))


def refuse_several(what: str) -> None:
    """Raise an error if a launcher has started several processes.

    Args:
        what: Command that works in one process only.

    Raises:
        UserError: The world size is larger than 1.
    """
    if rank_from_environment().world_size == 1:
        return
    error = UserError(
        f"{what} works in one process, and a launcher has started {rank_from_environment().world_size}",
        fix="start it without a launcher; `transfer run` and `transfer resume` of one run take several processes",
    )
    error.shown_elsewhere = rank_from_environment().index > 0
    raise error


def refuse_sharding() -> None:
    """Raise an error if the launcher is configured to shard the model.

    Raises:
        UserError: FSDP, DeepSpeed or Megatron is enabled.
    """
    for variable, name in _SHARDED.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes", "on"):
            raise UserError(
                f"{name} shards the model, which is not supported: every rank has a complete copy of it",
                where=f"{variable} in the environment",
                fix="launch without it: each rank computes a shard of every batch (docs/distributed.md)",
            )


def cpu_is_requested() -> bool:
    """Return whether ``accelerate launch --cpu`` started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def lacks_a_launcher() -> bool:
    """Return whether ``accelerate launch --cpu --num_processes N`` ran without mpirun: it starts 1 process, not N."""
    asked = cpu_is_requested() and "MASTER_ADDR" in os.environ
    return asked and not any(name in os.environ for name in _COUNT)


def _number(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)
