"""Ants and bees, ResNet-18 frozen up to layer3: layer4 and the head are trained with and without the feature cache.

Three variants alternate: with the cache; without it, with decoded images kept in memory; and the tutorial's loop
(tutorial_loop.py), which decodes them in every epoch. The seconds of an epoch include training and validation, but not
the checkpoint. All three train on 195 images and validate on 49 of the training folder, though not on the same ones.
The first run with the cache computes it before its first epoch; only the time of the complete command includes this.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from common import (
    ROOT,
    WEIGHTS,
    OtherProcesses,
    Process,
    data_file,
    machine,
    print_table,
    run_process,
    spread,
    transfer_run,
    verdict,
    wait_until_quiet,
)

TARGET = 3.0
VARIANTS = {"plain": "plain loop", "off": "computed every epoch", "auto": "cached"}


def split_images(folder: Path) -> Path:
    """Unpack ants and bees. Every fifth training image, 49 in total, replaces the validation images."""
    with zipfile.ZipFile(data_file("hymenoptera_data.zip")) as archive:
        archive.extractall(folder)
    data = folder / "hymenoptera_data"
    for kind in ("ants", "bees"):
        for image in (data / "val" / kind).iterdir():
            image.unlink()
    images = sorted((data / "train").glob("*/*.jpg"))
    for image in images[::5]:
        image.rename(data / "val" / image.parent.name / image.name)
    return data


def plain_loop(data: Path, weights: Path, epochs: int) -> tuple[Process, list[float]]:
    """Run the tutorial's loop; return its measurements and the seconds of each epoch."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tutorial_loop.py"), str(data), str(weights), "--layer4"]
    process = run_process([*command, "--epochs", str(epochs)])
    return process, [float(line.split()[-1]) for line in process.lines if line.startswith("epoch ")]


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=2, help="runs of each variant")
    parser.add_argument("--wait", type=float, default=0.0, help="maximum seconds to wait for a quiet machine")
    arguments = parser.parse_args()
    weights = data_file(WEIGHTS)
    wait_until_quiet(arguments.wait)
    print(machine())
    epochs: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    commands: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    losses: dict[str, list[dict[str, Any]]] = {}
    others = OtherProcesses()
    with tempfile.TemporaryDirectory() as temporary:
        data, cache = split_images(Path(temporary)), Path(temporary, "cache")
        for _ in range(arguments.repeat):
            for mode in ("auto", "off"):
                overrides = [
                    f"backbone.weights={weights}",
                    "backbone.augmentation=none",
                    f"train.cache={mode}",
                    "train.views=null",
                    f"train.phases=[{{epochs: {arguments.epochs}, freeze: {{until: layer3}}}}]",
                ]
                process = transfer_run("hymenoptera_features.yaml", overrides, Path(temporary, "runs"), cache)
                lines = (Path(process.lines[-1]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                losses[mode] = [json.loads(line) for line in lines]
                epochs[mode] += [record["seconds"] for record in losses[mode]]
                commands[mode].append(process.seconds)
            process, seconds = plain_loop(data, weights, arguments.epochs)
            epochs["plain"] += seconds
            commands["plain"].append(process.seconds)
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    other_fraction = others.cpu_fraction()
    print(f"n = {arguments.repeat} runs of {arguments.epochs} epochs each, alternating; median (minimum to maximum)")
    rows = []
    for variant, title in VARIANTS.items():
        speedups = [seconds / cached for seconds, cached in zip(epochs[variant], epochs["auto"], strict=True)]
        rows.append(
            {
                "activations of layer3": title,
                "seconds per epoch": spread(epochs[variant], ".2f"),
                "complete command, seconds": ", ".join(f"{seconds:.1f}" for seconds in commands[variant]),
                "speedup of cached": spread(speedups, ".2f") if variant != "auto" else "",
                "": verdict(speedups, TARGET, other_fraction) if variant == "plain" else "",
            }
        )
    print_table(rows)
    print(f"cache on disk: {size / 2**20:.1f} MiB; other processes used {other_fraction:.0%} of the machine")
    print("losses, training / validation:")
    for cached, computed in zip(losses["auto"], losses["off"], strict=True):
        pairs = [f"{record['train']['loss']:.6f} / {record['validation']['loss']:.6f}" for record in (cached, computed)]
        print(f"  epoch {cached['epoch']}: cached {pairs[0]}, computed {pairs[1]}")


if __name__ == "__main__":
    main()
