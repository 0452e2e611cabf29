"""TextCNN and BiLSTM on IMDb, compared with the plain loop of Dive into Deep Learning, on the CPU.

https://d2l.ai/chapter_natural-language-processing-applications/, sections 16.2 and 16.3: batches of 64 reviews in
random order, each padded to 500 words; `nn.Conv1d` and `nn.LSTM`; Adam. The other side is the engine on the same words
(split at whitespace, truncated at 500, the same vocabulary and vectors) with its loader, metrics and checks. Both train
and evaluate alternately within one process, with the same number of batches per round. The first round is not counted;
an evaluation covers 2,500 reviews. With --clock cpu, for one thread on a busy machine, seconds are processor seconds.
With --precision bf16 the engine computes in bfloat16, as with `train.precision`; the book stays in float32.

"Useful" counts only the operations that the definition of the model requires for the real words, as a fraction of this
machine's rate for a product of large square matrices. Computing padding lowers it; avoiding repeated work raises it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from common import THREADS, Config, data_file, machine, print_table, spread, wait_until_quiet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from transfer.config.check import load_config
from transfer.config.train_settings import Precision
from transfer.feature_cache.loader import StageInputs
from transfer.storage.run_directory import RunDirectory
from transfer.system.signals import Signals
from transfer.training.build import BuiltExperiment, build
from transfer.training.engine import fit
from transfer.training.evaluation import evaluate
from transfer.training.events import EpochEnded, EpochStarted, EvaluationStarted, Event

BATCH = 64
STEPS = 500
REVIEWS = 25_000
EVALUATED = 2_500
VECTORS = "vectors/imdb.w2v.100d.txt.gz"


def _embedding(vectors: Tensor, *, freeze: bool = True) -> nn.Embedding:
    embedding: nn.Embedding = nn.Embedding.from_pretrained(vectors.clone(), freeze=freeze)  # type: ignore[no-untyped-call]
    return embedding


class BookTextCNN(nn.Module):
    """The book's TextCNN, with the max-over-time pooling that its text describes."""

    def __init__(self, vectors: Tensor, kernel_sizes: tuple[int, ...] = (3, 4, 5), channels: int = 100) -> None:
        super().__init__()
        self.embedding = _embedding(vectors, freeze=False)
        self.constant_embedding = _embedding(vectors)
        self.dropout = nn.Dropout(0.5)
        self.decoder = nn.Linear(channels * len(kernel_sizes), 2)
        self.pool = nn.AdaptiveMaxPool1d(1)
        self.relu = nn.ReLU()
        self.convs = nn.ModuleList(nn.Conv1d(2 * vectors.shape[1], channels, size) for size in kernel_sizes)

    def forward(self, inputs: Tensor) -> Any:
        """Return class scores (B, 2) for word indices (B, 500)."""
        embeddings = torch.cat((self.embedding(inputs), self.constant_embedding(inputs)), dim=2).permute(0, 2, 1)
        encoding = torch.cat([self.relu(self.pool(conv(embeddings))).squeeze(-1) for conv in self.convs], dim=1)
        return self.decoder(self.dropout(encoding))


class BookBiRNN(nn.Module):
    """The book's BiLSTM, with frozen vectors."""

    def __init__(self, vectors: Tensor, hidden: int = 100, layers: int = 2) -> None:
        super().__init__()
        self.embedding = _embedding(vectors)
        self.encoder = nn.LSTM(vectors.shape[1], hidden, num_layers=layers, bidirectional=True)
        self.decoder = nn.Linear(4 * hidden, 2)

    def forward(self, inputs: Tensor) -> Any:
        """Return class scores (B, 2) for word indices (B, 500)."""
        outputs, _ = self.encoder(self.embedding(inputs.T))
        return self.decoder(torch.cat((outputs[0], outputs[-1]), dim=1))


@dataclass(frozen=True)
class Workload:
    """A model that both sides train.

    Args:
        backbone: Block ``backbone`` of the engine's config.
        head: Block ``head`` of the engine's config.
        optimizer: Block ``train.optimizer`` of the engine's config.
        book: Function that builds the book's model from the word vectors.
        operations: Floating-point operations per word of a forward pass, by the definition of the model.
    """

    backbone: Config
    head: Config
    optimizer: Config
    book: Callable[[Tensor], nn.Module]
    operations: int


TEXTCNN = {"name": "textcnn", "variant": "multichannel", "kernel_sizes": [3, 4, 5], "filters": 100}
BILSTM = {"name": "bilstm", "variant": "static", "layers": 2, "hidden_size": 100, "readout": "first_last"}
DROPOUT = {"name": "linear", "dropout": 0.5}
# Operations per word: twice (multiply, add) the weights that are applied to each word.
CONVOLUTIONS = 2 * 200 * 100 * (3 + 4 + 5)
RECURRENCES = 2 * 2 * 400 * ((100 + 100) + (200 + 100))
WORKLOADS = {
    "TextCNN": Workload(TEXTCNN, DROPOUT, {"name": "adam", "lr": 0.001}, BookTextCNN, CONVOLUTIONS),
    "BiLSTM": Workload(BILSTM, {"name": "linear"}, {"name": "adam", "lr": 0.01}, BookBiRNN, RECURRENCES),
}


@dataclass(frozen=True)
class Round:
    """Reviews per second (engine, book) of one round, and the training losses of its epoch."""

    train: tuple[float, float]
    evaluation: tuple[float, float]
    loss: tuple[float, float]


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(
    work: Workload, vectors: Path, rounds: int, batches: int, clock: Callable[[], float], precision: Precision
) -> tuple[list[Round], float, float]:
    """Return the counted rounds, and the mean number of words per training review and per validation review."""
    config = {
        "seed": 0,
        # In a small split, the batches of the longest and of the shortest reviews mix very different lengths.
        "data": {"name": "imdb", "validation": EVALUATED / REVIEWS},
        "backbone": {
            **work.backbone,
            "vectors": str(vectors),
            "tokenizer": "whitespace",
            "min_frequency": 5,
            "max_length": STEPS,
        },
        "head": work.head,
        "task": {"name": "classification"},
        "train": {
            "batch_size": BATCH,
            "evaluation_batch_size": BATCH,
            "optimizer": work.optimizer,
            "precision": precision,
            "phases": [{"epochs": rounds + 1, "freeze": "none"}],
        },
    }
    built = build(load_config(config), lambda _: None)
    book = Book(built, work, batches, clock)
    validation = StageInputs(built.loaders["validation"], 0, {})
    measured: list[Round] = []
    event_times: dict[type[Event], float] = {}

    def observe(event: Event) -> None:
        event_times[type(event)] = clock()
        if not isinstance(event, EpochEnded):
            return
        train_rate = batches * BATCH / (event_times[EvaluationStarted] - event_times[EpochStarted])
        record = event.record
        started = clock()
        evaluate(built.experiment.model, built.experiment.task, validation, precision, lambda _: None, "validation")
        evaluation_rate = len(validation.loader.split) / (clock() - started)
        loss, book_train_rate = book.train()
        measured.append(
            Round((train_rate, book_train_rate), (evaluation_rate, book.evaluate()), (record["train"]["loss"], loss))
        )

    with tempfile.TemporaryDirectory() as folder, Signals() as signals:
        experiment = replace(built.experiment, test=None, max_batches=batches)
        fit(experiment, RunDirectory.create(Path(folder), "speed"), observe, signals)
    words = {split: np.mean([len(text) for text in _encoded(built, split)]) for split in ("train", "validation")}
    return measured[1:], float(words["train"]), float(words["validation"])


def _encoded(built: BuiltExperiment, split: str) -> Sequence[Any]:
    """Return the word indices of each review of a split."""
    encoded = built.loaders[split].examples.encoded
    assert encoded is not None, "texts are encoded once"
    return encoded


class Book:
    """The book's loop on the words and vectors of a built experiment.

    Args:
        built: The experiment of the engine, whose words and vectors are used.
        work: The model to train.
        batches: Number of batches per training epoch.
        clock: Function that returns seconds.
    """

    def __init__(self, built: BuiltExperiment, work: Workload, batches: int, clock: Callable[[], float]) -> None:
        embedding = built.experiment.model.stages["embedding"]
        assert isinstance(embedding.static, Tensor)
        self.model = work.book(embedding.static)
        self.optimizer = torch.optim.Adam(
            [p for p in self.model.parameters() if p.requires_grad], lr=work.optimizer["lr"]
        )
        self.batches = batches
        self.clock = clock
        self.data = {name: self._features(built, name) for name in ("train", "validation")}

    def _features(self, built: BuiltExperiment, split: str) -> TensorDataset:
        loader = built.loaders[split]
        features = torch.zeros(len(loader.split), STEPS, dtype=torch.int64)
        for row, indices in zip(features, _encoded(built, split), strict=True):
            row[: len(indices)] = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        return TensorDataset(features, torch.from_numpy(loader.split.targets))

    def train(self) -> tuple[float, float]:
        """Train for one epoch of ``batches`` batches; return the mean loss and the reviews per second."""
        self.model.train()
        total, examples, started = 0.0, 0, self.clock()
        for number, (inputs, targets) in enumerate(DataLoader(self.data["train"], BATCH, shuffle=True)):
            if number == self.batches:
                break
            self.optimizer.zero_grad()
            losses = nn.functional.cross_entropy(self.model(inputs), targets, reduction="none")
            losses.sum().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total, examples = total + losses.sum().item(), examples + len(targets)
        return total / examples, examples / (self.clock() - started)

    def evaluate(self) -> float:
        """Evaluate the validation split; return the reviews per second."""
        self.model.eval()
        correct, started = 0, self.clock()
        with torch.no_grad():
            for inputs, targets in DataLoader(self.data["validation"], BATCH):
                correct += int((self.model(inputs).argmax(1) == targets).sum())
        return len(self.data["validation"]) / (self.clock() - started)


def product_rate(clock: Callable[[], float], size: int = 2048, repeats: int = 5) -> float:
    """Return the floating-point operations per second of a large matrix product, the best of ``repeats``."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats + 1):
        started = clock()
        torch.mm(left, right)
        seconds.append(clock() - started)
    return float(2 * size**3 / min(seconds[1:]))


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds per model, after one warm-up round")
    parser.add_argument("--batches", type=int, default=10, help="training batches of 64 reviews per round")
    parser.add_argument("--only", choices=WORKLOADS, help="measure only this model")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor seconds, with --threads 1")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help="precision of the engine")
    parser.add_argument("--wait", type=float, default=0.0, help="maximum seconds to wait for a quiet machine")
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("processor seconds add up over threads: --clock cpu is for --threads 1")
    clock = CLOCKS[arguments.clock]
    torch.set_num_threads(arguments.threads)
    vectors = data_file(VECTORS)
    data_file("aclImdb_v1.tar.gz")
    wait_until_quiet(arguments.wait)
    rate = product_rate(clock)
    print(f"{machine(arguments.threads)}; {arguments.clock} clock; matrix product {rate / 1e9:.0f} GFLOP/s")
    rows = []
    for name, work in WORKLOADS.items():
        if arguments.only not in (None, name):
            continue
        rounds, train_words, evaluation_words = measure(
            work, vectors, arguments.rounds, arguments.batches, clock, arguments.precision
        )
        for mode, pairs, operations in (
            ("train", [r.train for r in rounds], 3 * work.operations * train_words),
            ("evaluate", [r.evaluation for r in rounds], work.operations * evaluation_words),
        ):
            engine, book = (statistics.median(side) for side in zip(*pairs, strict=True))
            rows.append(
                {
                    "": f"{name}, {mode}",
                    "engine, reviews/s": f"{engine:.0f}",
                    "book, reviews/s": f"{book:.0f}",
                    "times faster": spread([rates[0] / rates[1] for rates in pairs], ".2f"),
                    "useful, engine": f"{engine * operations / rate:.0%}",
                    "useful, book": f"{book * operations / rate:.0%}",
                }
            )
        print(f"{name}: final losses {rounds[-1].loss[0]:.3f} and {rounds[-1].loss[1]:.3f}", flush=True)
    print(f"n = {arguments.rounds} rounds of {arguments.batches} batches, median (minimum to maximum)")
    print_table(rows)


if __name__ == "__main__":
    main()
