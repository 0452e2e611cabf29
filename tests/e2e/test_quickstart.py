"""The commands that a newcomer types, in processes of their own, on data that comes with the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from transfer.cli.app import main

ROOT = Path(__file__).parents[2]


def command_line(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "transfer", *arguments]
    env = os.environ | {"TRANSFER_CACHE": str(cwd / "cache"), "COLUMNS": "160"} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    answer = command_line("run", str(ROOT / "configs/quickstart_text.yaml"), cwd=folder)
    assert answer.returncode == 0, answer.stderr
    return folder, folder / answer.stdout.splitlines()[-1]


def test_last_line_is_run_directory_with_expected_files(text_run):
    _, run = text_run
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files >= {"config.yaml", "environment.json", "metrics.jsonl", "summary.json"}
    assert {name for name in files if name.startswith("model/")} == {
        "model/model.json",
        "model/weights.safetensors",
        "model/vocabulary.json",
        "model/embedding.json",
    }
    assert {name.split("/")[1] for name in files if name.startswith("checkpoints/")} >= {"best", "last"}
    assert not [name for name in files if name.endswith((".pt", ".pth", ".pkl", ".tmp"))]


def test_it_learns(text_run):
    _, run = text_run
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert summary["test"]["accuracy"] > 0.7  # chance is 0.5 on 104 reviews


def test_evaluate_prints_exactly_the_metrics_of_the_summary(text_run, call):
    _, run = text_run
    status, out, _ = call("evaluate", run, "--json")
    assert status == 0
    assert json.loads(out) == {"test": json.loads((run / "summary.json").read_text())["test"]}


def test_predict_reads_arguments_files_and_standard_input(text_run, tmp_path, call):
    _, run = text_run
    review = tmp_path / "review.txt"
    review.write_text("a film I would gladly watch again")
    _, out, _ = call("predict", run, "a film I would gladly watch again", review, "--json")
    first, second = map(json.loads, out.splitlines())
    assert first["probabilities"] == second["probabilities"]
    assert first["label"] in ("positive", "negative")
    # A real process, which shows that a prediction waits for no library that it does not use.
    command = [sys.executable, "-X", "importtime", "-m", "transfer", "predict", str(run), "-", "--json"]
    piped = subprocess.run(command, input="one line\nanother line\n", capture_output=True, text=True, check=True)
    assert [json.loads(line)["input"] for line in piped.stdout.splitlines()] == ["one line", "another line"]
    imported = {line.rpartition("|")[2].strip() for line in piped.stderr.splitlines()}
    assert "torch" in imported
    assert imported.isdisjoint({"torch._dynamo", "torchmetrics", "torchvision", "scipy", "sklearn"})


def test_predict_refuses_an_empty_text_in_one_panel(text_run, call):
    _, run = text_run
    status, _, err = call("predict", run, "   ")
    assert status == 2
    assert "empty" in err
    assert "Traceback" not in err


def test_evaluate_quick_run_of_vision_config(tmp_path, call):
    config = ROOT / "configs/quickstart_vision.yaml"
    status, out, err = call("run", config, "data.per_class=20", "--quick", "--output", tmp_path)
    assert status == 0, err
    run = Path(out.splitlines()[-1])
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["quick"], summary["epochs"]) == (True, 1)
    _, out, _ = call("evaluate", run, "--json")
    assert json.loads(out) == {"test": summary["test"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "configs/quickstart_text.yml"], "quickstart_text.yaml"),
        (["run", "configs/quickstart_text.yaml", "backbone.name=textcn"], "did you mean 'textcnn'"),
        (["run", "configs/quickstart_text.yaml", "backbone.filter=3"], "did you mean 'filters'"),
        (["run", "configs/quickstart_text.yaml", "train.batch_size=big"], "train.batch_size"),
        (["run", "configs/quickstart_text.yaml", "backbone.vectors=nowhere.txt"], "nowhere.txt"),
        (["run", "configs/quickstart_text.yaml", "head.name=nothing"], "linear, mlp"),
        (
            ["run", "configs/quickstart_text.yaml", "backbone={name: resnet18, weights: null}"],
            "takes the field 'image'",
        ),
        (["run", "configs/quickstart_text.yaml", "task={name: regression}"], "target of kind number"),
        (
            ["run", "configs/quickstart_text.yaml", "train.phases.0.freeze={until: lstm}"],
            "embedding, convolution, head",
        ),
        (["run", "configs/imdb_textcnn.yaml"], "aclImdb_v1.tar.gz"),
        (["run", "configs/hymenoptera_finetune.yaml"], "hymenoptera_data.zip"),
        (["evaluate", "nowhere"], "nowhere"),
        (["predict", "nowhere", "text"], "nowhere"),
        (["show", "backbone", "textcn"], "did you mean 'textcnn'"),
    ],
)
def test_user_error_is_one_panel_with_status_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRANSFER_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network, whatever the machine has
    monkeypatch.setenv("COLUMNS", "160")
    paths = [str(ROOT / a) if a.startswith("configs/") else a for a in arguments]
    monkeypatch.setattr(sys, "argv", ["transfer", *paths])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == 2, shown.out + shown.err
    assert said in " ".join(shown.err.replace("│", " ").split())
    assert "Traceback" not in shown.err
    assert not (tmp_path / "runs").exists()
