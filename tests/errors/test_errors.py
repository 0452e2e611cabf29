"""Errors and their problems."""

from __future__ import annotations

import pickle

import pytest

import transfer
from transfer.errors import Problem, RunError, damaged, nearest, unknown_name

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
def test_error_survives_pickling(cls: type[transfer.TransferError]) -> None:
    error = cls.of([Problem("a", "file:1", ("x", "y"), "do this"), Problem("b")])
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert back.problems == error.problems
    assert str(back) == str(error)


def test_error_contains_several_problems() -> None:
    error = transfer.ConfigError.of([Problem("first"), Problem("second")])
    assert isinstance(error, transfer.ConfigError)
    assert [p.message for p in error.problems] == ["first", "second"]
    assert str(error) == "first\nsecond"


def test_error_text_contains_location_alternatives_and_fix() -> None:
    error = transfer.DataError("no such class", where="data.csv:7", available=["a", "b"], fix="rename it")
    assert str(error) == "data.csv:7: no such class\n  available: a, b\n  fix: rename it"


@pytest.mark.parametrize(("name", "match"), [("linaer", "linear"), ("LINEAR", "linear"), ("resnet", None), ("", None)])
def test_nearest(name: str, match: str | None) -> None:
    assert nearest(name, ["linear", "mlp"]) == match


def test_unknown_name_suggests_the_nearest() -> None:
    problem = unknown_name("head", "linaer", ["mlp", "linear"], where="a.yaml:3", fix="install it")
    assert problem == Problem("unknown head 'linaer'", "a.yaml:3", ("linear", "mlp"), "did you mean 'linear'?")


def test_unknown_name_without_similar_one_shows_fix() -> None:
    assert unknown_name("head", "resnet", ["linear"], fix="install it").fix == "install it"
    assert unknown_name("head", "resnet", ["linear"]).fix is None


def test_unknown_name_of_an_owner() -> None:
    assert unknown_name("option", "size", [], owner="head 'mlp'").message == "unknown option 'size' of head 'mlp'"


def test_damaged_content_becomes_a_run_error() -> None:
    with (
        pytest.raises(RunError, match="the file cannot be read: KeyError: 'a'") as caught,
        damaged("the file cannot be read", "run", "restore it"),
    ):
        raise KeyError("a")
    assert (caught.value.problems[0].where, caught.value.problems[0].fix) == ("run", "restore it")
    with pytest.raises(transfer.DataError, match="kept"), damaged("the file cannot be read", "run", "restore it"):
        raise transfer.DataError("kept")


def test_public_names_can_be_imported() -> None:
    for name in transfer.__all__:
        assert getattr(transfer, name) is not None
    assert set(dir(transfer)) == set(transfer.__all__)
    with pytest.raises(AttributeError):
        transfer.nothing  # noqa: B018
