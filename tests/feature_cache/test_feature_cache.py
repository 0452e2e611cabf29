"""The feature cache: cached training gives the same results with less computation."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import POINT_SIZE, Dense, PointPreprocessing
from forked_python import ForkedPython
from PIL import Image
from torch import Tensor, nn

import transfer
from transfer import Backbone, Data, Dataset, DataSpec, FeatureSpec, Preprocessing, Split, TrainingError, register
from transfer.builtin.heads import MLP, Linear
from transfer.data.loader import Loader
from transfer.feature_cache import entry_writer, store
from transfer.feature_cache.entry import Entry
from transfer.feature_cache.loader import AUTO_VIEWS, CachedLoader, select_stage_inputs
from transfer.feature_cache.prefix import SAMPLE_EXAMPLES, FrozenPrefix
from transfer.feature_cache.store import FeatureCache
from transfer.interfaces import SPLITS
from transfer.models.model import Model
from transfer.system.directory_cache import STALE_SECONDS, DirectoryCache
from transfer.training.events import CachingStep, Event

HERE = Path(__file__).parent
PLENTY = 2**30


# --------------------------------------------------------------------------------------------------------- fixtures


class Lists(Dataset):
    """Lists of one to nine numbers, in two classes of different means."""

    @property
    def spec(self) -> DataSpec:
        return DataSpec(("list",), "class", ("low", "high"))

    def load(self) -> Data:
        generator = np.random.default_rng(0)
        targets = np.arange(120) % 2
        values = [(generator.normal(size=generator.integers(1, 10)) + target).tolist() for target in targets]
        whole = Split({"list": values}, targets)
        indices = np.arange(120)
        return Data(self.spec, {"train": whole.select(indices[30:]), "test": whole.select(indices[:30])})


class ListPreprocessing(Preprocessing):
    """Lists padded to the longest of a batch: values (B, T) and their mask (B, T)."""

    encode_once: ClassVar[bool] = True

    def encode(self, values: Sequence[Any]) -> list[Tensor]:
        return [torch.tensor(value, dtype=torch.float32) for value in values]

    def collate(self, encoded: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(value) for value in encoded])
        padded = nn.utils.rnn.pad_sequence(list(encoded), batch_first=True)
        return padded, torch.arange(padded.shape[1]) < lengths[:, None]

    def length(self, encoded: Tensor) -> int:
        return len(encoded)

    def read(self, source: str) -> Any:
        return [float(number) for number in source.split(",")]


class NoisyLists(ListPreprocessing):
    """The same, with noise on each value in training."""

    def augment(self, encoded: Tensor) -> Tensor:
        return encoded + 0.1 * torch.randn(len(encoded))


class Step(nn.Module):
    """A linear layer on every step; the output at padding is not zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        values, mask = pair
        return self.linear(values.unsqueeze(-1) if values.dim() == 2 else values).tanh(), mask


class Ragged(Backbone):
    """Sequences of different lengths: (B, T) -> (B, T, 3) and a mask."""

    field: ClassVar[str] = "list"
    of: ClassVar[type[Preprocessing]] = ListPreprocessing

    def __init__(self) -> None:
        super().__init__({"lower": Step(1, 4), "upper": Step(4, 3)})

    @property
    def features(self) -> FeatureSpec:
        return FeatureSpec("sequence", 3)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.of()


class NoisyRagged(Ragged):
    """The same with augmentation."""

    of: ClassVar[type[Preprocessing]] = NoisyLists


class Unmasked(Step):
    """Steps without their mask: a tensor whose shape differs between batches."""

    def forward(self, pair: Any) -> Any:
        return super().forward(pair)[0]


class MeanOfAll(nn.Module):
    """(B, T, D) -> (B, D)."""

    def forward(self, steps: Tensor) -> Tensor:
        return steps.mean(1)


class Varying(Ragged):
    """A first stage whose output differs in shape between batches and has no mask."""

    def __init__(self) -> None:
        Backbone.__init__(self, {"lower": Unmasked(1, 3), "upper": MeanOfAll()})

    @property
    def features(self) -> FeatureSpec:
        return FeatureSpec("vector", 3)


class Fork(nn.Module):
    """(B, 4) -> (B, 3) and int64 (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(POINT_SIZE, 3)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(points), points.argmax(1)


class Join(nn.Module):
    """A float of (B, 3) and an index (B,) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(POINT_SIZE, 3)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + self.table(pair[1])


class Pair(Backbone):
    """A first stage that returns two tensors of fixed shapes."""

    field: ClassVar[str] = "point"

    def __init__(self) -> None:
        super().__init__({"fork": Fork(), "join": Join()})

    @property
    def features(self) -> FeatureSpec:
        return FeatureSpec("vector", 3)

    @property
    def preprocessing(self) -> Preprocessing:
        return PointPreprocessing()


class SideInputs(Step):
    """The first stage, which also passes on an additive mask, a table of positions, ids and a value per example."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        states, mask = super().forward(pair)
        additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None, None]
        positions = torch.arange(mask.shape[1])
        ids = torch.where(mask, positions, 7)
        return additive, positions[None, :, None] / 10, states, positions[:, None] - positions, ids, mask, mask.sum(1)


class Block(nn.Module):
    """A stage that needs all side inputs: attention over real steps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, side: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        additive, positions, states, relative, ids, mask, count = side
        scores = states @ states.transpose(1, 2) - relative.abs() / 10 + additive[:, 0]
        states = scores.softmax(-1) @ (states + positions + ids[..., None] / 10)
        return self.linear(states * count[:, None, None] / 10), mask


class Encoder(Ragged):
    """Stages that pass on more tensors than values and their mask."""

    def __init__(self) -> None:
        Backbone.__init__(self, {"embeddings": SideInputs(1, 4), "layer": Block()})


class NoisyPoints(PointPreprocessing):
    """Points with noise in training."""

    def augment(self, encoded: Tensor) -> Tensor:
        return encoded + 0.1 * torch.randn(POINT_SIZE)


class Noisy(Dense):
    """Dense stages over points with noise."""

    @property
    def preprocessing(self) -> Preprocessing:
        return NoisyPoints()


class Images(Dataset):
    """Random images of 40 x 40 pixels in two classes, dark and light."""

    @property
    def spec(self) -> DataSpec:
        return DataSpec(("image",), "class", ("dark", "light"))

    def load(self) -> Data:
        generator = np.random.default_rng(0)
        targets = np.arange(36) % 2
        arrays = [generator.integers(60 * t, 180 + 60 * t, (40, 40, 3), dtype=np.uint8) for t in targets]
        whole = Split({"image": [Image.fromarray(array) for array in arrays]}, targets)
        indices = np.arange(36)
        return Data(self.spec, {"train": whole.select(indices[8:]), "test": whole.select(indices[:8])})


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: None) -> Path:
    """Give every test a cache of its own, and register the plugins of this file."""
    register("dataset", "lists")(Lists)
    register("dataset", "images")(Images)
    for name, cls in {"ragged": Ragged, "noisy_ragged": NoisyRagged, "varying": Varying, "pair": Pair}.items():
        register("backbone", name)(cls)
    register("backbone", "noisy")(Noisy)
    register("backbone", "encoder")(Encoder)
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def prefix_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the name of the last stage whenever a prefix is run."""
    seen: list[str] = []
    original = FrozenPrefix.run

    def run(self: FrozenPrefix, *args: Any, **options: Any) -> Iterator[Any]:
        seen.append(self.stages[-1])
        return original(self, *args, **options)

    monkeypatch.setattr(FrozenPrefix, "run", run)
    return seen


def points(count: int = 50) -> Split:
    generator = np.random.default_rng(0)
    return Split({"point": [row.tolist() for row in generator.normal(size=(count, POINT_SIZE))]}, np.arange(count) % 2)


def lists() -> Split:
    return Lists().load().splits["train"]


def small(seed: int = 0, *, count: int = 2, part: Split | None = None, **options: Any) -> tuple[FrozenPrefix, Loader]:
    """Return the first stages of a model and a loader over points."""
    torch.manual_seed(seed)
    backbone = Dense()
    model = Model(backbone, Linear(backbone.features, 2))
    loader = Loader(part or points(), ("point",), backbone.preprocessing, **{"batch_size": 8, **options})
    return FrozenPrefix(model, count, {}, "fp32"), loader


def ragged(cls: type[Ragged] = Ragged, **options: Any) -> tuple[FrozenPrefix, Loader]:
    torch.manual_seed(0)
    backbone = cls()
    model = Model(backbone, nn.Identity())  # type: ignore[arg-type]
    loader = Loader(lists(), ("list",), backbone.preprocessing, **{"batch_size": 8, **options})
    return FrozenPrefix(model, 1, {}, "fp32"), loader


def entry_of(cache: FeatureCache, prefix: FrozenPrefix, loader: Loader, view: int | None = None) -> Entry:
    entry = cache.load_or_compute(prefix, loader, view=view)
    assert isinstance(entry, Entry)
    return entry


@torch.no_grad()
def direct(prefix: FrozenPrefix, loader: Loader, indices: Any, *, view: int | None = None) -> Any:
    """Return what the frozen stages give for some examples, computed here and one by one."""
    preprocessing = loader.preprocessing
    encoded = preprocessing.encode([loader.split.column(*loader.fields)[int(i)] for i in indices])
    if view is not None:
        batches = loader.in_fixed_order(1, augment=True).epoch(view)
        inputs = {int(batch.indices[0]): batch.inputs for batch in batches}
        parts = [inputs[int(i)] for i in indices]
        value: Any = torch.cat(parts)
    else:
        value = preprocessing.model_inputs(encoded)
    prefix.model.eval()
    for stage in list(prefix.model)[: prefix.count]:
        value = stage(value)
    return value


def lines(run: transfer.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------ the same training, cached or not

FREEZE_FIRST = "train.phases=[{epochs: 3, freeze: {until: first}}]"
RUNS: Mapping[str, list[str]] = {
    "points": [FREEZE_FIRST],
    "points, all of the backbone": ["train.phases=[{epochs: 3, freeze: backbone}]"],
    "a sequence": [
        "backbone={name: steps}",
        "head={name: mean_of_steps}",
        "train.phases=[{epochs: 3, freeze: backbone}]",
    ],
    "sequences of different lengths": [
        "data={name: lists}",
        "backbone={name: ragged}",
        "head={name: mean_of_steps}",
        "train.phases=[{epochs: 3, freeze: {until: lower}}]",
    ],
    "sequences with side inputs": [
        "data={name: lists}",
        "backbone={name: encoder}",
        "head={name: mean_of_steps}",
        "train.phases=[{epochs: 3, freeze: {until: embeddings}}]",
    ],
    "a pair of tensors": ["backbone={name: pair}", "train.phases=[{epochs: 3, freeze: {until: fork}}]"],
    "texts": [
        "data={name: mini_reviews, limit: 40}",
        "backbone={name: textcnn, vectors: mini, variant: multichannel, kernel_sizes: [1, 3], filters: 8}",
        "train.phases=[{epochs: 3, freeze: {until: convolution}}]",
    ],
    "texts by tokens": [
        "data={name: mini_reviews, limit: 40}",
        "backbone={name: bilstm, vectors: mini, layers: 1, hidden_size: 4, readout: sequence}",
        "head={name: attention}",
        "train.batch_size=null",
        "train.max_tokens=200",
        "train.phases=[{epochs: 3, freeze: {until: lstm}}]",
    ],
    "images": [
        "data={name: images}",
        "backbone={name: resnet18, weights: null, image_size: 32, augmentation: none}",
        "train.phases=[{epochs: 2, freeze: {until: layer3}}]",
        "train.optimizer={name: sgd, lr: 0.005}",
    ],
    "bf16": [FREEZE_FIRST, "train.precision=bf16"],
}


@pytest.mark.parametrize("name", RUNS)
def test_cached_training_equals_uncached_training(config: dict[str, Any], tmp_path: Path, name: str) -> None:
    cached, again, uncached = (
        transfer.run(config, [*RUNS[name], f"train.cache={mode}"], output=tmp_path)
        for mode in ("auto", "verify", "off")
    )
    assert all(report["cached"] for report in cached.summary["cache"])
    assert not any(report["cached"] for report in uncached.summary["cache"])
    tolerance = {"rel": 1e-3, "abs": 1e-4} if name in ("images", "bf16") else {"rel": 1e-4, "abs": 1e-6}
    for one, same, other in zip(lines(cached), lines(again), lines(uncached), strict=True):
        for part in ("train", "validation"):
            assert one[part] == same[part]  # a second run reads the very same features
            assert one[part] == pytest.approx(other[part], **tolerance)
    assert cached.summary["test"] == pytest.approx(uncached.summary["test"], **tolerance)


def test_second_run_computes_only_sample_of_key(config: dict[str, Any], tmp_path: Path, prefix_runs: list[str]) -> None:
    transfer.run(config, [FREEZE_FIRST], output=tmp_path)
    assert prefix_runs == ["first"] * 3  # train, validation, test
    del prefix_runs[:]
    sizes: list[int] = []

    def count(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and module.in_features == POINT_SIZE and not output.is_meta:
            sizes.append(len(output))

    # A hook for all modules, because a hook of the stage itself would be part of its key.
    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        other = ["train.optimizer.lr=0.01", "train.batch_size=9", "head={name: mlp}", "train.phases.0.epochs=1"]
        run = transfer.run(config, [FREEZE_FIRST, *other], output=tmp_path)
    finally:
        handle.remove()
    assert prefix_runs == []
    assert sizes == [SAMPLE_EXAMPLES] * 3  # train, validation, test
    assert all(report["cached"] for report in run.summary["cache"])


# ------------------------------------------------------------------------------------------------------------ entries


def test_entry_contains_the_output_of_the_stages(cache_folder: Path) -> None:
    prefix, loader = small()
    entry = entry_of(FeatureCache(PLENTY), prefix, loader)
    indices = np.array([7, 0, 49, 7])
    torch.testing.assert_close(entry.take(indices), direct(prefix, loader, indices))
    assert entry.folder.parent == cache_folder
    (listed,) = FeatureCache(PLENTY).entries()
    assert listed["key"] == entry.folder.name == prefix.key(loader, None)
    assert (listed["stages"], listed["examples"], listed["view"], listed["fields"]) == (
        ["first", "second"],
        50,
        None,
        ["point"],
    )
    assert listed["bytes"] > 50 * 8 * 4


@pytest.mark.parametrize("made", [small, ragged])
def test_prefix_features_equal_plain_loop_bit_for_bit(made: Callable[..., tuple[FrozenPrefix, Loader]]) -> None:
    prefix, loader = made()
    batches = loader.in_fixed_order(64, augment=False).epoch(0)
    prefix.model.eval()
    for (indices, features), batch in zip(prefix.run(loader, None), batches, strict=True):
        value = batch.inputs
        with torch.inference_mode():
            for stage in list(prefix.model)[: prefix.count]:
                value = stage(value)
        assert np.array_equal(indices, batch.indices)
        for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (features, value)), strict=True):
            assert torch.equal(one, other)


def test_cached_loader_keeps_order_targets_and_indices() -> None:
    prefix, loader = small(training=True, seed=0)
    cached = CachedLoader(loader, [entry_of(FeatureCache(PLENTY), prefix, loader)])
    assert len(cached) == len(loader)
    for one, other in zip(cached.epoch(3, start=2, limit=3), loader.epoch(3, start=2, limit=3), strict=True):
        assert np.array_equal(one.indices, other.indices)
        assert torch.equal(one.targets, other.targets)
        torch.testing.assert_close(one.inputs, direct(prefix, loader, one.indices))


def test_entry_of_sequences_restores_masks() -> None:
    prefix, loader = ragged()
    entry = entry_of(FeatureCache(PLENTY), prefix, loader)
    for indices in (np.array([3, 50, 0, 3]), np.array([11])):
        values, mask = entry.take(indices)
        expected, expected_mask = direct(prefix, loader, indices)
        assert torch.equal(mask, expected_mask)
        torch.testing.assert_close(values[mask], expected[mask])
        assert values[~mask].abs().sum() == 0
    stored = sum(file.stat().st_size for file in entry.folder.glob("*.bin"))
    assert stored == 4 * 4 * sum(map(len, lists().fields["list"]))  # no padding


def test_entry_of_tuple_restores_dtypes() -> None:
    torch.manual_seed(0)
    backbone = Pair()
    prefix = FrozenPrefix(Model(backbone, Linear(backbone.features, 2)), 1, {}, "fp32")
    loader = Loader(points(), ("point",), backbone.preprocessing, batch_size=8)
    indices = np.array([4, 2])
    values, positions = entry_of(FeatureCache(PLENTY), prefix, loader).take(indices)
    expected = direct(prefix, loader, indices)
    torch.testing.assert_close(values, expected[0])
    assert torch.equal(positions, expected[1])
    assert positions.dtype == torch.int64


def test_entry_restores_side_inputs_and_stores_tables_once() -> None:
    prefix, loader = ragged(Encoder)
    entry = entry_of(FeatureCache(PLENTY, verify=True), prefix, loader)
    for indices in (np.array([3, 50, 0, 3]), np.array([11])):
        restored, expected = entry.take(indices), direct(prefix, loader, indices)
        mask = expected[5]
        for number, (one, other) in enumerate(zip(restored, expected, strict=True)):
            assert one.dtype == other.dtype
            is_states = number == 2  # the only tensor whose padding is not restored
            torch.testing.assert_close(one[mask] if is_states else one, other[mask] if is_states else other)
    shapes = [tensor["shape"] for tensor in json.loads((entry.folder / "entry.json").read_text())["tensors"]]
    assert shapes == [["B", 1, 1, "T"], [1, "T", 1], ["B", "T", 4], ["T", "T"], ["B", "T"], ["B", "T"], ["B"]]
    steps, count, longest = sum(map(len, lists().fields["list"])), len(lists()), 9
    assert {path.name: path.stat().st_size for path in entry.folder.glob("*.bin")} == {
        "0.bin": 4 * steps,
        "1.bin": 4 * longest,
        "2.bin": 4 * 4 * steps,
        "3.bin": 8 * longest**2,
        "4.bin": 8 * steps,
        "6.bin": 8 * count,
    }


def test_table_with_batch_size_rows_is_stored_once() -> None:
    class WithTable(nn.Module):
        def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
            return points, torch.arange(64)

    prefix, loader = small(count=1, part=points(128))
    prefix.model.first = WithTable()
    entry = entry_of(FeatureCache(PLENTY), prefix, loader)
    assert torch.equal(entry.take(np.array([5, 100]))[1], torch.arange(64))


@pytest.mark.parametrize(
    ("side", "reason"),
    [
        (lambda mask: mask[:, None] & mask[..., None], "differs in shape between batches"),
        (lambda mask: mask.cumsum(1)[:, None], "has no constant value at padding"),
        (lambda mask: mask.cumsum(1).max() - torch.arange(mask.shape[1]), "differs in shape between batches"),
    ],
    ids=["two axes of steps", "padding", "another table for each length"],
)
def test_unrestorable_side_inputs_are_not_cached(
    side: Callable[[Tensor], Tensor], reason: str, cache_folder: Path
) -> None:
    class WithSide(Step):
        def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            values, mask = super().forward(pair)
            return values, mask, side(mask)

    prefix, loader = ragged()
    prefix.model.lower = WithSide(1, 4)
    assert FeatureCache(PLENTY).load_or_compute(prefix, loader) == f"the output of stage lower {reason}"
    assert list(cache_folder.iterdir()) == []


def test_entry_keeps_bf16() -> None:
    prefix, loader = small(count=1)
    prefix = FrozenPrefix(prefix.model, 1, {}, "bf16")
    prefix.model.first = nn.Linear(POINT_SIZE, 5)
    features = entry_of(FeatureCache(PLENTY), prefix, loader).take(np.arange(4))
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), direct(prefix, loader, range(4)), rtol=0.02, atol=0.02)


def test_varying_shapes_without_mask_are_not_cached(config: dict[str, Any], tmp_path: Path, cache_folder: Path) -> None:
    overrides = ["data={name: lists}", "backbone={name: varying}", "train.phases=[{epochs: 1, freeze: backbone}]"]
    run = transfer.run(config, overrides, output=tmp_path)
    first = run.summary["cache"][0]
    assert first["cached"] is True  # the stage after it makes vectors of them
    prefix, loader = ragged(Varying)  # type: ignore[arg-type]
    reason = FeatureCache(PLENTY, folder=tmp_path / "other").load_or_compute(prefix, loader)
    assert reason == "the output of stage lower differs in shape between batches"
    assert list((tmp_path / "other").iterdir()) == []


def test_padding_before_the_steps_is_not_cached() -> None:
    class Left(Step):
        def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            values, mask = super().forward(pair)
            return values.flip(1), mask.flip(1)

    prefix, loader = ragged()
    prefix.model.lower = Left(1, 4)
    assert FeatureCache(PLENTY).load_or_compute(prefix, loader) == (
        "the output of stage lower has padding before the last step of a sequence"
    )


def test_computing_features_preserves_mode_and_random_state() -> None:
    prefix, loader = small(training=True)
    prefix.model.train()
    state = torch.get_rng_state()
    entry_of(FeatureCache(PLENTY), prefix, loader)
    assert isinstance(
        FeatureCache(1, folder=store.cache_folder("features") / "other").load_or_compute(prefix, loader), str
    )
    assert prefix.model.training
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------------------- keys


def change_weight(prefix: FrozenPrefix) -> None:
    with torch.no_grad():
        prefix.model.get_parameter("first.0.weight")[0, 0] += 1e-6


def change_buffer(prefix: FrozenPrefix) -> None:
    prefix.model.get_buffer("first.1.running_var")[3] = 2.0


class Wider(PointPreprocessing):
    def describe(self) -> Mapping[str, Any]:
        return {"size": POINT_SIZE, "scale": 2}


class Undescribed(PointPreprocessing):
    def __init__(self, scale: float) -> None:
        self.scale = scale


def test_key_changes_with_everything_that_determines_the_features() -> None:
    prefix, loader = small(training=True)
    keys = {"as it is": prefix.key(loader, None)}

    def add(name: str, other: FrozenPrefix | None = None, part: Loader | None = None, view: int | None = None) -> None:
        keys[name] = (other or prefix).key(part or loader, view)

    for name, change in (("weight", change_weight), ("buffer", change_buffer)):
        other, _ = small()
        change(other)
        add(name, other)
    other, _ = small()
    other.model.stages["second"][2].p = 0.3
    add("what a stage's repr says", other)
    other, _ = small()
    other.model.stages["second"].temperature = 2.0  # type: ignore[assignment]
    add("a plain attribute of a stage", other)
    add("stages", FrozenPrefix(prefix.model, 1, {}, "fp32"))
    add("assets", FrozenPrefix(prefix.model, 2, {"vocabulary.json": "[]"}, "fp32"))
    add("precision", FrozenPrefix(prefix.model, 2, {}, "bf16"))
    for name, preprocessing in {
        "class of the preprocessing": NoisyPoints(),
        "options of the preprocessing": Wider(),
        "an option that it does not describe": Undescribed(1.0),
        "that option": Undescribed(2.0),
    }.items():
        add(name, part=Loader(points(), ("point",), preprocessing, batch_size=8, training=True))
    values = [list(value) for value in points().fields["point"]]
    values[20][1] += 1e-9
    add("a value", part=small(part=Split({"point": values}, points().targets))[1])
    add("examples", part=small(part=points().select(np.arange(49)))[1])
    add("order", part=small(part=points().select(np.arange(50)[::-1]))[1])
    add("view 0", view=0)
    add("view 1", view=1)
    seeded = Loader(points(), ("point",), loader.preprocessing, batch_size=8, training=True, seed=1)
    add("seed of a view", part=seeded, view=0)
    assert len(set(keys.values())) == len(keys), keys


def test_key_ignores_everything_else() -> None:
    prefix, loader = small()
    key = prefix.key(loader, None)
    assert small(batch_size=3, training=True, workers=2)[0].key(small(batch_size=3, training=True)[1], None) == key
    seeded = Loader(points(), ("point",), PointPreprocessing(), batch_size=8, seed=5)
    assert prefix.key(seeded, None) == key  # nothing is random without a view
    targets = Split(points().fields, 1 - points().targets)
    assert prefix.key(small(part=targets)[1], None) == key
    torch.manual_seed(0)
    backbone = Dense()
    other = Model(backbone, MLP(backbone.features, 7)).train()
    with torch.no_grad():
        other.get_parameter("third.0.weight").zero_()
    other.requires_grad_(False)
    assert FrozenPrefix(other, 2, {}, "fp32").key(loader, None) == key


# -------------------------------------------------------------------------------------------------------------- views


def test_epoch_draws_one_view_of_each_example() -> None:
    prefix, _ = small(count=1)
    loader = Loader(points(), ("point",), NoisyPoints(), batch_size=8, seed=3, training=True)
    made = select_stage_inputs(FeatureCache(PLENTY), prefix, loader, views=2, mixed=False)
    assert made.report["views"] == 2
    everyone = np.arange(50)
    views = [direct(prefix, loader, everyone, view=view) for view in (0, 1)]
    assert not torch.allclose(views[0], views[1])
    drawn = []
    for epoch in (0, 1):
        chosen = np.random.default_rng((3, epoch, 1)).integers(2, size=50)
        drawn.append(chosen)
        for batch, plan in zip(made.loader.epoch(epoch), loader.batch_indices(epoch), strict=True):
            assert np.array_equal(batch.indices, plan)
            expected = torch.stack([views[chosen[i]][i] for i in batch.indices])
            torch.testing.assert_close(batch.inputs, expected)
    assert set(drawn[0]) == {0, 1}
    assert not np.array_equal(*drawn)


def test_views_of_sequences_of_different_lengths() -> None:
    prefix, loader = ragged(NoisyRagged, seed=3, training=True)
    cache = FeatureCache(PLENTY)
    entries = [entry_of(cache, prefix, loader, view) for view in (0, 1)]
    chosen = np.random.default_rng((3, 0, 1)).integers(2, size=len(loader.split))
    for batch in CachedLoader(loader, entries).epoch(0):
        values, mask = batch.inputs
        for row, index in enumerate(batch.indices):
            expected = entries[chosen[index]].take(np.array([index]))[0][0]
            assert torch.equal(values[row][mask[row]], expected)


def test_additional_views_reuse_existing_entries(
    config: dict[str, Any], tmp_path: Path, prefix_runs: list[str]
) -> None:
    overrides = ["backbone={name: noisy}", FREEZE_FIRST, "train.phases.0.epochs=3"]
    transfer.run(config, [*overrides, "train.views=2"], output=tmp_path)
    assert len(prefix_runs) == 4  # two views, validation, test
    del prefix_runs[:]
    run = transfer.run(config, [*overrides, "train.views=3"], output=tmp_path)
    assert len(prefix_runs) == 1
    assert run.summary["cache"][0]["views"] == 3
    assert run.summary["cache"][1]["views"] is None


def test_short_phase_caches_no_more_views_than_epochs(
    config: dict[str, Any], tmp_path: Path, prefix_runs: list[str]
) -> None:
    overrides = ["backbone={name: noisy}", FREEZE_FIRST, "train.views=4", "train.phases.0.epochs=1"]
    run = transfer.run(config, overrides, output=tmp_path)
    assert len(prefix_runs) == 3  # one view, validation, test
    assert run.summary["cache"][0]["views"] == 1


def test_auto_views_are_cached_for_a_frozen_backbone(
    config: dict[str, Any], tmp_path: Path, prefix_runs: list[str]
) -> None:
    overrides = ["backbone={name: noisy}", "train.phases=[{epochs: 5, freeze: backbone}]"]
    notes: list[str] = []
    run = transfer.run(
        config, overrides, output=tmp_path, observe=lambda event: notes.append(getattr(event, "text", ""))
    )
    assert run.summary["cache"][0]["views"] == AUTO_VIEWS == 4
    assert len(prefix_runs) == 6  # four views, validation, test
    assert any("4 views each" in note for note in notes)


def test_progress_of_computing_features_is_reported(config: dict[str, Any], tmp_path: Path) -> None:
    events: list[Event] = []
    overrides = ["backbone={name: noisy}", FREEZE_FIRST, "train.views=2"]
    transfer.run(config, overrides, output=tmp_path, observe=events.append)
    steps = [(e.split, e.step, e.steps) for e in events if isinstance(e, CachingStep)]
    assert [split for split, _, _ in steps] == sorted((split for split, _, _ in steps), key=SPLITS.index)
    for split in SPLITS:
        numbers = [step for name, step, _ in steps if name == split]
        (total,) = {steps_of_split for name, _, steps_of_split in steps if name == split}
        assert numbers == list(range(1, total + 1))
    events.clear()
    run = transfer.run(config, overrides, output=tmp_path, observe=events.append)
    assert not any(isinstance(event, CachingStep) for event in events)
    transfer.evaluate(run.folder, "train", observe=events.append)
    assert {event.split for event in events if isinstance(event, CachingStep)} == {"train"}


def test_random_augmentation_without_views_is_not_cached(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, ["backbone={name: noisy}", FREEZE_FIRST], output=tmp_path)
    train, validation, test = run.summary["cache"]
    assert train["cached"] is False
    assert "train.views" in train["why"]
    assert validation["cached"]
    assert test["cached"]


def test_mixed_training_examples_are_not_cached(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, [FREEZE_FIRST, "train.mix={mixup: 0.4}"], output=tmp_path)
    train, validation, _ = run.summary["cache"]
    assert train == {"phase": 1, "split": "train", "cached": False, "why": "train.mix mixes examples at the input"}
    assert validation["cached"]


def test_reason_mentions_batch_norm_only_if_present(config: dict[str, Any], tmp_path: Path) -> None:
    phases = "train.phases=[{epochs: 1}]"
    for overrides, expected in (
        ([], "no leading stage is fully frozen (including batch-norm statistics) and worth caching"),
        (["backbone={name: pair}"], "no leading stage is fully frozen and worth caching"),
    ):
        run = transfer.run(config, [*overrides, phases], output=tmp_path)
        assert {report["why"] for report in run.summary["cache"]} == {expected}


def test_disabled_cache_writes_nothing(
    config: dict[str, Any], tmp_path: Path, cache_folder: Path, prefix_runs: list[str]
) -> None:
    run = transfer.run(config, [FREEZE_FIRST, "train.cache=off"], output=tmp_path)
    assert {report["why"] for report in run.summary["cache"]} == {"train.cache is off"}
    assert not cache_folder.exists()
    assert prefix_runs == []


def test_quick_run_writes_nothing(config: dict[str, Any], tmp_path: Path, cache_folder: Path) -> None:
    run = transfer.run(config, [FREEZE_FIRST], output=tmp_path, quick=True)
    assert all("quick try" in report["why"] for report in run.summary["cache"])
    assert not cache_folder.exists()


# --------------------------------------------------------------------------------------------------------- boundaries

TWO_PHASES = "train.phases=[{epochs: 2, freeze: backbone}, {epochs: 2, freeze: {until: first}}]"


def test_unfreezing_phase_moves_the_boundary(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, [TWO_PHASES], output=tmp_path)
    whole = ["first", "second", "third"]
    found = [(report.get("phase"), report["split"], report["stages"]) for report in run.summary["cache"]]
    assert found == [
        (1, "train", whole),
        (1, "validation", whole),
        (2, "train", ["first"]),
        (2, "validation", ["first"]),
        (None, "test", ["first"]),
    ]


@pytest.mark.parametrize(
    "name", ["points", "sequences of different lengths", "texts by tokens", "images", "two phases"]
)
def test_evaluate_equals_summary_with_and_without_cache(
    config: dict[str, Any], tmp_path: Path, prefix_runs: list[str], name: str
) -> None:
    overrides = RUNS.get(name, [TWO_PHASES, "train.batch_size=7"])
    run = transfer.run(config, overrides, output=tmp_path)
    assert run.summary["cache"][-1]["cached"]
    del prefix_runs[:]
    assert transfer.evaluate(run.folder) == run.summary["test"]
    assert prefix_runs == []
    FeatureCache(PLENTY).clear()
    assert transfer.evaluate(run.folder) == run.summary["test"]
    assert len(prefix_runs) == 1


# ------------------------------------------------------------------------------------------------------------- verify


def alter(entry: Entry, change: Callable[[Any], Any] = lambda values: values + np.float32(0.01)) -> None:
    """Change the content of an entry, and its digest too."""
    file = entry.folder / "0.bin"
    content = change(np.fromfile(file, dtype=np.float32))
    content.tofile(file)
    described = json.loads((entry.folder / "entry.json").read_text(encoding="utf-8"))
    described["sha256"]["0.bin"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (entry.folder / "entry.json").write_text(json.dumps(described), encoding="utf-8")


@pytest.mark.parametrize("made", [small, ragged])
def test_verify_accepts_equal_and_refuses_altered_features(
    made: Callable[[], tuple[FrozenPrefix, Loader]],
) -> None:
    prefix, loader = made()
    strict = FeatureCache(PLENTY, verify=True)
    entry = entry_of(strict, prefix, loader)
    entry_of(strict, prefix, loader)
    alter(entry)
    entry_of(FeatureCache(PLENTY), prefix, loader)
    with pytest.raises(TrainingError, match="cached features differ") as caught:
        strict.load_or_compute(prefix, loader)
    assert caught.value.problems[0].where == str(entry.folder)


def test_verify_compares_bits_on_the_cpu() -> None:
    prefix, loader = small()
    entry = entry_of(FeatureCache(PLENTY), prefix, loader)
    alter(entry, lambda values: np.nextafter(values, np.float32(np.inf)))
    with pytest.raises(TrainingError, match="cached features differ"):
        FeatureCache(PLENTY, verify=True).load_or_compute(prefix, loader)


def test_verify_refuses_random_stage() -> None:
    class Random(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs + torch.rand_like(inputs)

    prefix, loader = small()
    prefix.model.second = Random()
    with pytest.raises(TrainingError, match="not deterministic"):
        FeatureCache(PLENTY, verify=True).load_or_compute(prefix, loader)


def test_run_with_verify_refuses_altered_entry(config: dict[str, Any], tmp_path: Path) -> None:
    transfer.run(config, [FREEZE_FIRST], output=tmp_path)
    for listed in FeatureCache(PLENTY).entries():
        alter(Entry(store.cache_folder("features") / listed["key"], (), np.array([]), None, is_tuple=False))
    with pytest.raises(TrainingError, match="cached features differ"):
        transfer.run(config, [FREEZE_FIRST, "train.cache=verify"], output=tmp_path)


# ------------------------------------------------------------------------------------------------------ damage, crashes


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def garble(path: Path) -> None:
    path.write_text('{"sha256": {}, "kinds": 3}', encoding="utf-8")


DAMAGE = [
    (truncate, "0.bin"),
    (flip, "0.bin"),
    (Path.unlink, "0.bin"),
    (flip, "order.npy"),
    (Path.unlink, "order.npy"),
    (flip, "lengths.npy"),
    (truncate, "entry.json"),
    (garble, "entry.json"),
    (Path.unlink, "entry.json"),
]


@pytest.mark.parametrize(("damage", "name"), DAMAGE)
def test_damaged_entry_is_computed_again(
    damage: Callable[[Path], None], name: str, prefix_runs: list[str], cache_folder: Path
) -> None:
    prefix, loader = ragged()
    cache = FeatureCache(PLENTY)
    good = entry_of(cache, prefix, loader)
    indices = np.arange(10)
    expected = good.take(indices)[0].clone()
    damage(good.folder / name)
    again = entry_of(cache, prefix, loader)
    assert torch.equal(again.take(indices)[0], expected)
    assert len(prefix_runs) == 2
    entry_of(cache, prefix, loader)
    assert len(prefix_runs) == 2
    assert list(cache_folder.iterdir()) == [good.folder]


@pytest.mark.parametrize("damage", [truncate, garble, Path.unlink])
def test_damaged_entry_of_another_key_is_ignored(damage: Callable[[Path], None]) -> None:
    cache = FeatureCache(PLENTY)
    damage(entry_of(cache, *small(1)).folder / "entry.json")
    entry = entry_of(cache, *small(2))
    assert [listed["key"] for listed in cache.entries()] == [entry.folder.name]


class _Crash(Exception):
    pass


def test_exception_while_writing_leaves_no_entry(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    def crash(*_: Any) -> None:
        raise _Crash

    prefix, loader = small()
    with monkeypatch.context() as patch:
        patch.setattr(entry_writer.np, "save", crash)
        with pytest.raises(_Crash):
            FeatureCache(PLENTY).load_or_compute(prefix, loader)
    assert list(cache_folder.iterdir()) == []
    entry_of(FeatureCache(PLENTY), prefix, loader)


SCRIPT = """
import sys
from pathlib import Path
from test_feature_cache import PLENTY, Entry, FeatureCache, ragged
from transfer.feature_cache import entry_writer, store
{body}
entry = FeatureCache(PLENTY, folder=Path(sys.argv[1])).load_or_compute(*ragged())
assert isinstance(entry, Entry), entry
print(float(entry.take(__import__("numpy").arange(20))[0].sum()))
"""


def start_writer(forked_python: ForkedPython, folder: Path, log: Path, body: str = "") -> int:
    """Start a process that writes an entry, and return its ID. It prints a sum of the entry to ``log``."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = ["-c", SCRIPT.format(body=body), str(folder)]
    return forked_python.fork(arguments, HERE, {**os.environ, "PYTHONPATH": path}, streams=(os.devnull, log, log))


def test_killed_writer_leaves_no_entry(tmp_path: Path, forked_python: ForkedPython) -> None:
    folder = tmp_path / "shared"
    kill = "import os, signal; entry_writer.np.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    log = tmp_path / "log"
    assert forked_python.wait(start_writer(forked_python, folder, log, kill)) == -signal.SIGKILL, log.read_text()
    (left,) = folder.iterdir()
    assert (left / "0.bin").stat().st_size > 0
    cache = FeatureCache(PLENTY, folder=folder)
    assert cache.entries() == []
    prefix, loader = ragged()
    entry = entry_of(cache, prefix, loader)
    assert entry.folder in folder.iterdir()
    assert left in folder.iterdir()  # it may belong to a run that is writing
    long_ago = time.time() - STALE_SECONDS - 1
    for path in (*left.iterdir(), left):
        os.utime(path, (long_ago, long_ago))
    other = entry_of(cache, *small())
    assert sorted(folder.iterdir()) == sorted([entry.folder, other.folder])


def test_two_processes_write_the_same_entry(tmp_path: Path, forked_python: ForkedPython) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    # Each waits with its renaming until the other has everything written too.
    meet = """
import time
def write(folder, *rest, original=store.write_entry):
    described = original(folder, *rest)
    (folder.parent / f"ready-{folder.name}").touch()
    deadline = time.time() + 60
    while len(list(folder.parent.glob("ready-*"))) < 2 and time.time() < deadline:
        time.sleep(0.01)
    return described
store.write_entry = write
"""
    logs = [tmp_path / "first", tmp_path / "second"]
    processes = [start_writer(forked_python, folder, log, meet) for log in logs]
    statuses = [forked_python.wait(process) for process in processes]
    answers = [log.read_text() for log in logs]
    assert statuses == [0, 0], answers
    assert len(list(folder.glob("ready-*"))) == 2
    assert answers[0] == answers[1]
    (entry,) = (path for path in folder.iterdir() if path.is_dir())
    assert entry.name == ragged()[0].key(ragged()[1], None)


def test_entry_dropped_by_another_process_stays_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, loader = small()
    monkeypatch.setattr(DirectoryCache, "_evict", lambda self, keep: shutil.rmtree(self.folder / keep))
    entry = entry_of(FeatureCache(PLENTY), prefix, loader)
    assert not entry.folder.exists()
    indices = np.arange(5)
    torch.testing.assert_close(entry.take(indices), direct(prefix, loader, indices))


# ----------------------------------------------------------------------------------------------------------- the limit


def test_least_recently_used_entry_is_evicted_first() -> None:
    cache = FeatureCache(PLENTY)
    first, second = (entry_of(cache, *small(seed)) for seed in (1, 2))
    for entry, seconds in ((first, 200), (second, 100)):
        when = time.time() - seconds
        os.utime(entry.folder, (when, when))
    entry_of(cache, *small(1))  # used again: the second is now the older one
    assert [listed["key"] for listed in cache.entries()] == [first.folder.name, second.folder.name]
    size = sum(listed["bytes"] for listed in cache.entries()) // 2
    third = entry_of(FeatureCache(int(2.5 * size)), *small(3))
    assert {listed["key"] for listed in cache.entries()} == {first.folder.name, third.folder.name}
    # A process that has mapped the dropped entry can still use it.
    torch.testing.assert_close(second.take(np.arange(5)), direct(*small(2), np.arange(5)))


def test_new_entry_is_not_evicted() -> None:
    cache = FeatureCache(PLENTY)
    entry_of(cache, *small(1))
    features = 50 * 8 * 4
    last = entry_of(FeatureCache(features), *small(2))  # with its index it is more than that
    (listed,) = cache.entries()
    assert listed["key"] == last.folder.name
    assert listed["bytes"] > features


def test_features_beyond_the_limit_are_not_cached(config: dict[str, Any], tmp_path: Path, cache_folder: Path) -> None:
    run = transfer.run(config, [FREEZE_FIRST, "train.cache_limit_gib=1.0e-7"], output=tmp_path)
    assert run.summary["status"] == "complete"
    for report in run.summary["cache"]:
        assert report["why"].startswith("the features need about ")
        assert report["why"].endswith("GiB, and train.cache_limit_gib allows 1e-07")
    assert list(cache_folder.iterdir()) == []


def test_views_beyond_the_common_limit_are_not_cached() -> None:
    prefix, _ = small(count=1)
    loader = Loader(points(), ("point",), NoisyPoints(), batch_size=8, seed=3, training=True)
    size = sum(tensor.nbytes for tensor in entry_of(FeatureCache(PLENTY), prefix, loader, view=0).tensors)
    made = select_stage_inputs(FeatureCache(2 * size), prefix, loader, views=3, mixed=False)
    assert made.report["why"].startswith("the features need about")
    assert not FeatureCache(PLENTY).entries()[1:]  # the one above: nothing was written to be dropped again
    assert select_stage_inputs(FeatureCache(PLENTY), prefix, loader, views=3, mixed=False).report["cached"]


def test_long_first_examples_do_not_exceed_the_limit() -> None:
    prefix, loader = ragged()
    size = sum(file.stat().st_size for file in entry_of(FeatureCache(PLENTY), prefix, loader).folder.glob("*.bin"))
    FeatureCache(PLENTY).clear()
    assert isinstance(FeatureCache(size).load_or_compute(prefix, loader), Entry)
    FeatureCache(PLENTY).clear()
    reason = FeatureCache(size - 1).load_or_compute(prefix, loader)
    assert isinstance(reason, str)
    assert reason.startswith("the features need more than ")


def test_unwritable_folder_does_not_stop_a_run(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "file" / "cache"))
    run = transfer.run(config, [FREEZE_FIRST], output=tmp_path)
    assert run.summary["status"] == "complete"
    assert all("cannot be written" in report["why"] for report in run.summary["cache"])


def test_clear_removes_only_entries_and_temporary_folders(cache_folder: Path) -> None:
    cache = FeatureCache(PLENTY)
    entries = [entry_of(cache, *small(seed)) for seed in (1, 2)]
    remains = cache_folder / f".{'a' * 40}.{'b' * 32}"
    remains.mkdir()
    (remains / "0.bin").write_bytes(b"12345")
    size = sum(listed["bytes"] for listed in cache.entries()) + 5
    mine = [cache_folder / ".ssh", cache_folder / "photos"]
    for folder in mine:
        folder.mkdir()
        (folder / "entry.json").write_text("{}", encoding="utf-8")
        os.utime(folder / "entry.json", (0, 0))
    (cache_folder / "notes.txt").touch()
    entry_of(cache, *small(1))
    assert len(cache.entries()) == 2
    assert cache.clear() == size
    assert sorted(cache_folder.iterdir()) == sorted([*mine, cache_folder / "notes.txt"])
    assert not any(entry.folder.exists() for entry in entries)
    assert cache.clear() == 0


def test_other_folders_are_neither_swept_nor_evicted(cache_folder: Path) -> None:
    hidden = cache_folder / ".config"
    hidden.mkdir(parents=True)
    (hidden / "entry.json").write_text("{}", encoding="utf-8")
    os.utime(hidden / "entry.json", (0, 0))
    os.utime(hidden, (0, 0))
    entry_of(FeatureCache(50 * 8 * 4), *small())
    assert hidden.exists()


def test_missing_folder_is_an_empty_cache(tmp_path: Path) -> None:
    cache = FeatureCache(PLENTY, folder=tmp_path / "nothing")
    assert (cache.entries(), cache.clear()) == ([], 0)
    assert not (tmp_path / "nothing").exists()
