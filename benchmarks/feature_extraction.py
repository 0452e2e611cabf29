"""Feature extraction on ants and bees: the complete `transfer run` command against the tutorial's plain loop.

Both are timed as complete processes, including imports. The plain loop (tutorial_loop.py) runs every image through the
frozen ResNet-18 in every epoch. `transfer run` runs each image once, and a second run with another learning rate reads
the cached features. The plain loop trains on 244 images and validates on the 153 of the folder val. `transfer run`
splits its validation split (49) off the 244, trains on 195 and scores the same 153 once at the end. Both process 397
distinct images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import zipfile
from dataclasses import replace
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

CASES = {
    "center crop": ["backbone.augmentation=none", "train.views=null"],
    "flip, 2 views": ["backbone.augmentation=[{name: RandomHorizontalFlip}]", "train.views=2"],
}
STEP_SCHEDULER = "train.scheduler={name: step, step_size: 7, gamma: 0.1}"
COLD_TARGET, WARM_TARGET = 12.0, 60.0


def plain_loop(data: Path, weights: Path, epochs: int, timed: int, *, flip: bool, workers: int) -> Process:
    """Run the tutorial's loop. If fewer epochs are timed, its seconds are scaled to all epochs."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tutorial_loop.py"), str(data), str(weights)]
    process = run_process([*command, "--epochs", str(timed), "--workers", str(workers), *(["--flip"] if flip else [])])
    trained = [float(line.split()[-1]) for line in process.lines if line.startswith("epoch ")]
    # Startup is counted once; each epoch that was not run counts as the mean of the timed ones.
    seconds = process.seconds + (epochs - timed) * statistics.mean(trained)
    startup = process.seconds - sum(trained)
    cpu_seconds = process.cpu_seconds * (seconds - startup) / sum(trained)
    return replace(process, seconds=seconds, cpu_seconds=cpu_seconds)


def transfer_twice(case: list[str], weights: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """Run `transfer run` with an empty feature cache, then again with another learning rate."""
    cache = folder / "cache"
    common = [f"backbone.weights={weights}", f"train.phases=[{{epochs: {epochs}, freeze: backbone}}]", STEP_SCHEDULER]
    results: dict[str, Any] = {}
    for name, rate in (("first", 0.01), ("second", 0.02)):
        overrides = [*case, *common, f"train.optimizer.lr={rate}"]
        process = transfer_run("hymenoptera_features.yaml", overrides, folder / "runs", cache)
        summary = json.loads((Path(process.lines[-1]) / "summary.json").read_text(encoding="utf-8"))
        reasons = [split["why"] for split in summary["cache"] if not split["cached"]]
        if reasons:
            sys.exit(f"a split was not cached: {reasons}")
        results[name] = (process, summary["test"]["accuracy"], summary["seconds"])
    results["cache_bytes"] = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return results


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument(
        "--baseline-epochs", type=int, help="epochs of the plain loop to time; the rest is extrapolated"
    )
    parser.add_argument("--baseline-workers", type=int, default=0, help="loader processes of the plain loop")
    parser.add_argument(
        "--repeat", type=int, default=3, help="pairs of runs of transfer, and runs of the plain loop if it is scaled"
    )
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument(
        "--wait", type=float, default=0.0, help="maximum seconds to wait for a quiet machine before each case"
    )
    arguments = parser.parse_args()
    weights = data_file(WEIGHTS)
    timed = min(arguments.baseline_epochs or arguments.epochs, arguments.epochs)
    print(machine())
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        with zipfile.ZipFile(data_file("hymenoptera_data.zip")) as archive:
            archive.extractall(temporary)
        for name in arguments.case or CASES:
            wait_until_quiet(arguments.wait)
            data, flip = Path(temporary, "hymenoptera_data"), name.startswith("flip")
            plain, pairs, others = [], [], OtherProcesses()
            for number in range(arguments.repeat):
                # The complete plain loop takes minutes, so it runs once. A scaled one alternates with transfer.
                if number == 0 or timed < arguments.epochs:
                    workers = arguments.baseline_workers
                    plain.append(plain_loop(data, weights, arguments.epochs, timed, flip=flip, workers=workers))
                pairs.append(
                    transfer_twice(CASES[name], weights, arguments.epochs, Path(temporary, f"{name} {number}"))
                )
            other_fraction = others.cpu_fraction()
            accuracy = next(line.split()[-1] for line in reversed(plain[-1].lines) if line.startswith("last val"))
            rows.append(
                {
                    "case": name,
                    "command": f"plain loop{f', scaled from {timed} epochs' if timed < arguments.epochs else ''}",
                    "seconds": spread([loop.seconds for loop in plain]),
                    "times faster": "1",
                    "CPU seconds": spread([loop.cpu_seconds for loop in plain], ".0f"),
                    "accuracy on 153": f"{float(accuracy):.3f}" if timed == arguments.epochs else "-",
                    "cache": "-",
                    "peak memory": f"{plain[-1].peak_bytes / 2**20:.0f} MiB",
                    "times less CPU": "1",
                    "": f"other processes used {other_fraction:.0%} of the machine",
                }
            )
            for which, target in (("first", COLD_TARGET), ("second", WARM_TARGET)):
                runs = [pair[which][0] for pair in pairs]
                ratios = [plain[min(i, len(plain) - 1)].seconds / run.seconds for i, run in enumerate(runs)]
                rows.append(
                    {
                        "case": name,
                        "command": f"transfer run, {which}",
                        "seconds": spread([run.seconds for run in runs]),
                        "times faster": spread(ratios),
                        "CPU seconds": spread([run.cpu_seconds for run in runs]),
                        "accuracy on 153": f"{pairs[-1][which][1]:.3f}",
                        "cache": f"{pairs[-1]['cache_bytes'] / 1024:.0f} KiB",
                        "peak memory": f"{max(run.peak_bytes for run in runs) / 2**20:.0f} MiB",
                        "times less CPU": spread(
                            [plain[min(i, len(plain) - 1)].cpu_seconds / run.cpu_seconds for i, run in enumerate(runs)]
                        ),
                        "": verdict(ratios, target, other_fraction),
                    }
                )
    print(f"{arguments.epochs} epochs, batches of 32; n = {arguments.repeat}, median (minimum to maximum)")
    print_table(rows)


if __name__ == "__main__":
    main()
