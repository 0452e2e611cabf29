"""What the benchmarks share: processes measured from outside, synthetic workloads, a plain loop beside the engine."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, default_collate

from transfer import Backbone, Data, DataError, Dataset, DataSpec, FeatureSpec, Preprocessing, Split, register
from transfer.config.check import load_config
from transfer.models.model import Model
from transfer.training import freezing as transfer_freezing
from transfer.training.build import build
from transfer_vision.models.resnet import ResNet18, ResNet50

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
"""Of both sides of every comparison on the CPU."""
BUSY = 0.1
"""Where others take more of the processor than this, times decide nothing."""
ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "weights/resnet18-tiny-imagenet.safetensors"

_TICKS = os.sysconf("SC_CLK_TCK")

Config = dict[str, Any]


# --------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """A command that ended.

    Args:
        seconds: From its start to its end, imports included.
        cpu_seconds: Of all its threads: on one thread hardly changed by what others do on the machine.
        peak_bytes: The most memory it had resident.
        lines: What it printed.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    lines: list[str]


def run_process(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Process:
    """Run a command to its end on two threads and measure it from outside; stop where it fails."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "TERM": "dumb", "COLUMNS": "200", **(environment or {})}
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().splitlines()
    if process.returncode:
        sys.exit("\n".join([*lines[-30:], f"exit status {process.returncode}: {' '.join(command)}"]))
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Process(seconds, cpu_seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), lines)


def transfer_run(config: str, overrides: Sequence[str], folder: Path, cache: Path) -> Process:
    """Run ``transfer run`` on a file of ``configs``; the last of its lines is the run's folder."""
    command = [sys.executable, "-m", "transfer", "run", str(ROOT / "configs" / config), *overrides]
    return run_process([*command, "--output", str(folder)], {"TRANSFER_CACHE": str(cache)})


def data_file(name: str) -> Path:
    """Return a file below ``$TRANSFER_DATA``, or say that it is not there and stop."""
    path = Path(os.environ.get("TRANSFER_DATA", ".")).expanduser().resolve() / name
    if not path.exists():
        sys.exit(f"this benchmark needs {name} in the folder that TRANSFER_DATA names; {path} does not exist")
    return path


# ------------------------------------------------------------------------------------------------------------ output


def machine(threads: int = THREADS) -> str:
    """Say what this runs on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    load = os.getloadavg()[0]
    return (
        f"{device}, {os.cpu_count()} cores, {threads} threads, load {load:.2f}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def wait_until_quiet(seconds: float, most: float = 0.8) -> None:
    """Wait at most so long for a load average below ``most``: others' work on a shared machine is noise."""
    until = time.monotonic() + seconds
    while os.getloadavg()[0] > most and time.monotonic() < until:
        time.sleep(5)


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows of equal keys as a Markdown table, numbers to the right."""
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    print("| " + " | ".join(name.ljust(width) for name, width in zip(names, widths, strict=True)) + " |")
    print("|" + "|".join(("-" * (w + 1) + ":") if i else "-" * (w + 2) for i, w in enumerate(widths)) + "|")
    for row in rows:
        cells = [row[n].rjust(w) if i else row[n].ljust(w) for i, (n, w) in enumerate(zip(names, widths, strict=True))]
        print("| " + " | ".join(cells) + " |", flush=True)


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Return the median with the least and the greatest value."""
    middle = statistics.median(values)
    if len(values) == 1:
        return format(middle, form)
    return f"{middle:{form}} ({min(values):{form}} to {max(values):{form}})"


def verdict(values: Sequence[float], target: float, others: float, *, at_least: bool = True) -> str:
    """Say whether a target is met by every value, by none, or not decided: by some, or on a busy machine."""
    met = [value >= target if at_least else value <= target for value in values]
    wanted = f"target {'at least' if at_least else 'at most'} {target:g}"
    if others > BUSY:
        return f"{wanted}: not decided, the machine was busy"
    return f"{wanted}: {'met' if all(met) else 'not decided' if any(met) else 'MISSED'}"


class Others:
    """How much of the processor other people's work took since this object was made (Linux; elsewhere unknown: 0)."""

    def __init__(self) -> None:
        self._before = self._now()

    def share(self) -> float:
        """Return that share, between 0 and 1."""
        busy, total, own = (now - before for now, before in zip(self._now(), self._before, strict=True))
        return max(0.0, busy - own) / total if total else 0.0

    def _now(self) -> tuple[float, float, float]:
        if not Path("/proc/stat").exists():
            return 0.0, 0.0, 0.0
        ticks = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own = sum(usage.ru_utime + usage.ru_stime for usage in used)
        idle = ticks[3] + ticks[4]
        return (sum(ticks) - idle) / _TICKS, sum(ticks) / _TICKS, own


# --------------------------------------------------------------------------------------------------- synthetic inputs


@register("dataset", "synthetic_tensors")
class SyntheticTensors(Dataset):
    """Random tensors in memory with labels in turn.

    Args:
        examples: Of the training split.
        shape: Of one example.
        classes: Number of classes.
        held_out: Examples of the validation and of the test split.
    """

    def __init__(self, *, examples: int, shape: tuple[int, ...], classes: int = 10, held_out: int = 16) -> None:
        self._examples, self._shape, self._held_out = examples, shape, held_out
        self._classes = tuple(f"class {number}" for number in range(classes))

    @property
    def spec(self) -> DataSpec:
        """A tensor and a class."""
        return DataSpec(("image",), "class", self._classes)

    def load(self) -> Data:
        """Draw the three splits."""
        splits = {}
        for seed, (name, count) in enumerate(_sizes(self._examples, self._held_out).items()):
            values = torch.randn(count, *self._shape, generator=torch.Generator().manual_seed(seed))
            splits[name] = Split({"image": list(values)}, np.arange(count) % len(self._classes))
        return Data(self.spec, splits)


@register("dataset", "synthetic_texts")
class SyntheticTexts(Dataset):
    """Texts of random words, between half and the whole of the greatest length.

    Args:
        examples: Of the training split.
        length: Words of the longest text.
        words: How many words there are.
        held_out: Examples of the validation and of the test split.
    """

    def __init__(self, *, examples: int, length: int, words: int, held_out: int = 16) -> None:
        self._examples, self._length, self._words, self._held_out = examples, length, words, held_out

    @property
    def spec(self) -> DataSpec:
        """A text and one of two classes."""
        return DataSpec(("text",), "class", ("negative", "positive"))

    def load(self) -> Data:
        """Draw the three splits."""
        splits = {}
        for seed, (name, count) in enumerate(_sizes(self._examples, self._held_out).items()):
            generator = np.random.default_rng(seed)
            lengths = generator.integers(self._length // 2, self._length, size=count, endpoint=True)
            texts = [" ".join(f"w{word}" for word in generator.integers(self._words, size=n)) for n in lengths]
            splits[name] = Split({"text": texts}, np.arange(count) % 2)
        return Data(self.spec, splits)


def _sizes(examples: int, held_out: int) -> dict[str, int]:
    return {"train": examples, "validation": held_out, "test": held_out}


class TensorPreprocessing(Preprocessing):
    """Take tensors as they are."""

    def encode(self, values: Sequence[Any]) -> Sequence[Any]:
        """Return the tensors."""
        return values

    def collate(self, encoded: Sequence[Any]) -> Tensor:
        """Stack them."""
        return torch.stack(list(encoded))

    def read(self, source: str) -> Any:
        """Refuse: there are no files."""
        raise DataError("synthetic tensors are not read from anywhere", where=source)


@register("backbone", "tensor_resnet18")
class TensorResNet18(ResNet18):
    """ResNet-18 over tensors that need no preprocessing."""

    @property
    def preprocessing(self) -> Any:
        """Nothing but stacking."""
        return TensorPreprocessing()


@register("backbone", "tensor_resnet50")
class TensorResNet50(ResNet50):
    """ResNet-50 over tensors that need no preprocessing."""

    @property
    def preprocessing(self) -> Any:
        """Nothing but stacking."""
        return TensorPreprocessing()


@register("backbone", "next_to_nothing")
class NextToNothing(Backbone):
    """Eight numbers through one small layer: what a step of it costs is what the loop costs."""

    field = "image"

    def __init__(self) -> None:
        super().__init__({"layer": nn.Linear(8, 8)})

    @property
    def features(self) -> FeatureSpec:
        """A vector of eight."""
        return FeatureSpec("vector", 8)

    @property
    def preprocessing(self) -> Preprocessing:
        """Nothing but stacking."""
        return TensorPreprocessing()


def vision_config(backbone: str, *, batch: int, steps: int, epochs: int, image_size: int = 224, **train: Any) -> Config:
    """Return the config of a ResNet from random weights on random tensors."""
    return {
        "seed": 0,
        "data": {
            "name": "synthetic_tensors",
            "examples": batch * steps,
            "shape": [3, image_size, image_size],
            "held_out": batch,
        },
        "backbone": {"name": f"tensor_{backbone}", "weights": None, "image_size": image_size},
        "head": {"name": "linear"},
        "task": {"name": "classification"},
        "train": {
            "batch_size": batch,
            "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
            "phases": [{"epochs": epochs, "freeze": "none"}],
            **train,
        },
    }


def text_config(*, batch: int, steps: int, epochs: int, length: int = 400, words: int = 20_000, **train: Any) -> Config:
    """Return the config of a TextCNN of the usual size on random texts."""
    return {
        "seed": 0,
        "data": {
            "name": "synthetic_texts",
            "examples": batch * steps,
            "length": length,
            "words": words,
            "held_out": batch,
        },
        "backbone": {"name": "textcnn", "tokenizer": "whitespace", "min_frequency": 1, "filters": 100},
        "head": {"name": "linear"},
        "task": {"name": "classification"},
        "train": {
            "batch_size": batch,
            "optimizer": {"name": "adam", "lr": 0.001},
            "phases": [{"epochs": epochs, "freeze": "none"}],
            **train,
        },
    }


def small_config(*, batch: int, steps: int, epochs: int) -> Config:
    """Return the config of next to nothing, to see what a step of the loop itself costs."""
    config = vision_config("resnet18", batch=batch, steps=steps, epochs=epochs)
    config["data"]["shape"] = [8]
    config["backbone"] = {"name": "next_to_nothing"}
    return config


# -------------------------------------------------------------------------------------------------------- plain loop


class PlainLoop:
    """The same model, weights, batches and optimizer as a config's run, trained by a loop without any framework.

    Args:
        config: Of the run.
        device: Where to train.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        checked = load_config(config)
        built = build(checked, lambda _: None)
        loader = built.loaders["train"]
        values = loader.preprocessing.encode(list(loader.split.column(*loader.fields)))
        # What a plain loop would have in memory: pairs of an input tensor and a class.
        inputs = [v if isinstance(v, Tensor) else torch.from_numpy(v).long() for v in values]
        self.examples = list(zip(inputs, loader.split.targets.tolist(), strict=True))
        self.padded = len({tensor.shape for tensor in inputs}) > 1
        self.plan = loader.plan
        self.device = device
        self.precision = checked.train.precision
        self.model: Model = built.experiment.model.to(device)
        phase = built.experiment.phases[0]
        transfer_freezing.apply(self.model, phase.frozen)
        options = {key: value for key, value in config["train"]["optimizer"].items() if key != "name"}
        optimizers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = optimizers[config["train"]["optimizer"]["name"]](trained, **options)
        self.forward: Any = torch.compile(self.model) if config["train"].get("compile") else self.model

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches that the engine makes in this epoch, from a plain DataLoader."""
        loader: DataLoader[Any] = DataLoader(
            self.examples,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_sampler=[batch.tolist() for batch in self.batch_indices(epoch)],
            collate_fn=_pad if self.padded else default_collate,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Train on one batch; return its mean loss, without waiting for the device."""
        inputs, targets = inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = functional.cross_entropy(self.forward(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach() * len(targets)

    def epoch(self, epoch: int, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
        """Train one epoch; return its seconds by a clock and its mean loss."""
        self.model.train()
        started = clock()
        losses = [self.step(inputs, targets) for inputs, targets in self.batches(epoch)]
        loss = torch.stack(losses).sum().item() / len(self.examples)
        return clock() - started, loss


def _pad(examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*examples, strict=True)
    return nn.utils.rnn.pad_sequence(list(inputs), batch_first=True), torch.tensor(targets)
