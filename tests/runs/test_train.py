"""Check, run, evaluate, predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Points

import transfer
from transfer import ConfigError, DataError, PluginError, RunError, TransferError, register
from transfer.models.model import Model
from transfer.models.saved_model import read_model
from transfer.registry.entry_points import Plugin
from transfer.runs.train import Run
from transfer.training.events import EpochEnded, Event, Note, RunStarted

FILES = {
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "plots/accuracy.svg",
    "plots/calibration.svg",
    "plots/confusion.svg",
    "plots/f1_macro.svg",
    "plots/learning_rate.svg",
    "plots/loss.svg",
    "plots/time.svg",
    "predictions.safetensors",
    "report.html",
    "summary.json",
    "checkpoints/best/model.safetensors",
    "checkpoints/best/state.json",
    "checkpoints/last/metrics.safetensors",
    "checkpoints/last/model.safetensors",
    "checkpoints/last/optimizer.safetensors",
    "checkpoints/last/state.json",
    "model/model.json",
    "model/weights.safetensors",
}


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run(config: dict[str, Any], tmp_path: Path) -> Run:
    return transfer.run(config, ["train.phases=[{epochs: 3}]"], output=tmp_path / "runs")


def test_a_run_of_one_epoch_has_exactly_these_files(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, ["train.phases=[{epochs: 1}]"], output=tmp_path)
    assert files(run.folder) == FILES
    assert list(tmp_path.iterdir()) == [run.folder]


def test_a_longer_run_keeps_the_checkpoints_before(run: Run) -> None:
    others = {name for name in files(run.folder) if ".previous/" not in name}
    assert others == FILES


def test_the_summary_is_what_is_returned(run: Run) -> None:
    summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    assert summary == run.summary
    assert summary["status"] == "complete"
    assert {
        "best_epoch",
        "validation",
        "test",
        "parameters",
        "examples_per_second",
        "waiting_for_data",
        "seconds",
        "peak_memory_bytes",
        "data",
    } <= set(summary)
    assert summary["data"] == {
        "train": {"near": 54, "far": 54},
        "validation": {"near": 6, "far": 6},
        "test": {"near": 20, "far": 20},
    }


def test_a_run_is_called_after_its_config(config_file: Path, tmp_path: Path) -> None:
    run = transfer.run(config_file, ["train.phases=[{epochs: 1}]"], output=tmp_path / "runs")
    assert run.folder.name.startswith("tiny-")


def test_the_resolved_config_runs_again(run: Run, tmp_path: Path) -> None:
    again = transfer.run(run.folder / "config.yaml", output=tmp_path / "again")
    assert again.summary["test"] == run.summary["test"]
    read = [yaml.safe_load((r.folder / "config.yaml").read_text(encoding="utf-8")) for r in (run, again)]
    assert read[0] == read[1]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_gives_exactly_the_figures_of_the_summary(run: Run, split: str) -> None:
    assert transfer.evaluate(run.folder, split) == run.summary[split]


def test_evaluate_of_a_frozen_backbone_gives_exactly_the_figures_of_the_summary(
    config: dict[str, Any], tmp_path: Path
) -> None:
    run = transfer.run(config, ["train.phases=[{epochs: 2, freeze: backbone}]"], output=tmp_path)
    assert transfer.evaluate(run.folder) == run.summary["test"]


def test_an_unknown_split_lists_those_there_are(run: Run) -> None:
    with pytest.raises(RunError, match="unknown split 'dev'") as caught:
        transfer.evaluate(run.folder, "dev")
    assert set(caught.value.problems[0].available) == {"train", "validation", "test"}


def test_evaluate_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        transfer.evaluate(tmp_path / "nothing")


def test_predict_is_what_the_model_says(run: Run) -> None:
    loaded = read_model(run.folder / "model")
    points = [[0.5, 1.0, -1.0, 2.0], [3.0, 3.0, 3.0, 3.0]]
    with torch.inference_mode():
        probabilities = loaded.model(torch.tensor(points)).softmax(1)
    answers = list(transfer.predict(run.folder, [",".join(map(str, point)) for point in points]))
    assert [answer["input"] for answer in answers] == ["0.5,1.0,-1.0,2.0", "3.0,3.0,3.0,3.0"]
    for answer, row in zip(answers, probabilities, strict=True):
        assert answer["probability"] == pytest.approx(row.max().item())
        assert answer["label"] == loaded.data.classes[int(row.argmax())]
    json.dumps(answers)


def test_predict_goes_on_over_many_batches_in_order(run: Run) -> None:
    sources = [f"{i},0,0,0" for i in range(150)]
    assert [answer["input"] for answer in transfer.predict(run.folder, iter(sources))] == sources


def test_predict_of_nothing_is_nothing(run: Run) -> None:
    assert list(transfer.predict(run.folder, [])) == []


def test_an_input_that_cannot_be_encoded_is_named(run: Run) -> None:
    with pytest.raises(DataError, match="a point has 4 numbers") as caught:
        list(transfer.predict(run.folder, ["1,2,3,4", "1,2,3"]))
    assert caught.value.problems[0].where == "1,2,3"


def test_an_input_that_cannot_be_read_is_named(run: Run) -> None:
    with pytest.raises(DataError, match="the input cannot be read: could not convert string to float: 'x'") as caught:
        list(transfer.predict(run.folder, ["1,2,3,4", "1,2,x"]))
    assert caught.value.problems[0].where == "1,2,x"


def test_a_quick_try_proves_a_config(config: dict[str, Any], tmp_path: Path) -> None:
    overrides = ["train.phases=[{epochs: 50, freeze: backbone}, {epochs: 50}]", "train.batch_size=4"]
    run = transfer.run(config, overrides, output=tmp_path, quick=True)
    assert run.summary["quick"] is True
    assert run.summary["epochs"] == 2
    assert transfer.evaluate(run.folder) == run.summary["test"]
    assert list(transfer.predict(run.folder, ["1,2,3,4"]))


def test_a_wrong_config_writes_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        transfer.run(config, ["head.name=linaer"], output=tmp_path / "runs")
    with pytest.raises(DataError):
        transfer.run(config, ["data.count=2"], output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_check_reads_no_data(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import Points

    monkeypatch.setattr(Points, "load", lambda self: pytest.fail("the data was read"))
    checked, parts = transfer.check(config)
    assert checked.backbone.plugin.name == "dense"
    assert all(parameter.is_meta for parameter in parts.model.parameters())
    assert [group.stage for group in parts.phases[0].groups] == ["first", "second", "third", "head"]


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["head.name=mean_of_steps"], ["head 'mean_of_steps' takes a sequence"]),
        (["backbone={name: steps}"], ["head 'linear' takes a vector"]),
        (["task={name: regression}"], ["task 'regression' learns a target of kind number"]),
        (
            ["task={name: regression}", "backbone={name: steps}"],
            ["task 'regression' learns a target of kind number", "head 'linear' takes a vector"],
        ),
        (
            ["train.phases=[{epochs: 1, freeze: {until: fourth}}, {epochs: 1, lr: {heda: 1}}]"],
            ["there is no stage called 'fourth'", "lr names 'heda'"],
        ),
    ],
)
def test_parts_that_do_not_fit_are_all_refused_at_once(
    config: dict[str, Any], overrides: list[str], messages: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        transfer.check(config, overrides)
    assert len(caught.value.problems) == len(messages)
    for problem, message in zip(caught.value.problems, messages, strict=True):
        assert problem.message.startswith(message)
        assert problem.where


def test_a_misfit_names_the_lines_of_both(config_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        transfer.check(config_file, ["backbone={name: steps}"])
    (problem,) = caught.value.problems
    lines = config_file.read_text(encoding="utf-8").splitlines()
    assert problem.where == f"{config_file}:{lines.index('head:') + 1}"
    assert "override 'backbone={name: steps}'" in problem.message


def test_a_run_says_why_it_failed(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TransferError("the disk is full")

    monkeypatch.setattr("transfer.runs.train.fit", broken)
    with pytest.raises(TransferError):
        transfer.run(config, output=tmp_path)
    (folder,) = tmp_path.iterdir()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary == {"status": "failed", "error": "TransferError: the disk is full"}
    with pytest.raises(RunError, match="the run did not end") as caught:
        transfer.evaluate(folder)
    assert caught.value.problems[0].fix == f"finish the run: transfer resume {folder}"


def test_environment_and_facts_contain_the_device(config: dict[str, Any], tmp_path: Path) -> None:
    events: list[Event] = []
    run = transfer.run(config, ["train.device=cpu"], output=tmp_path, observe=events.append)
    environment = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert (environment["device"], started.facts["device"]) == ("cpu", "cpu, fp32")


def test_artifact_that_cannot_be_imported_is_a_note(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(plugin: Plugin) -> None:
        raise PluginError(f"{plugin.kind} {plugin.name!r} cannot be imported")

    notes: list[str] = []
    monkeypatch.setattr("transfer.runs.artifacts.import_target", missing)
    run = transfer.run(
        config, output=tmp_path, observe=lambda event: notes.append(event.text) if isinstance(event, Note) else None
    )
    assert run.summary["status"] == "complete"
    assert "the report was not written: artifact 'report' cannot be imported" in notes


@pytest.mark.gpu
def test_predict_and_evaluate_use_the_requested_device(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, ["train.device=cpu"], output=tmp_path)
    sources = ["1,2,3,4", "0,0,0,0"]
    labels = {
        device: [prediction["label"] for prediction in transfer.predict(run.folder, sources, device=device)]
        for device in (None, "cpu", "cuda", "cuda:0")
    }
    assert len({tuple(values) for values in labels.values()}) == 1
    on_gpu = transfer.evaluate(run.folder, device="cuda")
    assert on_gpu == pytest.approx(run.summary["test"], abs=1e-4)


@pytest.mark.gpu
def test_predict_moves_the_model_to_the_device(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transfer.runs import predictor

    forward, devices = predictor.forward_batches, []

    def recorded(model: Model, *arguments: Any, **options: Any) -> Any:
        devices.append({parameter.device.type for parameter in model.parameters()})
        return forward(model, *arguments, **options)

    monkeypatch.setattr(predictor, "forward_batches", recorded)
    run = transfer.run(config, output=tmp_path)
    list(transfer.predict(run.folder, ["1,2,3,4"]))
    list(transfer.predict(run.folder, ["1,2,3,4"], device="cpu"))
    assert devices == [{"cuda"}, {"cpu"}]


@pytest.fixture
def folder_config(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return a config whose dataset reads its number of points from a file."""

    class Stored(Points):
        """Points, as many as a file says.

        Args:
            file: Path of the file.
        """

        def __init__(self, *, file: str) -> None:
            super().__init__(count=int(Path(file).read_text(encoding="utf-8")))

    register("dataset", "stored")(Stored)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "count").write_text("160", encoding="utf-8")
    return {**config, "data": {"name": "stored", "file": str(tmp_path / "old" / "count")}}


def test_run_whose_data_has_moved_is_evaluated(folder_config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(folder_config, ["train.phases=[{epochs: 1}]"], output=tmp_path / "runs")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = [f"data.file={tmp_path / 'new' / 'count'}"]
    assert transfer.evaluate(run.folder, "test", moved) == run.summary["test"]
    with pytest.raises(ConfigError, match=r"expected data\.key=value"):
        transfer.evaluate(run.folder, "test", ["train.batch_size=1"])


def test_run_whose_data_has_moved_is_resumed(folder_config: dict[str, Any], tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, EpochEnded):
            raise Stop

    with pytest.raises(Stop):
        transfer.run(folder_config, ["train.checkpoint.every_steps=1"], output=tmp_path / "runs", observe=stop)
    (run,) = (tmp_path / "runs").iterdir()
    (tmp_path / "old").rename(tmp_path / "new")
    file = tmp_path / "new" / "count"
    file.write_text("120", encoding="utf-8")
    with pytest.raises(RunError, match="other data"):  # other content under the new path
        transfer.resume(run, [f"data.file={file}"])
    file.write_text("160", encoding="utf-8")
    transfer.resume(run, [f"data.file={file}"])
    assert str(file) in (run / "config.yaml").read_text(encoding="utf-8")
    assert transfer.evaluate(run)


def test_seeds_and_reports_of_moved_data(folder_config: dict[str, Any], tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Note) and event.text.startswith("seed 4"):
            raise StopIteration

    one_epoch = ["train.phases=[{epochs: 1}]"]
    with pytest.raises(StopIteration):
        transfer.run_seeds(folder_config, one_epoch, seeds=2, output=tmp_path / "runs", observe=stop)
    (folder,) = (tmp_path / "runs").iterdir()
    (tmp_path / "old").rename(tmp_path / "new")
    moved = [f"data.file={tmp_path / 'new' / 'count'}"]
    assert transfer.resume_seeds(folder, moved).summary["status"] == "complete"
    assert (tmp_path / "new").name in (folder / "seeds.json").read_text(encoding="utf-8")
    assert "top losses" in transfer.report(folder / "seed-3", moved).read_text(encoding="utf-8").lower()
