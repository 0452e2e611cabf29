"""A package that core and the built-in plugins know nothing of: installed as anybody's, named in a config."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples/plugins/transfer-hashing"
# The tabular one is a dataset, a backbone and a task. The others are a backbone each, or two small parts.
MAX_LINES_OF_CODE = {"transfer-tabular": 170}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(PACKAGE)], check=True, timeout=120)
    return os.environ | {"PYTHONPATH": str(site), "COLUMNS": "160"}


@pytest.fixture
def run(python, tmp_path):
    """Return a function that runs ``transfer ARGUMENTS`` with the environment variables given."""
    return lambda environment, *arguments: python("-m", "transfer", *arguments, cwd=tmp_path, environment=environment)


def test_sources_do_not_mention_third_party_plugin():
    sources = [p.read_text() for folder in ("core", "plugins") for p in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 20
    assert not any("transfer_hashing" in source for source in sources)


def lines_of_code(source):
    """Count the lines that hold more than a comment or a docstring."""
    prose = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    spans = (range(t.start[0], t.end[0] + 1) for t in tokens if t.type not in blank)
    return len({line for span in spans for line in span} - prose)


def test_a_docstring_is_no_code():
    assert (
        lines_of_code('"""What it is."""\n\n# Why.\ndef one():\n    """Say."""\n    return (\n        1\n    )\n') == 4
    )


@pytest.mark.parametrize("package", sorted((ROOT / "examples/plugins").iterdir()), ids=lambda path: path.name)
def test_each_package_is_short(package):
    modules = list(package.glob("transfer_*/**/*.py"))
    assert modules
    assert sum(lines_of_code(module.read_text()) for module in modules) <= MAX_LINES_OF_CODE.get(package.name, 150)


def test_its_plugins_are_listed_with_their_distribution(installed, run):
    listed = json.loads(run(installed, "plugins", "--json").stdout)
    mine = {(p["kind"], p["name"]) for p in listed if p["distribution"] == "transfer-hashing"}
    assert mine == {("backbone", "hashing"), ("head", "cosine")}


def test_its_options_are_shown(installed, run):
    answer = run(installed, "show", "backbone", "hashing")
    assert "buckets" in answer.stdout
    assert "fewer collisions" in answer.stdout


def test_a_config_trains_it_and_the_run_predicts(installed, run, tmp_path):
    answer = run(installed, "run", str(PACKAGE / "reviews.yaml"))
    assert answer.returncode == 0, answer.stderr
    folder = tmp_path / answer.stdout.splitlines()[-1]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test"]["accuracy"] > 0.6
    said = run(installed, "predict", str(folder), "wonderful and moving", "--json")
    assert json.loads(said.stdout)["label"] in ("positive", "negative")


def test_error_without_plugin_states_what_to_install(installed, run, tmp_path):
    answer = run(installed, "run", str(PACKAGE / "reviews.yaml"), "--quick")
    folder = tmp_path / answer.stdout.splitlines()[-1]
    said = run(os.environ | {"COLUMNS": "160"}, "predict", str(folder), "some text")
    assert said.returncode == 2
    assert "pip install transfer-hashing==0.1.0" in said.stderr
