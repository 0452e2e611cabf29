"""What needs no second process: shares of batches, places, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from transfer import UserError
from transfer.experiments import lr_finder as learning_rate
from transfer.experiments import pretraining_gain as value
from transfer.experiments import seeds as several
from transfer.experiments import sweep as sweeping
from transfer.system.ranks import Rank, lacks_a_launcher, rank_from_environment
from transfer.training.distributed import SINGLE_PROCESS, ProcessGroup, process_group


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("examples", [1, 2, 3, 4, 5, 7, 16, 33])
def test_shares_are_the_batch_cut_into_pieces_of_like_size(count: int, examples: int) -> None:
    batch = np.arange(100, 100 + examples)
    everybody = [ProcessGroup(Rank(rank, count)) for rank in range(count)]
    sizes = [one.shard_size(examples) for one in everybody]
    assert [*np.concatenate([one.shard(batch)[:size] for one, size in zip(everybody, sizes, strict=True)])] == [*batch]
    taken = [size for size in sizes if size]
    assert max(taken) - min(taken) <= 1
    # Batch norm cannot train on one example, neither as a share nor as what a process computes for nothing.
    assert all(len(one.shard(batch)) >= min(2, examples) for one in everybody)


def test_one_process_has_the_whole_batch_and_asks_nobody() -> None:
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
def test_the_place_is_what_the_launcher_says(
    environment: dict[str, str], expected: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    assert rank_from_environment() == expected
    # A job of a cluster that is no training: nobody says where to meet.
    monkeypatch.delenv("MASTER_ADDR")
    assert rank_from_environment() == Rank()


def test_a_launcher_that_starts_one_process_instead_of_several_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not lacks_a_launcher()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert not lacks_a_launcher()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # which accelerate sets where several were asked for
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
def test_what_only_one_process_does_is_refused_once(start: object, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": str(rank)}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match="works in one process, and a launcher has started 2") as caught:
        start()  # type: ignore[operator]
    assert caught.value.shown_elsewhere == bool(rank)


def test_a_single_process_joins_nobody() -> None:
    with process_group() as processes:
        assert processes is SINGLE_PROCESS
