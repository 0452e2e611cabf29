"""Accumulation, clipping, EMA, patience, warm-up, mixup, compilation and class weights in complete runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import POINT_SIZE, Dense, Points
from torch import Tensor, nn

import transfer
from transfer import Backbone, ConfigError, Data, FeatureSpec, Preprocessing, register
from transfer.builtin.tasks import Classification
from transfer.models.model import Model
from transfer.models.saved_model import read_model
from transfer.storage import checkpoint
from transfer.training import engine as engine_module, evaluation
from transfer.training.events import Event, Note
from transfer.training.mixup import MixedBatch
from transfer.training.state import Progress


class Smooth(Backbone):
    """Backbone without batch norm and dropout: the gradient of a batch is the mean over its examples."""

    field = "point"

    def __init__(self) -> None:
        super().__init__(
            {"first": nn.Sequential(nn.Linear(POINT_SIZE, 6), nn.Tanh()), "second": nn.Sequential(nn.Linear(6, 5))}
        )

    @property
    def features(self) -> FeatureSpec:
        return FeatureSpec("vector", 5)

    @property
    def preprocessing(self) -> Preprocessing:
        return Dense().preprocessing


@pytest.fixture(autouse=True)
def smooth(tiny: None) -> None:
    register("backbone", "smooth")(Smooth)


SMOOTH = ["backbone={name: smooth}"]
Run = transfer.Run


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(run: Run) -> dict[str, Tensor]:
    return read_model(run.folder / "model").model.state_dict()


def last(run: Run, part: str = "model") -> dict[str, Tensor]:
    return checkpoint.load(run.folder / "checkpoints" / "last")[0][part]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return a list to which every optimizer step appends its gradients, rate and new weights."""
    seen: list[dict[str, Any]] = []
    original = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any, **options: Any) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        answer = original(self, *args, **options)
        seen.append(
            {
                "norm": float(torch.stack([g.norm() for g in gradients]).norm()),
                "gradients": [g.clone() for g in gradients],
                "lr": self.param_groups[-1]["lr"],
                "after": [p.detach().clone() for p in parameters],
            }
        )
        return answer

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    return seen


# ------------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("freeze", ["none", "{until: first}"])
def test_accumulated_batches_equal_one_large_batch(config: dict[str, Any], tmp_path: Path, freeze: str) -> None:
    """108 examples are 14 batches of 8 (the last has 4), or 5 batches of 24 (the last has 12)."""
    overrides = [*SMOOTH, f"train.phases=[{{epochs: 2, freeze: {freeze}}}]"]
    large = transfer.run(config, [*overrides, "train.batch_size=24"], output=tmp_path)
    small = transfer.run(config, [*overrides, "train.batch_size=8", "train.accumulate=3"], output=tmp_path)
    for name, tensor in weights(large).items():
        torch.testing.assert_close(weights(small)[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    for one, other in zip(lines(large), lines(small), strict=True):
        assert one["validation"] == pytest.approx(other["validation"], rel=1e-4)


def test_schedule_counts_optimizer_steps_with_accumulation(
    config: dict[str, Any], tmp_path: Path, steps: list[dict[str, Any]]
) -> None:
    overrides = ["train.batch_size=8", "train.accumulate=3", "train.phases=[{epochs: 2}]"]
    transfer.run(config, [*overrides, "train.scheduler={name: one_cycle}"], output=tmp_path)
    assert len(steps) == 2 * 5
    assert len({step["lr"] for step in steps}) == 10  # the scheduler steps with the optimizer
    assert steps[-1]["lr"] == min(step["lr"] for step in steps)


TEXTS = [
    "data={name: mini_reviews, limit: 60}",
    "backbone={name: textcnn, dimensions: 4, kernel_sizes: [1], filters: 4}",
    "train.batch_size=null",
    "train.max_tokens=150",
    "train.bucket=false",
]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_schedule_ends_with_last_step_of_token_batches(
    config: dict[str, Any], tmp_path: Path, steps: list[dict[str, Any]], accumulate: int
) -> None:
    rate = ["train.scheduler={name: one_cycle}", "train.phases=[{epochs: 3}]", f"train.accumulate={accumulate}"]
    run = transfer.run(config, [*TEXTS, *rate], output=tmp_path)
    checked, parts = transfer.check(run.folder / "config.yaml")
    assert (checked.train.batch_size, checked.train.max_tokens) == (None, 150)
    rates = [step["lr"] for step in steps]
    assert len(set(rates)) == len(rates)
    assert rates[-1] == min(rates)
    assert rates[-1] < 1e-4 * max(rates)
    assert transfer.evaluate(run.folder) == run.summary["test"]
    assert parts.backbone.field == "text"


def test_quick_run_with_token_batches(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, TEXTS, output=tmp_path, quick=True)
    assert run.summary["epochs"] == 1
    assert transfer.evaluate(run.folder) == run.summary["test"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch_size=8", "train.max_tokens=100"], "train is invalid: set batch_size or max_tokens, not both"),
        (["train.batch_size=null"], "train is invalid: set batch_size or max_tokens"),
        (["train.batch_size=null", "train.max_tokens=100"], "one example, which max_tokens allows"),
        (
            ["train.batch_size=null", "train.max_tokens=100", "train.phases=[{epochs: 1, freeze: backbone}]"],
            "needs inputs with a length in tokens, which dense does not have",
        ),
        (["train.bucket=0"], "train.bucket is invalid: expected true, false, or a number of batches"),
    ],
)
def test_wrong_batch_settings_are_refused(config: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        transfer.check(config, overrides)


# ----------------------------------------------------------------------------------------------------------- clipping


def test_clipping_bounds_gradient_norm(config: dict[str, Any], tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    transfer.run(config, [*SMOOTH], output=tmp_path)
    free = [step["norm"] for step in steps]
    bound = sorted(free)[len(free) // 2]
    del steps[:]
    phases = "train.phases=[{epochs: 1, freeze: [first]}, {epochs: 1}]"
    transfer.run(config, [*SMOOTH, phases, f"train.clip_norm={bound}"], output=tmp_path)
    clipped = [step["norm"] for step in steps]
    assert max(clipped) <= bound * (1 + 1e-4)
    assert max(free) > bound * 1.05
    assert any(norm == pytest.approx(bound, rel=1e-4) for norm in clipped)
    assert any(norm < bound * 0.99 for norm in clipped)  # shorter gradients are unchanged


def test_clipping_keeps_gradient_direction(config: dict[str, Any], tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    for overrides in ([], ["train.clip_norm=0.001"]):
        transfer.run(config, [*SMOOTH, "train.phases=[{epochs: 1}]", *overrides], output=tmp_path)
    free, clipped = steps[0], steps[len(steps) // 2]
    assert clipped["norm"] == pytest.approx(0.001, rel=1e-3)
    for one, other in zip(free["gradients"], clipped["gradients"], strict=True):
        torch.testing.assert_close(other, one * (0.001 / free["norm"]), rtol=1e-3, atol=1e-8)


# ------------------------------------------------------------------------------------------- exponential moving average


def test_ema_recurrence_validation_and_checkpoint(
    config: dict[str, Any], tmp_path: Path, steps: list[dict[str, Any]]
) -> None:
    run = transfer.run(config, [*SMOOTH, "train.ema=0.8", "train.phases=[{epochs: 1}]"], output=tmp_path)
    average = steps[0]["after"]
    for step in steps[1:]:
        average = [0.8 * old + 0.2 * new for old, new in zip(average, step["after"], strict=True)]
    names = list(weights(run))
    for name, expected, now in zip(names, average, steps[-1]["after"], strict=True):
        torch.testing.assert_close(weights(run)[name], expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(last(run, "average")[name], expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(last(run)[name], now)
        assert not torch.allclose(expected, now, rtol=1e-3)
    assert lines(run)[0]["validation"] == pytest.approx(transfer.evaluate(run.folder, "validation"), rel=1e-6)
    assert transfer.evaluate(run.folder) == run.summary["test"]


def test_ema_does_not_change_training(config: dict[str, Any], tmp_path: Path) -> None:
    plain, averaged = (transfer.run(config, extra, output=tmp_path) for extra in ([], ["train.ema=0.9"]))
    assert "average" not in checkpoint.load(plain.folder / "checkpoints" / "last")[0]
    for name, tensor in last(plain).items():
        assert torch.equal(tensor, last(averaged)[name]), name
    assert [line["train"] for line in lines(plain)] == [line["train"] for line in lines(averaged)]


def test_ema_buffers_equal_those_of_the_model(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, ["train.ema=0.9"], output=tmp_path)
    for name in ("first.1.running_mean", "third.1.num_batches_tracked"):
        assert torch.equal(last(run, "average")[name], last(run)[name])


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_parameters_frozen_later_are_frozen_in_ema(config: dict[str, Any], tmp_path: Path, cache: str) -> None:
    """The saved weights are the validated ones: the average does not drift towards the frozen weights."""
    phases = "train.phases=[{epochs: 1}, {epochs: 3, freeze: backbone, lr: 0.5}]"
    run = transfer.run(config, [phases, "train.ema=0.9", f"train.cache={cache}"], output=tmp_path)
    average, model = last(run, "average"), last(run)
    for name in model:
        assert torch.equal(average[name], model[name]) == (not name.startswith("head")), name
    scored = transfer.evaluate(run.folder, "validation")
    assert scored == pytest.approx(run.summary["validation"], rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- patience


def scripted(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> None:
    """Replace the validation accuracy of each epoch by the next of these values."""
    values = iter(accuracies)
    original = evaluation.evaluate

    def evaluate(*args: Any, **options: Any) -> dict[str, float]:
        scores = original(*args, **options)
        return scores if args[5] != "validation" else {**scores, "accuracy": next(values), "loss": 1.0}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)


def test_patience_ends_phase_and_next_phase_starts(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first phase is best in its second epoch. The second phase counts its own epochs, though none is as good.
    scripted(monkeypatch, [0.5, 0.9, 0.8, 0.9, 0.1, 0.2, 0.3, 0.3, 0.2])
    phases = "train.phases=[{epochs: 9, patience: 2, freeze: backbone}, {epochs: 5, patience: 3}]"
    notes: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    run = transfer.run(config, [phases], output=tmp_path, observe=observe)
    assert [line["phase"] for line in lines(run)] == [1] * 4 + [2] * 5
    assert run.summary["best_epoch"] == 2
    assert run.summary["epochs"] == 9
    assert any("phase 1 ends after epoch 4: no better for 2 epochs" in note for note in notes)
    assert not any("phase 2 ends" in note for note in notes)


def test_equal_metric_counts_against_patience(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.5] * 9)
    run = transfer.run(config, ["train.phases=[{epochs: 9, patience: 1}]"], output=tmp_path)
    assert len(lines(run)) == 2


# --------------------------------------------------------------------------------------------------------- time limit


def test_max_minutes_ends_training_before_an_epoch_that_would_exceed_it(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The limit is set so that it is exceeded after three epochs, whatever the speed of the machine.
    left, reason = iter([60.0] * 3 + [0.0] * 9), Progress.reason_to_stop
    monkeypatch.setattr(Progress, "reason_to_stop", lambda self, patience, _: reason(self, patience, next(left)))
    notes: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    phases = "train.phases=[{epochs: 9, freeze: backbone}, {epochs: 5}]"
    run = transfer.run(config, [phases, "train.max_minutes=1"], output=tmp_path, observe=observe)
    assert [line["phase"] for line in lines(run)] == [1, 1]
    assert [note for note in notes if "max_minutes" in note] == [
        "phase 1 ends after epoch 2: another epoch would end after train.max_minutes",
        "phase 2 is not trained: another epoch would end after train.max_minutes",
    ]
    assert run.summary["test"]["accuracy"] >= 0


def test_max_minutes_trains_at_least_one_epoch(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, ["train.max_minutes=1.0e-6", "train.phases=[{epochs: 3}]"], output=tmp_path)
    assert len(lines(run)) == 1


# ------------------------------------------------------------------------------------------------------------ warm-up


def test_warmup_in_each_phase(config: dict[str, Any], tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    """An epoch has seven batches."""
    overrides = ["train.warmup_epochs=0.5", "train.phases=[{epochs: 1, freeze: backbone}, {epochs: 2, lr: 0.1}]"]
    transfer.run(config, overrides, output=tmp_path)
    found = [step["lr"] for step in steps]
    warm = round(0.5 * 7)
    rising = [(k + 1) / (warm + 1) for k in range(warm)]
    expected = [0.05 * share for share in rising] + [0.05] * (7 - warm)
    expected += [0.1 * share for share in rising] + [0.1] * (14 - warm)
    assert found == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------- mix


def test_mixed_losses_are_trained_on(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With lam 0, mixup trains on the second example of each pair."""

    def swap(inputs: Tensor, mix: object) -> MixedBatch:
        partners = torch.arange(len(inputs)).flip(0)
        return MixedBatch(inputs[partners], partners, 0.0)

    plain = transfer.run(config, [*SMOOTH], output=tmp_path)
    monkeypatch.setattr(engine_module, "mix_batch", swap)
    swapped = transfer.run(config, [*SMOOTH, "train.mix={mixup: 1.0}"], output=tmp_path)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(swapped)[name], tensor, rtol=1e-4, atol=1e-6)


def test_run_with_mixup_learns_and_is_reproducible(config: dict[str, Any], tmp_path: Path) -> None:
    overrides = ["data.distance=4.0", "train.mix={mixup: 0.4}", "train.phases=[{epochs: 4}]"]
    first, second = (transfer.run(config, overrides, output=tmp_path) for _ in range(2))
    assert first.summary["test"]["accuracy"] > 0.9
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(first).items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.mix={cutmix: 1.0}"], "cutmix needs a batch of images"),
        (["train.mix={}"], "mixup, cutmix or both"),
        (
            ["data={name: mini_reviews}", "backbone={name: textcnn}", "train.mix={mixup: 1.0}"],
            "expected a float tensor",
        ),
    ],
)
def test_wrong_mix_is_refused_before_the_run(
    config: dict[str, Any], tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        transfer.run(config, overrides, output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------------------------- compilation


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # every torch release has other warnings
def test_compiled_model_trains_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    overrides = ["backbone.dropout=0.0", "train.phases=[{epochs: 1, freeze: {until: first}}, {epochs: 1}]"]
    plain, compiled = (
        transfer.run(config, [*overrides, f"train.compile={flag}"], output=tmp_path) for flag in ("false", "true")
    )
    for one, other in zip(lines(plain), lines(compiled), strict=True):
        for part in ("train", "validation"):
            assert one[part] == pytest.approx(other[part], rel=1e-4)
    assert list(weights(plain)) == list(weights(compiled))


def test_recomputed_run_has_identical_weights(config: dict[str, Any], tmp_path: Path) -> None:
    """The first phase trains on cached features, the second everything; the backbone has batch norm and dropout."""
    overrides = ["train.phases=[{epochs: 1, freeze: {until: first}}, {epochs: 1}]", "train.accumulate=2"]
    plain = transfer.run(config, overrides, output=tmp_path)
    recomputed = transfer.run(config, [*overrides, "train.recompute=true"], output=tmp_path)
    for name, tensor in last(plain).items():
        assert torch.equal(last(recomputed)[name], tensor), name
    with pytest.raises(ConfigError, match="recompute and compile do not combine"):
        transfer.check(config, ["train.recompute=true", "train.compile=true"])


def test_model_is_compiled_only_if_configured(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[nn.Module] = []

    def compile_(model: Model, *, dynamic: bool | None) -> Model:
        assert dynamic is None  # points have one size
        asked.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    transfer.run(config, output=tmp_path)
    assert asked == []
    transfer.run(config, ["train.compile=true"], output=tmp_path)
    assert [type(model) for model in asked] == [Model]


# --------------------------------------------------------------------------------- weights of classes and of parameters


class Uneven(Points):
    """Points with one far point in four."""

    def load(self) -> Data:
        """Remove most far points from the training split."""
        data = super().load()
        train = data.splits["train"]
        keep = np.flatnonzero((train.targets == 0) | (np.arange(len(train)) % 6 == 1))
        return Data(data.spec, {**data.splits, "train": train.select(keep)})


def test_balanced_class_weights_come_from_training_split(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register("dataset", "uneven")(Uneven)
    tasks: list[Classification] = []
    original: Callable[[Classification, Any], None] = Classification.prepare

    def prepare(self: Classification, targets: Any) -> None:
        original(self, targets)
        tasks.append(self)

    monkeypatch.setattr(Classification, "prepare", prepare)
    overrides = ["data.name=uneven", "train.phases=[{epochs: 3}]"]
    plain = transfer.run(config, overrides, output=tmp_path)
    balanced = transfer.run(config, [*overrides, "task.class_weights=balanced"], output=tmp_path)
    counts: Mapping[str, int] = balanced.summary["data"]["train"]
    assert counts["near"] > 2.5 * counts["far"]
    total = sum(counts.values())
    assert tasks[0].weights is None
    assert tasks[1].weights is not None
    assert tasks[1].weights.tolist() == pytest.approx([total / (2 * counts[name]) for name in ("near", "far")])

    def share_of_far(run: Run) -> float:
        loaded = read_model(run.folder / "model")
        points = torch.randn(400, POINT_SIZE, generator=torch.Generator().manual_seed(0)) + 0.5
        with torch.inference_mode():
            return float((loaded.model(points).argmax(1) == 1).float().mean())

    assert share_of_far(balanced) > share_of_far(plain) + 0.1


def test_unknown_class_in_class_weights_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="class_weights names"):
        transfer.check(config, ["task.class_weights={near: 1.0, fra: 2.0}"])


def test_parameters_without_weight_decay_do_not_shrink(config: dict[str, Any], tmp_path: Path) -> None:
    """Without a gradient, only weight decay changes the weights."""
    decay = "train.optimizer={name: sgd, lr: 0.1, weight_decay: 0.5, no_weight_decay: [norm, bias]}"

    class Still(Classification):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs * 0).sum(1)

    register("task", "still")(Still)
    overrides = ["task={name: still}", "train.phases=[{epochs: 1}]"]
    start = transfer.run(config, [*overrides, "train.optimizer={name: sgd, lr: 1.0e-30}"], output=tmp_path)
    run = transfer.run(config, [*overrides, decay], output=tmp_path)
    batches = 7
    for name in dict(read_model(run.folder / "model").model.named_parameters()):
        spared = name.endswith("bias") or name in ("first.1.weight", "third.1.weight")
        expected = last(start)[name] * (1.0 if spared else (1 - 0.1 * 0.5) ** batches)
        torch.testing.assert_close(last(run)[name], expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.phases=[{epochs: 1, batch_norm: train}]"], "none is frozen"),
        (["train.phases=[{epochs: 1, freeze: [second], batch_norm: train}]"], "none is frozen"),
        (["train.views=2"], "train.views"),
        (["train.warmup_epochs=0.5", "train.scheduler={name: one_cycle}"], "already contains a warm-up"),
        (["train.warmup_epochs=2"], "warmup_epochs is too long"),
    ],
)
def test_setting_without_effect_is_refused(config: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        transfer.check(config, overrides)
    assert caught.value.problems[0].where
