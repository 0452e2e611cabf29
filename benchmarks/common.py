"""Shared code of the benchmarks: timing of processes, synthetic workloads, a plain training loop as the baseline."""

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
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.transforms import v2

from transfer import Backbone, Data, DataError, Dataset, DataSpec, FeatureSpec, Preprocessing, Split, register
from transfer.config.check import load_config
from transfer.models.model import Model
from transfer.models.precision import place, resolve_precision
from transfer.training import freezing as transfer_freezing
from transfer.training.build import build
from transfer_vision.models.backbones import Torchvision
from transfer_vision.models.resnet import ResNet18, ResNet50
from transfer_vision.preprocessing import IMAGENET_MEAN, IMAGENET_STD

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
"""Number of threads of both sides of every comparison on the CPU."""
MAX_OTHER_FRACTION = 0.1
"""If other processes use a larger fraction of the processor, elapsed times decide no target."""
ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "weights/resnet18-tiny-imagenet.safetensors"

_TICKS = os.sysconf("SC_CLK_TCK")

Config = dict[str, Any]


# --------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """Measurements of a completed command.

    Args:
        seconds: Elapsed seconds from start to exit, including imports.
        cpu_seconds: Processor seconds of all threads; on one thread hardly affected by other processes.
        peak_bytes: Peak resident memory in bytes.
        lines: Lines of the combined standard output and standard error.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    lines: list[str]


def run_process(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Process:
    """Run a command on :data:`THREADS` threads and return its measurements; exit if it fails."""
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
    """Run ``transfer run`` on a file in ``configs``. The last line that it prints is the path of the run directory."""
    command = [sys.executable, "-m", "transfer", "run", str(ROOT / "configs" / config), *overrides]
    return run_process([*command, "--output", str(folder)], {"TRANSFER_CACHE": str(cache)})


def data_file(name: str) -> Path:
    """Return the path of a file in ``$TRANSFER_DATA``; exit with a message if it does not exist."""
    path = Path(os.environ.get("TRANSFER_DATA", ".")).expanduser().resolve() / name
    if not path.exists():
        sys.exit(f"this benchmark requires {name} in the folder TRANSFER_DATA: {path} does not exist")
    return path


# ------------------------------------------------------------------------------------------------------------ output


def machine(threads: int = THREADS) -> str:
    """Return a line that describes the device, the number of threads, the load and the versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    load = os.getloadavg()[0]
    return (
        f"{device}, {os.cpu_count()} cores, {threads} threads, load {load:.2f}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def wait_until_quiet(seconds: float, max_load: float = 0.8) -> None:
    """Wait up to this number of seconds until the load average is at most ``max_load``."""
    until = time.monotonic() + seconds
    while os.getloadavg()[0] > max_load and time.monotonic() < until:
        time.sleep(5)


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows with the same keys as a Markdown table; all columns but the first are right-aligned."""
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    print("| " + " | ".join(name.ljust(width) for name, width in zip(names, widths, strict=True)) + " |")
    print("|" + "|".join(("-" * (w + 1) + ":") if i else "-" * (w + 2) for i, w in enumerate(widths)) + "|")
    for row in rows:
        cells = [row[n].rjust(w) if i else row[n].ljust(w) for i, (n, w) in enumerate(zip(names, widths, strict=True))]
        print("| " + " | ".join(cells) + " |", flush=True)


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Return the median with the minimum and the maximum as text."""
    median = statistics.median(values)
    if len(values) == 1:
        return format(median, form)
    return f"{median:{form}} ({min(values):{form}} to {max(values):{form}})"


def verdict(values: Sequence[float], target: float, other_fraction: float, *, at_least: bool = True) -> str:
    """Return whether all values meet a target, or none; undecided if only some do or the machine was busy."""
    met = [value >= target if at_least else value <= target for value in values]
    description = f"target {'at least' if at_least else 'at most'} {target:g}"
    if other_fraction > MAX_OTHER_FRACTION:
        return f"{description}: not decided, the machine was busy"
    return f"{description}: {'met' if all(met) else 'not decided' if any(met) else 'MISSED'}"


class OtherProcesses:
    """Processor use of other processes since the construction of this object. Linux only; 0 on other systems."""

    def __init__(self) -> None:
        self._before = self._now()

    def cpu_fraction(self) -> float:
        """Return the fraction of the machine's processor time, between 0 and 1."""
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
    """Random tensors in memory with alternating labels.

    Args:
        examples: Number of training examples.
        shape: Shape of one example, without the batch dimension.
        classes: Number of classes.
        held_out: Number of examples in the validation split and in the test split.
    """

    def __init__(self, *, examples: int, shape: tuple[int, ...], classes: int = 10, held_out: int = 16) -> None:
        self._examples, self._shape, self._held_out = examples, shape, held_out
        self._classes = tuple(f"class {number}" for number in range(classes))

    @property
    def spec(self) -> DataSpec:
        """One tensor and one class label per example."""
        return DataSpec(("image",), "class", self._classes)

    def load(self) -> Data:
        """Generate the three splits."""
        splits = {}
        for seed, (name, count) in enumerate(_sizes(self._examples, self._held_out).items()):
            values = torch.randn(count, *self._shape, generator=torch.Generator().manual_seed(seed))
            splits[name] = Split({"image": list(values)}, np.arange(count) % len(self._classes))
        return Data(self.spec, splits)


LENGTH_SIGMA = 0.6
"""Standard deviation of the logarithm of the lengths of IMDb's reviews."""


@register("dataset", "synthetic_texts")
class SyntheticTexts(Dataset):
    """Texts of random words, between half of the maximum length and the maximum length.

    Args:
        examples: Number of training examples.
        length: Maximum number of words per text.
        words: Number of distinct words.
        held_out: Number of examples in the validation split and in the test split.
        mean: Mean number of words of log-normal lengths, as movie reviews have them, before longer texts are cut.
    """

    def __init__(self, *, examples: int, length: int, words: int, held_out: int = 16, mean: int | None = None) -> None:
        self._examples, self._length, self._words, self._held_out = examples, length, words, held_out
        self._mean = mean

    @property
    def spec(self) -> DataSpec:
        """One text and one of two class labels per example."""
        return DataSpec(("text",), "class", ("negative", "positive"))

    def load(self) -> Data:
        """Generate the three splits."""
        splits = {}
        for seed, (name, count) in enumerate(_sizes(self._examples, self._held_out).items()):
            generator = np.random.default_rng(seed)
            if self._mean is None:
                lengths = generator.integers(self._length // 2, self._length, size=count, endpoint=True)
            else:
                drawn = generator.lognormal(np.log(self._mean) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA, size=count)
                lengths = drawn.astype(np.int64).clip(10, self._length)
            texts = [" ".join(f"w{word}" for word in generator.integers(self._words, size=n)) for n in lengths]
            splits[name] = Split({"text": texts}, np.arange(count) % 2)
        return Data(self.spec, splits)


def _sizes(examples: int, held_out: int) -> dict[str, int]:
    return {"train": examples, "validation": held_out, "test": held_out}


class TensorPreprocessing(Preprocessing):
    """Preprocessing that passes tensors through unchanged."""

    def encode(self, values: Sequence[Any]) -> Sequence[Any]:
        """Return the tensors unchanged."""
        return values

    def collate(self, encoded: Sequence[Any]) -> Tensor:
        """Stack the tensors to a batch."""
        return torch.stack(list(encoded))

    def read(self, source: str) -> Any:
        """Raise an error: synthetic tensors have no files."""
        raise DataError("synthetic tensors cannot be read from a file", where=source)


@register("backbone", "tensor_resnet18")
class TensorResNet18(ResNet18):
    """ResNet-18 for preprocessed tensors."""

    @property
    def preprocessing(self) -> Any:
        """Preprocessing that only stacks tensors."""
        return TensorPreprocessing()


@register("backbone", "tensor_resnet50")
class TensorResNet50(ResNet50):
    """ResNet-50 for preprocessed tensors."""

    @property
    def preprocessing(self) -> Any:
        """Preprocessing that only stacks tensors."""
        return TensorPreprocessing()


@register("backbone", "tensor_torchvision")
class TensorTorchvision(Torchvision):
    """Model of torchvision for preprocessed tensors."""

    @property
    def preprocessing(self) -> Any:
        """Preprocessing that only stacks tensors."""
        return TensorPreprocessing()


@register("backbone", "minimal")
class MinimalBackbone(Backbone):
    """One linear layer on eight numbers: a training step measures the cost of the loop itself."""

    field = "image"

    def __init__(self) -> None:
        super().__init__({"layer": nn.Linear(8, 8)})

    @property
    def features(self) -> FeatureSpec:
        """A vector of eight features."""
        return FeatureSpec("vector", 8)

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing that only stacks tensors."""
        return TensorPreprocessing()


def vision_config(backbone: str, *, batch: int, steps: int, epochs: int, image_size: int = 224, **train: Any) -> Config:
    """Return the config of a randomly initialized ResNet on random tensors."""
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


def text_config(
    *,
    batch: int,
    steps: int,
    epochs: int,
    length: int = 400,
    words: int = 20_000,
    mean: int | None = None,
    **train: Any,
) -> Config:
    """Return the config of a TextCNN of the default size on random texts."""
    return {
        "seed": 0,
        "data": {
            "name": "synthetic_texts",
            "examples": batch * steps,
            "length": length,
            "words": words,
            "held_out": batch,
            "mean": mean,
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


def minimal_config(*, batch: int, steps: int, epochs: int) -> Config:
    """Return the config of the minimal model, which measures the cost of the loop itself."""
    config = vision_config("resnet18", batch=batch, steps=steps, epochs=epochs)
    config["data"]["shape"] = [8]
    config["backbone"] = {"name": "minimal"}
    return config


# -------------------------------------------------------------------------------------------------------- plain loop


class PlainLoop:
    """A training loop without a framework, with the same model, weights, batches and optimizer as a run.

    Args:
        config: Config of the run.
        device: Device to train on.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        checked = load_config(config)
        built = build(checked, lambda _: None)
        self.device = device
        self.load_examples(built.loaders["train"], config)
        self.precision = resolve_precision(checked.train.precision, device)
        self.model: Model = built.experiment.model
        place(self.model, device)  # channels last and fast kernels on a GPU, as an expert's loop has them
        phase = built.experiment.phases[0]
        transfer_freezing.apply(self.model, phase.frozen)
        options = {key: value for key, value in config["train"]["optimizer"].items() if key != "name"}
        options["fused"] = True
        optimizers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = optimizers[config["train"]["optimizer"]["name"]](trained, **options)
        self.forward: Any = torch.compile(self.model) if config["train"].get("compile") else self.model

    def load_examples(self, loader: Any, config: Config) -> None:
        """Encode the examples once, as a plain loop would: pairs of an input tensor and a class index."""
        values = loader.preprocessing.encode(list(loader.split.column(*loader.fields)))
        inputs = [v if isinstance(v, Tensor) else torch.from_numpy(v).long() for v in values]
        self.examples: Any = list(zip(inputs, loader.split.targets.tolist(), strict=True))
        if config["data"].get("mean"):  # usual scripts pad every text to the maximum length
            longest = config["data"]["length"]
            inputs = [functional.pad(tensor, (0, longest - len(tensor))) for tensor in inputs]
            self.examples = list(zip(inputs, loader.split.targets.tolist(), strict=True))
        self.padded = len({tensor.shape for tensor in inputs}) > 1
        self.batch_indices = loader.batch_indices

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of the engine in this epoch, loaded by a plain DataLoader."""
        loader: DataLoader[Any] = DataLoader(
            self.examples,
            batch_sampler=[batch.tolist() for batch in self.batch_indices(epoch)],
            collate_fn=_pad if self.padded else default_collate,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Train on one batch; return the sum of its losses, without synchronizing with the device."""
        inputs, targets = inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = functional.cross_entropy(self.forward(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach() * len(targets)

    def epoch(self, epoch: int, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
        """Train one epoch; return its duration in seconds by ``clock`` and its mean loss."""
        self.model.train()
        started = clock()
        # One synchronization per epoch, at item(): steps on a GPU are queued without waiting.
        losses = [self.step(inputs, targets) for inputs, targets in self.batches(epoch)]
        loss = torch.stack(losses).sum().item() / len(self.examples)
        return clock() - started, loss


class JpegLoop(PlainLoop):
    """Plain loop over a folder of images: torchvision's dataset and transforms, and every core as a loader process."""

    def load_examples(self, loader: Any, config: Config) -> None:
        """Open the folder, and start loader processes that live as long as the loop."""
        size = config["backbone"]["image_size"]
        steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        self.examples = TorchvisionFolder(str(Path(config["data"]["root"]) / "train"), v2.Compose(steps))
        workers = max(1, (os.cpu_count() or 1) - 1)
        self._loader: DataLoader[Any] = DataLoader(
            self.examples,
            config["train"]["batch_size"],
            shuffle=True,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=True,
        )
        self._mean, self._std = (
            torch.tensor(values, device=self.device).mul(255).view(-1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
        )

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield random batches; bytes are copied to the device and normalized there."""
        for inputs, targets in self._loader:
            pixels = inputs.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            yield pixels.float().sub_(self._mean).div_(self._std), targets


def _pad(examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*examples, strict=True)
    return nn.utils.rnn.pad_sequence(list(inputs), batch_first=True), torch.tensor(targets)
