"""Ants and bees, ResNet-18 frozen up to layer3: layer4 and the head trained with and without the feature cache.

Three ways in turn: with the cache; without it, where decoded pictures stay in memory all the same; and the tutorial's
loop (tutorial_loop.py), which decodes them in every epoch. An epoch's seconds are training and validation, without the
checkpoint; all three train on as many pictures (195) and validate on as many (49) of the training folder, though not on
the same ones. The first run with the cache computes it before its first epoch; that is in the whole command alone.
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
    Others,
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
WAYS = {"plain": "plain loop", "off": "computed every epoch", "auto": "cached"}


def split_pictures(folder: Path) -> Path:
    """Unpack ants and bees, with every fifth picture for training, 49 in all, in the place of those to validate."""
    with zipfile.ZipFile(data_file("hymenoptera_data.zip")) as archive:
        archive.extractall(folder)
    data = folder / "hymenoptera_data"
    for kind in ("ants", "bees"):
        for picture in (data / "val" / kind).iterdir():
            picture.unlink()
    pictures = sorted((data / "train").glob("*/*.jpg"))
    for picture in pictures[::5]:
        picture.rename(data / "val" / picture.parent.name / picture.name)
    return data


def plain_loop(data: Path, weights: Path, epochs: int) -> tuple[Process, list[float]]:
    """Run the tutorial's loop; return the seconds of its epochs too."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tutorial_loop.py"), str(data), str(weights), "--layer4"]
    process = run_process([*command, "--epochs", str(epochs)])
    return process, [float(line.split()[-1]) for line in process.lines if line.startswith("epoch ")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=2, help="runs of each side")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a quiet machine")
    arguments = parser.parse_args()
    weights = data_file(WEIGHTS)
    wait_until_quiet(arguments.wait)
    print(machine())
    epochs: dict[str, list[float]] = {way: [] for way in WAYS}
    whole: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[dict[str, Any]]] = {}
    others = Others()
    with tempfile.TemporaryDirectory() as temporary:
        data, cache = split_pictures(Path(temporary)), Path(temporary, "cache")
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
                whole[mode].append(process.seconds)
            process, seconds = plain_loop(data, weights, arguments.epochs)
            epochs["plain"] += seconds
            whole["plain"].append(process.seconds)
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    share = others.share()
    print(f"n = {arguments.repeat} runs of {arguments.epochs} epochs each, alternating; median (least to greatest)")
    rows = []
    for way, title in WAYS.items():
        faster = [seconds / ours for seconds, ours in zip(epochs[way], epochs["auto"], strict=True)]
        rows.append(
            {
                "activations of layer3": title,
                "seconds per epoch": spread(epochs[way], ".2f"),
                "whole command, seconds": ", ".join(f"{seconds:.1f}" for seconds in whole[way]),
                "cached is so many times faster": spread(faster, ".2f") if way != "auto" else "",
                "": verdict(faster, TARGET, share) if way == "plain" else "",
            }
        )
    print_table(rows)
    print(f"cache on disk: {size / 2**20:.1f} MiB; others used {share:.0%} of the machine")
    print("losses, training / validation:")
    for cached, computed in zip(losses["auto"], losses["off"], strict=True):
        pairs = [f"{record['train']['loss']:.6f} / {record['validation']['loss']:.6f}" for record in (cached, computed)]
        print(f"  epoch {cached['epoch']}: cached {pairs[0]}, computed {pairs[1]}")


if __name__ == "__main__":
    main()
