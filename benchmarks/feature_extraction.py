"""Feature extraction on ants and bees: the whole `transfer run` command against the tutorial's plain loop.

Both are processes timed from their start, imports included. The plain loop (tutorial_loop.py) runs every picture
through the frozen ResNet-18 in every epoch; `transfer run` does so once, and in a second run with another learning rate
not at all. Sizes: the loop trains on 244 pictures and validates on the 153 of the folder val; `transfer run` cuts its
validation split (49) off the 244, trains on 195 and scores the same 153 once at the end. Distinct pictures: 397 each.
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

CASES = {
    "centre crop": ["backbone.augmentation=none", "train.views=null"],
    "flip, 2 views": ["backbone.augmentation=[{name: RandomHorizontalFlip}]", "train.views=2"],
}
STEP_SCHEDULER = "train.scheduler={name: step, step_size: 7, gamma: 0.1}"
COLD_TARGET, WARM_TARGET = 12.0, 60.0


def plain_loop(data: Path, weights: Path, epochs: int, timed: int, *, flip: bool, workers: int) -> Process:
    """Run the tutorial's loop; where fewer epochs are timed, its seconds are scaled to all."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tutorial_loop.py"), str(data), str(weights)]
    process = run_process([*command, "--epochs", str(timed), "--workers", str(workers), *(["--flip"] if flip else [])])
    trained = [float(line.split()[-1]) for line in process.lines if line.startswith("epoch ")]
    # Startup counts once, the mean epoch as often as there are epochs.
    seconds = process.seconds + (epochs - timed) * statistics.mean(trained)
    startup = process.seconds - sum(trained)
    cpu_seconds = process.cpu_seconds * (seconds - startup) / sum(trained)
    return replace(process, seconds=seconds, cpu_seconds=cpu_seconds)


def ours(case: list[str], weights: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """Run `transfer run` with an empty feature cache, then again with another learning rate."""
    cache = folder / "cache"
    common = [f"backbone.weights={weights}", f"train.phases=[{{epochs: {epochs}, freeze: backbone}}]", STEP_SCHEDULER]
    found: dict[str, Any] = {}
    for name, rate in (("first", 0.01), ("second", 0.02)):
        overrides = [*case, *common, f"train.optimizer.lr={rate}"]
        process = transfer_run("hymenoptera_features.yaml", overrides, folder / "runs", cache)
        summary = json.loads((Path(process.lines[-1]) / "summary.json").read_text(encoding="utf-8"))
        why = [part["why"] for part in summary["cache"] if not part["cached"]]
        if why:
            sys.exit(f"a split was not cached: {why}")
        found[name] = (process, summary["test"]["accuracy"], summary["seconds"])
    found["cache_bytes"] = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--baseline-epochs", type=int, help="time so many of the plain loop's epochs and scale")
    parser.add_argument("--baseline-workers", type=int, default=0, help="loader processes of the plain loop")
    parser.add_argument(
        "--repeat", type=int, default=3, help="pairs of our runs, and of the plain loop where it is scaled"
    )
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a quiet machine before each case")
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
            plain, pairs, others = [], [], Others()
            for number in range(arguments.repeat):
                # The whole plain loop takes minutes: once is enough. Scaled, it alternates with our runs.
                if number == 0 or timed < arguments.epochs:
                    workers = arguments.baseline_workers
                    plain.append(plain_loop(data, weights, arguments.epochs, timed, flip=flip, workers=workers))
                pairs.append(ours(CASES[name], weights, arguments.epochs, Path(temporary, f"{name} {number}")))
            share = others.share()
            accuracy = next(line.split()[-1] for line in reversed(plain[-1].lines) if line.startswith("last val"))
            rows.append(
                {
                    "case": name,
                    "what": f"plain loop{f', scaled from {timed} epochs' if timed < arguments.epochs else ''}",
                    "seconds": spread([loop.seconds for loop in plain]),
                    "times faster": "1",
                    "CPU seconds": spread([loop.cpu_seconds for loop in plain], ".0f"),
                    "accuracy on 153": f"{float(accuracy):.3f}" if timed == arguments.epochs else "-",
                    "cache": "-",
                    "peak memory": f"{plain[-1].peak_bytes / 2**20:.0f} MiB",
                    "times less CPU": "1",
                    "": f"others used {share:.0%} of the machine",
                }
            )
            for which, target in (("first", COLD_TARGET), ("second", WARM_TARGET)):
                runs = [pair[which][0] for pair in pairs]
                ratios = [plain[min(i, len(plain) - 1)].seconds / run.seconds for i, run in enumerate(runs)]
                rows.append(
                    {
                        "case": name,
                        "what": f"transfer run, {which}",
                        "seconds": spread([run.seconds for run in runs]),
                        "times faster": spread(ratios),
                        "CPU seconds": spread([run.cpu_seconds for run in runs]),
                        "accuracy on 153": f"{pairs[-1][which][1]:.3f}",
                        "cache": f"{pairs[-1]['cache_bytes'] / 1024:.0f} KiB",
                        "peak memory": f"{max(run.peak_bytes for run in runs) / 2**20:.0f} MiB",
                        "times less CPU": spread(
                            [plain[min(i, len(plain) - 1)].cpu_seconds / run.cpu_seconds for i, run in enumerate(runs)]
                        ),
                        "": verdict(ratios, target, share),
                    }
                )
    print(f"{arguments.epochs} epochs, batches of 32; n = {arguments.repeat}, median (least to greatest)")
    print_table(rows)


if __name__ == "__main__":
    main()
