"""``transfer new-plugin``: what it makes installs, passes its own tests, is lint-clean and trains."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import transfer
from transfer import UserError
from transfer.registry.scaffold import new_plugin

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(python: Run) -> Run:
    """Return a function that runs ``python -m ARGUMENTS`` with additional environment variables."""
    return lambda *arguments, cwd, **environment: python(
        "-m", *arguments, cwd=cwd, environment=os.environ | {"COLUMNS": "160"} | environment
    )


@pytest.fixture(scope="module")
def made(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the package's folder, and a folder of packages in which it is installed."""
    folder = tmp_path_factory.mktemp("new")
    said = run("transfer", "new-plugin", "Sonar_Two", cwd=folder)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[0] == "cd transfer-sonar-two"
    assert said.stdout.splitlines()[-1] == "transfer run sonar_two.yaml"
    site = folder / "site"
    pip = ("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site))
    done = run(*pip, str(folder / "transfer-sonar-two"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "transfer-sonar-two", str(site)


def test_it_is_small_and_complete(made: tuple[Path, str]) -> None:
    folder, _ = made
    files = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "build" not in path.parts
    }
    assert files >= {
        "README.md",
        "pyproject.toml",
        "sonar_two.yaml",
        "tests/test_contracts.py",
        "transfer_sonar_two/__init__.py",
    }
    assert sum(len((folder / name).read_text(encoding="utf-8").splitlines()) for name in files) < 150
    assert not any("$" in (folder / name).read_text(encoding="utf-8") for name in files)


def test_it_is_clean(run: Run, made: tuple[Path, str]) -> None:
    folder, _ = made
    for arguments in (["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        done = run(*arguments, "--no-cache", cwd=folder)
        assert done.returncode == 0, done.stdout
    ours = ("--config", str(Path(__file__).parents[2] / "pyproject.toml"))
    done = run("ruff", "check", "--no-cache", *ours, "transfer_sonar_two", cwd=folder)
    assert done.returncode == 0, done.stdout


def test_it_passes_its_own_tests(run: Run, made: tuple[Path, str]) -> None:
    folder, site = made
    done = run("pytest", "-q", "-p", "no:cacheprovider", "-W", "error", cwd=folder, PYTHONPATH=site)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_it_trains_and_predicts(run: Run, made: tuple[Path, str], tmp_path: Path) -> None:
    folder, site = made
    done = run("transfer", "run", str(folder / "sonar_two.yaml"), cwd=tmp_path, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr
    ended = tmp_path / done.stdout.splitlines()[-1]
    assert json.loads((ended / "summary.json").read_text(encoding="utf-8"))["test"]["accuracy"] > 0.8
    (tmp_path / "signal.txt").write_text("0 1 0 -1 " * 16, encoding="utf-8")
    said = run("transfer", "predict", str(ended), "signal.txt", "--json", cwd=tmp_path, PYTHONPATH=site)
    assert json.loads(said.stdout)["label"] in ("sine", "square", "sawtooth")


def test_it_is_written_for_this_version(tmp_path: Path) -> None:
    folder = new_plugin("sonar", tmp_path, version=transfer.__version__)
    assert f'dependencies = ["transferkit>={transfer.__version__},<0.' in (folder / "pyproject.toml").read_text()
    later = new_plugin("radar", tmp_path, version="1.2.3")
    assert 'dependencies = ["transferkit>=1.2.3,<2"]' in (later / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ["", "1st", "a b", "../up", "-", "transfer-", "café"])
def test_a_name_that_makes_no_package_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no valid package name") as caught:
        new_plugin(name, tmp_path, version="0.1.0")
    assert caught.value.problems[0].fix == "use letters, digits and hyphens, and start with a letter"
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path: Path) -> None:
    new_plugin("sonar", tmp_path, version="0.1.0")
    with pytest.raises(UserError, match="transfer-sonar exists"):
        new_plugin("transfer-sonar", tmp_path, version="0.1.0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("linear", "transferkit has a plugin called 'linear'"),
        ("transfer-mini-reviews", "transferkit has a plugin called 'mini_reviews'"),
        ("text", "transferkit has a module transfer_text"),
        ("Vision", "transferkit has a module transfer_vision"),
    ],
)
def test_name_of_a_built_in_plugin_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        new_plugin(name, tmp_path, version="0.1.0")
    assert not list(tmp_path.iterdir())


def test_free_name_writes_no_warning(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, out, err = call("new-plugin", "sonar", "--output", tmp_path)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 4
