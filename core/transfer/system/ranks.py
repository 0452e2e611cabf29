"""Rank and world size of this process, read from the environment variables that launchers set.

Launchers are torchrun, ``accelerate launch``, MPI and Slurm's ``srun``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from transfer.errors import UserError

# Rank, world size, local rank and local world size. torchrun and accelerate, then the MPIs that `accelerate launch
# --mpirun_hostfile` starts, then srun. The first launcher that has set a world size counts: torchrun and mpirun may run
# in a step of Slurm, whose variables then describe the launchers instead of the processes.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
)
_TORCHRUN, _SLURM = _LAUNCHERS[0], _LAUNCHERS[-1]
_NO_STEP = 2**32 - 16
"""Step ids from here on are those of Slurm's own steps: the script of a job, the shell of an allocation."""
MIN_SLURM_PORT, SLURM_PORTS = 20_000, 10_000
"""Range of the ports that are derived from Slurm's job ids. It is below the ports that Linux gives to clients."""
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
    """Return the rank of this process: rank 0 of 1 without a launcher.

    Raises:
        UserError: An MPI has started several processes, and nothing states the address at which they can meet.
    """
    names = _launcher()
    if names is None:
        return Rank()
    rank, count = _number(names[0], 0), _number(names[1], 1)
    if count == 1:
        return Rank()
    if "MASTER_ADDR" not in os.environ and _slurm_head_node() is None:
        # A cluster job that is no distributed training may set WORLD_SIZE. An MPI sets its variables only in processes
        # that it has started, which would all train the same run.
        if names is _TORCHRUN:
            return Rank()
        error = UserError(
            f"MPI has started {count} processes, and MASTER_ADDR is not set: expected the address of rank 0",
            where=f"{names[1]} in the environment",
            fix="pass MASTER_ADDR and MASTER_PORT to all processes, or start them with torchrun",
        )
        error.shown_elsewhere = rank > 0
        raise error
    local_count = _number(names[3], 0) or (_slurm_local_count() if names is _SLURM else count)
    return Rank(rank, count, _number(names[2], rank), local_count)


def set_rendezvous_address() -> None:
    """Set MASTER_ADDR and MASTER_PORT for processes that Slurm has started, unless they are set."""
    head_node = _slurm_head_node()
    if head_node is not None:
        os.environ.setdefault("MASTER_ADDR", head_node)
        # All processes of a step derive the same port, and steps at the same time on one machine different ones.
        number = 101 * _number("SLURM_JOB_ID", 0) + _number("SLURM_STEP_ID", 0)
        os.environ.setdefault("MASTER_PORT", str(MIN_SLURM_PORT + number % SLURM_PORTS))


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
    return cpu_is_requested() and "MASTER_ADDR" in os.environ and _launcher() is None


def _launcher() -> tuple[str, str, str, str] | None:
    """Return the names of the variables of the launcher that started this process; None without a launcher."""
    # The script of a job and the shell of an allocation have SLURM_NTASKS too: only srun sets the variables of a step.
    in_step = _number("SLURM_STEP_ID", _NO_STEP) < _NO_STEP
    launchers = _LAUNCHERS if in_step else _LAUNCHERS[:-1]
    return next((names for names in launchers if os.environ.get(names[1], "").isdigit()), None)


def _slurm_head_node() -> str | None:
    """Return the name of the machine of rank 0 in a step or job of Slurm; None outside of Slurm."""
    # Rank 0 runs on the first machine of the list. SLURM_LAUNCH_NODE_IPADDR is the machine on which srun was called,
    # which may be a login node.
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    # The names are compressed: gpu[003-006,9],cpu1. A comma inside brackets does not separate machines.
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else None


def _slurm_local_count() -> int:
    """Return the number of processes of a step of Slurm on this machine."""
    counts: list[int] = []
    # Compressed: 4(x2),3 are 4, 4 and 3 processes.
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(repeats or 1)
    node = _number("SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 1


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default
