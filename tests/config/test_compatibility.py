"""Which parts fit together."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from conftest import Dense, Points

from transfer import DataSpec, FeatureSpec, Head, register
from transfer.config.compatibility import Table, compatibility_tables


@pytest.fixture(scope="module")
def built_in() -> dict[str, Table]:
    tables, _ = compatibility_tables()
    return {table.title.split()[-1]: table for table in tables}


def cells(tables: list[Table], row: str, column: str) -> list[str]:
    return [table.cells[row][column] for table in tables if row in table.rows and column in table.columns]


def test_backbones_and_heads_agree_by_layout(built_in: dict[str, Table]) -> None:
    fits = built_in["features"].cells
    assert (fits["textcnn"]["linear"], fits["textcnn"]["attention"]) == ("yes", "")
    assert fits["resnet18"]["mlp"] == "yes"


def test_an_option_that_makes_two_fit_is_named(built_in: dict[str, Table]) -> None:
    assert built_in["features"].cells["bilstm"]["attention"] == "readout: sequence"
    assert built_in["target"].cells["text_csv"]["regression"] == "target: number"


def test_datasets_and_backbones_agree_by_field(built_in: dict[str, Table]) -> None:
    fits = built_in["fields"].cells
    assert (fits["imdb"]["textcnn"], fits["imdb"]["resnet18"], fits["hotdog"]["resnet18"]) == ("yes", "", "yes")


def test_datasets_and_tasks_agree_by_target(built_in: dict[str, Table]) -> None:
    fits = built_in["target"].cells
    assert (fits["imdb"]["classification"], fits["imdb"]["regression"]) == ("yes", "")


def test_a_plugin_whose_declaration_depends_on_an_option_says_so() -> None:
    messages = {str(problem.where): problem.message for problem in compatibility_tables()[1]}
    assert messages["backbone 'torchvision'"] == "the declaration depends on option 'model'"
    assert messages["backbone 'fusion'"] == "the declaration depends on option 'parts'"


@pytest.mark.usefixtures("tiny")
def test_what_is_registered_here_is_in_it() -> None:
    tables, _ = compatibility_tables()
    assert cells(tables, "points", "dense") == ["yes"]
    assert cells(tables, "points", "regression") == ["target: number"]
    assert cells(tables, "steps", "mean_of_steps") == ["yes"]
    assert cells(tables, "steps", "linear") == [""]


def test_what_cannot_be_built_is_named_and_hides_nothing() -> None:
    class Needy(Points):
        """It needs a number that nobody can guess."""

        def __init__(self, *, size: int) -> None:
            super().__init__()

    class Crashing(Dense):
        """It crashes."""

        @property
        def features(self) -> FeatureSpec:
            raise RuntimeError("no such device")

    register("dataset", "needy")(Needy)
    register("backbone", "crashing")(Crashing)
    tables, problems = compatibility_tables()
    messages = [str(problem.message) for problem in problems]
    assert "the declaration depends on option 'size'" in messages
    # The backbones of fusion cannot be filled in with a placeholder.
    assert "the declaration depends on option 'parts'" in messages
    assert "backbone 'crashing' cannot be built: RuntimeError: no such device" in messages
    assert cells(tables, "imdb", "textcnn") == ["yes"]


def test_a_variant_that_is_refused_is_no_problem() -> None:
    class Choosy(Points):
        """Two of three are refused."""

        def __init__(self, *, mode: Literal["a", "b", "c"] = "a") -> None:
            if mode == "b":
                raise ValueError("b wants more")
            super().__init__(target="number" if mode == "c" else "class")

        @property
        def spec(self) -> DataSpec:
            return super().spec

    class Anything(Head):
        """Takes both layouts."""

        layouts: Any = frozenset({"vector", "sequence"})

    register("dataset", "choosy")(Choosy)
    register("head", "anything")(Anything)
    tables, problems = compatibility_tables()
    assert not any("choosy" in str(problem) for problem in problems)
    assert cells(tables, "choosy", "regression") == ["mode: c"]
    assert cells(tables, "textcnn", "anything") == cells(tables, "bilstm", "anything") == ["yes"]
