"""Names of version 0.1 that still work."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import transfer
from transfer.cli.plugin_subcommands import OLD_SPELLINGS
from transfer.config.compatibility import Table


@pytest.mark.parametrize(("old", "new"), transfer._OLD_NAMES.items())
def test_old_python_name_warns_and_works(old: str, new: str) -> None:
    assert new in transfer.__all__
    assert old not in transfer.__all__
    with pytest.warns(DeprecationWarning, match=f"transfer.{old} is deprecated: use transfer.{new}"):
        found = getattr(transfer, old)
    assert found is getattr(transfer, new)


def test_old_commands_are_not_in_the_help(call: Any) -> None:
    status, out, _ = call("--help")
    commands = [line.split()[1] for line in out.splitlines() if line.startswith("│ ") and len(line.split()) > 2]
    assert status == 0
    assert set(OLD_SPELLINGS.values()) <= set(commands)
    assert not set(OLD_SPELLINGS) & set(commands)


@pytest.mark.parametrize(("old", "new"), OLD_SPELLINGS.items())
def test_old_command_has_the_options_of_the_new_one(call: Any, old: str, new: str) -> None:
    old_status, old_help, _ = call(old, "--help")
    status, new_help, _ = call(new, "--help")
    assert old_status == status == 0
    assert old_help.partition("╭")[2] == new_help.partition("╭")[2]  # all below the usage, which contains the name


def test_matrix_is_compatibility(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [Table("backbones and heads", {"dense": {"linear": "yes"}})]
    monkeypatch.setattr("transfer.config.compatibility.compatibility_tables", lambda: (tables, []))
    status, out, _ = call("matrix", "--json")
    assert (status, json.loads(out)) == (0, {"backbones and heads": {"dense": {"linear": "yes"}}})
    assert call("compatibility", "--json") == (0, out, "")


def test_value_is_pretraining_gain(call: Any, config_file: Path) -> None:
    status, _, err = call("value", config_file)
    assert status == 2
    assert "backbone 'dense' loads no pretrained weights" in err


def test_look_is_preview(call: Any, tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "configs" / "quickstart_text.yaml"
    status, out, _ = call("look", config, "--output", tmp_path / "batch.txt")
    assert status == 0
    assert out.splitlines()[-1] == str(tmp_path / "batch.txt")


@pytest.mark.parametrize("option", ["--images", "--pictures"])
def test_evaluate_draws_predictions(
    call: Any, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    from transfer.reports import preview

    run = transfer.run(config, ["train.phases=[{epochs: 1}]"], output=tmp_path).folder
    monkeypatch.setattr(preview, "preview_predictions", lambda *_, **__: SimpleNamespace(path="drawn.png"))
    status, out, _ = call("evaluate", run, option)
    assert status == 0
    assert "predictions: drawn.png" in out


def test_pictures_is_not_in_the_help(call: Any) -> None:
    _, out, _ = call("evaluate", "--help")
    assert "--images" in out
    assert "--pictures" not in out
