"""What a user is told."""

from __future__ import annotations

import pickle

import pytest

import transfer
from transfer.errors import Problem, nearest

CLASSES = {
    transfer.TransferError: 1,
    transfer.TrainingError: 1,
    transfer.UserError: 2,
    transfer.ConfigError: 2,
    transfer.PluginError: 2,
    transfer.DataError: 2,
    transfer.WeightsError: 2,
    transfer.RunError: 2,
}


@pytest.mark.parametrize(("cls", "status"), CLASSES.items())
def test_exit_status(cls: type[transfer.TransferError], status: int) -> None:
    assert cls("wrong").exit_status == status


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_pickling(cls: type[transfer.TransferError]) -> None:
    error = cls.of([Problem("a", "file:1", ("x", "y"), "do this"), Problem("b")])
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert back.problems == error.problems
    assert str(back) == str(error)


def test_one_error_holds_several_problems() -> None:
    error = transfer.ConfigError.of([Problem("first"), Problem("second")])
    assert isinstance(error, transfer.ConfigError)
    assert [p.message for p in error.problems] == ["first", "second"]
    assert str(error) == "first\nsecond"


def test_a_problem_says_where_what_exists_and_the_fix() -> None:
    error = transfer.DataError("no such class", where="data.csv:7", available=["a", "b"], fix="rename it")
    assert str(error) == "data.csv:7: no such class\n  available: a, b\n  fix: rename it"


@pytest.mark.parametrize(("name", "found"), [("linaer", "linear"), ("LINEAR", "linear"), ("resnet", None), ("", None)])
def test_nearest(name: str, found: str | None) -> None:
    assert nearest(name, ["linear", "mlp"]) == found


def test_public_names_are_there() -> None:
    for name in transfer.__all__:
        assert getattr(transfer, name) is not None
    assert set(dir(transfer)) == set(transfer.__all__)
    with pytest.raises(AttributeError):
        transfer.nothing  # noqa: B018
