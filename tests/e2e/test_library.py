"""Library use: the shipped example script, and the same from Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import transfer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/custom_task.py"


def test_a_custom_task_is_a_script_of_under_40_lines():
    assert len(SCRIPT.read_text().splitlines()) < 40


def test_the_script_trains_its_task(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    answer = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "'accuracy':" in answer.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert '"name": "hinge"' in (run / "model/model.json").read_text()


def test_importing_transfer_imports_no_torch():
    code = "import sys, transfer; assert 'torch' not in sys.modules; transfer.Backbone; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists():
    assert all(getattr(transfer, name) is not None for name in transfer.__all__)
    assert set(transfer.__all__) == set(dir(transfer))
