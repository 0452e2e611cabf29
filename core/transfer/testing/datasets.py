"""What a dataset promises."""

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
        raise unittest.SkipTest(f"its data is not here: {error}") from None
    require(isinstance(data, Data), f"load returns a {type(data).__name__}, and not a transfer.Data")
    return data  # type: ignore[no-any-return]


def _require_spec(spec: Any) -> None:
    require(isinstance(spec, DataSpec), f"spec is a {type(spec).__name__}, and not a transfer.DataSpec")
    fields = isinstance(spec.fields, tuple) and spec.fields and all(isinstance(name, str) for name in spec.fields)
    require(fields, f"spec.fields is {spec.fields!r}: a tuple of names belongs there")
    require(
        spec.target in get_args(TargetKind),
        f"spec.target is {spec.target!r}: one of {get_args(TargetKind)} belongs there",
    )
    classes = isinstance(spec.classes, tuple) and all(isinstance(name, str) for name in spec.classes)
    require(classes, f"spec.classes is {spec.classes!r:.80}: a tuple of names belongs there")
    require(len(set(spec.classes)) == len(spec.classes), "two classes have one name")


@promise("interfaces.Dataset", "quick")
def the_spec_is_known_without_data(case: Case) -> None:
    """The constructor and ``spec`` read nothing: a config is checked where the data is not."""
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, {"TRANSFER_DATA": empty}):
        dataset: Dataset = case.component().make()
        _require_spec(dataset.spec)
        require(not os.listdir(empty), "the constructor writes into the data folder")


@promise("interfaces.Data", "data")
def what_is_loaded_agrees_with_the_spec(case: Case) -> None:
    """``load`` returns the fields, the target and, where they were known before, the classes that ``spec`` says."""
    spec, found = case.component().make().spec, _loaded(case).spec
    _require_spec(found)
    require((found.fields, found.target) == (spec.fields, spec.target), f"spec says {spec}, and load says {found}")
    require(found.classes, "load returns no classes")
    require(spec.classes in ((), found.classes), f"spec says the classes {spec.classes}, and load {found.classes}")


@promise("interfaces.Split", "data")
def splits_hold_what_they_should(case: Case) -> None:
    """Splits are train and, if any, validation and test, each with every field and targets of the type that fits."""
    data = _loaded(case)
    require("train" in data.splits, f"there is no split 'train' in {', '.join(data.splits)}")
    require(
        set(data.splits) <= set(SPLITS),
        f"splits are {', '.join(data.splits)}: some of {', '.join(SPLITS)} belong there",
    )
    for name, split in data.splits.items():
        require(len(split), f"the {name} split is empty")
        require(
            set(split.fields) == set(data.spec.fields), f"the {name} split has the fields {', '.join(split.fields)}"
        )
        _require_targets(name, split, data.spec)


def _require_targets(name: str, split: Split, spec: DataSpec) -> None:
    targets, count = split.targets, len(spec.classes)
    found = f"targets of the {name} split are {targets.dtype} {targets.shape}"
    if spec.target == "class":
        require(targets.dtype == np.int64 and targets.ndim == 1, f"{found}, where int64 (N,) belongs")
        inside = targets.min() >= 0 and targets.max() < count
        require(inside, f"{found} from {targets.min()} to {targets.max()}, and there are {count} classes")
        return
    good = targets.dtype == np.float32 and targets.shape == (len(split), count)
    require(good, f"{found}, where float32 {(len(split), count)} belongs")
    require(np.isfinite(targets).all(), f"a target of the {name} split is not finite")
    if spec.target == "labels":
        require(np.isin(targets, (0, 1)).all(), f"a target of the {name} split is neither 0 nor 1")


@promise("interfaces.Dataset", "data")
def loading_again_gives_the_same(case: Case) -> None:
    """A second ``load`` gives the same examples in the same order: runs are repeated, and features are stored."""
    one, other = _loaded(case), case.component().make().load()
    require(one.spec == other.spec, f"the first time it is {one.spec}, and the second time {other.spec}")
    for name, split in one.splits.items():
        require(np.array_equal(split.targets, other.splits[name].targets), f"targets of the {name} split differ")
        for column in split.fields:
            equal = split.fingerprint(column) == other.splits[name].fingerprint(column)
            require(equal, f"the field {column!r} of the {name} split differs")


@promise("interfaces.Split", "data")
def splits_survive_pickling(case: Case) -> None:
    """A split's columns can be pickled, for loader processes, and read the same afterwards."""
    for name, split in _loaded(case).splits.items():
        few = split.select(np.arange(min(4, len(split))))
        copy: Split = pickle.loads(pickle.dumps(few))  # noqa: S301  # just pickled here
        for column in few.fields:
            equal = copy.fingerprint(column) == few.fingerprint(column)
            require(equal, f"the field {column!r} of the {name} split differs afterwards")
