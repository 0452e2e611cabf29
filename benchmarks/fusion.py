"""Does fusion help where it must? Pictures of shapes beside short texts that name one: do the two agree?

The picture alone says nothing of that, and neither does the text: of each shape and of each text as many agree as do
not. A ResNet-18 learns the shapes first, once and from other pictures; frozen, it is the picture backbone of every run.
For every seed pictures, texts and labels are drawn into a CSV file, which ``multimodal_csv`` reads.
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
PICTURE = {
    "name": "resnet18",
    "weights": None,
    "image_size": SIZE,
    "resize": SIZE,
    "augmentation": "none",
}
TEXT = {"name": "textcnn", "variant": "rand", "dimensions": 16, "kernel_sizes": [1, 2], "filters": 16}


def draw(folder: Path, count: int, seed: int) -> Path:
    """Write pictures and a table of them: image, text, label, part (train or test)."""
    random = np.random.default_rng(seed)
    pictures = ShapeImages(count, SIZE, (seed,))
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "text", "label", "part"))
        for index, (picture, shape) in enumerate(zip(pictures, pictures.targets(), strict=True)):
            picture.save(folder / f"{index}.png")
            agree = bool(random.integers(2))
            named = shape if agree else (shape + random.integers(1, len(SHAPES))) % len(SHAPES)
            text = str(random.choice(TEXTS)).format(SHAPES[named])
            label = "agree" if agree else "differ"
            table.writerow((f"{index}.png", text, label, "test" if index >= count * 3 // 4 else "train"))
    return folder / "table.csv"


def shapes(output: Path) -> transfer.Run:
    """Let a picture backbone learn the shapes."""
    train = {
        "batch_size": 32,
        "optimizer": {"name": "adamw", "lr": 2e-3},
        "scheduler": {"name": "one_cycle"},
        "phases": [{"epochs": 6}],
    }
    data = {"name": "shapes", "image_size": SIZE}
    return transfer.run({"seed": 0, "data": data, "backbone": PICTURE, "train": train}, output=output)


def accuracy(backbone: dict[str, Any], frozen: Any, table: Path, seed: int, output: Path) -> float:
    """Train on the table with the backbone and return the test accuracy."""
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
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--count", type=int, default=1600, help="examples; a quarter of them is the test split")
    arguments = parser.parse_args()
    print(machine())
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(temporary, "runs")
        learned = shapes(runs)
        print(f"test accuracy on the shapes: {learned.summary['test']['accuracy']:.3f}", flush=True)
        picture = PICTURE | {"weights": str(learned.folder)}
        fusion = {"name": "fusion", "parts": {"image": picture, "text": TEXT}}
        backbones: dict[str, tuple[dict[str, Any], Any]] = {
            "picture alone": (picture, "backbone"),
            "text alone": (TEXT, "none"),
            "fusion, concatenated": (fusion, ["image"]),
            "fusion, gated": (fusion | {"join": "gate", "size": 64}, ["image"]),
        }
        for seed in range(arguments.seeds):
            folder = Path(temporary, str(seed))
            folder.mkdir()
            table = draw(folder, arguments.count, seed + 1)
            for name, (backbone, frozen) in backbones.items():
                found.setdefault(name, []).append(accuracy(backbone, frozen, table, seed, runs))
                print(f"seed {seed}, {name}: {found[name][-1]:.3f}", flush=True)
    rows = [
        {
            "backbone": name,
            "test accuracy, mean": f"{statistics.mean(values):.3f}",
            "standard deviation": f"{statistics.stdev(values):.3f}" if len(values) > 1 else "",
            "seeds": " ".join(f"{value:.3f}" for value in values),
        }
        for name, values in found.items()
    ]
    print_table(rows)


if __name__ == "__main__":
    main()
