"""What a plugin that is wrong gets: the exact message, and nobody else is hurt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Install

import transfer
from transfer import PluginError, RunError
from transfer.cli import app as cli
from transfer.registry import entry_points as registry
from transfer.registry.listing import catalog

HEAD = '''
from torch import nn
from transfer import Head

class Good(Head):
    """A linear layer."""

    def __init__(self, features, out_features):
        super().__init__()
        self.output = nn.Linear(features.size, out_features)

    def forward(self, features):
        return self.output(features)

class Wrong:
    """No head."""
'''
VERSION = transfer.__version__


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the command line in this process: status, output, errors."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("TRANSFER_DEBUG", raising=False)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transfer", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        out, err = capsys.readouterr()
        return status, out, " ".join(err.replace("│", " ").split())

    return run


def refusal(kind: str, name: str) -> str:
    with pytest.raises(PluginError) as caught:
        registry.load(kind, name)
    return str(caught.value)


def listed(name: str) -> tuple[str, str | None] | None:
    (entry,) = [entry for entry in catalog() if entry.plugin.name == name]
    return entry.problem and (entry.problem.message, entry.problem.fix)


def test_one_that_raises_on_import(install: Install, call: Any) -> None:
    install(
        "sick", "0.3", {"transfer.heads": ["sick = sick_plugin:Good"]}, sick_plugin="raise RuntimeError('no device')"
    )
    assert refusal("head", "sick") == (
        "entry point sick = sick_plugin:Good of sick 0.3: head 'sick' cannot be imported: RuntimeError: no device\n"
        "  fix: reinstall or update sick, or choose another head"
    )
    assert call("show", "head", "linear")[0] == 0
    assert call("plugins")[0] == 0


def test_one_that_registers_a_wrong_type(install: Install) -> None:
    install("confused", "1", {"transfer.heads": ["confused = confused_plugin:Wrong"]}, confused_plugin=HEAD)
    assert refusal("head", "confused") == (
        "entry point confused = confused_plugin:Wrong of confused 1: head 'confused' is "
        "<class 'confused_plugin.Wrong'>, which is no subclass of transfer.Head\n"
        "  fix: derive it from transfer.Head"
    )


def test_builtin_head_wins_over_a_clashing_name(install: Install, call: Any) -> None:
    install("rival", "2.0", {"transfer.heads": ["linear = rival_plugin:Good"]}, rival_plugin=HEAD)
    assert registry.load("head", "linear").__module__ == "transfer.builtin.heads"
    assert registry.load("head", "transferkit:linear").__module__ == "transfer.builtin.heads"
    assert registry.load("head", "rival:linear").__module__ == "rival_plugin"
    status, out, _ = call("plugins")
    assert status == 0
    assert "head linear is unavailable: more than one distribution claims the name" in out
    assert "fix: write 'rival:linear' in a config" in out


def test_one_for_another_interface_version(install: Install, call: Any) -> None:
    entries = {"transfer.heads": ["tomorrow = tomorrow_plugin:Good"]}
    install("tomorrow", "4.0", entries, requires=["transferkit>=7,<8"], tomorrow_plugin=HEAD)
    message = f"it is written for transferkit>=7,<8, and transferkit {VERSION} is installed"
    fix = f"pip install 'transferkit>=7,<8', or a version of tomorrow for transferkit {VERSION}"
    assert refusal("head", "tomorrow") == (
        "entry point tomorrow = tomorrow_plugin:Good of tomorrow 4.0: head 'tomorrow' cannot be loaded: "
        f"{message}\n  fix: {fix}"
    )
    assert "tomorrow_plugin" not in sys.modules
    assert listed("tomorrow") == (message, fix)
    status, out, _ = call("plugins")
    assert status == 0
    assert f"head tomorrow is unavailable: {message}\n  fix: {fix}" in out


def test_one_for_this_interface_version_loads(install: Install) -> None:
    entries = {"transfer.heads": ["today = today_plugin:Good"]}
    install("today", "4.0", entries, requires=[f"transferkit>={VERSION},<99"], today_plugin=HEAD)
    assert registry.load("head", "today").__name__ == "Good"
    assert listed("today") is None


def test_plugin_requiring_other_transfer_project_is_refused(install: Install) -> None:
    entries = {"transfer.heads": ["older = older_plugin:Good"]}
    install("older", "4.0", entries, requires=[f"transfer>={VERSION},<99"], older_plugin=HEAD)
    message = f"it requires transfer>={VERSION},<99, and the distribution of this framework is called transferkit"
    fix = "install a version of older that requires transferkit"
    assert message in refusal("head", "older")
    assert listed("older") == (message, fix)


def test_one_that_disappears_after_a_run_was_saved(
    install: Install, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("fleeting", "1.5", {"transfer.heads": ["fleeting = fleeting_plugin:Good"]}, fleeting_plugin=HEAD)
    run = transfer.run(config, ["head={name: fleeting}", "train.phases=[{epochs: 1}]"], output=tmp_path / "runs")
    assert list(transfer.predict(run.folder, ["1,2,3,4"]))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    registry._entry_points.cache_clear()
    with pytest.raises(RunError) as caught:
        list(transfer.predict(run.folder, ["1,2,3,4"]))
    (problem,) = caught.value.problems
    assert problem.message == "unknown head 'fleeting'"
    assert problem.fix == "pip install fleeting==1.5"


def test_check_loads_each_and_names_what_is_broken(
    install: Install, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {"transfer.heads": ["sick = sick_plugin:Good", "well = well_plugin:Good"]}
    install("half-sick", "0.3", entries, sick_plugin="raise RuntimeError('no device')", well_plugin=HEAD)
    monkeypatch.setattr("transfer.registry.listing.plugins", lambda kind="head": registry.plugins(kind))
    status, out, _ = call("plugins", "--check")
    assert status == 1
    assert "good    head half-sick:well: 9 contracts kept" in out
    assert "good    head transferkit:linear: 9 contracts kept" in out
    assert "broken  head half-sick:sick: 0 contracts kept" in out
    assert "head-sick breaks the contract 'it can be imported'" in out
    assert "RuntimeError: no device" in out


def test_plugins_are_described(call: Any, install: Install) -> None:
    install("well", "1", {"transfer.heads": ["well = well_plugin:Good"]}, well_plugin=HEAD)
    found = {(p["kind"], p["name"]): p for p in json.loads(call("plugins", "--json")[1])}
    assert found["head", "well"]["description"] == "A linear layer."
    assert found["head", "well"]["unavailable"] is None
    assert "well_plugin" not in sys.modules
    assert "One linear layer over a feature vector" in call("plugins")[1]


COMMANDS = '''
import typer
from transfer import DataError

def greet(name: str, loud: bool = False) -> None:
    """Greet somebody."""
    print(name.upper() if loud else name)

def fail() -> None:
    """Fail."""
    raise DataError("nothing there", fix="look elsewhere")

app = typer.Typer()

@app.command()
def one(): print("one")

@app.command()
def two(): print("two")

number = 3
'''


@pytest.fixture
def commands(install: Install) -> None:
    lines = ["greet = command_plugin:greet", "fail = command_plugin:fail", "many = command_plugin:app"]
    lines += ["number = command_plugin:number", "gone = nowhere_plugin:app", "run = command_plugin:greet"]
    install("commanding", "1.0", {"transfer.commands": lines}, command_plugin=COMMANDS)


@pytest.mark.usefixtures("commands")
def test_a_package_adds_subcommands(call: Any) -> None:
    assert call("greet", "you", "--loud")[:2] == (0, "YOU\n")
    assert call("many", "two")[:2] == (0, "two\n")
    assert "--loud" in call("greet", "--help")[1]


@pytest.mark.usefixtures("commands")
def test_help_lists_them_without_importing_any(call: Any) -> None:
    status, out, _ = call("--help")
    assert status == 0
    assert "Greet somebody." in out
    assert "A command of commanding." in out
    assert "Train CONFIG" in out
    assert "command_plugin" not in sys.modules


@pytest.mark.usefixtures("commands")
def test_broken_subcommand_does_not_affect_others(call: Any) -> None:
    status, _, err = call("gone")
    assert status == 2
    assert "command 'gone' cannot be imported: ModuleNotFoundError: No module named 'nowhere_plugin'" in err
    assert "command 'number' is wrong" in call("number")[2]
    assert call("plugins")[0] == 0


@pytest.mark.usefixtures("commands")
def test_a_mistake_in_a_subcommand_is_a_panel(call: Any) -> None:
    status, _, err = call("fail")
    assert status == 2
    assert "nothing there" in err
    assert "look elsewhere" in err


@pytest.mark.usefixtures("commands")
def test_a_subcommand_cannot_replace_one_of_core(call: Any) -> None:
    assert "CONFIG" in call("run", "--help")[1]
    assert "command run is unavailable: transfer has a command of that name" in call("plugins")[1]


@pytest.mark.usefixtures("commands")
def test_two_packages_with_one_subcommand_are_named(call: Any, install: Install) -> None:
    install("polite", "2.0", {"transfer.commands": ["greet = command_plugin:greet"]})
    status, _, err = call("greet", "you")
    assert status == 2
    assert "command 'greet' is claimed by commanding 1.0 and polite 2.0" in err
