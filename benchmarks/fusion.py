"""Accuracy of fusion on a task that requires both inputs: does the text name the shape in the image?

Neither input is sufficient: for each shape and each text, the labels are balanced. A ResNet-18 is first pretrained once
to classify the shapes, on other images; frozen, it is the image backbone of every run. For each seed, images, texts and
labels are drawn and written to a CSV file, which ``multimodal_csv`` reads.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, print_table

import transfer
from transfer_vision.data.shapes import SHAPES, ShapeImages

SIZE = 32
TEXTS = (
    "a {} on a plain background",
    "here someone drew a {}",
    "what you see is a {} , nothing else",
    "one {} , slightly turned",
    "the {} of the collection",
)
IMAGE = {
    "name": "resnet18",
    "weights": None,
    "image_size": SIZE,
    "resize": SIZE,
    "augmentation": "none",
}
TEXT = {"name": "textcnn", "variant": "rand", "dimensions": 16, "kernel_sizes": [1, 2], "filters": 16}


def draw(folder: Path, count: int, seed: int) -> Path:
    """Write images and a table with the columns image, text, label and part (train or test); return its path."""
    random = np.random.default_rng(seed)
    images = ShapeImages(count, SIZE, (seed,))
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "text", "label", "part"))
        for index, (image, shape) in enumerate(zip(images, images.targets(), strict=True)):
            image.save(folder / f"{index}.png")
            agree = bool(random.integers(2))
            named = shape if agree else (shape + random.integers(1, len(SHAPES))) % len(SHAPES)
            text = str(random.choice(TEXTS)).format(SHAPES[named])
            label = "agree" if agree else "differ"
            table.writerow((f"{index}.png", text, label, "test" if index >= count * 3 // 4 else "train"))
    return folder / "table.csv"


def shapes(output: Path) -> transfer.Run:
    """Pretrain the image backbone to classify the shapes."""
    train = {
        "batch_size": 32,
        "optimizer": {"name": "adamw", "lr": 2e-3},
        "scheduler": {"name": "one_cycle"},
        "phases": [{"epochs": 6}],
    }
    data = {"name": "shapes", "image_size": SIZE}
    return transfer.run({"seed": 0, "data": data, "backbone": IMAGE, "train": train}, output=output)


def accuracy(backbone: dict[str, Any], frozen: Any, table: Path, seed: int, output: Path) -> float:
    """Train a backbone on the table and return the test accuracy."""
    config = {
        "seed": seed,
        "data": {"name": "multimodal_csv", "train": str(table), "split": "part"},
        "backbone": backbone,
        "head": {"name": "mlp"},
        "train": {
            "batch_size": 32,
            "optimizer": {"name": "adamw", "lr": 3e-3},
            "phases": [{"epochs": 20, "freeze": frozen}],
        },
    }
    return float(transfer.run(config, output=output).summary["test"]["accuracy"])


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--count", type=int, default=1600, help="number of examples; a quarter is the test split")
    arguments = parser.parse_args()
    print(machine())
    accuracies: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(temporary, "runs")
        pretrained = shapes(runs)
        print(f"test accuracy on the shapes: {pretrained.summary['test']['accuracy']:.3f}", flush=True)
        image = IMAGE | {"weights": str(pretrained.folder)}
        fusion = {"name": "fusion", "parts": {"image": image, "text": TEXT}}
        backbones: dict[str, tuple[dict[str, Any], Any]] = {
            "image only": (image, "backbone"),
            "text only": (TEXT, "none"),
            "fusion, concatenated": (fusion, ["image"]),
            "fusion, gated": (fusion | {"join": "gate", "size": 64}, ["image"]),
        }
        for seed in range(arguments.seeds):
            folder = Path(temporary, str(seed))
            folder.mkdir()
            table = draw(folder, arguments.count, seed + 1)
            for name, (backbone, frozen) in backbones.items():
                accuracies.setdefault(name, []).append(accuracy(backbone, frozen, table, seed, runs))
                print(f"seed {seed}, {name}: {accuracies[name][-1]:.3f}", flush=True)
    rows = [
        {
            "backbone": name,
            "test accuracy, mean": f"{statistics.mean(values):.3f}",
            "standard deviation": f"{statistics.stdev(values):.3f}" if len(values) > 1 else "",
            "seeds": " ".join(f"{value:.3f}" for value in values),
        }
        for name, values in accuracies.items()
    ]
    print_table(rows)


if __name__ == "__main__":
    main()
