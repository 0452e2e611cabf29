"""From files of texts to the first batch, the first and the second time, beside the way of Dive into Deep Learning.

All begin with IMDb's 50,000 reviews, in the archive as it is downloaded or in the unpacked folder, learn the vocabulary
of the training half (words that occur five times or more), numericalise both halves to at most 500 tokens and make the
first batch of 64; with --vectors all read the same file of word vectors too. Files are in the system's cache for all.

* The book (section 16.1): unpack the archive whenever it is called, split at blanks, a Counter, indices by its
  vocabulary's method, which is called for each token, lists padded to 500. It keeps nothing for a second time.
* The book, tightened: the same steps with a dictionary instead of that method, as one would write them who counts
  seconds. The book itself is the baseline; this one tells how much of the gain is not the book's own fault.
* Ours, split at blanks: the same work as the book, the same number of words. Like for like.
* Ours: the default tokenizer, that of GloVe's own text, which cuts more finely and undoes markup: more work.
  The first time ours also writes what the second time reads.

Every measurement is a process of its own; the ways alternate. Seconds are without imports, on all cores unless
OMP_NUM_THREADS says how many; processor seconds are of all processes together, so helpers' count in full, with their
imports. Memory is the most that was resident in the main process; helpers have theirs.

With --copies K the training reviews are repeated K times (40: a million), each copy with a word of its own, in one
JSON Lines file, which our way goes from to the first batch, loader included: how it grows.
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
from common import BUSY, Others, data_file, machine, print_table, run_process, spread, wait_until_quiet

BATCH_SIZE = 64
MAX_LENGTH = 500
MIN_FREQUENCY = 5
VECTORS = "vectors/imdb.w2v.100d.txt.gz"
BEGINNINGS = ("archive", "folder")
OURS, BLANKS, BOOK, TIGHT = "ours", "ours, split at blanks", "the book", "the book, tightened"


def ours(files: Path, tokenizer: str, vectors: Path | None) -> int:
    """Go from files to the first batch with the text plugin and the loader; return the number of words."""
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
    """Words by index, looked up as the book does: by a call for every token."""

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
        """The index of what is no word."""
        return self.indices["<unk>"]


def book(files: Path, vectors: Path | None, *, tightened: bool) -> int:
    """Do the same as the book does; return the number of words."""
    folder = files
    if files.is_file():  # its `download_extract` unpacks whenever it is called
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
        known: dict[str, list[float]] = {}
        with gzip.open(vectors, "rt", encoding="utf-8") as lines:
            for line in lines:
                word, *numbers = line.rstrip().split(" ")
                if len(numbers) > 1:
                    known[word] = [float(number) for number in numbers]
        zeros = [0.0] * len(next(iter(known.values())))
        torch.tensor([known.get(token, zeros) for token in vocabulary.tokens])
    look_up, unknown, padding = vocabulary.indices.get, vocabulary.unknown, vocabulary["<pad>"]

    def pad(line: list[str]) -> list[int]:
        indices = [look_up(token, unknown) for token in line] if tightened else vocabulary[line]
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


WAYS: dict[str, Callable[[Path, Path | None], int]] = {
    OURS: lambda files, vectors: ours(files, "glove", vectors),
    BLANKS: lambda files, vectors: ours(files, "whitespace", vectors),
    BOOK: lambda files, vectors: book(files, vectors, tightened=False),
    TIGHT: lambda files, vectors: book(files, vectors, tightened=True),
}


def child(arguments: argparse.Namespace) -> None:
    """Measure one way in this process and print what it took."""

    def cpu_seconds() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    started, cpu_started = time.perf_counter(), cpu_seconds()
    words = WAYS[arguments.child](arguments.files, data_file(VECTORS) if arguments.vectors else None)
    found: dict[str, float] = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu_started}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found |= {"words": words, "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024)}
    print(json.dumps(found))


def measure(way: str, files: Path, cache: Path, vectors: bool) -> dict[str, float]:
    """Measure one way in a process of its own, with what the cache holds."""
    options = ["--child", way, "--files", str(files), *(["--vectors"] if vectors else [])]
    process = run_process([sys.executable, __file__, *options], {"TRANSFER_CACHE": str(cache)})
    found: dict[str, float] = json.loads(process.lines[-1])
    found["disk_bytes"] = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return found


def one_round(ways: Sequence[str], files: Path, cache: Path, vectors: bool) -> dict[str, dict[str, float]]:
    """Measure each way once with an empty cache, and ours a second time."""
    found = {}
    for way in ways:
        shutil.rmtree(cache, ignore_errors=True)
        found[way] = measure(way, files, cache, vectors)
        if way in (OURS, BLANKS):
            found[f"{way}, the second time"] = measure(way, files, cache, vectors)
    return found


def repeated(folder: Path, copies: int) -> Path:
    """Write the training reviews so many times into one file of JSON Lines."""
    from transfer_text.data.datasets import IMDb

    train = IMDb(root=str(data_file("aclImdb_v1.tar.gz"))).load().splits["train"]
    path = folder / "reviews.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for text, target in zip(train.fields["text"], train.targets.tolist(), strict=True):
                line = {"text": f"{text} copy{copy}", "label": str(target)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def table(beginning: str, rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, str]]:
    """Return the rows for files of one kind."""
    rows = []
    for way in rounds[0]:
        row = {"from": beginning, "way": way, "words": f"{rounds[0][way]['words']:,}"}
        for unit, title in (("seconds", "seconds"), ("cpu_seconds", "processor seconds")):
            row[title] = spread([found[way][unit] for found in rounds], ".2f")
            for base in (BOOK, TIGHT):
                if base in rounds[0]:
                    faster = [found[base][unit] / found[way][unit] for found in rounds]
                    row[f"times {base.replace(', ', ' ')}, {title}"] = spread(faster, ".1f") if way != base else "1"
        row["memory, MiB"] = f"{max(found[way]['peak_bytes'] for found in rounds) / 2**20:.0f}"
        row["on disk, MiB"] = f"{rounds[-1][way]['disk_bytes'] / 2**20:.0f}"
        rows.append(row)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way, which alternate")
    parser.add_argument("--copies", type=int, default=1, help="of the training reviews, in one file, ours alone")
    parser.add_argument("--begin", nargs="+", choices=BEGINNINGS, default=BEGINNINGS, help="with which files")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS), help="what to measure")
    parser.add_argument("--vectors", action="store_true", help="read word vectors too")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    wait_until_quiet(arguments.wait)
    print(machine())
    others = Others()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary) / "cache"
        packed = data_file("aclImdb_v1.tar.gz")
        beginnings = {"archive": packed, "folder": Path(temporary) / "aclImdb"}
        beginnings = {name: beginnings[name] for name in arguments.begin}
        if arguments.copies > 1:
            os.environ["TRANSFER_CACHE"] = str(cache)
            beginnings = {f"{25_000 * arguments.copies:,} reviews": repeated(Path(temporary), arguments.copies)}
            arguments.ways = [OURS]
        elif "folder" in arguments.begin:
            with tarfile.open(packed) as archive:
                archive.extractall(temporary, filter="data")
        for beginning, files in beginnings.items():
            rounds = [one_round(arguments.ways, files, cache, arguments.vectors) for _ in range(arguments.rounds)]
            rows += table(beginning, rounds)
    share = others.share()
    print(f"from files to the first batch; n = {arguments.rounds}, alternating; median (least to greatest)")
    print(f"others took {share:.0%} of the machine" + ("" if share <= BUSY else ": seconds decide nothing"))
    print_table(rows)


if __name__ == "__main__":
    main()
