"""From files of texts to the first batch, the first and the second time, beside the usual tutorial's way.

Both begin with IMDb's 50,000 reviews, in the archive as it is downloaded or in the unpacked folder, learn the
vocabulary of the training half (words that occur five times or more), numericalise both halves to at most 500 tokens
and make the first batch of 64. The tutorial's way is that of Dive into Deep Learning (section 16.1): unpack the
archive, split at blanks, a Counter, lists of indices padded to 500 in Python. Ours tokenizes as GloVe's own text was,
which cuts more finely and undoes markup; --tokenizer whitespace splits at blanks as the tutorial does. With --vectors
both also read word vectors. Every measurement is a process of its own; the ways alternate. Seconds are without
imports, on all cores or, as processor seconds, on a busy machine; memory is the most that was resident.

With --copies K the training reviews are repeated K times in memory, each copy with a word of its own, and their
indices are what is measured, without the loader: how it grows.
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
from pathlib import Path

import torch
from common import data_file, machine, print_table, run_process, spread, wait_until_quiet

BATCH_SIZE = 64
MAX_LENGTH = 500
MIN_FREQUENCY = 5
VECTORS = "vectors/imdb.w2v.100d.txt.gz"
BEGINNINGS = ("archive", "folder")
WAYS = {"first": "ours, the first time", "second": "ours, the second time", "tutorial": "the tutorial's way"}


def ours(files: Path, copies: int, tokenizer: str, vectors: Path | None) -> tuple[int, ...]:
    """Go from files to the first batch with the text plugin and the loader."""
    from transfer import Split
    from transfer.loading import Loader
    from transfer_text.datasets import IMDb
    from transfer_text.preprocessing import TextPreprocessing
    from transfer_text.vectors import read_vectors
    from transfer_text.vocabulary import Vocabulary

    splits = IMDb(root=str(files)).load().splits
    if copies > 1:
        texts = [f"{text} copy{copy}" for copy in range(copies) for text in splits["train"].fields["text"]]
        splits = {"train": Split({"text": texts}, splits["train"].targets.repeat(copies))}
    vocabulary = Vocabulary.build(splits["train"].fields["text"], tokenizer, min_frequency=MIN_FREQUENCY)
    if vectors is not None:
        torch.from_numpy(read_vectors(str(vectors), vocabulary.tokens).matrix)
    preprocessing = TextPreprocessing(vocabulary, MAX_LENGTH)
    if copies > 1:  # the loader has a part of its own for each example, which is not what is measured here
        encoded = preprocessing.encode(splits["train"].fields["text"])
        return tuple(preprocessing.collate([encoded[index] for index in range(BATCH_SIZE)]).shape)
    loaders = [
        Loader(split, ("text",), preprocessing, batch_size=BATCH_SIZE, training=name == "train")
        for name, split in splits.items()
    ]
    return tuple(next(iter(loaders[0].epoch())).inputs.shape)


def tutorial(files: Path, copies: int, tokenizer: str, vectors: Path | None) -> tuple[int, ...]:
    """Do the same as the tutorial does, whose tokenizer splits at blanks."""
    folder = files
    if files.is_file():  # its `download_extract` unpacks whenever it is called
        folder = Path(os.environ["TRANSFER_CACHE"]) / "unpacked"
        with tarfile.open(files) as archive:
            archive.extractall(folder, filter="data")
        folder /= "aclImdb"

    def read(split: str) -> tuple[list[str], list[int]]:
        texts, labels = [], []
        for label in ("pos", "neg"):
            for file in (folder / split / label).iterdir():
                texts.append(file.read_bytes().decode("utf-8").replace("\n", ""))
                labels.append(int(label == "pos"))
        return texts, labels

    data = {split: read(split) for split in ("train", "test")}
    if copies > 1:
        texts, labels = data["train"]
        data = {"train": ([f"{text} copy{copy}" for copy in range(copies) for text in texts], labels * copies)}
    tokens = {split: [text.split() for text in texts] for split, (texts, _) in data.items()}
    counter = Counter(token for line in tokens["train"] for token in line)
    frequent = [token for token, count in counter.most_common() if count >= MIN_FREQUENCY]
    index = {token: place for place, token in enumerate(["<unk>", "<pad>", *frequent])}
    if vectors is not None:
        known: dict[str, list[float]] = {}
        with gzip.open(vectors, "rt", encoding="utf-8") as lines:
            for line in lines:
                word, *numbers = line.rstrip().split(" ")
                if len(numbers) > 1:
                    known[word] = [float(number) for number in numbers]
        zeros = [0.0] * len(next(iter(known.values())))
        torch.tensor([known.get(token, zeros) for token in index])

    def pad(line: list[str]) -> list[int]:
        indices = [index.get(token, 0) for token in line]
        return indices[:MAX_LENGTH] if len(indices) > MAX_LENGTH else indices + [1] * (MAX_LENGTH - len(indices))

    loaders = [
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(
                torch.tensor([pad(line) for line in tokens[split]]), torch.tensor(data[split][1])
            ),
            BATCH_SIZE,
            shuffle=split == "train",
        )
        for split in data
    ]
    return tuple(next(iter(loaders[0]))[0].shape)


def child(arguments: argparse.Namespace) -> None:
    """Measure one way in this process and print what it took."""
    go = {"ours": ours, "tutorial": tutorial}[arguments.child]
    started, cpu_started = time.perf_counter(), time.process_time()
    go(arguments.files, arguments.copies, arguments.tokenizer, data_file(VECTORS) if arguments.vectors else None)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes}))


def measure(way: str, files: Path, cache: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one way in a process of its own."""
    if way == "second":  # the folder is as the first time left it, but for what the tutorial unpacked
        shutil.rmtree(cache / "unpacked", ignore_errors=True)
    else:
        shutil.rmtree(cache, ignore_errors=True)
    options = ["--child", "tutorial" if way == "tutorial" else "ours", "--copies", str(arguments.copies)]
    options += ["--tokenizer", arguments.tokenizer, *(["--vectors"] if arguments.vectors else [])]
    process = run_process([sys.executable, __file__, *options, "--files", str(files)], {"TRANSFER_CACHE": str(cache)})
    found: dict[str, float] = json.loads(process.lines[-1])
    found["disk_bytes"] = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way, which alternate")
    parser.add_argument("--copies", type=int, default=1, help="of the training reviews")
    parser.add_argument("--begin", nargs="+", choices=BEGINNINGS, default=BEGINNINGS, help="with which files")
    parser.add_argument("--tokenizer", default="glove", help="of our way")
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
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        packed = data_file("aclImdb_v1.tar.gz")
        if "folder" in arguments.begin:
            with tarfile.open(packed) as archive:
                archive.extractall(temporary, filter="data")
        for beginning in arguments.begin:
            files = packed if beginning == "archive" else Path(temporary) / "aclImdb"
            cache = Path(temporary) / "cache"
            rounds = [{way: measure(way, files, cache, arguments) for way in WAYS} for _ in range(arguments.rounds)]
            for way, name in WAYS.items():
                row = {"from": beginning, "way": name}
                for unit, title in (("seconds", "seconds"), ("cpu_seconds", "processor seconds")):
                    row[title] = spread([found[way][unit] for found in rounds], ".2f")
                    faster = [found["tutorial"][unit] / found[way][unit] for found in rounds]
                    row[f"times less, {title}"] = spread(faster, ".1f") if way != "tutorial" else "1"
                row["memory, MiB"] = f"{max(found[way]['peak_bytes'] for found in rounds) / 2**20:.0f}"
                row["on disk, MiB"] = f"{rounds[-1][way]['disk_bytes'] / 2**20:.0f}"
                rows.append(row)
    print(f"from files to the first batch; n = {arguments.rounds}, alternating; median (least to greatest)")
    print_table(rows)


if __name__ == "__main__":
    main()
