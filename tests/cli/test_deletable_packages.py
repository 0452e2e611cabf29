"""Training, evaluation and prediction work if the package reports, deployment or experiments is deleted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart_text.yaml"

# One process runs all commands, because each new process would import torch again. RUN stands for the run directory.
SCRIPT = """
import contextlib, importlib.util, io, json, os, sys
from pathlib import Path
from transfer.cli.app import main

def call(arguments):
    sys.argv = ["transfer", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
    return {"arguments": arguments, "status": status, "out": out.getvalue(), "err": err.getvalue()}

config, package, commands = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
assert importlib.util.find_spec(package) is None
results = [call(["run", config, "--quick", "--output", "runs"])]
run = results[0]["out"].splitlines()[-1]
(Path(run) / "summary.json").unlink()  # as if the process had been killed before the end of the run
Path("seeds").mkdir()
Path("seeds", "seeds.json").write_text("{}")
for arguments in [["resume", run], ["evaluate", run], ["predict", run, "a fine film"], ["plugins"], *commands]:
    results.append(call([run if argument == "RUN" else argument for argument in arguments]))
print(json.dumps(results))
"""

COMMANDS = {
    "reports": [["report", "RUN"], ["preview", str(CONFIG)], ["evaluate", "RUN", "--images"]],
    "deployment": [["export", "RUN", "--format", "safetensors"], ["push", "RUN", "owner/name"], ["serve", "RUN"]],
    "experiments": [
        ["compare", "RUN"],
        ["sweep", str(CONFIG), "space.yaml"],
        ["find-lr", str(CONFIG)],
        ["pretraining-gain", str(CONFIG)],
        ["probe", str(CONFIG)],
        ["run", str(CONFIG), "--seeds", "2"],
        ["resume", "seeds"],
    ],
}


@pytest.mark.parametrize(
    "package", ["reports", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deployment", "experiments"))]
)
def test_package_can_be_deleted(package: str, tmp_path: Path, python: Any) -> None:
    core = shutil.copytree(
        ROOT / "core" / "transfer", tmp_path / "core" / "transfer", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.rmtree(core / package)
    folders = [tmp_path / "core", ROOT / "plugins" / "vision", ROOT / "plugins" / "text"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
        "TRANSFER_CACHE": str(tmp_path / "cache"),
    }
    environment.pop("TRANSFER_DEBUG", None)
    arguments = (str(CONFIG), f"transfer.{package}", json.dumps(COMMANDS[package]))
    ended = python("-c", SCRIPT, *arguments, cwd=tmp_path, environment=environment)
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout)
    first_unavailable = len(results) - len(COMMANDS[package])
    for result in results[:first_unavailable]:
        assert result["status"] == 0, result
    listed = results[first_unavailable - 1]["out"]
    for command in {arguments[0] for arguments in COMMANDS[package]} - {"evaluate", "run", "resume"}:
        assert f"command {command} is unavailable: it needs the package transfer.{package}," in listed
    for result in results[first_unavailable:]:
        assert result["status"] == 2, result
        assert "Traceback" not in result["err"]
        assert f"it needs the package transfer.{package}" in result["err"]
        assert result["err"].count("─ UserError ") == 1


def test_resume_recognizes_the_files_of_experiments() -> None:
    from transfer.cli import run_commands
    from transfer.experiments import pretraining_gain, seeds

    assert run_commands.SEEDS_MANIFEST == seeds.MANIFEST
    assert run_commands.PRETRAINING_GAIN_MANIFEST == pretraining_gain.VALUE
