"""Library use: the shipped example script, and the same from Python."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import transfer
from transfer import testing
from transfer.registry import entry_points as registry
from transfer.testing import Case, contracts_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/custom_task.py"


def test_custom_task_script_under_40_lines():
    assert len(SCRIPT.read_text().splitlines()) < 40


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Return a function that executes an example as ``python SCRIPT`` does, and returns its run directory.

    Overrides are added to those of the script.
    """
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})

    def execute(script, *overrides):
        run = transfer.run
        monkeypatch.setattr(transfer, "run", lambda config, own=(): run(config, [*own, *overrides]))
        runpy.run_path(str(script), run_name="__main__")
        (run,) = (tmp_path / "runs").iterdir()
        return run

    return execute


ONE_EPOCH = ["train.phases=[{epochs: 1}]"]


def test_custom_task_script_trains(run_script, capsys):
    run = run_script(SCRIPT, *ONE_EPOCH)
    assert "'accuracy':" in capsys.readouterr().out
    assert '"name": "hinge"' in (run / "model/model.json").read_text()


PARTS = {"backbone": "byte_grams", "dataset": "sentences", "head": "maxout", "task": "hinge"}
OPTIONS = {"backbone": {"width": 8}}


@pytest.mark.parametrize("kind", ["backbone", "dataset", "head"])
def test_custom_component_script_trains(kind, run_script):
    run = run_script(ROOT / f"examples/custom_{kind}.py", *(ONE_EPOCH if kind != "dataset" else []))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert summary["test"]["accuracy"] > (0.6 if kind == "dataset" else 0.3)
    assert PARTS[kind] in (run / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["backbone", "head", "task"])
def test_custom_component_script_learns(kind, run_script):
    run = run_script(ROOT / f"examples/custom_{kind}.py")
    assert json.loads((run / "summary.json").read_text())["test"]["accuracy"] > 0.6


@pytest.mark.parametrize("kind", PARTS)
def test_the_script_of_each_kind_keeps_every_contract(kind, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    importlib.import_module(f"custom_{kind}")
    checked = contracts_of(Case(kind, PARTS[kind], OPTIONS.get(kind, {})))
    assert len(checked) >= 6
    for contract in checked:
        contract.check()


def test_the_guide_lists_every_public_name():
    guide = (ROOT / "docs/library.md").read_text()
    names = [*transfer.__all__, *testing.__all__]
    assert [name for name in names if f"`{name}`" not in guide] == [], "add them to the table in docs/library.md"
    assert all(f"examples/custom_{kind}.py" in guide for kind in registry.KINDS)


def test_guide_lists_public_names_of_text_and_vision():
    guide = (ROOT / "docs/library.md").read_text()
    rows = re.findall(r"^\| `(transfer_\w+\.\w+)`: ([^|]+) \|", guide, re.MULTILINE)
    assert [module for module, _ in rows] == ["transfer_text.interfaces", "transfer_vision.preprocessing"]
    for module, names in rows:
        assert all(hasattr(importlib.import_module(module), name) for name in re.findall(r"`(\w+)`", names))


def test_the_package_is_typed():
    assert (Path(transfer.__file__).parent / "py.typed").is_file()


def test_importing_transfer_imports_no_torch():
    code = "import sys, transfer; assert 'torch' not in sys.modules; transfer.Backbone; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists():
    assert all(getattr(transfer, name) is not None for name in transfer.__all__)
    assert set(transfer.__all__) == set(dir(transfer))
