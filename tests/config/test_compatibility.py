"""Compatibility of plugins."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from conftest import Dense, Points

from transfer import DataSpec, FeatureSpec, Head, register
from transfer.config.compatibility import Table, compatibility_tables
from transfer.errors import Problem
from transfer.registry import entry_points


@pytest.fixture(scope="module")
def built_in_tables() -> tuple[list[Table], list[Problem]]:
    """Return the tables and problems of all built-in plugins, which take seconds to build."""
    return compatibility_tables()


@pytest.fixture
def built_in(built_in_tables: tuple[list[Table], list[Problem]]) -> dict[str, Table]:
    return {table.title.split()[-1]: table for table in built_in_tables[0]}


@pytest.fixture
def without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the backbones for images, which take seconds to build."""
    listed = entry_points.plugins

    def plugins(kind: str | None = None) -> list[entry_points.Plugin]:
        return [p for p in listed(kind) if p.kind != "backbone" or not p.target.startswith("transfer_vision")]

    monkeypatch.setattr(entry_points, "plugins", plugins)


def cells(tables: list[Table], row: str, column: str) -> list[str]:
    return [table.cells[row][column] for table in tables if column in table.cells.get(row, {})]


def test_backbones_and_heads_are_compatible_by_layout(built_in: dict[str, Table]) -> None:
    cells = built_in["features"].cells
    assert (cells["textcnn"]["linear"], cells["textcnn"]["attention"]) == ("yes", "")
    assert cells["resnet18"]["mlp"] == "yes"


def test_option_that_makes_plugins_compatible_is_named(built_in: dict[str, Table]) -> None:
    assert built_in["features"].cells["bilstm"]["attention"] == "readout: sequence"
    assert built_in["target"].cells["text_csv"]["regression"] == "target: number"


def test_datasets_and_backbones_are_compatible_by_field(built_in: dict[str, Table]) -> None:
    cells = built_in["fields"].cells
    assert (cells["imdb"]["textcnn"], cells["imdb"]["resnet18"], cells["hotdog"]["resnet18"]) == ("yes", "", "yes")


def test_datasets_and_tasks_are_compatible_by_target(built_in: dict[str, Table]) -> None:
    cells = built_in["target"].cells
    assert (cells["imdb"]["classification"], cells["imdb"]["regression"]) == ("yes", "")


def test_declaration_that_depends_on_option_is_reported(
    built_in_tables: tuple[list[Table], list[Problem]],
) -> None:
    messages = {str(problem.where): problem.message for problem in built_in_tables[1]}
    assert messages["backbone 'torchvision'"] == "the declaration depends on option 'model'"
    assert messages["backbone 'fusion'"] == "the declaration depends on option 'parts'"


def test_text_options_of_backbones_get_no_placeholder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub(Dense):
        """A backbone whose constructor would look up the name of a model in a network."""

        def __init__(self, *, model: str) -> None:
            raise AssertionError(f"looked up {model}")

    register("backbone", "hub")(Hub)
    all_plugins = entry_points.plugins
    # Only this plugin: building the others takes most of the time of the tables.
    monkeypatch.setattr(
        "transfer.config.compatibility.entry_points.plugins",
        lambda kind: [p for p in all_plugins(kind) if p.name in ("hub", "huggingface")],
    )
    problems = {str(problem.where): problem.message for problem in compatibility_tables()[1]}
    assert problems == {
        "backbone 'hub'": "the declaration depends on option 'model'",
        "dataset 'huggingface'": "the declaration depends on its options",
    }


@pytest.mark.usefixtures("tiny", "without_images")
def test_tables_contain_registered_plugins() -> None:
    tables, _ = compatibility_tables()
    assert cells(tables, "points", "dense") == ["yes"]
    assert cells(tables, "points", "regression") == ["target: number"]
    assert cells(tables, "steps", "mean_of_steps") == ["yes"]
    assert cells(tables, "steps", "linear") == [""]


@pytest.mark.usefixtures("without_images")
def test_plugin_that_cannot_be_built_is_reported() -> None:
    class Needy(Points):
        """A dataset with a required number, for which there is no placeholder."""

        def __init__(self, *, size: int) -> None:
            super().__init__()

    class Crashing(Dense):
        """A backbone whose features raise an error."""

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


@pytest.mark.usefixtures("without_images")
def test_refused_variant_is_left_out() -> None:
    class Choosy(Points):
        """A dataset that refuses one of three modes."""

        def __init__(self, *, mode: Literal["a", "b", "c"] = "a") -> None:
            if mode == "b":
                raise ValueError("b needs other options")
            super().__init__(target="number" if mode == "c" else "class")

        @property
        def spec(self) -> DataSpec:
            return super().spec

    class Anything(Head):
        """A head for both layouts."""

        layouts: Any = frozenset({"vector", "sequence"})

    register("dataset", "choosy")(Choosy)
    register("head", "anything")(Anything)
    tables, problems = compatibility_tables()
    assert not any("choosy" in str(problem) for problem in problems)
    assert cells(tables, "choosy", "regression") == ["mode: c"]
    assert cells(tables, "textcnn", "anything") == cells(tables, "bilstm", "anything") == ["yes"]
