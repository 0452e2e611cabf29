"""Evaluations of a run on other data: the data that an argument names, and the results in the run directory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transfer.config.check import load_config
from transfer.config.option_schema import has_option
from transfer.config.run_config import RunConfig
from transfer.config.yaml_document import make_document
from transfer.errors import ConfigError, RunError, UserError, unknown_name
from transfer.interfaces import SPLITS, Data, Split
from transfer.storage.predictions import Predictions, read_predictions, write_predictions
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import read_json, write_json
from transfer.system.file_schema import FileSchema, checked

EVALUATIONS = "evaluations"
"""Folder of a run with a JSON file of the results on each dataset, and a file of the predictions."""
_OWN_SPLITS = {"val": None, "test": None, "split": None, "test_fraction": 0.0}
"""Options that would divide a table, or name further ones."""
_COLUMNS = ("text", "label", "target", "separator", "label_names")
"""Options that a dataset of the Hub and a table have in common."""


class Evaluation(FileSchema):
    """Results of a model on a dataset that it was not trained on, as in ``evaluations/NAME.json``.

    Args:
        name: Name of the dataset.
        data: Data block of the dataset.
        split: Split of the dataset that was scored.
        examples: Number of examples.
        digest: Digest of the examples; scores on the same ones can be compared.
        missing: Classes of the model without an example.
        metrics: Loss and metrics.
    """

    name: str
    data: dict[str, Any]
    split: str
    examples: int
    digest: str
    missing: list[str] = []
    metrics: dict[str, float]


def config_on(
    plain: Mapping[str, Any], on: str | Path | Mapping[str, Any], fields: Sequence[str], overrides: Sequence[str]
) -> RunConfig:
    """Return the config of a run with other data.

    Args:
        plain: Config of the run.
        on: Path of a table or folder, or the data block of a config: a mapping, or its YAML.
        fields: Fields that the backbone takes as input.
        overrides: Changes to the data block, each ``data.key=value``.

    Raises:
        UserError: The data does not exist, or the block or an override is wrong.
    """
    if other := [text for text in overrides if not text.startswith("data.")]:
        raise ConfigError(f"the override {other[0]!r} is invalid here: expected data.key=value")
    block = dict(on) if isinstance(on, Mapping) else _data_block(plain, on, fields)
    # The data is scored as it is: it is neither limited nor divided.
    return load_config({**plain, "data": block.get("data", block)}, overrides)


def _data_block(plain: Mapping[str, Any], on: str | Path, fields: Sequence[str]) -> dict[str, Any]:
    """Return the data block of an argument."""
    path = Path(on).expanduser()
    if path.is_dir():
        return {"name": f"{fields[0]}_folder", "root": str(path), "test_fraction": 0.0}
    if path.is_file():
        trained = load_config(plain).data
        is_table = has_option(trained.cls, "train") and has_option(trained.cls, "label")
        if is_table and not has_option(trained.cls, "dataset"):
            # The columns are those of the training table.
            own = {name: value for name, value in _OWN_SPLITS.items() if has_option(trained.cls, name)}
            return {**plain["data"], "train": str(path), "limit": None, **own}
        columns = {name: trained.resolved[name] for name in _COLUMNS if is_table and name in trained.resolved}
        return {"name": f"{fields[0]}_csv", "train": str(path), **columns}
    text = str(on).removeprefix("data:").strip()
    if text.startswith("{"):
        block: dict[str, Any] = make_document({}, [f"data={text}"]).data["data"]
        return block
    raise UserError(
        "there is no such data: expected a table, a folder, or the data block of a config",
        where=str(on),
        fix="check the path, or write --on 'data: {name: text_csv, train: new.csv}', for example",
    )


def select_split(data: Data, split: str | None, where: str) -> tuple[str, Split]:
    """Return the split of a dataset to score, with its name.

    Args:
        data: Data with the splits of the dataset.
        split: Name of the split; None selects ``test``, otherwise ``validation``, otherwise the only split.
        where: Location of the data, for errors.

    Raises:
        UserError: The dataset has no such split, or the split is empty.
    """
    if split is not None and split not in data.splits:
        raise UserError.of([unknown_name("split", split, data.splits, where=where)])
    name = split or next(name for name in reversed(SPLITS) if name in data.splits)
    if not len(data.splits[name]):
        raise UserError(f"the {name} split is empty: expected at least one example", where=where)
    return name, data.splits[name]


def evaluation_name(directory: RunDirectory, on: str | Path | Mapping[str, Any], block: Mapping[str, Any]) -> str:
    """Return the name of a dataset in the run: that of its file or folder, with a number if it is another one's."""
    is_path = not isinstance(on, Mapping) and not str(on).removeprefix("data:").strip().startswith("{")
    root = Path(str(on)).resolve().name if is_path else Path(str(block.get("root") or block.get("train") or "")).name
    stem = re.sub(r"\.(csv|tsv|jsonl?|ndjson|parquet|gz|bz2|xz|zip)\b", "", root) or str(block["name"])
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_") or "data"
    names = {evaluation.name: evaluation.data for evaluation in read_evaluations(directory)}
    number, name = 1, stem
    while name in names and names[name] != block:
        number += 1
        name = f"{stem}-{number}"
    return name


def write_evaluation(directory: RunDirectory, evaluation: Evaluation, scored: Predictions) -> None:
    """Write the results of a dataset into the run directory, in place of older ones."""
    folder = directory.path / EVALUATIONS
    folder.mkdir(exist_ok=True)
    write_predictions(folder / f"{evaluation.name}.safetensors", scored)
    write_json(folder / f"{evaluation.name}.json", evaluation.model_dump(mode="json"))


def read_evaluations(directory: RunDirectory) -> list[Evaluation]:
    """Return the results of a run on other data, by name.

    Raises:
        RunError: A file is damaged.
    """
    files = sorted((directory.path / EVALUATIONS).glob("[!.]*.json"), key=lambda file: file.stem)
    return [checked(read_json(file, "there is no evaluation"), Evaluation, str(file)) for file in files]


def read_evaluation(directory: RunDirectory, name: str) -> tuple[Evaluation, Predictions]:
    """Return the results of a run on a dataset, and its predictions.

    Raises:
        RunError: The run was not evaluated on such a dataset, or a file is damaged.
    """
    evaluations = {evaluation.name: evaluation for evaluation in read_evaluations(directory)}
    if name not in evaluations:
        fix = f"evaluate the run first: transfer evaluate {directory.path} --on DATA"
        where = str(directory.path)
        raise RunError.of([unknown_name("evaluation", name, evaluations, where=where, fix=fix)])
    path = directory.path / EVALUATIONS / f"{name}.safetensors"
    if (predictions := read_predictions(path)) is None:
        raise RunError("the predictions are missing", where=str(path), fix="evaluate the run again")
    return evaluations[name], predictions
