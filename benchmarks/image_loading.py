"""Images per second from files to batches, compared with torchvision's ImageFolder and PyTorch's DataLoader.

Both sides read the unpacked training images of ants and bees in a random order. They resize the shorter side to 256,
crop 224 x 224 (at the center, or at random with a random flip with --augment), normalize, and stack 32 to a batch.
transfer keeps the decoded images in memory after the first epoch; each round starts with an empty memory. The variants
alternate. Seconds are elapsed, or with --clock cpu, for a busy machine, processor seconds including loader processes.
Differences of pixels are printed in steps of 8-bit values. --train also trains ResNet-18 for two epochs and prints the
fraction of the time that it waits for data.
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
from common import THREADS, OtherProcesses, data_file, machine, print_table, spread, wait_until_quiet
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
    """Return the processor seconds of this process and its terminated children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(batches: Iterable[object], clock: Callable[[], float]) -> float:
    """Iterate over all batches and return the seconds it took."""
    started = clock()
    for _ in batches:
        pass
    return clock() - started


def reference(root: Path, augment: bool, workers: int) -> DataLoader[object]:
    """Return the data loader of PyTorch's tutorials."""
    random_crop = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    crop = random_crop if augment else [transforms.CenterCrop(224)]
    steps = [transforms.Resize(256), *crop, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    dataset = TorchvisionFolder(str(root), transforms.Compose(steps))
    return DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=workers)


def transfer_loader(root: Path, augment: bool) -> Loader:
    """Return the loader of the engine, with an empty memory."""
    preprocessing = ImagePreprocessing(image_size=224, augmentation="default" if augment else "none")
    split = ImageFolder(root=str(root), test_fraction=0).load().splits["train"]
    return Loader(split, ("image",), preprocessing, batch_size=BATCH_SIZE, training=True)


def differences(root: Path) -> str:
    """Return a line about the differences between the pixels of both sides, without augmentation."""
    dataset = TorchvisionFolder(str(root), transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)]))
    loader = transfer_loader(root, augment=False)
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
        f"{sum(mean > 0.1 for mean in means)} of {len(means)} images by more than 0.1 on average"
    )


def train(root: Path) -> None:
    """Train ResNet-18 for two epochs and print the fraction of the time that it waited for data."""
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
        print(f"training ResNet-18, epoch {number}: {speed:.1f} images/s, {waiting:.1%} of the time waiting for data")


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[0, 2], help="numbers of worker processes of the DataLoader"
    )
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
        print(f"validating {len(paths)} files: {clock() - started:.2f} s")
        print(differences(root))
        others = OtherProcesses()
        seconds: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for workers in options.workers:
                name = f"ImageFolder + DataLoader, {workers} workers"
                seconds.setdefault(name, []).append(timed(reference(root, options.augment, workers), clock))
            loader = transfer_loader(root, options.augment)
            for epoch in range(EPOCHS):
                name = "transfer, first epoch" if epoch == 0 else "transfer, later epochs"
                seconds.setdefault(name, []).append(timed(loader.epoch(epoch), clock))
        baselines = [statistics.median(values) for name, values in seconds.items() if "DataLoader" in name]
        print_table(
            [
                {
                    "variant": name,
                    "images per second": spread([len(paths) / value for value in values], ".0f"),
                    **{
                        f"times {workers} workers": spread([baseline / value for value in values], ".2f")
                        for workers, baseline in zip(options.workers, baselines, strict=True)
                    },
                }
                for name, values in seconds.items()
            ]
        )
        print(f"other processes used {others.cpu_fraction():.0%} of the machine")
        if options.train:
            train(root)


if __name__ == "__main__":
    main()
