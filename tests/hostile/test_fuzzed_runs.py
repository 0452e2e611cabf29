"""Whatever is done to the files of a run directory, every command takes it or refuses it in words."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from safetensors.torch import load, save

import transfer
from transfer.cli import app as cli
from transfer.deployment.serving.models import ServedModel
from transfer.errors import UserError
from transfer.storage import checkpoint

MUTATIONS = int(os.environ.get("TRANSFER_MUTATIONS", "15"))
"""Mutations of each run; TRANSFER_MUTATIONS=5000 for a long search."""
PLAIN = {".json", ".jsonl", ".yaml"}

values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([-1, 0, 1, 2**31, 10**30, 0.5, float("nan"), float("inf")]),
        st.sampled_from(["", "..", "../../outside", "/outside", "\x1b[31mred", "linear", "\ud800", "a" * 300]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "x", ""]), inner, max_size=3),
    max_leaves=4,
)


class Killed(BaseException):
    """Stands in for a signal that nothing can catch."""


def exit_status(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; return its exit status and what it printed."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr("sys.argv", ["transfer", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), printed.getvalue()
    return 0, printed.getvalue()


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value below a node."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from places(child, (*at, key))


def retyped(draw: st.DrawFn, content: Any) -> Any:
    """Drop, replace or swap a value anywhere in plain data."""
    content = copy.deepcopy(content)
    everywhere = list(places(content))
    if not everywhere:
        return draw(values)
    # Evenly over the depths: a file may hold thousands of words and few keys.
    depth = draw(st.sampled_from(sorted({len(place) for place in everywhere})))
    *way, key = draw(st.sampled_from([place for place in everywhere if len(place) == depth]))
    holder = content
    for step in way:
        holder = holder[step]
    match draw(st.sampled_from(["drop", "replace", "replace", "wrap", "add"])):
        case "drop":
            del holder[key]
        case "wrap":
            holder[key] = [holder[key]]
        case "add" if isinstance(holder, dict):
            holder[draw(st.sampled_from(["name", "x", *map(str, holder)]))] = draw(values)
        case _:
            holder[key] = draw(values)
    return content


@st.composite
def damaged(draw: st.DrawFn, path: Path) -> bytes:
    """Flip bits of a file, cut it, put something into it, or change one value of its plain data."""
    content = path.read_bytes()
    if path.suffix in PLAIN and draw(st.booleans()):
        if path.suffix == ".yaml":
            return yaml.safe_dump(retyped(draw, yaml.safe_load(content))).encode("utf-8", "surrogatepass")
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        return b"\n".join(json.dumps(retyped(draw, json.loads(line))).encode() for line in lines)
    if not content:
        return draw(st.binary(max_size=8))
    # The beginning of a file says what the rest means.
    place = draw(st.integers(0, min(len(content), 400) - 1) | st.integers(0, len(content) - 1))
    match draw(st.sampled_from(["flip", "cut", "insert", "replace"])):
        case "flip":
            return content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
        case "cut":
            return content[:place]
        case "insert":
            return content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place:]
        case _:
            return draw(st.sampled_from([b"", b"{}", b"[]", b"null", b"\x00" * 64, b"[" * 100_000, b"\xff\xfe"]))


def tree(folder: Path) -> dict[str, int]:
    """Return every path below a folder, with its time."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def hostile_tensors(draw: st.DrawFn, path: Path) -> bytes:
    """Change the dtype, shape, name or values of one tensor of a file."""
    tensors = load(path.read_bytes())
    if not tensors:
        return path.read_bytes()
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    match draw(st.sampled_from(["dtype", "cut", "shape", "drop", "rename", "nan", "large"])):
        case "dtype":
            tensors[name] = tensor.to(draw(st.sampled_from([torch.float64, torch.int8, torch.bool, torch.float16])))
        case "cut":
            tensors[name] = tensor.reshape(-1)[:1].clone()
        case "shape":
            tensors[name] = tensor.unsqueeze(0)
        case "rename":
            tensors[draw(st.sampled_from(["x", "", name + "x", *tensors]))] = tensor
        case "nan" if tensor.is_floating_point():
            tensors[name] = torch.full_like(tensor, torch.nan)
        case "large":
            tensors[name] = tensor.new_full(tensor.shape, 100)
    return save(tensors)


def refresh_digests(checkpoint_folder: Path) -> None:
    """Write the digests of a checkpoint again, as somebody would who wants it to be taken."""
    path = checkpoint_folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        state.pop("own_sha256", None)
        state["sha256"] |= {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in checkpoint_folder.glob("*.safetensors")
        }
        path.write_text(json.dumps({**state, "own_sha256": checkpoint._digest_of(state)}), encoding="utf-8")
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return  # damaged beyond that


def mutate(draw: st.DrawFn, path: Path) -> None:
    """Damage a file, or put a link, a pipe or a folder in its place."""
    if not path.is_file() or path.is_symlink():
        return  # an earlier mutation
    match draw(st.sampled_from(["content"] * 9 + ["tensors"] * 3 + ["missing", "pipe", "loop", "link", "folder"])):
        case "missing":
            path.unlink()
        case "pipe":
            path.unlink()
            os.mkfifo(path)
        case "loop" | "link" | "folder" as kind:
            path.unlink()
            if kind == "folder":
                path.mkdir()
            else:
                target = path.name if kind == "loop" else draw(st.sampled_from(["/dev/zero", "../../keep.txt", "."]))
                path.symlink_to(target)
        case "tensors" if path.suffix == ".safetensors":
            path.write_bytes(hostile_tensors(draw, path))
        case _:
            path.write_bytes(draw(damaged(path)))


class HangError(BaseException):
    """A command did not end."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


Act = Callable[[Path], tuple[int, str]]


def search(run: Path, folder: Path, act: Act, files: list[str], examples: int) -> None:
    """Give a command many damaged copies of a run: it ends, prints a reason, and writes nowhere else.

    All mutations are tried, and the failures are reported together.
    """
    folder.mkdir()
    (folder / "around").mkdir()
    (folder / "around" / "keep.txt").write_text("mine", encoding="utf-8")
    intact = Path(shutil.copytree(run, folder / "around" / "run"))
    assert act(intact)[0] == 0, "the command fails on the intact run too"
    failures: dict[str, int] = {}
    statuses: Counter[int] = Counter()

    @seed(0)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def attack(data: st.DataObject) -> None:
        copied = folder / "around" / "run"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(run, copied)
        before = {path: time for path, time in tree(folder).items() if not path.startswith("around/run")}
        names = data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=draw_count(data), unique=True))
        for name in names:
            data.draw(st.composite(mutate)(copied / name))
        if data.draw(st.booleans()):
            for state in copied.glob("checkpoints/*/state.json"):
                refresh_digests(state.parent)
        try:
            with time_limit(120):
                status, printed = act(copied)
            statuses[status] += 1
            assert status in (0, 1, 2), printed
            assert printed.strip(), "nothing was printed"
            assert not set(printed) & {chr(code) for code in range(32)} - {"\n"}, repr(printed)
        except (Exception, HangError) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {str(error)[:120]} at {frame.filename}:{frame.lineno}, after {names}"
            failures[what] = failures.get(what, 0) + 1
        after = {path: time for path, time in tree(folder).items() if not path.startswith("around/run")}
        # The folder that holds the run may have had a temporary folder in it.
        assert {k: v for k, v in after.items() if k != "around"} == {k: v for k, v in before.items() if k != "around"}

    attack()
    print(f"{statuses.total()} mutations by exit status: {dict(statuses)}")  # noqa: T201  # shown by pytest -rP
    assert not failures, "\n".join(f"{count} x {what}" for what, count in sorted(failures.items()))


def draw_count(data: st.DataObject) -> int:
    """Return the maximum number of files that are damaged together: mostly one."""
    return data.draw(st.sampled_from([1, 1, 1, 3]))


def command(*arguments: str) -> Act:
    """Return a function that runs a command with a run as its first argument."""
    first, *options = arguments
    return lambda run: exit_status(first, str(run), *options)


def files_of(run: Path, *leave_out: str) -> list[str]:
    return [str(p.relative_to(run)) for p in sorted(run.rglob("*")) if p.is_file() and p.name not in leave_out]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of a small text model, with a vocabulary."""
    config = {
        "data": {"name": "mini_reviews"},
        "backbone": {"name": "textcnn", "dimensions": 4, "filters": 2, "kernel_sizes": [2], "min_frequency": 8},
        "train": {"batch_size": 32, "phases": [{"epochs": 1}]},
    }
    return transfer.run(config, output=tmp_path_factory.mktemp("text"), quick=True).folder


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of a small image model, with its preprocessing."""
    config = {
        "data": {"name": "shapes", "image_size": 32, "limit": 60},
        "backbone": {
            "name": "torchvision",
            "model": "shufflenet_v2_x0_5",
            "weights": None,
            "image_size": 32,
            "resize": 32,
        },
        "train": {"batch_size": 32, "phases": [{"epochs": 1}]},
    }
    return transfer.run(config, output=tmp_path_factory.mktemp("image"), quick=True).folder


@pytest.fixture(scope="module")
def scored_text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of a small text model with stored predictions."""
    config = {
        "data": {"name": "mini_reviews", "limit": 20},
        "backbone": {"name": "textcnn", "dimensions": 4, "filters": 2, "kernel_sizes": [2], "min_frequency": 8},
        "train": {"batch_size": 32, "phases": [{"epochs": 2}]},
    }
    return transfer.run(config, output=tmp_path_factory.mktemp("scored")).folder


@pytest.fixture
def stopped_run(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run that was killed in its second epoch."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    save, count = checkpoint.save, 0

    def counting(*arguments: Any, **options: Any) -> None:
        nonlocal count
        save(*arguments, **options)
        count += 1
        if count == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", counting)
        options = ["train.ema=0.9", "train.optimizer={name: adam}", "train.scheduler={name: cosine}"]
        with pytest.raises(Killed):
            transfer.run(config, [*options, "train.checkpoint.every_steps=3"], output=tmp_path / "stopped")
    (folder,) = (tmp_path / "stopped").iterdir()
    return folder


def test_predict_takes_or_refuses_any_model_folder(text_run: Path, tmp_path: Path) -> None:
    files = [name for name in files_of(text_run) if name.startswith("model/")]
    search(text_run, tmp_path / "attacks", command("predict", "a good film"), files, MUTATIONS)


def test_evaluate_takes_or_refuses_any_run(text_run: Path, tmp_path: Path) -> None:
    files = files_of(text_run, "keep.txt")
    search(text_run, tmp_path / "attacks", command("evaluate"), files, MUTATIONS // 2)


def test_report_takes_or_refuses_any_run(scored_text_run: Path, tmp_path: Path) -> None:
    files = [name for name in files_of(scored_text_run) if not name.startswith("checkpoints/")]
    search(scored_text_run, tmp_path / "attacks", command("report"), files, MUTATIONS)


def test_export_takes_or_refuses_any_run(text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a fresh process makes of an export is tested elsewhere, and takes seconds.
    monkeypatch.setattr("transfer.deployment.export._compare", lambda *arguments: (0.0, 1, frozenset()))
    files = files_of(text_run, "state.json")
    search(
        text_run,
        tmp_path / "attacks",
        command("export", "--format", "safetensors"),
        files,
        MUTATIONS // 2,
    )


def test_resume_takes_or_refuses_any_run(stopped_run: Path, tmp_path: Path) -> None:
    search(stopped_run, tmp_path / "attacks", command("resume"), files_of(stopped_run), MUTATIONS)


def served(run: Path) -> tuple[int, str]:
    """Read a model and warm it up as ``transfer serve`` does, and send it a request."""
    try:
        model = ServedModel.read("model", run)
        model.describe()
        model.example()
    except UserError as error:
        return 2, str(error)
    return 0, str(model.predict([dict.fromkeys(model.inputs, b"a good film")]))


def test_serve_takes_or_refuses_any_model_folder(text_run: Path, tmp_path: Path) -> None:
    files = [name for name in files_of(text_run) if name.startswith("model/")]
    search(text_run, tmp_path / "attacks", served, files, MUTATIONS // 3)


def test_serve_takes_or_refuses_any_image_model(image_run: Path, tmp_path: Path) -> None:
    files = [name for name in files_of(image_run) if name.startswith("model/")]
    search(image_run, tmp_path / "attacks", served, files, MUTATIONS // 3)


def test_compare_takes_or_refuses_any_run(scored_text_run: Path, tmp_path: Path) -> None:
    files = [name for name in files_of(scored_text_run) if not name.startswith("checkpoints/")]
    act = lambda run: exit_status("compare", str(run), str(scored_text_run))  # noqa: E731
    search(scored_text_run, tmp_path / "attacks", act, files, MUTATIONS // 3)


@pytest.fixture
def folder_of_seeds(config: dict[str, Any], tmp_path: Path) -> Path:
    """Return a folder of two seeds, of which the second is missing its summary."""
    folder = transfer.run_seeds(config, ["train.phases=[{epochs: 1}]"], seeds=2, output=tmp_path / "runs").folder
    (folder / "summary.json").unlink()
    (folder / "seed-4" / "summary.json").unlink()
    return folder


def test_resume_takes_or_refuses_any_folder_of_seeds(folder_of_seeds: Path, tmp_path: Path) -> None:
    files = files_of(folder_of_seeds) + ["seeds.json"] * 20
    search(folder_of_seeds, tmp_path / "attacks", command("resume"), files, MUTATIONS // 3)


@pytest.fixture
def folder_of_sweep(config_file: Path, tmp_path: Path) -> Path:
    """Return the folder of a sweep with two trials."""
    pytest.importorskip("optuna")
    space = tmp_path / "space.yaml"
    text = "sweep: {trials: 2, sampler: {name: random, seed: 1}, pruner: {name: none}}\ntrain.batch_size: [16, 32]\n"
    space.write_text(text, encoding="utf-8")
    folder = transfer.sweep(config_file, space, ["train.phases=[{epochs: 1}]"], output=tmp_path / "sweeps").folder
    space.write_text(text.replace("trials: 2", "trials: 3"), encoding="utf-8")
    return folder


def test_sweep_takes_or_refuses_any_folder(folder_of_sweep: Path, config_file: Path, tmp_path: Path) -> None:
    def act(run: Path) -> tuple[int, str]:
        (run.parent / folder_of_sweep.name).unlink(missing_ok=True)
        # The name of the folder is that of the config and of the space.
        run.rename(run.parent / folder_of_sweep.name)
        try:
            files = str(config_file), str(tmp_path / "space.yaml")
            return exit_status("sweep", *files, "train.phases=[{epochs: 1}]", "--output", str(run.parent))
        finally:
            (run.parent / folder_of_sweep.name).rename(run)

    files = files_of(folder_of_sweep) + ["study.db", "sweep.yaml", "sweep.json", "study.lock"] * 20
    search(folder_of_sweep, tmp_path / "attacks", act, files, MUTATIONS // 3)
