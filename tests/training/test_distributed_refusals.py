"""Distributed training without a second process: shards, ranks and refusals."""

from __future__ import annotations

import os

import numpy as np
import pytest

from transfer import UserError
from transfer.experiments import (
    lr_finder as learning_rate,
    pretraining_gain as value,
    seeds as several,
    sweep as sweeping,
)
from transfer.system.ranks import Rank, lacks_a_launcher, rank_from_environment, set_rendezvous_address
from transfer.training.distributed import SINGLE_PROCESS, ProcessGroup, process_group


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("examples", [1, 2, 3, 4, 5, 7, 16, 33])
def test_shards_are_contiguous_and_of_equal_size(count: int, examples: int) -> None:
    batch = np.arange(100, 100 + examples)
    ranks = [ProcessGroup(Rank(rank, count)) for rank in range(count)]
    sizes = [rank.shard_size(examples) for rank in ranks]
    assert [*np.concatenate([rank.shard(batch)[:size] for rank, size in zip(ranks, sizes, strict=True)])] == [*batch]
    nonempty = [size for size in sizes if size]
    assert max(nonempty) - min(nonempty) <= 1
    # Batch norm cannot train on one example, not even on a rank with an empty shard.
    assert all(len(rank.shard(batch)) >= min(2, examples) for rank in ranks)


def test_single_process_has_the_complete_batch() -> None:
    batch = np.arange(7)
    assert SINGLE_PROCESS.shard(batch) is not None
    assert len(SINGLE_PROCESS.shard(batch)) == SINGLE_PROCESS.shard_size(7) == 7
    assert SINGLE_PROCESS.broadcast_object(lambda: "made") == "made"
    SINGLE_PROCESS.barrier()
    SINGLE_PROCESS.require_equal({"data": "this"})
    with SINGLE_PROCESS.local_main_first():
        pass


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Rank(3, 4, 1, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Rank(1, 2, 1, 2)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            Rank(2, 4, 0, 2),
        ),
    ],
)
def test_rank_is_read_from_launcher_variables(
    environment: dict[str, str], expected: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    assert rank_from_environment() == expected
    monkeypatch.delenv("MASTER_ADDR")
    if "PMI_SIZE" in environment or "OMPI_COMM_WORLD_SIZE" in environment:
        # Several equal processes would otherwise train the same run.
        with pytest.raises(UserError, match=r"MPI has started \d processes, and MASTER_ADDR is not set") as caught:
            rank_from_environment()
        assert caught.value.shown_elsewhere
    else:  # a cluster job that is not distributed training sets no address for the rendezvous
        assert rank_from_environment() == Rank()


SLURM_STEP = {
    "SLURM_JOB_ID": "4001",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_STEP_NODELIST": "gpu[003-004,9],login1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


def test_rank_is_read_from_slurm_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in SLURM_STEP.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr("os.environ", dict(os.environ))  # the address is set in it
    os.environ.pop("MASTER_ADDR", None)
    os.environ.pop("MASTER_PORT", None)
    assert rank_from_environment() == Rank(5, 7, 1, 3)
    set_rendezvous_address()
    assert os.environ["MASTER_ADDR"] == "gpu003"
    assert 20_000 <= int(os.environ["MASTER_PORT"]) < 30_000
    assert rank_from_environment() == Rank(5, 7, 1, 3)
    # torchrun in a step: the variables of Slurm describe the launchers.
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert rank_from_environment() == Rank(1, 2, 1, 2)


@pytest.mark.parametrize("step", [None, str(2**32 - 5)], ids=["no step", "batch step"])
def test_script_of_slurm_job_is_single_process(step: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in SLURM_STEP.items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("SLURM_STEP_ID")
    if step is not None:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    assert rank_from_environment() == Rank()


def test_accelerate_launch_on_cpu_without_mpi_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not lacks_a_launcher()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert not lacks_a_launcher()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # accelerate sets it if several processes were requested
    assert lacks_a_launcher()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not lacks_a_launcher()


@pytest.mark.parametrize(
    "start",
    [
        lambda: several.run_seeds("nothing.yaml", seeds=2),
        lambda: several.resume_seeds("nothing"),
        lambda: value.pretraining_gain("nothing.yaml", seeds=2),
        lambda: value.resume_pretraining_gain("nothing"),
        lambda: sweeping.sweep("nothing.yaml", "nothing.yaml"),
        lambda: learning_rate.find_learning_rate("nothing.yaml"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_single_process_command_is_refused_and_reported_once(
    start: object, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": str(rank)}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match="works in one process, and a launcher has started 2") as caught:
        start()  # type: ignore[operator]
    assert caught.value.shown_elsewhere == bool(rank)


def test_process_group_of_single_process() -> None:
    with process_group() as processes:
        assert processes is SINGLE_PROCESS
