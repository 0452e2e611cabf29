# ruff: noqa: T201
"""Damages folders of every kind, and gives them to every command that reads them.

    python tests/hostile/folder_fuzzer.py --mutations 10000 --processes 2

A command must accept a damaged folder or refuse it in words: no traceback, no signal, no hang, no write outside of the
folder, and no code of the folder is executed. Each batch of mutations is a process that is forked from one that has
imported everything. A mutation depends only on its kind and number: ``--only sweep:17`` repeats one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from safetensors.torch import load, save

import transfer
from transfer.cli import app as cli
from transfer.deployment.serving.models import ServedModel
from transfer.errors import UserError
from transfer.storage import checkpoint

SECONDS = 60
"""Time limit of one mutation."""
BATCH = 25
"""Mutations per forked process."""
MEMORY_BYTES = 12 * 2**30
"""Address space of a process: a mutation that asks for more gets an error, not the memory of the machine."""
PLAIN = {".json", ".jsonl", ".yaml"}
BAIT = "fuzzer_bait"
"""Importable module that no entry point names. Importing it writes a file into the scene."""
BOMB = b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n".encode() for n in range(1, 10)
)

TEXT: dict[str, Any] = {
    "data": {"name": "mini_reviews", "limit": 20},
    "backbone": {"name": "textcnn", "vectors": None, "dimensions": 4, "filters": 2, "kernel_sizes": [2]},
    "train": {"batch_size": 16, "phases": [{"epochs": 1, "freeze": ["embedding"]}, {"epochs": 1}]},
}
IMAGE: dict[str, Any] = {
    "data": {"name": "shapes", "image_size": 32, "limit": 24},
    "backbone": {
        "name": "torchvision",
        "model": "shufflenet_v2_x0_5",
        "weights": None,
        "image_size": 32,
        "resize": 32,
    },
    "train": {"batch_size": 16, "phases": [{"epochs": 1, "freeze": "backbone"}]},
}
SPACE = "sweep: {trials: %d, sampler: {name: random, seed: 1}, pruner: {name: none}}\ntrain.batch_size: [8, 16]\n"


class StoppedError(BaseException):
    """Stands in for a signal that nothing can catch."""


class HangError(BaseException):
    """A command did not end in time."""


def exit_status(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; return its exit status and everything that it printed."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["transfer", *arguments]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), printed.getvalue()
    return 0, printed.getvalue()


# ------------------------------------------------------------------------------------------------------------- damage


def value(random_: random.Random, depth: int = 2) -> Any:
    """Return plain data of any type: numbers at limits, paths, names of code, text that is no UTF-8."""
    simple: list[Any] = [None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -1e308, float("nan"), float("inf")]
    simple += ["", "..", "../../outside", "/outside", "\x1b[31mred", "linear", "\ud800", "a" * 300, "\0", "-x"]
    simple += [BAIT, f"{BAIT}:run", f"{BAIT}.run", "os:system", "${HOME}", "http://127.0.0.1:9/x", "a\nb", 3, "2"]
    if depth and random_.random() < 0.2:
        return [value(random_, depth - 1) for _ in range(random_.randrange(3))]
    if depth and random_.random() < 0.2:
        return {random_.choice(["name", "x", ""]): value(random_, depth - 1) for _ in range(random_.randrange(3))}
    return random_.choice(simple)


def locations(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value below a node."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from locations(child, (*at, key))


def retyped(random_: random.Random, content: Any) -> Any:
    """Drop, replace, wrap or add a value anywhere in plain data."""
    content = copy.deepcopy(content)
    everywhere = list(locations(content))
    if not everywhere:
        return value(random_)
    # Evenly over the depths: a file may contain thousands of words and few keys.
    depth = random_.choice(sorted({len(location) for location in everywhere}))
    *way, key = random_.choice([location for location in everywhere if len(location) == depth])
    parent = content
    for step in way:
        parent = parent[step]
    action = random_.choice(["drop", "replace", "replace", "wrap", "add"])
    if action == "drop":
        del parent[key]
    elif action == "wrap":
        parent[key] = [parent[key]]
    elif action == "add" and isinstance(parent, dict):
        parent[random_.choice(["name", "x", *map(str, parent)])] = value(random_)
    else:
        parent[key] = value(random_)
    return content


class _Payload:
    """Object whose pickle writes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


def damaged(random_: random.Random, path: Path, executed: Path) -> bytes:
    """Flip bits of a file, cut it, insert bytes, replace it, or change one value of its plain data."""
    content = path.read_bytes()
    if path.suffix in PLAIN and random_.random() < 0.6:
        with contextlib.suppress(ValueError, yaml.YAMLError, RecursionError):  # an earlier mutation
            if path.suffix == ".yaml":
                return yaml.safe_dump(retyped(random_, yaml.safe_load(content))).encode("utf-8", "surrogatepass")
            lines = content.splitlines() if path.suffix == ".jsonl" else [content]
            return b"\n".join(json.dumps(retyped(random_, json.loads(line))).encode() for line in lines)
    if not content:
        return random_.randbytes(random_.randrange(8))
    # The first bytes of a file determine the meaning of the rest.
    place = random_.randrange(min(len(content), 400) if random_.random() < 0.5 else len(content))
    match random_.choice(["flip", "cut", "insert", "replace"]):
        case "flip":
            return content[:place] + bytes([content[place] ^ (1 << random_.randrange(8))]) + content[place + 1 :]
        case "cut":
            return content[:place]
        case "insert":
            return content[:place] + random_.randbytes(random_.randint(1, 9)) + content[place:]
    others = [b"", b"{}", b"[]", b"null", b"\0" * 64, b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", BOMB]
    others += [b"1" * 5000, b"NaN", b"x: !!python/object/apply:os.system ['exit 1']", pickle.dumps(_Payload(executed))]
    return random_.choice(others)


def hostile_tensors(random_: random.Random, path: Path) -> bytes:
    """Change the dtype, shape, name or values of one tensor of a file."""
    content = path.read_bytes()
    try:
        tensors = load(content)
    except Exception:  # an earlier mutation
        return content
    if not tensors:
        return content
    name = random_.choice(sorted(tensors))
    tensor = tensors.pop(name)
    match random_.choice(["dtype", "cut", "shape", "drop", "rename", "nan", "large"]):
        case "dtype":
            tensors[name] = tensor.to(random_.choice([torch.float64, torch.int8, torch.bool, torch.float16]))
        case "cut":
            tensors[name] = tensor.reshape(-1)[:1].clone()
        case "shape":
            tensors[name] = tensor.unsqueeze(0)
        case "rename":
            tensors[random_.choice(["x", "", name + "x", *tensors])] = tensor
        case "nan" if tensor.is_floating_point():
            tensors[name] = torch.full_like(tensor, torch.nan)
        case "large":
            tensors[name] = tensor.new_full(tensor.shape, 100)
    return save(tensors)


def edit_study(random_: random.Random, path: Path) -> None:
    """Write any value into a column of a SQLite file, drop a table, or delete its rows."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as study:
        tables = [row[0] for row in study.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        table = random_.choice(sorted(tables))
        column = random_.choice([row[1] for row in study.execute(f'PRAGMA table_info("{table}")')])
        new = random_.choice(
            ["RUNNING", "COMPLETE", "folder", "../..", "{", "{}", '"../../x"', "9" * 99, -1, None, 2**62]
        )
        statements = [f'UPDATE "{table}" SET "{column}" = ?'] * 8 + [f'DELETE FROM "{table}"', f'DROP TABLE "{table}"']
        statement = random_.choice(statements)
        with study:
            study.execute(statement, [new] if "?" in statement else [])


def refresh_digests(folder: Path) -> None:
    """Write the digests of checkpoints and cache entries again, as somebody would who wants them to be accepted."""
    for path in [*folder.rglob("state.json"), *folder.rglob("entry.json")]:
        try:
            if not path.is_file():
                continue
            state = json.loads(path.read_bytes())
            state.pop("own_sha256", None)
            files = [file for file in path.parent.iterdir() if file.name in state["sha256"] and file.is_file()]
            state["sha256"] |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
            if path.name == "state.json":
                state["own_sha256"] = checkpoint._digest_of(state)
            path.write_text(json.dumps(state), encoding="utf-8")
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            continue  # damaged beyond that


def mutate(random_: random.Random, path: Path, executed: Path) -> None:
    """Damage a file, or put a link, a pipe or a folder in its place."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size > 2**26:
        return  # an earlier mutation
    action = random_.choice(["content"] * 9 + ["special"] * 3 + ["missing", "pipe", "loop", "link", "folder"])
    if action == "special" and path.suffix == ".safetensors":
        path.write_bytes(hostile_tensors(random_, path))
    elif action == "special" and path.suffix == ".db":
        edit_study(random_, path)
    elif action in ("content", "special"):
        path.write_bytes(damaged(random_, path, executed))
    else:
        path.unlink()
        if action == "pipe":
            os.mkfifo(path)
        elif action == "folder":
            path.mkdir()
        elif action == "loop":
            path.symlink_to(path.name)
        elif action == "link":
            path.symlink_to(random_.choice(["/dev/zero", "../../keep.txt", "../keep.txt", "."]))


# -------------------------------------------------------------------------------------------------------------- kinds

Act = Callable[[Path], tuple[int, str]]


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Args:
        build: Function that writes an intact folder below a path, and returns the folder.
        acts: Functions that give the folder to a command by name, and return the exit status and the output.
        files: Pattern of the relative paths of the files that are damaged.
        often: Names of files that are damaged as often as all others together.
        refused: Names of the commands that refuse the intact folder too, because it is incomplete.
    """

    build: Callable[[Path], Path]
    acts: dict[str, Act]
    files: str = ".*"
    often: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def command(name: str, *options: str) -> Act:
    """Return a function that runs a command with the folder as its first argument."""
    return lambda folder: exit_status(name, str(folder), *options)


def served(folder: Path) -> tuple[int, str]:
    """Read a model and warm it up as ``transfer serve`` does, and send it a request."""
    try:
        model = ServedModel.read("model", folder)
        model.describe()
        model.example()
        contents = {"image/*": Path("out/image.png").read_bytes()}
        return 0, str(model.predict([{k: contents.get(v.media_type, b"a good film") for k, v in model.inputs.items()}]))
    except UserError as error:
        return 2, str(error)


def exported(folder: Path) -> tuple[int, str]:
    """Export a run; the verification in a fresh process takes seconds and is left out."""
    with mock.patch("transfer.deployment.export._compare", return_value=(0.0, 1, frozenset())):
        return exit_status("export", str(folder), "--format", "safetensors")


def fine_tuned(folder: Path) -> tuple[int, str]:
    """Start a run from the weights of the folder, in an output folder that may change."""
    (config := Path("out") / "tuned.yaml").write_text(yaml.safe_dump(TEXT), encoding="utf-8")
    return exit_status("run", str(config), f"backbone.weights={folder}", "--quick", "--output", "out/runs")


def compared(folder: Path) -> tuple[int, str]:
    """Compare a folder with itself and with an intact one."""
    return exit_status("compare", str(folder), str(Path("intact").resolve()))


def swept(folder: Path) -> tuple[int, str]:
    """Continue a sweep with a third trial. The name of its folder is that of the config and of the space."""
    named = folder.with_name("text-space")
    folder.rename(named)
    Path("out/text.yaml").write_text(yaml.safe_dump(TEXT), encoding="utf-8")
    Path("out/space.yaml").write_text(SPACE % 3, encoding="utf-8")
    try:
        return exit_status("sweep", "out/text.yaml", "out/space.yaml", "--output", str(named.parent))
    finally:
        named.rename(folder)


def with_cache(act: Callable[[], tuple[int, str]]) -> Act:
    """Return a function that runs a command with a folder as the user's cache."""

    def run(folder: Path) -> tuple[int, str]:
        with mock.patch.dict(os.environ, TRANSFER_CACHE=str(folder)), everything_cached():
            return act()

    return run


@contextlib.contextmanager
def everything_cached() -> Iterator[None]:
    """Cache small collections of texts too."""
    with (
        mock.patch("transfer_text.encoding.text_blocks.MIN_CACHED_CHARACTERS", 1),
        mock.patch("transfer_text.encoding.vocabulary.MIN_CACHED_WORDS", 1),
    ):
        yield


def vectors_file() -> str:
    """Write word vectors, always with the same time, which is part of the key of their cache entry."""
    path = Path("out/vectors.txt")
    path.write_text("good 1 0 0 0\nbad 0 1 0 0\nfilm 0 0 1 0\n", encoding="utf-8")
    os.utime(path, (1, 1))
    return str(path.resolve())


def cached_run() -> tuple[int, str]:
    """Train with word vectors, cached texts and cached features."""
    Path("out/text.yaml").write_text(yaml.safe_dump(TEXT), encoding="utf-8")
    options = [f"backbone.vectors={vectors_file()}", "backbone.vectors_vocabulary=true"]
    options += ["train.phases=[{epochs: 1, freeze: backbone}]", "--output", "out/runs"]
    return exit_status("run", "out/text.yaml", *options)


def build(config: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda folder: transfer.run(copy.deepcopy(config), output=folder).folder


def build_stopped(folder: Path) -> Path:
    """Return a run that was killed in its second epoch, with checkpoints of an optimizer, a moving average and more."""
    saving, count = checkpoint.save, 0

    def counting(*arguments: Any, **options: Any) -> None:
        nonlocal count
        saving(*arguments, **options)
        count += 1
        if count == 3:
            raise StoppedError

    options = ["train.ema=0.9", "train.optimizer={name: adam}", "train.scheduler={name: cosine}"]
    options += ["train.phases=[{epochs: 3}]", "train.checkpoint.every_steps=1"]
    with mock.patch.object(checkpoint, "save", counting), contextlib.suppress(StoppedError):
        transfer.run(copy.deepcopy(TEXT), options, output=folder)
    (run,) = folder.iterdir()
    return run


def build_seeds(folder: Path) -> Path:
    """Return a folder of two seeds, of which the second has no summary."""
    run = transfer.run_seeds(copy.deepcopy(TEXT), ["train.phases=[{epochs: 1}]"], seeds=2, output=folder).folder
    (run / "summary.json").unlink()
    (run / "seed-1" / "summary.json").unlink()
    return run


def build_sweep(folder: Path) -> Path:
    (folder / "text.yaml").write_text(yaml.safe_dump(TEXT), encoding="utf-8")
    (folder / "space.yaml").write_text(SPACE % 2, encoding="utf-8")
    return transfer.sweep(folder / "text.yaml", folder / "space.yaml", output=folder / "sweeps").folder


def build_export(folder: Path) -> Path:
    run = transfer.run(copy.deepcopy(TEXT), output=folder, quick=True).folder
    assert exported(run)[0] == 0
    return run / "export" / "safetensors"


def build_cache(folder: Path) -> Path:
    (folder / "cache").mkdir()
    status, printed = with_cache(cached_run)(folder / "cache")
    assert status == 0, printed
    return folder / "cache"


PREDICT = {"predict": command("predict", "a good film"), "serve": served}
ALL = {name: command(name) for name in ("evaluate", "report", "resume", "clean")}
KINDS: dict[str, Kind] = {
    "run": Kind(build(TEXT), PREDICT | ALL | {"export": exported, "compare": compared}),
    "image run": Kind(
        build(IMAGE), {"predict": command("predict", "out/image.png"), "serve": served} | ALL | {"export": exported}
    ),
    "stopped run": Kind(build_stopped, ALL, refused=("evaluate", "report", "clean")),
    "seeds": Kind(
        build_seeds,
        {n: command(n) for n in ("resume", "evaluate")} | {"compare": compared},
        often=("seeds.json",),
        refused=("evaluate", "compare"),
    ),
    "sweep": Kind(build_sweep, {"sweep": swept}, often=("study.db", "sweep.yaml", "sweep.json")),
    "model": Kind(build(TEXT), PREDICT | {"fine-tune": fine_tuned}, files=r"model/.*", often=("model/model.json",)),
    "export": Kind(build_export, PREDICT | {"fine-tune": fine_tuned}),
    "cache": Kind(
        build_cache,
        {
            "run": with_cache(cached_run),
            "list": with_cache(lambda: exit_status("cache", "list")),
            "clear": with_cache(lambda: exit_status("cache", "clear")),
        },
        files=r"(?!text/vocabulary).*",
    ),
}


# ------------------------------------------------------------------------------------------------------------- search


@dataclass
class Outcome:
    """Results of the mutations of one kind of folder."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[str]] = field(default_factory=dict)

    def add(self, number: int, result: str, failure: str | None, kind: str) -> None:
        self.counts[result] += 1
        if failure is not None:
            self.failures.setdefault(failure, []).append(f"{kind}:{number}")


class Scene:
    """A folder that contains a kind's intact folder, the damaged copy and everything that must not change.

    Args:
        kind: Name of the kind.
        root: Empty folder.
    """

    def __init__(self, kind: str, root: Path) -> None:
        self.kind = KINDS[kind]
        self.name = kind
        self.root = root.resolve()
        for name in ("around", "home", "tmp", "out", "cache", "bait", "built"):
            (self.root / name).mkdir()
        (self.root / "around" / "keep.txt").write_text("mine", encoding="utf-8")
        (self.root / "bait" / f"{BAIT}.py").write_text(
            f"open({str(self.executed)!r}, 'w')\nrun = print\n", encoding="utf-8"
        )
        _write_image(self.root / "out" / "image.png")

    @property
    def executed(self) -> Path:
        """File that exists if code of the folder was executed."""
        return self.root / "executed"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Work in the scene: folders of the user, current folder and import path."""
        variables = {"HOME": "home", "XDG_CACHE_HOME": "home", "TMPDIR": "tmp", "TRANSFER_CACHE": "cache"}
        before = Path.cwd()
        os.chdir(self.root)
        try:
            with (
                mock.patch.dict(os.environ, {name: str(self.root / folder) for name, folder in variables.items()}),
                mock.patch.object(tempfile, "tempdir", None),
                mock.patch.object(sys, "path", [*sys.path, str(self.root / "bait")]),
                mock.patch.object(os, "fsync", return_value=None),
            ):
                yield
        finally:
            os.chdir(before)

    def build(self) -> None:
        """Write the intact folder."""
        with self.entered():
            self.kind.build(self.root / "built").rename(self.root / "intact")
        shutil.rmtree(self.root / "built")

    def check_intact(self) -> None:
        """Require that every command accepts the intact folder: otherwise the search would find nothing."""
        with self.entered():
            for name, act in self.kind.acts.items():
                status, printed = act(self._copy())
                assert status == 0 or name in self.kind.refused, f"{self.name}, {name}: {printed}"

    def _copy(self) -> Path:
        copied = self.root / "around" / "folder"
        shutil.rmtree(copied, ignore_errors=True)
        return Path(shutil.copytree(self.root / "intact", copied, symlinks=True))

    def _tree(self) -> dict[str, tuple[int, int]]:
        """Return time and size of everything that must not change."""
        free = tuple(str(self.root / name) for name in ("around/folder", "around/text-space", "out", "tmp", "cache"))
        paths = [path for path in self.root.rglob("*") if not str(path).startswith(free)]
        # The folder around the damaged one may have had a temporary folder in it.
        return {
            str(path): (path.lstat().st_mtime_ns, path.lstat().st_size)
            for path in paths
            if path != self.root / "around"
        }

    def attack(self, number: int, *, show: bool = False) -> tuple[str, str | None]:
        """Damage a copy of the folder and give it to a command; return the kind of outcome, and its failure if any."""
        random_ = random.Random(f"{self.name} {number}")
        with self.entered():
            folder = self._copy()
            paths = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
            paths = [path for path in paths if re.fullmatch(self.kind.files, path)]
            name, act = random_.choice(list(self.kind.acts.items()))
            for _ in range(random_.choice([1, 1, 1, 3])):
                names = self.kind.often if self.kind.often and random_.random() < 0.5 else paths
                mutate(random_, folder / random_.choice(names), self.executed)
            if random_.random() < 0.5:
                refresh_digests(folder)
            shutil.rmtree(self.root / "tmp")
            (self.root / "tmp").mkdir()
            before = self._tree()
            try:
                with time_limit():
                    status, printed = act(folder)
                assert status in (0, 1, 2), f"exit status {status}"
                assert printed.strip(), "nothing was printed"
                assert "Traceback" not in printed, "a traceback was printed"
                control = set(printed) & {chr(code) for code in range(32)} - {"\n"}
                assert not control, f"control characters were printed: {control!r}"
            except HangError:
                return "hang", f"{name} does not end"
            except Exception as error:
                if show:
                    traceback.print_exc()
                frames = traceback.extract_tb(error.__traceback__)
                ours = [f for f in frames if "/transfer" in f.filename and "folder_fuzzer" not in f.filename]
                where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in [frames[-1], *ours[-2:][::-1]])
                return "traceback", f"{name}: {type(error).__name__}: {str(error)[:160]} at {where}"
            after = self._tree()
            if self.executed.exists():
                self.executed.unlink()
                return "executed", f"{name} executes code of the folder"
            if after != before:
                changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
                return "outside", f"{name} changes {[key.removeprefix(str(self.root)) for key in changed][:3]}"
            return ("accepted" if status == 0 else "refused"), None


def _write_image(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(path)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _forked(target: Callable[[Connection], None]) -> tuple[Any, Connection]:
    """Start a function in a forked process; return the process and the connection on which it sends results."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs,))
    process.start()
    theirs.close()
    return process, ours


def _batch(scene: Scene, numbers: Sequence[int], connection: Connection) -> None:
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for number in numbers:
        connection.send((number, scene.attack(number)))


def _build(scene: Scene, connection: Connection) -> None:
    scene.build()
    scene.check_intact()
    connection.send("built")


def search(scene: Scene, numbers: Sequence[int]) -> Outcome:
    """Try mutations in forked processes. A process that dies or does not answer is an outcome of its mutation."""
    outcome = Outcome()
    remaining = list(numbers)
    while remaining:
        batch, position = remaining[:BATCH], 0
        process, connection = _forked(lambda theirs, batch=batch: _batch(scene, batch, theirs))
        while position < len(batch):
            try:
                # An alarm cannot end code outside of Python, such as a library that waits for a pipe.
                number, (result, failure) = (
                    connection.recv()
                    if connection.poll(SECONDS + 30)
                    else (batch[position], ("hang", "does not answer"))
                )
            except EOFError:
                process.join()
                number, result, failure = batch[position], "abort", f"the process ended with {process.exitcode}"
            outcome.add(number, result, failure, scene.name)
            position += 1
            if failure in ("does not answer",) or result == "abort":
                break
        if process.is_alive() and position < len(batch):
            process.kill()
        process.join()
        connection.close()
        remaining = remaining[position:]
    return outcome


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1000, help="number of mutations of all kinds together")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation of each kind")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", help="KIND:NUMBER; repeat one mutation in this process, and show the traceback")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _repeat(only: str) -> None:
    kind, _, number = only.rpartition(":")
    root = Path(tempfile.mkdtemp())
    scene = Scene(kind, root)
    scene.build()
    faulthandler.enable()
    print(root)
    print(scene.attack(int(number), show=True))


def _part(options: argparse.Namespace) -> None:
    """Search in this process, and print the outcomes of all kinds as one line of JSON."""
    # Commands import these when they run: each forked process would import them again, which takes seconds.
    for module in ("training.engine", "reports.report", "experiments.comparison", "experiments.sweep"):
        importlib.import_module(f"transfer.{module}")
    results = {}
    each = -(-options.mutations // len(options.kinds))
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as root:
            scene = Scene(kind, Path(root))
            process, connection = _forked(lambda theirs, scene=scene: _build(scene, theirs))
            process.join()
            assert process.exitcode == 0, f"the folder of the kind {kind} cannot be built"
            connection.close()
            numbers = range(options.first + options.part, options.first + each, options.processes)
            outcome = search(scene, numbers)
        results[kind] = [outcome.counts, outcome.failures]
        print(f"{kind}: {dict(outcome.counts)}", file=sys.stderr, flush=True)
    print(json.dumps(results))


def main() -> int:
    """Search in several processes, and print a table of the outcomes."""
    options = _arguments()
    torch.set_num_threads(1)
    if options.only:
        _repeat(options.only)
        return 0
    if options.part is not None:
        _part(options)
        return 0
    start = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    commands = [[sys.executable, __file__, *sys.argv[1:], "--part", str(part)] for part in range(options.processes)]
    processes = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) for line in commands]
    total: dict[str, Outcome] = {kind: Outcome() for kind in options.kinds}
    status = 0
    for process in processes:
        printed, _ = process.communicate()
        status |= process.returncode
        for kind, (counts, failures) in json.loads(printed.splitlines()[-1] if printed else "{}").items():
            total[kind].counts.update(counts)
            for failure, names in failures.items():
                total[kind].failures.setdefault(failure, []).extend(names)
    columns = ("accepted", "refused", "traceback", "abort", "hang", "outside", "executed")
    print(f"{'kind':12}", *(f"{column:>9}" for column in ("mutations", *columns)))
    for kind, outcome in total.items():
        row = (outcome.counts.total(), *(outcome.counts[column] for column in columns))
        print(f"{kind:12}", *(f"{count:9d}" for count in row))
    print(f"{sum(outcome.counts.total() for outcome in total.values())} mutations in {time.monotonic() - start:.0f} s")
    for outcome in total.values():
        for failure, names in sorted(outcome.failures.items(), key=lambda item: -len(item[1])):
            print(f"{len(names)} x {failure}   {', '.join(names[:3])}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
