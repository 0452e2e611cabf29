"""From text files to the first batch, in the first and in the second run, compared with Dive into Deep Learning.

All variants start from IMDb's 50,000 reviews, in the downloaded archive or in the unpacked folder. They build the
vocabulary of the training half (words that occur five times or more), encode both halves to at most 500 tokens and make
the first batch of 64. With --vectors all read the same file of word vectors as well. Files are in the page cache.

* The book (section 16.1): unpack the archive at every call, split at whitespace, a Counter, indices by the vocabulary's
  method, which is called for each token, lists padded to 500. Nothing is cached for a second run.
* The book, optimized: the same steps with a dictionary instead of that method, as in code tuned for speed. The book
  itself is the baseline; this variant separates the gain over the book's own inefficiency.
* transfer, whitespace: the same work as the book, with the same number of words.
* transfer: the default tokenizer, that of GloVe's training text, which splits more finely and removes markup, which is
  more work. The first run also writes the cache that the second run reads.

Every measurement is a separate process; the variants alternate. Seconds exclude imports; all cores are used unless
OMP_NUM_THREADS is set. Processor seconds are those of all processes, including the imports of worker processes. Memory
is the peak resident memory of the main process, without worker processes.

--copies K measures how transfer scales: the training reviews are repeated K times (40: a million), each copy with a
unique additional word, in one JSON Lines file, from the file to the first batch, including the loader.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    MAX_OTHER_FRACTION,
    OtherProcesses,
    data_file,
    machine,
    print_table,
    run_process,
    spread,
    wait_until_quiet,
)

BATCH_SIZE = 64
MAX_LENGTH = 500
MIN_FREQUENCY = 5
VECTORS = "vectors/imdb.w2v.100d.txt.gz"
FILE_KINDS = ("archive", "folder")
TRANSFER, WHITESPACE = "transfer", "transfer, whitespace"
BOOK, OPTIMIZED_BOOK = "the book", "the book, optimized"


def load_with_transfer(files: Path, tokenizer: str, vectors: Path | None) -> int:
    """Make the first batch from files with the text plugin and the loader; return the size of the vocabulary."""
    from transfer.data.loader import Loader
    from transfer_text.data.datasets import IMDb
    from transfer_text.data.tables import TextCSV
    from transfer_text.encoding.preprocessing import TextPreprocessing
    from transfer_text.encoding.vocabulary import Vocabulary
    from transfer_text.vectors.word_vectors import read_vectors

    dataset = TextCSV(train=str(files)) if files.suffix == ".jsonl" else IMDb(root=str(files))
    splits = dataset.load().splits
    vocabulary = Vocabulary.build(splits["train"].fields["text"], tokenizer, min_frequency=MIN_FREQUENCY)
    if vectors is not None:
        torch.from_numpy(read_vectors(str(vectors), vocabulary.tokens).matrix)
    preprocessing = TextPreprocessing(vocabulary, MAX_LENGTH)
    loaders = {
        name: Loader(split, ("text",), preprocessing, batch_size=BATCH_SIZE, training=name == "train")
        for name, split in splits.items()
    }
    next(loaders["train"].epoch())
    return len(vocabulary)


class BookVocabulary:
    """The book's vocabulary, which is called for every token."""

    def __init__(self, lines: list[list[str]]) -> None:
        counter = Counter([token for line in lines for token in line])
        self.frequencies = sorted(counter.items(), key=lambda pair: pair[1], reverse=True)
        frequent = {token for token, count in self.frequencies if count >= MIN_FREQUENCY}
        self.tokens = sorted({"<unk>", "<pad>", *frequent})
        self.indices = {token: index for index, token in enumerate(self.tokens)}

    def __getitem__(self, tokens: Any) -> Any:
        if not isinstance(tokens, list | tuple):
            return self.indices.get(tokens, self.unknown)
        return [self[token] for token in tokens]

    @property
    def unknown(self) -> int:
        """Index of the unknown word."""
        return self.indices["<unk>"]


def load_with_book(files: Path, vectors: Path | None, *, optimized: bool) -> int:
    """Make the first batch from files with the book's code; return the size of the vocabulary."""
    folder = files
    if files.is_file():  # the book's `download_extract` unpacks at every call
        folder = Path(os.environ["TRANSFER_CACHE"]) / "unpacked"
        with tarfile.open(files) as archive:
            archive.extractall(folder, filter="data")
        folder /= "aclImdb"

    def read(split: str) -> tuple[list[str], list[int]]:
        texts, labels = [], []
        for label in ("pos", "neg"):
            parent = os.path.join(folder, split, label)
            for name in os.listdir(parent):
                with open(os.path.join(parent, name), "rb") as file:
                    texts.append(file.read().decode("utf-8").replace("\n", ""))
                labels.append(1 if label == "pos" else 0)
        return texts, labels

    data = {split: read(split) for split in ("train", "test")}
    tokens = {split: [text.split() for text in texts] for split, (texts, _) in data.items()}
    vocabulary = BookVocabulary(tokens["train"])
    if vectors is not None:
        pretrained: dict[str, list[float]] = {}
        with gzip.open(vectors, "rt", encoding="utf-8") as lines:
            for line in lines:
                word, *numbers = line.rstrip().split(" ")
                if len(numbers) > 1:
                    pretrained[word] = [float(number) for number in numbers]
        zeros = [0.0] * len(next(iter(pretrained.values())))
        torch.tensor([pretrained.get(token, zeros) for token in vocabulary.tokens])
    look_up, unknown, padding = vocabulary.indices.get, vocabulary.unknown, vocabulary["<pad>"]

    def pad(line: list[str]) -> list[int]:
        indices = [look_up(token, unknown) for token in line] if optimized else vocabulary[line]
        return indices[:MAX_LENGTH] if len(indices) > MAX_LENGTH else indices + [padding] * (MAX_LENGTH - len(indices))

    loaders = {
        split: torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.tensor([pad(line) for line in tokens[split]]), torch.tensor(labels)),
            BATCH_SIZE,
            shuffle=split == "train",
        )
        for split, (_, labels) in data.items()
    }
    next(iter(loaders["train"]))
    return len(vocabulary.tokens)


VARIANTS: dict[str, Callable[[Path, Path | None], int]] = {
    TRANSFER: lambda files, vectors: load_with_transfer(files, "glove", vectors),
    WHITESPACE: lambda files, vectors: load_with_transfer(files, "whitespace", vectors),
    BOOK: lambda files, vectors: load_with_book(files, vectors, optimized=False),
    OPTIMIZED_BOOK: lambda files, vectors: load_with_book(files, vectors, optimized=True),
}


def child(arguments: argparse.Namespace) -> None:
    """Measure one variant in this process and print the result as JSON."""

    def cpu_seconds() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    started, cpu_started = time.perf_counter(), cpu_seconds()
    words = VARIANTS[arguments.child](arguments.files, data_file(VECTORS) if arguments.vectors else None)
    measurement: dict[str, float] = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": cpu_seconds() - cpu_started,
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measurement |= {"words": words, "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024)}
    print(json.dumps(measurement))


def measure(variant: str, files: Path, cache: Path, vectors: bool) -> dict[str, float]:
    """Measure one variant in a separate process, with the current content of the cache."""
    options = ["--child", variant, "--files", str(files), *(["--vectors"] if vectors else [])]
    process = run_process([sys.executable, __file__, *options], {"TRANSFER_CACHE": str(cache)})
    measurement: dict[str, float] = json.loads(process.lines[-1])
    measurement["disk_bytes"] = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return measurement


def one_round(variants: Sequence[str], files: Path, cache: Path, vectors: bool) -> dict[str, dict[str, float]]:
    """Measure each variant once with an empty cache, and those of transfer a second time."""
    measurements = {}
    for variant in variants:
        shutil.rmtree(cache, ignore_errors=True)
        measurements[variant] = measure(variant, files, cache, vectors)
        if variant in (TRANSFER, WHITESPACE):
            measurements[f"{variant}, second run"] = measure(variant, files, cache, vectors)
    return measurements


def write_copies(folder: Path, copies: int) -> Path:
    """Write ``copies`` copies of the training reviews to one JSON Lines file; return its path."""
    from transfer_text.data.datasets import IMDb

    train = IMDb(root=str(data_file("aclImdb_v1.tar.gz"))).load().splits["train"]
    path = folder / "reviews.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for text, target in zip(train.fields["text"], train.targets.tolist(), strict=True):
                line = {"text": f"{text} copy{copy}", "label": str(target)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def table(kind: str, rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, str]]:
    """Return the rows of the table for one kind of files."""
    rows = []
    for variant in rounds[0]:
        row = {"from": kind, "variant": variant, "words": f"{rounds[0][variant]['words']:,}"}
        for unit, title in (("seconds", "seconds"), ("cpu_seconds", "processor seconds")):
            row[title] = spread([measured[variant][unit] for measured in rounds], ".2f")
            for base in (BOOK, OPTIMIZED_BOOK):
                if base in rounds[0]:
                    speedups = [measured[base][unit] / measured[variant][unit] for measured in rounds]
                    row[f"times {base.replace(', ', ' ')}, {title}"] = (
                        spread(speedups, ".1f") if variant != base else "1"
                    )
        row["memory, MiB"] = f"{max(measured[variant]['peak_bytes'] for measured in rounds) / 2**20:.0f}"
        row["on disk, MiB"] = f"{rounds[-1][variant]['disk_bytes'] / 2**20:.0f}"
        rows.append(row)
    return rows


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant, which alternate")
    parser.add_argument(
        "--copies", type=int, default=1, help="copies of the training reviews in one file; measures only transfer"
    )
    parser.add_argument(
        "--begin", nargs="+", choices=FILE_KINDS, default=FILE_KINDS, help="kinds of files to start from"
    )
    parser.add_argument(
        "--ways", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), help="variants to measure"
    )
    parser.add_argument("--vectors", action="store_true", help="also read word vectors")
    parser.add_argument("--wait", type=float, default=0.0, help="maximum seconds to wait for a quiet machine")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    wait_until_quiet(arguments.wait)
    print(machine())
    others = OtherProcesses()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary) / "cache"
        packed = data_file("aclImdb_v1.tar.gz")
        sources = {"archive": packed, "folder": Path(temporary) / "aclImdb"}
        sources = {name: sources[name] for name in arguments.begin}
        if arguments.copies > 1:
            os.environ["TRANSFER_CACHE"] = str(cache)
            sources = {f"{25_000 * arguments.copies:,} reviews": write_copies(Path(temporary), arguments.copies)}
            arguments.ways = [TRANSFER]
        elif "folder" in arguments.begin:
            with tarfile.open(packed) as archive:
                archive.extractall(temporary, filter="data")
        for kind, files in sources.items():
            rounds = [one_round(arguments.ways, files, cache, arguments.vectors) for _ in range(arguments.rounds)]
            rows += table(kind, rounds)
    other_fraction = others.cpu_fraction()
    print(f"from files to the first batch; n = {arguments.rounds}, alternating; median (minimum to maximum)")
    print(
        f"other processes used {other_fraction:.0%} of the machine"
        + ("" if other_fraction <= MAX_OTHER_FRACTION else ": elapsed seconds are unreliable")
    )
    print_table(rows)


if __name__ == "__main__":
    main()
