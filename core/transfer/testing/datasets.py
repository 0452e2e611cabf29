"""Contracts of datasets."""

from __future__ import annotations

import os
import pickle
import tempfile
import unittest
from functools import lru_cache
from typing import Any, get_args
from unittest import mock

import numpy as np

from transfer.errors import DataError
from transfer.interfaces import SPLITS, Data, Dataset, DataSpec, Split, TargetKind
from transfer.testing.cases import Case, promise, require


@lru_cache(maxsize=1)
def _loaded(case: Case) -> Data:
    try:
        data = case.component().make().load()
    except DataError as error:
        raise unittest.SkipTest(f"its data is missing: {error}") from None
    require(isinstance(data, Data), f"load returns a {type(data).__name__}, not a transfer.Data")
    return data  # type: ignore[no-any-return]


def _require_spec(spec: Any) -> None:
    require(isinstance(spec, DataSpec), f"spec is a {type(spec).__name__}, not a transfer.DataSpec")
    fields = isinstance(spec.fields, tuple) and spec.fields and all(isinstance(name, str) for name in spec.fields)
    require(fields, f"spec.fields is {spec.fields!r}: expected a tuple of names")
    require(
        spec.target in get_args(TargetKind),
        f"spec.target is {spec.target!r}: expected one of {get_args(TargetKind)}",
    )
    classes = isinstance(spec.classes, tuple) and all(isinstance(name, str) for name in spec.classes)
    require(classes, f"spec.classes is {spec.classes!r:.80}: expected a tuple of names")
    require(len(set(spec.classes)) == len(spec.classes), "two classes have the same name")


@promise("interfaces.Dataset", "quick")
def the_spec_is_known_without_data(case: Case) -> None:
    """The constructor and ``spec`` read no data: a config can be checked before the data exists."""
    # An empty data folder: a constructor that reads data fails, and one that writes leaves files.
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, {"TRANSFER_DATA": empty}):
        dataset: Dataset = case.component().make()
        _require_spec(dataset.spec)
        require(not os.listdir(empty), "the constructor writes to the data folder")


@promise("interfaces.Data", "data")
def loaded_data_agrees_with_the_spec(case: Case) -> None:
    """``load`` returns the fields, the target kind and the classes of ``spec``, whose classes may be empty."""
    spec, loaded = case.component().make().spec, _loaded(case).spec
    _require_spec(loaded)
    same = (loaded.fields, loaded.target) == (spec.fields, spec.target)
    require(same, f"spec and load disagree: spec is {spec}, load returns {loaded}")
    require(loaded.classes, "load returns no classes")
    require(spec.classes in ((), loaded.classes), f"spec has the classes {spec.classes}, load returns {loaded.classes}")


@promise("interfaces.Split", "data")
def splits_are_complete_and_have_typed_targets(case: Case) -> None:
    """The splits are train and optionally validation and test, with every field and targets of the right type."""
    data = _loaded(case)
    require("train" in data.splits, f"there is no split 'train': got {', '.join(data.splits)}")
    require(
        set(data.splits) <= set(SPLITS),
        f"the splits are {', '.join(data.splits)}: expected some of {', '.join(SPLITS)}",
    )
    for name, split in data.splits.items():
        require(len(split), f"the {name} split is empty")
        require(
            set(split.fields) == set(data.spec.fields), f"the {name} split has the fields {', '.join(split.fields)}"
        )
        _require_targets(name, split, data.spec)


def _require_targets(name: str, split: Split, spec: DataSpec) -> None:
    targets, count = split.targets, len(spec.classes)
    described = f"targets of the {name} split are {targets.dtype} {targets.shape}"
    if spec.target == "class":
        require(targets.dtype == np.int64 and targets.ndim == 1, f"{described}: expected int64 (N,)")
        inside = targets.min() >= 0 and targets.max() < count
        require(inside, f"{described} from {targets.min()} to {targets.max()}: expected 0 to {count - 1}")
        return
    good = targets.dtype == np.float32 and targets.shape == (len(split), count)
    require(good, f"{described}: expected float32 {(len(split), count)}")
    require(np.isfinite(targets).all(), f"a target of the {name} split is not finite")
    if spec.target == "labels":
        require(np.isin(targets, (0, 1)).all(), f"a target of the {name} split is neither 0 nor 1")


@promise("interfaces.Dataset", "data")
def loading_is_deterministic(case: Case) -> None:
    """A second ``load`` returns the same examples in the same order, so that runs and cached features can be reused."""
    one, other = _loaded(case), case.component().make().load()
    require(one.spec == other.spec, f"two calls of load return different specs: {one.spec}, then {other.spec}")
    for name, split in one.splits.items():
        require(np.array_equal(split.targets, other.splits[name].targets), f"targets of the {name} split differ")
        for column in split.fields:
            equal = split.fingerprint(column) == other.splits[name].fingerprint(column)
            require(equal, f"the field {column!r} of the {name} split differs in the second call")


@promise("interfaces.Split", "data")
def splits_survive_pickling(case: Case) -> None:
    """The columns of a split can be pickled, for loader processes, without a change."""
    for name, split in _loaded(case).splits.items():
        # Four examples are enough, and data may be large.
        few = split.select(np.arange(min(4, len(split))))
        copy: Split = pickle.loads(pickle.dumps(few))  # noqa: S301  # just pickled here
        for column in few.fields:
            equal = copy.fingerprint(column) == few.fingerprint(column)
            require(equal, f"the field {column!r} of the {name} split differs after pickling")
