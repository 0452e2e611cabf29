"""Vectors of inputs, their files, and the nearest training examples."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import transfer
from transfer import UserError
from transfer.runs.embedding_files import write_embeddings
from transfer.runs.pretrained_predictor import load_run_or_config
from transfer.runs.stage_outputs import pooled

CONFIG = {
    "data": {"name": "points"},
    "backbone": {"name": "dense"},
    "train": {"epochs": 1, "report": False},
}
POINTS = [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0]]
ROWS = [{"input": "a", "line": 1}, {"input": "b", "line": 2, "error": "cannot be read"}, {"input": "c", "line": 3}]
VECTORS = [torch.tensor([1.0, 2.0]), None, torch.tensor([3.0, 4.0])]
COLUMNS = ["input", "line", "error"]


@pytest.fixture
def run(tiny: None, tmp_path: Path) -> transfer.Run:
    return transfer.run(CONFIG, output=tmp_path)


def test_embedding_is_the_input_of_the_head(run: transfer.Run) -> None:
    predictor = transfer.load(run.folder)
    embeddings = predictor.embed(POINTS)
    assert embeddings.dtype == np.float32
    assert np.array_equal(embeddings, predictor.features(POINTS).numpy())
    assert predictor.embed(POINTS, stage="head").shape == (3, 2)
    assert np.array_equal(predictor.embed({"p": POINTS}, column="p"), embeddings)
    for values, message in (([], "there are no values"), ([[1.0]], "a point has 4 numbers"), ([""], "could not conv")):
        with pytest.raises(UserError, match=message):
            predictor.embed(values)
    with pytest.raises(UserError, match="unknown stage 'fourth'"):
        predictor.embed(POINTS, stage="fourth")


def test_embedding_of_a_sequence_is_the_mean_over_its_steps() -> None:
    features = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[7.0, 7.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert pooled((features, mask)).tolist() == [[2.0, 3.0], [0.0, 0.0]]


def test_numpy_file_has_its_rows_beside_it(tmp_path: Path) -> None:
    assert write_embeddings(tmp_path / "e.npy", zip(ROWS, VECTORS, strict=True), COLUMNS) == (3, 2)
    values = np.load(tmp_path / "e.npy")
    assert values[[0, 2]].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert np.isnan(values[1]).all()
    assert (tmp_path / "e.npy.csv").read_text() == "input,line,error\na,1,\nb,2,cannot be read\nc,3,\n"


def test_safetensors_file_has_its_rows_in_its_metadata(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e.safetensors", zip(ROWS, VECTORS, strict=True), COLUMNS)
    with safe_open(tmp_path / "e.safetensors", "np") as file:
        assert file.get_tensor("embedding")[2].tolist() == [3.0, 4.0]
        assert [row["input"] for row in json.loads(file.metadata()["rows"])] == ["a", "b", "c"]


class Arrays:
    """The classes of pyarrow that write vectors, on plain lists."""

    @staticmethod
    def from_arrays(offsets: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        ends = list(offsets[1:])
        return [
            None if start is None else list(values[start : ends[row] if ends[row] is not None else start + 2])
            for row, start in enumerate(offsets[:-1])
        ]


def test_parquet_file_has_a_list_or_null_in_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[dict[str, Any]] = []

    def array(values: Any, type: Any = None, mask: Any = None) -> list[Any]:
        listed = np.asarray(values, dtype=object).tolist()
        return listed if mask is None else [None if gone else value for value, gone in zip(listed, mask, strict=True)]

    arrow, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    members = {"array": array, "string": str, "table": dict, "LargeListArray": Arrays, "parquet": parquet}
    arrow.__dict__.update(members)
    parquet.write_table = lambda table, path: (tables.append(table), Path(path).touch())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    write_embeddings(tmp_path / "e.parquet", zip(ROWS, VECTORS, strict=True), COLUMNS)
    assert tables[0]["embedding"] == [[1.0, 2.0], None, [3.0, 4.0]]
    assert tables[0]["input"] == ["a", "b", "c"]


def test_file_without_a_vector_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 1 inputs has a vector"):
        write_embeddings(tmp_path / "e.npy", [(ROWS[1], None)], COLUMNS)
    with pytest.raises(UserError, match="the column 'embedding' cannot be kept"):
        write_embeddings(tmp_path / "e.npy", [], ["embedding"])
    assert not list(tmp_path.iterdir())


def test_config_gives_the_features_of_its_pretrained_backbone(run: transfer.Run, tmp_path: Path) -> None:
    notes: list[Any] = []
    (tmp_path / "mine.yaml").write_text(json.dumps(CONFIG))
    predictor = load_run_or_config(str(tmp_path / "mine.yaml"), observe=notes.append)
    assert predictor.embed(POINTS).shape == (3, 8)
    assert "the backbone has no pretrained weights" in notes[0].text
    with pytest.raises(UserError, match="unknown stage 'head'"):
        predictor.embed(POINTS, stage="head")
    # With the weights of a run, the features are those of the run.
    config = {**CONFIG, "backbone": {"name": "dense", "weights": str(run.folder)}}
    (tmp_path / "mine.yaml").write_text(json.dumps(config))
    predictor = load_run_or_config(str(tmp_path / "mine.yaml"))
    assert np.array_equal(predictor.embed(POINTS), transfer.load(run.folder).embed(POINTS))


def test_nearest_neighbors_are_training_examples(run: transfer.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    train = transfer.load(run.folder)
    answers = transfer.neighbors(run.folder, POINTS[:2], k=3)
    assert [answer["input"] for answer in answers] == ["input 0", "input 1"]
    distances = [one["distance"] for one in answers[0]["neighbors"]]
    assert distances == sorted(distances)
    # A training example is its own nearest neighbor, also without the feature cache.
    examples = [answer["neighbors"][0]["index"] for answer in answers]
    from transfer.config.check import load_config
    from transfer.training.build import read_data

    config = load_config(run.folder / "config.yaml")
    _, splits = read_data(config)
    values = [splits["train"].column("point")[index] for index in examples]
    for override in ("cache: auto", "cache: off"):
        text = (run.folder / "config.yaml").read_text()
        (run.folder / "config.yaml").write_text(text.replace("cache: auto", override))
        nearest = [answer["neighbors"][0] for answer in transfer.neighbors(run.folder, values, k=1)]
        assert [one["index"] for one in nearest] == examples
        assert all(one["distance"] < 1e-5 for one in nearest)
        assert [one["label"] for one in nearest] == [
            train.classes[splits["train"].targets[index]] for index in examples
        ]


def test_neighbors_without_data_are_refused(run: transfer.Run) -> None:
    with pytest.raises(UserError, match="k is wrong: expected 1 to 108"):
        transfer.neighbors(run.folder, POINTS, k=500)
    with pytest.raises(UserError, match="there are no values"):
        transfer.neighbors(run.folder, [])
    text = (run.folder / "config.yaml").read_text()
    missing = text.replace("name: points", "name: text_csv\n  train: gone.csv").replace("  count: 160\n", "")
    (run.folder / "config.yaml").write_text(missing.replace("  distance: 1.0\n", "").replace("  target: class\n", ""))
    (run.folder / "environment.json").write_text("{}")
    with pytest.raises(UserError, match="the table cannot be read: No such file"):
        transfer.neighbors(run.folder, POINTS)
