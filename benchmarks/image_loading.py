"""Pictures a second from files to batches, beside torchvision's ImageFolder and PyTorch's DataLoader.

Both read the unpacked training pictures of ants and bees, resize the shorter side to 256, cut 224 x 224 out (the
centre, or with --augment a random part, flipped at random), normalise and stack 32 to a batch, in a random order. Ours
keeps the decoded pictures in memory after the first epoch. The ways alternate; a round of ours begins with an empty
memory. Seconds are those of the clock, or with --clock cpu of the processor, loader processes included, on a busy
machine. How much the pixels differ is printed in steps of 8-bit values. --train also trains ResNet-18 for two epochs
and says what share of the time it waits for data.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from common import THREADS, Others, data_file, machine, print_table, spread, wait_until_quiet
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder as TorchvisionFolder

import transfer
from transfer.data.loader import Loader
from transfer_vision.data.datasets import ImageFolder
from transfer_vision.images.image_sources import FolderSource
from transfer_vision.images.validation import scan
from transfer_vision.preprocessing import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocessing

BATCH_SIZE = 32
EPOCHS = 3


def processor_seconds() -> float:
    """Return what this process and its ended children have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(batches: Iterable[object], clock: Callable[[], float]) -> float:
    """Go through all batches and return how long that took."""
    started = clock()
    for _ in batches:
        pass
    return clock() - started


def reference(root: Path, augment: bool, workers: int) -> DataLoader[object]:
    """Return what the tutorials write."""
    part = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    cut = part if augment else [transforms.CenterCrop(224)]
    steps = [transforms.Resize(256), *cut, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    dataset = TorchvisionFolder(str(root), transforms.Compose(steps))
    return DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=workers)


def ours(root: Path, augment: bool) -> Loader:
    """Return the loader that the engine uses, with nothing in memory yet."""
    preprocessing = ImagePreprocessing(image_size=224, augmentation="default" if augment else "none")
    split = ImageFolder(root=str(root), test_fraction=0).load().splits["train"]
    return Loader(split, ("image",), preprocessing, batch_size=BATCH_SIZE, training=True)


def differences(root: Path) -> str:
    """Say how much the pixels of both ways differ, without augmentation."""
    dataset = TorchvisionFolder(str(root), transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)]))
    loader = ours(root, augment=False)
    column = loader.split.fields["image"]
    means, largest = [], 0.0
    for index in range(len(dataset)):
        theirs = transforms.functional.pil_to_tensor(dataset[index][0]).float()
        (encoded,) = loader.preprocessing.encode([column[index]])
        difference = (transforms.functional.center_crop(encoded, [224, 224]).float() - theirs).abs()
        means.append(float(difference.mean()))
        largest = max(largest, float(difference.max()))
    return (
        f"pixels differ by {statistics.mean(means):.4f} of 255 on average, at most by {largest:.0f}; "
        f"{sum(mean > 0.1 for mean in means)} of {len(means)} pictures by more than 0.1 on average"
    )


def train(root: Path) -> None:
    """Train ResNet-18 for two epochs and say how long it waited."""
    config = {
        "data": {"name": "image_folder", "root": str(root), "test_fraction": 0.0, "validation": 0.1},
        "backbone": {"name": "resnet18", "weights": None},
        "train": {"batch_size": BATCH_SIZE, "phases": [{"epochs": 2}], "optimizer": {"name": "sgd", "lr": 0.01}},
    }
    with tempfile.TemporaryDirectory() as folder:
        run = transfer.run(config, output=folder)
        lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        record = json.loads(line)
        speed, waiting = record["examples_per_second"], record["waiting_for_data"]
        print(f"training ResNet-18, epoch {number}: {speed:.1f} pictures/s, {waiting:.1%} of the time waiting for data")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="of the DataLoader")
    parser.add_argument("--augment", action="store_true")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--wait", type=float, default=0)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    clock = time.perf_counter if options.clock == "wall" else processor_seconds
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(data_file("hymenoptera_data.zip")) as archive:
            archive.extractall(folder)
        root = Path(folder) / "hymenoptera_data" / "train"
        wait_until_quiet(options.wait)
        print(f"{machine()}; {options.clock} clock, {'augmented' if options.augment else 'not augmented'}")
        source, paths = FolderSource(root), [str(path.relative_to(root)) for path in sorted(root.rglob("*.jp*g"))]
        started = clock()
        scan(source, paths)
        print(f"the first look at the {len(paths)} files: {clock() - started:.2f} s")
        print(differences(root))
        others = Others()
        seconds: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for workers in options.workers:
                name = f"ImageFolder + DataLoader, {workers} workers"
                seconds.setdefault(name, []).append(timed(reference(root, options.augment, workers), clock))
            loader = ours(root, options.augment)
            for epoch in range(EPOCHS):
                name = "ours, first epoch" if epoch == 0 else "ours, later epochs"
                seconds.setdefault(name, []).append(timed(loader.epoch(epoch), clock))
        base = [statistics.median(values) for name, values in seconds.items() if "DataLoader" in name]
        print_table(
            [
                {
                    "way": name,
                    "pictures a second": spread([len(paths) / value for value in values], ".0f"),
                    **{
                        f"times {workers} workers": spread([one / value for value in values], ".2f")
                        for workers, one in zip(options.workers, base, strict=True)
                    },
                }
                for name, values in seconds.items()
            ]
        )
        print(f"others took {others.share():.0%} of the machine")
        if options.train:
            train(root)


if __name__ == "__main__":
    main()
