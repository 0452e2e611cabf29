"""From files of texts to the first batch, the first and the second time, beside the usual tutorial's way.

Both read the 50,000 reviews of IMDb from the same unpacked folder, learn the vocabulary of the training half (words
that occur five times or more), numericalise both halves to at most 500 tokens and make the first batch of 64. The
tutorial's way is that of Dive into Deep Learning (section 16.1): split at blanks, a Counter, lists of indices padded to
500 in Python. Ours tokenizes as GloVe's own text was, which cuts more finely and undoes markup. Every measurement is a
process of its own; the three ways alternate. Seconds are without imports; memory is the most that was resident.

With --copies K the training reviews are repeated K times in memory, each copy with a word of its own, and their
indices are what is measured, without the loader: how it grows.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from common import data_file, machine, print_table, run_process, spread, wait_until_quiet

BATCH_SIZE = 64
MAX_LENGTH = 500
MIN_FREQUENCY = 5


def ours(folder: Path, copies: int) -> tuple[int, ...]:
    """Go from files to the first batch with the text plugin and the loader."""
    from transfer import Split
    from transfer.loading import Loader
    from transfer_text.datasets import IMDb
    from transfer_text.preprocessing import TextPreprocessing
    from transfer_text.vocabulary import Vocabulary

    splits = IMDb(root=str(folder)).load().splits
    if copies > 1:
        texts = [f"{text} copy{copy}" for copy in range(copies) for text in splits["train"].fields["text"]]
        splits = {"train": Split({"text": texts}, splits["train"].targets.repeat(copies))}
    vocabulary = Vocabulary.build(splits["train"].fields["text"], min_frequency=MIN_FREQUENCY)
    preprocessing = TextPreprocessing(vocabulary, MAX_LENGTH)
    if copies > 1:  # the loader has a part of its own for each example, which is not what is measured here
        encoded = preprocessing.encode(splits["train"].fields["text"])
        return tuple(preprocessing.collate([encoded[index] for index in range(BATCH_SIZE)]).shape)
    loaders = [
        Loader(split, "text", preprocessing, batch_size=BATCH_SIZE, training=name == "train")
        for name, split in splits.items()
    ]
    return tuple(next(iter(loaders[0].epoch())).inputs.shape)


def tutorial(folder: Path, copies: int) -> tuple[int, ...]:
    """Do the same as the tutorial does."""

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


def child(way: str, folder: Path, copies: int) -> None:
    """Measure one way in this process and print what it took."""
    go: Callable[[Path, int], tuple[int, ...]] = {"ours": ours, "tutorial": tutorial}[way]
    started = time.perf_counter()
    shape = go(folder, copies)
    seconds = time.perf_counter() - started
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes, "shape": shape}))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way, which alternate")
    parser.add_argument("--copies", type=int, default=1, help="of the training reviews")
    parser.add_argument("--ways", nargs="+", default=["first", "second", "tutorial"], help="which of the three")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.folder, arguments.copies)
        return
    wait_until_quiet(arguments.wait)
    print(machine())
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(data_file("aclImdb_v1.tar.gz")) as archive:
            archive.extractall(temporary, filter="data")
        cache, disk_bytes = Path(temporary) / "cache", 0
        for _ in range(arguments.rounds):
            for way in arguments.ways:
                if way == "first":
                    shutil.rmtree(cache, ignore_errors=True)
                options = ["--child", "tutorial" if way == "tutorial" else "ours", "--copies", str(arguments.copies)]
                command = [sys.executable, __file__, *options, "--folder", str(Path(temporary) / "aclImdb")]
                process = run_process(command, {"TRANSFER_CACHE": str(cache)})
                measured[way].append({**json.loads(process.lines[-1]), "cpu": process.cpu_seconds})
                if way == "first":
                    disk_bytes = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    names = {"first": "ours, the first time", "second": "ours, the second time", "tutorial": "the tutorial's way"}
    print(f"from files to the first batch; n = {arguments.rounds}, alternating; median (least to greatest)")
    print_table(
        [
            {
                "way": names[way],
                "seconds": spread([one["seconds"] for one in found], ".2f"),
                "CPU seconds with imports": spread([one["cpu"] for one in found], ".1f"),
                "memory, MiB": spread([one["peak_bytes"] / 2**20 for one in found], ".0f"),
                "on disk, MiB": f"{disk_bytes / 2**20:.0f}" if way != "tutorial" else "0",
            }
            for way, found in measured.items()
        ]
    )


if __name__ == "__main__":
    main()
