"""A run is read with the plugins that it recorded; missing and changed ones are reported alike by every command."""

from __future__ import annotations

import importlib
import linecache
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Dense, Install
from torch import nn

import transfer
from transfer import PluginError, RunError, register
from transfer.models.recorded_plugins import code_digest
from transfer.registry import entry_points as registry

Call = Callable[..., tuple[int, str, str]]
HEAD = '''
from torch import nn
from transfer import Head

class Fancy(Head):
    """A linear layer."""

    def __init__(self, features, out_features):
        super().__init__()
        self.output = nn.Linear(features.size, out_features)

    def forward(self, features):
        return self.output(features)
'''
ENTRY = {"transfer.heads": ["fancy = first_plugin:Fancy"]}


@pytest.fixture
def run(install: Install, config: dict[str, Any], tmp_path: Path) -> Path:
    """Return a run with the head ``fancy`` of the distribution ``first``."""
    install("first", "1.5", ENTRY, first_plugin=HEAD)
    overrides = ["head={name: fancy}", "train.phases=[{epochs: 1}]"]
    return transfer.run(config, overrides, output=tmp_path / "runs").folder


COMMANDS = [
    ["evaluate"],
    ["predict"],
    ["report"],
    ["export", "--format", "safetensors"],
    ["evaluate", "--images"],
    ["resume"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_names_a_missing_plugin_alike(
    command: list[str], run: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    registry._entry_points.cache_clear()
    if command[0] == "resume":
        (run / "summary.json").unlink()
    status, _, err = call(command[0], run, *command[1:], *(["1,2,3,4"] if command[0] == "predict" else []))
    assert status == 2
    text = " ".join(err.replace("│", " ").split())
    assert re.search(r"─╮ error unknown head 'fancy' available [a-z_, ]+ fix pip install first==1.5 ╰─", text), text


def test_run_keeps_distribution_despite_second_claim(run: Path, install: Install) -> None:
    before = transfer.evaluate(run)
    install("second", "2.0", {"transfer.heads": ["fancy = second_plugin:Fancy"]}, second_plugin="raise RuntimeError")
    with pytest.raises(PluginError, match=r"claimed by first 1\.5 and second 2\.0"):
        registry.load("head", "fancy")
    assert transfer.evaluate(run) == before
    assert list(transfer.predict(run, ["1,2,3,4"]))
    (run / "summary.json").unlink()
    assert transfer.resume(run).summary["status"] == "complete"


def test_plugin_of_another_distribution_is_not_used(
    run: Path, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next(tmp_path.glob("first-*")).rename(tmp_path / "removed")
    install("second", "2.0", {"transfer.heads": ["fancy = second_plugin:Fancy"]}, second_plugin=HEAD)
    with pytest.raises(RunError, match="unknown head 'fancy'") as caught:
        transfer.evaluate(run)
    assert caught.value.problems[0].fix == "pip install first==1.5"


def notes(run: Path) -> list[str]:
    events: list[Any] = []
    transfer.evaluate(run, observe=events.append)
    list(transfer.predict(run, ["1,2,3,4"], observe=events.append))
    return [event.text for event in events if type(event).__name__ == "Note"]


def test_another_version_is_reported(run: Path, install: Install, tmp_path: Path) -> None:
    assert notes(run) == []
    next(tmp_path.glob("first-*")).rename(tmp_path / "removed")
    install("first", "1.6", ENTRY)
    expected = "plugins have changed since the run, so results may differ: head 'fancy': first 1.5 -> first 1.6"
    assert notes(run) == [expected, expected]


def test_changed_code_of_the_same_version_is_reported(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "first_plugin.py"
    source.write_text(HEAD.replace('"""A linear layer."""', '"""Another text."""  # and a comment'), encoding="utf-8")
    reload_plugin()
    assert notes(run) == []
    source.write_text(HEAD.replace("self.output(features)", "2 * self.output(features)"), encoding="utf-8")
    reload_plugin()
    expected = "plugins have changed since the run, so results may differ: the code of head 'fancy' has changed"
    assert notes(run) == [expected, expected]


def reload_plugin() -> None:
    sys.modules.pop("first_plugin", None)
    importlib.invalidate_caches()
    linecache.clearcache()


def test_changed_registered_class_is_reported(config: dict[str, Any], tmp_path: Path) -> None:
    run = transfer.run(config, output=tmp_path).folder

    class Other(Dense):
        """The same parameters, and another function."""

        def forward(self, inputs: Any) -> Any:
            return -super().forward(inputs)

    Other.__module__, Other.__qualname__ = Dense.__module__, Dense.__qualname__
    register("backbone", "dense")(Other)
    assert all("the code of backbone 'dense' has changed" in note for note in notes(run))
    assert len(notes(run)) == 2
    (run / "summary.json").unlink()
    events: list[Any] = []
    transfer.resume(run, observe=events.append)
    assert any("the code of backbone 'dense' has changed" in getattr(event, "text", "") for event in events)


def test_class_without_source_has_no_digest() -> None:
    made = type("Made", (nn.Module,), {"forward": lambda self, x: torch.relu(x)})
    made.__module__ = "nowhere"
    assert code_digest(made) is None
