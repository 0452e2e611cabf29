"""The command line."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import transfer as library
from transfer import TransferError, __main__
from transfer.cli import deployment_commands


def transfer(*arguments: str | Path, prelude: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    code = f"{prelude}\nimport sys\nfrom transfer.cli.app import main\nsys.argv[0] = 'transfer'\nmain()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, **options)


def environment() -> dict[str, str]:
    variables = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    variables.pop("TRANSFER_DEBUG", None)
    return variables


NO_TORCH = "import atexit, sys; atexit.register(lambda: print('TORCH' if 'torch' in sys.modules else 'LIGHT'))"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plugins"], ["plugins", "--json"]])
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    ended = transfer(*arguments, prelude=NO_TORCH)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "LIGHT"
    assert ended.stderr == ""


def test_plugins_as_json() -> None:
    ended = transfer("plugins", "--json")
    found = {(p["kind"], p["name"]): p for p in json.loads(ended.stdout)}
    assert found["head", "linear"]["distribution"] == "transferkit"


PACKAGE = """
import pathlib, sys
package = pathlib.Path({folder!r}, "needy-1.dist-info")
package.mkdir(parents=True)
facts = ["Metadata-Version: 2.1", "Name: needy", "Version: 1", "Requires-Dist: not-there-at-all"]
(package / "METADATA").write_text("\\n".join(facts))
(package / "entry_points.txt").write_text("[transfer.heads]\\nneedy = needy:Head\\n")
sys.path.insert(0, {folder!r})
"""


def test_what_cannot_be_loaded_is_listed_with_reason_and_remedy(tmp_path: Path) -> None:
    listed = transfer("plugins", prelude=NO_TORCH + PACKAGE.format(folder=str(tmp_path / "plain")))
    assert listed.stdout.splitlines()[-1] == "LIGHT"
    assert "head needy is unavailable: it needs not-there-at-all, which is not installed" in listed.stdout
    assert "fix: pip install needy" in listed.stdout
    found = json.loads(transfer("plugins", "--json", prelude=PACKAGE.format(folder=str(tmp_path / "json"))).stdout)
    reasons = {(p["kind"], p["name"]): (p["unavailable"], p["fix"]) for p in found}
    assert reasons["head", "needy"] == ("it needs not-there-at-all, which is not installed", "pip install needy")
    assert reasons["head", "linear"] == (None, None)


def test_the_installed_command_is_this_one() -> None:
    from importlib import metadata

    (entry,) = metadata.entry_points(group="console_scripts", name="transfer")
    assert entry.load() is __main__.command


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["check", "missing.yaml"], 2)])
def test_the_process_ends_with_the_status_after_what_packages_do_at_its_end(
    arguments: list[str], status: int, python: Any
) -> None:
    code = """
import atexit, sys
from transfer.__main__ import command
sys.argv = ["transfer", *sys.argv[1:]]
from transfer.cli import app as cli
app, cli.app = cli.app, lambda: (atexit.register(print, "said at the end"), app())
command()
"""
    ended = python("-c", code, *arguments)
    assert ended.returncode == status
    assert ended.stdout.endswith("said at the end\n")


def test_a_mistake_is_a_panel_without_a_traceback(tmp_path: Path, python: Any) -> None:
    (tmp_path / "near.yaml").write_text("data: {}\nbackbone: {name: resnet}\n", encoding="utf-8")
    ended = python("-m", "transfer", "check", tmp_path / "naer.yaml", environment=environment())
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    for part in ("config file", "available", "near.yaml", "fix", "did you mean"):
        assert part in ended.stderr


def test_debug_shows_the_traceback(tmp_path: Path, python: Any) -> None:
    ended = python("-m", "transfer", "--debug", "check", tmp_path / "nothing.yaml", environment=environment())
    assert ended.returncode not in (0, 2)
    assert "Traceback" in ended.stderr
    assert "ConfigError" in ended.stderr


def test_an_unknown_command_is_a_mistake_of_the_user() -> None:
    ended = transfer("rnu")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


def test_a_full_disk_is_told_in_words() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "transfer", "plugins"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert "No space left on device" in ended.stderr
    assert "free some space" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_path_that_cannot_be_written_is_named(call: Any, tmp_path: Path) -> None:
    status, _, err = call("schema", "--output", tmp_path / "nowhere" / "schema.json")
    assert status == 1
    assert "No such file or directory" in err
    assert "schema.json" in err


def test_a_line_that_is_not_utf_8_is_named(call: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1,2,3,4\ncaf\xe9\n"), "utf-8", errors="strict"))
    status, _, err = call("predict", folder, "-")
    assert status == 2
    assert "line 2: the line is not UTF-8" in err


def test_run_prints_the_folder_last(call: Any, config_file: Path, tmp_path: Path) -> None:
    status, out, _ = call("run", config_file, "train.phases=[{epochs: 1}]", "--output", tmp_path / "runs")
    assert status == 0
    folder = Path(out.splitlines()[-1])
    assert folder.parent == tmp_path / "runs"
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["epochs"] == 1


def test_a_quick_run(call: Any, config_file: Path, tmp_path: Path) -> None:
    status, out, _ = call("run", config_file, "--quick", "--output", tmp_path / "runs")
    assert status == 0
    assert json.loads((Path(out.splitlines()[-1]) / "summary.json").read_text(encoding="utf-8"))["quick"] is True


def test_several_seeds_and_a_comparison(call: Any, config_file: Path, tmp_path: Path) -> None:
    one = ("run", config_file, "train.phases=[{epochs: 1}]", "--seeds", "2", "--output", tmp_path / "runs")
    status, out, _ = call(*one)
    assert status == 0
    assert "mean ± standard deviation" in out
    folder = Path(out.splitlines()[-1])
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["seeds"] == [3, 4]
    status, again, _ = call("resume", folder)
    assert (status, again.splitlines()[-1]) == (0, str(folder))
    status, out, _ = call("compare", folder, folder / "seed-3", "--csv", tmp_path / "table.csv")
    assert status == 0
    assert "reference" in out
    assert (tmp_path / "table.csv").is_file()


def test_check_shows_the_plan(call: Any, config_file: Path) -> None:
    status, out, _ = call("check", config_file, "train.phases=[{epochs: 1, freeze: backbone}]")
    assert status == 0
    assert "frozen" in out
    assert "dense" in out


def test_check_shows_every_rate_of_many_phases_on_a_narrow_console(call: Any, config_file: Path) -> None:
    phases = ", ".join(f"{{epochs: 1, freeze: none, lr: {number}.23e-05}}" for number in range(1, 9))
    status, out, _ = call("check", config_file, f"train.phases=[{phases}]")
    assert status == 0
    assert [rate for number in range(1, 9) if (rate := f"{number}.23e-05") not in out] == []


def test_wrong_overrides_are_a_panel(call: Any, config_file: Path) -> None:
    status, out, err = call("check", config_file, "backbone.widht=3", "head.name=linaer")
    assert (status, out) == (2, "")
    for part in (
        "2 problems",
        "unknown option 'widht' of backbone 'dense'",
        "override 'backbone.widht=3'",
        "did you mean 'width'?",
        "did you mean 'linear'?",
    ):
        assert part in err


@pytest.fixture
def folder(config: dict[str, Any], tmp_path: Path) -> Path:
    return library.run(config, ["train.phases=[{epochs: 1}]"], output=tmp_path).folder


def test_evaluate_as_json(call: Any, folder: Path) -> None:
    status, out, _ = call("evaluate", folder, "--json")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert status == 0
    assert json.loads(out) == {"test": summary["test"]}


def test_evaluate_for_people(call: Any, folder: Path) -> None:
    status, out, _ = call("evaluate", folder, "--split", "validation")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert status == 0
    assert repr(summary["validation"]["accuracy"]) in out


def test_predict_as_json(call: Any, folder: Path) -> None:
    status, out, _ = call("predict", folder, "1,2,3,4", "0,0,0,0", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [row["input"] for row in rows] == ["1,2,3,4", "0,0,0,0"]
    assert {row["label"] for row in rows} <= {"near", "far"}


def test_predict_reads_lines(call: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1,2,3,4\n\n5,6,7,8\n"))
    _, out, _ = call("predict", folder, "-", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["line"], row["input"]) for row in rows] == [(1, "1,2,3,4"), (2, ""), (3, "5,6,7,8")]
    assert (rows[1]["label"], rows[1]["note"]) == (None, "the input is blank")


def test_predict_for_people(call: Any, folder: Path) -> None:
    status, out, _ = call("predict", folder, "1,2,3,4")
    assert status == 0
    assert "near" in out
    assert "1,2,3,4" in out


def test_predict_with_no_run(call: Any, tmp_path: Path) -> None:
    status, _, err = call("predict", tmp_path, "1,2,3,4")
    assert status == 2
    assert "is no run directory" in err


def test_show_describes_the_options(call: Any) -> None:
    status, out, _ = call("show", "head", "linear")
    assert status == 0
    for part in (
        "transfer.builtin.heads:Linear",
        "number >= 0 and < 1",
        "0.0",
        "Fraction of the features that is zeroed",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(("optimiser", "adam"), "unknown kind of plugin 'optimiser'"), (("head", "linaer"), "did you mean 'linear'?")],
)
def test_show_of_the_unknown(call: Any, arguments: tuple[str, str], part: str) -> None:
    status, _, err = call("show", *arguments)
    assert status == 2
    assert part in err


@pytest.mark.parametrize(("error", "status"), [(TransferError("it broke"), 1), (KeyboardInterrupt(), 130)])
def test_other_exit_statuses(
    call: Any, config_file: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("transfer.runs.train.run", fail)
    got, _, err = call("run", config_file)
    assert got == status
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    prelude = "import transfer.registry.listing as r; p = r.plugins(); r.plugins = lambda *_: p * 100"
    code = f"{prelude}\nfrom transfer.cli.app import main\nmain()"
    command = f"{sys.executable} -c '{code}' plugins --json | head -n 1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ended.stdout == "[\n"
    assert "Traceback" not in ended.stderr


def test_a_server_says_which_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from transfer.errors import Problem
    from transfer.registry import requirements

    lacking = Problem("it needs fastapi, which is not installed", fix="pip install 'transferkit[serve]'")
    monkeypatch.setattr(requirements, "unmet", lambda distribution, extras: lacking)
    with pytest.raises(TransferError, match="needs fastapi") as caught:
        deployment_commands.serve(["runs/none"])
    assert caught.value.problems[0].fix == "pip install 'transferkit[serve]'"


@pytest.mark.parametrize(("columns", "has_version"), [(80, False), (160, True)])
def test_plugins_shows_names_and_descriptions_completely(
    call: Any, monkeypatch: pytest.MonkeyPatch, columns: int, has_version: bool
) -> None:
    from transfer.registry.listing import catalog

    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = call("plugins")
    table, _, _ = out.partition("\n\n")
    lines = table.splitlines()
    assert max(map(len, lines)) <= columns
    assert ("version" in lines[0].split()) == has_version
    assert ["dataset", "torchvision_dataset", "transferkit"] in [line.split()[:3] for line in lines]
    words = " ".join(table.split())
    (linear,) = [e for e in catalog() if (e.plugin.kind, e.plugin.name) == ("head", "linear")]
    start = lines[0].index("description")
    assert linear.description in " ".join(" ".join(line[start:].split()) for line in lines)
    assert "…" not in words


def test_next_command_is_one_line_without_a_terminal(call: Any, config_file: Path, tmp_path: Path) -> None:
    output = tmp_path / ("a long folder name " * 8).strip()
    _, out, _ = call("run", config_file, "train.phases=[{epochs: 1}]", "--output", output)
    folder = out.splitlines()[-1]
    (line,) = [line for line in out.splitlines() if line.startswith("next: ")]
    assert line == f"next: transfer predict '{folder}' INPUT...   or   transfer evaluate '{folder}'"


def test_resume_command_is_one_line_without_a_terminal(
    call: Any, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transfer.system.signals import Interrupted

    def interrupted(*_: Any, **__: Any) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr("transfer.runs.train.fit", interrupted)
    monkeypatch.setenv("COLUMNS", "80")
    output = tmp_path / ("a long folder name " * 8).strip()
    status, out, _ = call("run", config_file, "--output", output)
    (folder,) = output.iterdir()
    assert status == 143
    assert f"interrupted; resume with: transfer resume '{folder}'" in out.splitlines()


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_device_option(call: Any, folder: Path, command: str) -> None:
    inputs = ["1,2,3,4"] if command == "predict" else []
    assert call(command, folder, *inputs, "--device", "cpu")[0] == 0
    for device, message in (("cuda:99", "is not on this machine"), ("gpu", "is unknown")):
        status, out, err = call(command, folder, *inputs, "--device", device)
        assert (status, out) == (2, "")
        assert f"device {device!r} {message}" in err
        assert "--device" in err


def test_predict_notes_that_the_device_of_the_run_is_missing(call: Any, folder: Path) -> None:
    path = folder / "config.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("device: auto", "device: cuda:99"), encoding="utf-8")
    for command in (["evaluate", folder], ["predict", folder, "1,2,3,4", "--json"]):
        status, out, err = call(*command)
        assert status == 0
        assert "train.device of the run is cuda:99, which is not on this machine; using" in out + err
    assert json.loads(out)["input"] == "1,2,3,4"
