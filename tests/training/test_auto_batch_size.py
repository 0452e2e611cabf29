"""``batch_size: auto``: the size that it finds, and that it changes nothing else."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

import transfer
from transfer import ConfigError, TrainingError, find_learning_rate, run_seeds
from transfer.cli.plan import render
from transfer.config.check import load_config
from transfer.config.json_schema import config_schema
from transfer.data.batch import Batch
from transfer.errors import MemoryRanOut
from transfer.storage.run_directory import RunDirectory
from transfer.system.memory import PeakResident
from transfer.training import auto_batch_size
from transfer.training.auto_batch_size import find_batch_size, most_demanding_phase, search_by_extrapolation
from transfer.training.build import build
from transfer.training.events import Event, Note
from transfer.training.experiment import Experiment, Phase

AUTO = "train.batch_size=auto"
TRAINED = "data.count=1000"  # 675 of them for training: 750, minus a tenth for validation


def ignore_events(_: Event) -> None:
    return


@pytest.fixture
def memory_for(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes torch run out of memory if a batch has more examples than a limit."""

    def limit(examples: int, evaluated: int = 10_000) -> None:
        forward = torch.nn.Linear.forward

        def fails(self: torch.nn.Linear, inputs: Tensor) -> Tensor:
            limit = evaluated if torch.is_inference_mode_enabled() else examples
            if inputs.device.type != "meta" and len(inputs) > limit:  # preflight runs on the meta device
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return forward(self, inputs)

        monkeypatch.setattr(torch.nn.Linear, "forward", fails)

    return limit


@pytest.fixture
def experiment(config: dict[str, Any]) -> Experiment:
    return build(load_config(config, [TRAINED]), ignore_events).experiment


def notes_of(do: Callable[[Callable[[Event], None]], Any]) -> tuple[Any, list[Note]]:
    notes: list[Note] = []
    return do(lambda event: notes.append(event) if isinstance(event, Note) else None), notes


# ---------------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize(("limit", "expected"), [(2, 2), (20, 16), (32, 32)])
def test_largest_power_of_two_that_fits_is_found(
    experiment: Experiment, memory_for: Callable[..., None], limit: int, expected: int
) -> None:
    memory_for(limit)
    found, notes = notes_of(lambda observe: find_batch_size(experiment, observe))
    assert found == expected
    assert notes[-1].text == f"batch size {expected}, found by auto: {2 * expected} ran out of memory"
    assert notes[-1].details is not None
    assert list(notes[-1].details)[1:] == [f"step of {2**power}" for power in range(1, expected.bit_length())]


def test_evaluation_batch_must_fit_too(
    config: dict[str, Any], experiment: Experiment, memory_for: Callable[..., None]
) -> None:
    memory_for(10_000, evaluated=20)
    assert find_batch_size(experiment, ignore_events) == 8
    own = build(load_config(config, [TRAINED, "train.evaluation_batch_size=4"]), ignore_events).experiment
    assert find_batch_size(own, ignore_events, evaluation_batch_size=4) > 8


def test_epoch_has_minimum_number_of_steps(config: dict[str, Any], experiment: Experiment) -> None:
    assert len(experiment.train.split) // 8 == 84
    assert find_batch_size(experiment, ignore_events) == 64
    few = build(load_config(config, ["data.count=20"]), ignore_events).experiment
    assert find_batch_size(few, ignore_events) == 2


def test_size_predicted_not_to_fit_is_not_tried(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system kills a process that exceeds memory, so memory is extrapolated from smaller sizes."""
    tried: list[int] = []
    mebibyte = 2**20

    class DryTrainer:
        def __init__(self, experiment: Experiment) -> None:
            pass

        def prepare_phase(self, phase: Phase) -> None:
            pass

        def dry_run_step(self, trained: Batch, evaluated: Batch) -> None:
            tried.append(len(trained.indices))

    class Peak(PeakResident):
        @staticmethod
        def now() -> int:
            return (100 + 10 * (tried[-1] if tried else 0)) * mebibyte

    monkeypatch.setattr(auto_batch_size, "Trainer", DryTrainer)
    monkeypatch.setattr(auto_batch_size, "PeakResident", Peak)
    monkeypatch.setattr(auto_batch_size, "available_bytes", lambda: 2 * 200 * mebibyte)
    found, notes = notes_of(lambda observe: find_batch_size(experiment, observe))
    assert found == 16  # 32 would take 320 MiB, the limit is 200 MiB
    assert set(tried) == {2, 4, 8, 16}
    assert notes[-1].text == "batch size 16, found by auto: 32 would take about 0.31 GiB"
    assert notes[-1].details is not None
    assert notes[-1].details["memory limit"] == "0.20 GiB"


@pytest.mark.parametrize(
    ("limit", "max_size", "expected", "tried", "reason"),
    [
        (1000, 1024, 64, [8, 16, 64], "128 would take about"),
        (1000, 32, 32, [8, 16, 32], "no more than 32"),
        (10**9, 1024, 1024, [8, 16, 1024], "no more than 1024"),
        (250, 1024, 8, [8, 16], "16 takes"),
        (150, 1024, 4, [8, 4], "8 takes"),
        (130, 4, 2, [4, 2], "4 takes"),
        (10, 1024, None, [8, 4, 2], "2 takes"),
    ],
)
def test_gpu_size_is_extrapolated_from_two_sizes(
    limit: int, max_size: int, expected: int | None, tried: list[int], reason: str
) -> None:
    sizes: list[int] = []

    def peak_bytes(size: int) -> int:
        sizes.append(size)
        return 100 + 10 * size

    costs, text = search_by_extrapolation(peak_bytes, max_size, limit)
    assert max(costs, default=None) == expected
    assert sizes == tried
    assert text.startswith(reason)


def test_smaller_size_is_tried_after_wrong_prediction() -> None:
    def peak_bytes(size: int) -> int:
        if size > 100:
            raise MemoryRanOut("memory ran out")
        return 10 * size

    costs, reason = search_by_extrapolation(peak_bytes, 1024, 10_000)
    assert costs == {8: 80, 16: 160, 64: 640}
    assert reason == "128 ran out of memory"


def test_error_if_no_size_fits(config: dict[str, Any], memory_for: Callable[..., None], tmp_path: Path) -> None:
    memory_for(1)
    with pytest.raises(TrainingError, match="auto found none: 2 ran out of memory") as caught:
        transfer.run(config, [AUTO], output=tmp_path / "runs")
    assert "freeze more stages" in str(caught.value.problems[0].fix)
    assert not (tmp_path / "runs").exists()


def test_search_does_not_change_the_experiment(experiment: Experiment) -> None:
    def state() -> list[bytes]:
        tensors = [t.numpy().tobytes() for t in experiment.model.state_dict().values()]
        generators = [torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes()]  # type: ignore[index]
        flags = [repr([p.requires_grad for p in experiment.model.parameters()]).encode()]
        order = [np.concatenate(experiment.train.batch_indices(epoch)).tobytes() for epoch in range(2)]
        return [*tensors, *generators, *flags, *order, repr(random.getstate()).encode()]

    before = state()
    assert find_batch_size(experiment, ignore_events) == 64
    assert state() == before
    assert all(parameter.grad is None for parameter in experiment.model.parameters())


def test_most_demanding_phase_is_tried(config: dict[str, Any]) -> None:
    phases = "[{epochs: 1, freeze: backbone}, {epochs: 1}, {epochs: 1, freeze: {until: first}}]"
    experiment = build(load_config(config, [f"train.phases={phases}"]), ignore_events).experiment
    assert most_demanding_phase(experiment) is experiment.phases[1]


def test_longest_texts_are_tried() -> None:
    config = {"data": {"name": "mini_reviews"}, "backbone": {"name": "textcnn", "filters": 2, "vectors": None}}
    loader = build(load_config({**config, "train": {"bucket": False}}), ignore_events).experiment.train
    lengths = loader.preprocessing.lengths(loader.examples.encoded)  # type: ignore[arg-type]
    found = loader.largest_batch(4)
    assert sorted(lengths[found.indices]) == sorted(lengths)[-4:]


def test_peak_between_entry_and_exit_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fixed values: the memory of the test process also changes for other reasons.
    sampled = threading.Event()
    values = iter([100, 300])

    def now() -> int:
        value = next(values, 200)
        if value == 200:
            sampled.set()
        return value

    monkeypatch.setattr(PeakResident, "now", staticmethod(now))
    with PeakResident() as peak:
        assert sampled.wait(60)
    assert peak.bytes == 300


def test_resident_memory_is_in_bytes() -> None:
    assert PeakResident.now() > 50 * 2**20  # Python with torch needs more than 50 MiB


# ------------------------------------------------------------------------------------------------------------ the runs


def test_run_with_auto_equals_run_with_found_size(config: dict[str, Any], tmp_path: Path) -> None:
    found = transfer.run(config, [AUTO], output=tmp_path / "auto")
    assert yaml.safe_load((found.folder / "config.yaml").read_text())["train"]["batch_size"] == 8
    given = transfer.run(config, ["train.batch_size=8"], output=tmp_path / "given")

    def outcome(run: transfer.Run) -> Any:
        return [(line["train"], line["validation"]) for line in RunDirectory(run.folder).metrics()], run.summary["test"]

    assert outcome(found) == outcome(given)
    assert transfer.evaluate(found.folder) == found.summary["test"]


def test_resumed_run_keeps_its_batch_size(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_for: Callable[..., None]
) -> None:
    memory_for(20)
    run = transfer.run(config, [AUTO], output=tmp_path)
    (run.folder / "summary.json").unlink()
    monkeypatch.setattr("transfer.training.build.find_batch_size", lambda *arguments: pytest.fail("it has been found"))
    assert transfer.resume(run.folder).summary["test"] == run.summary["test"]


def test_all_seeds_use_one_batch_size(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([16, 4, 8])
    monkeypatch.setattr("transfer.training.build.find_batch_size", lambda *arguments: next(sizes))
    run = run_seeds(config, [AUTO], seeds=2, output=tmp_path)
    plain = [RunDirectory(run.folder / f"seed-{seed}").config() for seed in (3, 4)]
    assert [each["train"]["batch_size"] for each in plain] == [16, 16]


def test_batch_size_of_lr_finder_and_quick_run(config: dict[str, Any], tmp_path: Path) -> None:
    find_learning_rate(config, [AUTO], steps=10, output=tmp_path / "curve.svg")
    run = transfer.run(config, [AUTO, "train.precision=bf16", "train.ema=0.9"], output=tmp_path, quick=True)
    assert RunDirectory(run.folder).config()["train"]["batch_size"] == 8


# ---------------------------------------------------------------------------------------------------------- the config


def test_config_accepts_auto_but_no_other_word(config: dict[str, Any]) -> None:
    assert load_config(config, [AUTO]).resolved["train"]["batch_size"] == "auto"
    for wrong in ("automatic", "0", "1.5"):
        with pytest.raises(ConfigError, match="expected an integer of 1 or more, or auto"):
            load_config(config, [f"train.batch_size={wrong}"])
    with pytest.raises(ConfigError, match="batch_size or max_tokens, not both"):
        load_config(config, [AUTO, "train.max_tokens=100"])


def test_check_prints_that_batch_size_is_found_later(config: dict[str, Any]) -> None:
    checked, parts = transfer.check(config, [AUTO])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*render(checked, parts))
    assert "the largest batch size that fits into memory at the start" in console.export_text()


def test_json_schema_allows_auto(tiny: None) -> None:
    validator = jsonschema.Draft202012Validator(config_schema()[0])
    block = {"data": {"name": "points"}, "backbone": {"name": "dense"}}
    assert all(validator.is_valid({**block, "train": {"batch_size": size}}) for size in (16, "auto", "${SIZE:-8}"))
    assert not any(validator.is_valid({**block, "train": {"batch_size": size}}) for size in (0, "all"))
