"""README.md and docs/: every command, script and config in them is run, as it stands, in a folder where all is small.

A page is read downward. Of its fenced blocks, those without a language hold commands, a line each; ``python`` is
executed; ``yaml`` is checked, and written to the file that its first line names (``# transfer run my.yaml``); ``text``
shows what the commands above it print; ``toml`` and ``json`` are read. Where a comment says ``exit status 2``, it is.

What cannot be downloaded or takes long is stood in for (``small``, ``STAND_INS``); what cannot be run at all is listed
with its reason (``NOT_RUN``). A new page needs nothing; a command that needs more than is here fails, saying so.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import typer
import yaml
from PIL import Image
from safetensors.torch import save_file

import transfer
from transfer.cli import app as cli
from transfer.cli.plugin_subcommands import all_commands
from transfer.config.json_schema import config_schema
from transfer.config.run_config import RunConfigSchema
from transfer.config.train_settings import TrainConfig
from transfer.registry import entry_points as registry

ROOT = Path(__file__).parents[2]
PAGES = sorted(str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

WHAT_TO_DO = """
Make the page true, or give the command what it needs in tests/e2e/test_documentation.py: a file in `own_files`, a
meaning of a placeholder in PLACEHOLDERS or OF_PAGES, something smaller in STAND_INS, or, where it cannot be run here,
its reason in NOT_RUN (scripts: NOT_EXECUTED)."""


# ------------------------------------------------------------------------------------------------ what stands in for it


def has_target(words: list[str]) -> bool:
    return f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")


def has_script(words: list[str]) -> bool:
    return any((ROOT / word).is_file() for word in words)


def has_extras(words: list[str]) -> bool:
    extras = [extra for word in words for extra in re.findall(r"(?:^transfer|^\.)\[(\w+)]", word)]
    return all(extra in PROJECT["optional-dependencies"] for extra in extras)


def anything(_: list[str]) -> bool:
    return True


# What a command begins with, why it is not run here, and what is looked up instead.
NOT_RUN = {
    "make": ("sets up environments and runs tests; CI runs check and test", has_target),
    "torchrun": ("tests/e2e/test_distributed.py starts several processes", anything),
    "accelerate launch": ("the same", anything),
    "srun": ("tests/training/test_distributed_refusals.py reads the variables that it sets", anything),
    "pip": ("installs packages; the extras are those of pyproject.toml", has_extras),
    ".venv/bin/python benchmarks/": ("takes minutes; what it gave stands below it", has_script),
    "python reviews/predict.py": ("tests/deployment/test_export.py runs the script of an export", anything),
    "transfer audit": ("needs timm and cleanlab: tests/experiments/test_audit.py", anything),
    "transfer run configs/hymenoptera_efficientnet.yaml data.exclude": ("the same", anything),
    "transfer probe configs/hymenoptera_efficientnet.yaml": ("needs timm; the README has another", anything),
    "cd transfer-sonar": ("tests/e2e/test_new_plugin.py installs, tests and trains what new-plugin writes", anything),
    "pytest": ("the same", anything),
    "transfer run sonar.yaml": ("the same", anything),
}
# Scripts by a line of theirs.
NOT_EXECUTED = {
    'contracts("transfer-sonar"': "tests/e2e/test_new_plugin.py runs it in the package that new-plugin writes",
    'contracts("my-package"': "the same with names of the reader's own",
}
# In commands, in this order.
STAND_INS = {
    r"(transfer pretraining-gain (?!.*--seeds).*)": r"\1 --seeds 2",  # the default is 5
    r"--seeds 5": "--seeds 2",
    r"(transfer export (?!.*--dry-run).*)": r"\1 --dry-run",  # tests/core/test_exporting.py exports every format
    r"(transfer push (?!.*--dry-run).*)": r"\1 --dry-run",  # tests/deployment/test_push.py uploads to a local server
    r"--processes 2": "",  # each imports torch anew; tests/core/test_sweep.py has several
    r"epochs: \d+": "epochs: 2",
    r"(recipe=.*epochs: )2": r"\g<1>4",  # a part for each phase
}
DATA = {
    "imdb": {"name": "mini_reviews", "limit": 12},
    "mini_reviews": {"limit": 12},
    "hymenoptera": {"name": "shapes", "per_class": 12, "image_size": 32},
    "hotdog": {"name": "shapes", "per_class": 12, "image_size": 32},
    "shapes": {"per_class": 12, "image_size": 32},
}
TINY_NETWORK = {"name": "torchvision", "model": "squeezenet1_1", "weights": "squeezenet1_1.safetensors"}


def small(config: dict[str, Any], network: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Return the config of a run of a second: few examples, small pictures, two epochs a phase, nothing downloaded.

    Args:
        config: As a page or a shipped file has it.
        network: Replaces options of a backbone for pictures.
    """
    data = config["data"] | DATA.get(config["data"]["name"], {})
    config = config | {"data": data, "train": dict(config.get("train", {}))}
    if data["name"] == "mini_reviews":
        data.pop("validation", None)
    if phases := config["train"].get("phases"):
        config["train"]["phases"] = [phase | {"epochs": 2} for phase in phases]
    config["backbone"] = _small_backbone(config["backbone"], network)
    return config


def _small_backbone(backbone: dict[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
    if "parts" in backbone:
        return backbone | {"parts": {key: _small_backbone(part, network) for key, part in backbone["parts"].items()}}
    if backbone.get("vectors", "").startswith("glove"):
        return backbone | {"vectors": "mini", "min_frequency": 1}
    if backbone["name"].startswith(("resnet", "torchvision")):
        return backbone | {"weights": None, "image_size": 32, "resize": 32} | network
    return backbone


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what every page finds: configs that are small, files of one's own, and two runs."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        network = TINY_NETWORK if config["data"]["name"] in ("hymenoptera", "hotdog") else {}
        (folder / "configs" / path.name).write_text(yaml.safe_dump(small(config, network)), encoding="utf-8")
    save_file(torchvision.models.squeezenet1_1().state_dict(), folder / str(TINY_NETWORK["weights"]))
    for name in ("my.yaml", "config.yaml"):
        shutil.copy(folder / "configs/quickstart_text.yaml", folder / name)
    for kind in ("text", "vision"):
        run = transfer.run(folder / f"configs/quickstart_{kind}.yaml", output=folder / "runs")
        run.folder.rename(folder / "runs" / kind)
    own_files(folder)
    return folder


def own_files(folder: Path) -> None:
    """Write what a reader brings: pictures, texts, tables."""
    for number, (split, name) in enumerate(product(("train", "val"), ("ants", "bees"))):
        pictures = folder / "images" / split / name
        pictures.mkdir(parents=True)
        for shade in range(8):
            Image.new("RGB", (40, 36), (30 * shade, 60 * number, 90)).save(pictures / f"{shade}.jpg")
    shutil.copy(folder / "images/train/ants/1.jpg", folder / "ant.jpg")
    for name, numbers in (("reviews.csv", range(40)), ("held_out.csv", range(40, 52))):
        rows = [f"a {word} film {number},{word}" for number, word in zip(numbers, cycle(("good", "bad")))]
        (folder / name).write_text("\n".join(["review,sentiment", *rows]) + "\n", encoding="utf-8")
    (folder / "new.csv").write_text("text,label\na good film,positive\na bad film,negative\n", encoding="utf-8")
    (folder / "space.yaml").write_text(
        "sweep: {trials: 2}\ntrain.optimizer.lr: {log: [1.0e-5, 0.1]}\n", encoding="utf-8"
    )
    (folder / "letters").mkdir()
    for path in ("letter.txt", "letters/one.txt", "letters/two.txt", "reviews.txt"):
        (folder / path).write_text("worth every minute\n", encoding="utf-8")


PLACEHOLDERS = {
    "RUN": "runs/text",
    "RUN...": "runs/text",
    "VISION_RUN": "runs/vision",
    "CONFIG": "configs/quickstart_text.yaml",
    "INPUT...": "'worth every minute'",
    "runs/A": "runs/text",
    "runs/B": "runs/vision",
}
"""What a page leaves to the reader; RUN is the page's own last run of a config, once it has trained one."""
OF_PAGES = {
    "docs/evaluating.md": {"runs/A": "runs/text", "runs/B": "runs/text", "runs/C": "runs/text"},
}


# -------------------------------------------------------------------------------------------------------------- a page


@dataclass(frozen=True)
class Block:
    """A fenced block, and the line at which its text begins."""

    language: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(found[1], found[2], text.count("\n", 0, found.start(2)) + 1)


class Reader:
    """Does what a page says, downward.

    Args:
        page: Its path from the project's root.
        capture: Reads what was printed.
        monkeypatch: Ends with the test.
    """

    def __init__(self, page: str, capture: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.page = page
        self.capture = capture
        self.monkeypatch = monkeypatch
        self.placeholders = PLACEHOLDERS | OF_PAGES.get(page, {})
        self.names: dict[str, Any] = {"__name__": "page"}
        self.printed = ""
        self.requests: list[str] = []
        self.answers: dict[str, subprocess.CompletedProcess[str]] = {}
        self.left_out: set[str] = set()

    def read(self) -> None:
        found = list(blocks(self.page))
        shell = [line for block in found if not block.language for line in lines_of(block.text)]
        self.requests = [line for line in shell if line.startswith("curl ")]
        for block in found:
            match block.language:
                case "":
                    self.printed = ""
                    for offset, line in enumerate(block.text.splitlines()):
                        self.type(line, block.line + offset)
                case "python":
                    self.execute(block)
                case "yaml":
                    self.check(block)
                case "toml":
                    self.check_entry_points(block)
                case "json":
                    for line in block.text.splitlines():
                        json.loads(line)
                case "text":
                    self.compare(block)
                case other:
                    self.wrong(block.line, f"this test does not know what a block of {other} is")
        for request in self.requests if shutil.which("curl") else ():
            answer = self.answers.get(request)
            if answer is None or answer.returncode or "label" not in json.loads(answer.stdout):
                self.wrong(1, f"{request}\n{answer.stdout if answer else 'no model that the page serves is asked'}")

    def wrong(self, line: int, what: str) -> None:
        pytest.fail(f"{self.page}:{line}: {what}\n{WHAT_TO_DO}", pytrace=False)

    # ------------------------------------------------------------------------------------------------ commands

    def type(self, line: str, number: int) -> None:
        """Run a command, unless it is one of those that cannot be run here."""
        command = without_comment(line)
        if not command:
            return
        words, expected = shlex.split(command), 2 if "exit status 2" in line else 0
        for beginning, (_, looks_right) in NOT_RUN.items():
            if command.startswith(beginning):
                self.left_out.add(beginning)
                if not looks_right(words):
                    self.wrong(number, f"{command}: there is no such target, script or extra")
                return
        if words[0] == "curl":  # asked of the server that the page starts
            return
        if words[0] != "transfer":
            self.wrong(number, f"{command}: this test does not know how to run {words[0]}")
        status, said = self.run(command)
        if status != expected:
            self.wrong(number, f"{command}\nexit status {status}\n{said}")

    def run(self, command: str) -> tuple[int, str]:
        """Run a command of ours in this process; return its exit status and what it printed."""
        for pattern, replacement in STAND_INS.items():
            command = re.sub(pattern, replacement, command)
        for name in sorted(self.placeholders, key=len, reverse=True):
            command = re.sub(rf"(?<![\w/]){re.escape(name)}(?![\w])", self.placeholders[name], command)
        command, _, source = command.partition(" < ")
        words = [word for part in shlex.split(command)[1:] for word in (sorted(glob.glob(part)) or [part])]
        stdin = io.StringIO(Path(source.strip()).read_text(encoding="utf-8") if source else "")
        self.monkeypatch.setattr(sys, "stdin", stdin)
        if words[0] == "serve":
            with self.visited() as port:
                status = self.call([*words, "--port", str(port)])
            status = 0 if status == 128 + signal.SIGTERM else status
        else:
            status = self.call(words)
        out, err = self.capture.readouterr()
        self.printed += out + err
        last = Path(out.splitlines()[-1]) if out.strip() else Path()
        if words[0] == "run" and status == 0 and "--quick" not in words and (last / "config.yaml").is_file():
            self.placeholders["RUN"] = self.placeholders["RUN..."] = str(last)
        return status, out + err

    def call(self, words: list[str]) -> int:
        self.monkeypatch.setattr(sys, "argv", ["transfer", *words])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    @contextmanager
    def visited(self) -> Iterator[int]:
        """Yield a free port; what listens there is asked the page's requests and then told to end."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]

        def visit() -> None:
            served = models_at(f"http://127.0.0.1:{port}")
            try:
                for request in self.requests:
                    name = re.search(r"models/([^/]+)/", request)
                    if name is None or name[1] in served:
                        here = request.replace("localhost:8000", f"127.0.0.1:{port}")
                        asked = [*shlex.split(here), "--silent", "--fail-with-body"]
                        self.answers[request] = subprocess.run(asked, capture_output=True, text=True, check=False)
            finally:
                if served:
                    os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=visit)
        thread.start()
        yield port
        thread.join()

    # -------------------------------------------------------------------------------------------- scripts, configs

    def execute(self, block: Block) -> None:
        """Execute a script, after those above it; one that cannot be is compiled."""
        code = compile("\n" * (block.line - 1) + block.text, self.page, "exec")
        for line in NOT_EXECUTED:
            if line in block.text:
                self.left_out.add(line)
                return
        try:
            exec(code, self.names)
        except Exception as error:
            self.wrong(block.line, f"{type(error).__name__}: {error}")
        self.printed = "".join(self.capture.readouterr())

    def check(self, block: Block) -> None:
        """Check a config, or each part of one; write it where the block's first line names a file."""
        named = re.match(r"# (?:transfer run )?([\w./-]+\.yaml)\b", block.text)
        if named is None:
            for line, part in parts_of(block.text):
                if problem := reason_not_cached(part):
                    self.wrong(block.line + line, problem)
            return
        content = yaml.safe_load(block.text)
        if "backbone" in content:
            try:
                transfer.check(content)
            except transfer.UserError as error:
                self.wrong(block.line, str(error))
            content = small(content)
        if "sweep" in content:
            content["sweep"]["trials"] = 2
        Path(named[1]).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    def check_entry_points(self, block: Block) -> None:
        """Hold every group of entry points to the kinds that there are."""
        project = tomllib.loads(block.text)["project"]
        groups = {f"transfer.{kind.removesuffix('s')}s" for kind in [*registry.kinds(), "command", "kind"]}
        if unknown := set(project.get("entry-points", {})) - groups:
            self.wrong(block.line, f"there is no group {', '.join(unknown)}")

    def compare(self, block: Block) -> None:
        """Hold what a page shows to what was printed, but for numbers, names of runs, and what `...` leaves out."""
        printed = {skeleton(line) for line in self.printed.splitlines()}
        for offset, line in enumerate(block.text.splitlines()):
            if (wanted := skeleton(line)) and not any(matches(wanted, found) for found in printed):
                self.wrong(block.line + offset, f"this is not what is printed:\n{line}\nbut\n{self.printed}")


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def models_at(address: str) -> list[str]:
    """Return the names of the models that are served there, once they are; none after fifteen seconds."""
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"{address}/models", timeout=5) as response:
                return [model["name"] for model in json.load(response)["models"]]
        except OSError:
            time.sleep(0.05)
    return []


def without_comment(line: str) -> str:
    """Return a line of shell without the comment at its end."""
    for found in re.finditer(r"(?:^|\s)#", line):
        before = line[: found.start()]
        if before.count("'") % 2 == before.count('"') % 2 == 0:
            return before.rstrip()
    return line


def skeleton(line: str) -> str:
    """Return what stays the same from run to run: no frames, blanks as one, any number as 0, any class as one."""
    line = re.sub(r"[+-]?\d[\d.,:-]*", "0", re.sub("[╭╮╰╯─│]", " ", line))
    return " ".join(re.sub("positive|negative", "CLASS", line).split())


def matches(wanted: str, found: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, wanted.split("..."))), found) is not None


def parts_of(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line and the value of every block at the left margin: each is an example of its own."""
    lines = text.splitlines()
    begins = [number for number, line in enumerate(lines) if re.match(r"\w", line)]
    for begin, end in pairwise([*begins, len(lines)]):
        yield begin, yaml.safe_load("\n".join(lines[begin:end]))


def reason_not_cached(part: dict[str, Any]) -> str | None:
    """Return what is wrong with a part of a config; nothing where some whole config with it passes the check."""
    (key,) = part
    if key == "adapter" and find_spec("peft") is None:  # tests/builtin/test_adapters.py trains one
        return None
    name = part[key].get("name") if isinstance(part[key], dict) else None
    if key == "backbone" and name in ("open_clip", "timm", "transformers"):
        # `make plugins` tests them; models may be downloaded.
        return None
    if key in TrainConfig.model_fields:
        part = {"train": part}
    elif key not in RunConfigSchema.model_fields:
        part = {"backbone": {"name": "resnet18", **part}}
    said = []
    choices = [[part[section]] if section in part else others for section, others in COMPLETIONS.items()]
    for chosen in product(*choices):
        try:
            transfer.check({**dict(zip(COMPLETIONS, chosen, strict=True)), **part})
        except transfer.UserError as error:
            said.append(str(error))
        else:
            return None
    return "\n".join(dict.fromkeys(said))


COMPLETIONS: dict[str, list[dict[str, Any]]] = {
    "task": [{"name": "classification"}, {"name": "multilabel"}, {"name": "regression"}],
    "head": [{"name": "linear"}, {"name": "attention"}],
    "data": [
        {"name": "shapes"},
        {"name": "mini_reviews"},
        {"name": "multimodal_csv", "train": "a.csv", "image": "image", "text": "text", "label": "label"},
    ],
    "backbone": [
        {"name": "torchvision", "model": "squeezenet1_1"},
        {"name": "resnet18"},
        {"name": "textcnn"},
        {"name": "fusion", "parts": {"image": {"name": "resnet18"}, "text": {"name": "textcnn"}}},
    ],
}


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Be in a folder of the page's own, where no data was ever downloaded and no network is."""
    for path in made.iterdir():
        if path.name == "configs":
            shutil.copytree(path, tmp_path / path.name)
        elif path.name == "runs":
            (tmp_path / "runs").mkdir()
            for run in path.iterdir():
                (tmp_path / "runs" / run.name).symlink_to(run)
        else:
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRANSFER_DATA", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("COLUMNS", "100")
    yield tmp_path
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("page", PAGES)
def test_a_page(page: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Reader(page, capsys, monkeypatch).read()


def test_what_is_left_out_is_still_there() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    commands = [line for block in found if not block.language for line in block.text.splitlines()]
    stale = [name for name in NOT_RUN if not any(line.startswith(name) for line in commands)]
    stale += [line for line in NOT_EXECUTED if not any(line in block.text for block in found)]
    assert stale == [], "no page has these any more: remove them from NOT_RUN and NOT_EXECUTED"


def prose(page: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page}: {target}"


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    pages = [Path(page).name for page in PAGES if page.startswith("docs/") and page != "docs/index.md"]
    assert [name for name in pages if f"]({name})" not in index] == [], "add them to docs/index.md"


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Every key that a config may have anywhere."""

    def walk(schema: Any) -> Iterator[str]:
        if isinstance(schema, dict):
            yield from schema.get("properties", {})
        for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
            yield from walk(inner)

    return set(walk(config_schema()[0]))


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_keys_in_the_text_exist(page: str, keys: set[str]) -> None:
    commands = all_commands(typer.main.get_command(cli.app))
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if found := re.match(r"(?:data|backbone|head|task|train)((?:\.\w+)+)(?:[:= ]|$)", code):
            unknown = [key for key in found[1].split(".")[1:] if not key.isdigit() and key not in keys]
            assert not unknown, f"{page}: `{code}`: no config has a key {unknown[0]}"
        words = code.split()
        if words[0] != "transfer" or len(words) == 1 or words[1] in ("NAME", "COMMAND") or words[1].startswith("-"):
            continue
        command = commands.get(words[1])
        assert command is not None, f"{page}: `{code}`: there is no such command"
        options = {name for parameter in command.params for name in parameter.opts}
        unknown = [word for word in words[2:] if word.startswith("--") and word.rstrip(".,") not in options]
        assert not unknown, f"{page}: `{code}`: {words[1]} has no option {unknown[0]}"


def test_reference_is_up_to_date() -> None:
    written = runpy.run_path(str(ROOT / "docs/reference.py"))["page"]()
    assert (ROOT / "docs/reference.md").read_text(encoding="utf-8") == written, "run: make reference"
