"""Ants and bees, ResNet-18 frozen up to layer3: layer4 and the head trained with and without the feature cache.

Runs alternate: cached, not cached, cached, ... An epoch's seconds are those of metrics.jsonl: training and validation,
without the checkpoint. The first run with the cache computes it before its first epoch; that is shown apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import WEIGHTS, Others, data_file, machine, print_table, spread, transfer_run, verdict, wait_until_quiet

TARGET = 3.0


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
    epochs: dict[str, list[float]] = {"auto": [], "off": []}
    whole: dict[str, list[float]] = {"auto": [], "off": []}
    losses: dict[str, list[dict[str, Any]]] = {}
    others = Others()
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary, "cache")
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
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    ratios = [off / auto for off, auto in zip(epochs["off"], epochs["auto"], strict=True)]
    print(f"n = {arguments.repeat} runs of {arguments.epochs} epochs each, alternating; median (least to greatest)")
    print_table(
        [
            {
                "activations of layer3": {"auto": "cached", "off": "computed every epoch"}[mode],
                "seconds per epoch": spread(epochs[mode], ".2f"),
                "whole command, seconds": ", ".join(f"{seconds:.1f}" for seconds in whole[mode]),
            }
            for mode in ("off", "auto")
        ]
    )
    print(f"times faster per epoch: {spread(ratios, '.2f')}; {verdict(ratios, TARGET, others.share())}")
    print(f"cache on disk: {size / 2**20:.1f} MiB; others used {others.share():.0%} of the machine")
    print("losses, training / validation:")
    for cached, computed in zip(losses["auto"], losses["off"], strict=True):
        pairs = [f"{record['train']['loss']:.6f} / {record['validation']['loss']:.6f}" for record in (cached, computed)]
        print(f"  epoch {cached['epoch']}: cached {pairs[0]}, computed {pairs[1]}")


if __name__ == "__main__":
    main()
