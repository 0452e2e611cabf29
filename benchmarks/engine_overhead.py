"""Engine overhead per step, compared with a plain loop with the same model, weights, batches and optimizer.

`transfer.run` trains; after each of its epochs, the plain loop trains the same epoch on its own copy. The two therefore
alternate within one process. The time of the engine is that of a training epoch, including its loader, metrics and
checks for finite losses, divided by the number of steps; validation and the checkpoint at the end of the epoch are
excluded. The plain loop sums the loss and computes no metrics. The third model is minimal: it measures the loop itself.

On a busy machine, `OMP_NUM_THREADS=1 ... --clock cpu` measures processor seconds on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from common import (
    THREADS,
    Config,
    OtherProcesses,
    PlainLoop,
    machine,
    minimal_config,
    print_table,
    spread,
    text_config,
    verdict,
    vision_config,
    wait_until_quiet,
)

import transfer
from transfer.training.events import EpochEnded, EpochStarted, EvaluationStarted, Event

TARGET_PERCENT = 2.0
WARM_UP_EPOCHS = 1


def measure(config: Config, clock: Callable[[], float]) -> list[tuple[float, float, float, float]]:
    """Return a tuple per epoch: milliseconds per step of engine and plain loop, then their mean losses."""
    plain = PlainLoop(config, torch.device("cpu"))
    steps = len(plain.batch_indices(0))
    measurements: list[tuple[float, float, float, float]] = []
    times = {"started": 0.0, "trained": 0.0}

    def observe(event: Event) -> None:
        if isinstance(event, EpochStarted):
            times["started"] = clock()
        elif isinstance(event, EvaluationStarted) and event.split == "validation":
            times["trained"] = clock() - times["started"]
        elif isinstance(event, EpochEnded):
            plain_seconds, plain_loss = plain.epoch(event.record["epoch"] - 1, clock)
            milliseconds = times["trained"] / steps * 1e3, plain_seconds / steps * 1e3
            measurements.append((*milliseconds, event.record["train"]["loss"], plain_loss))

    with tempfile.TemporaryDirectory() as folder:
        transfer.run(config, output=folder, observe=observe)
    return measurements


def _quartiles(values: Sequence[float]) -> list[float]:
    """Return the quartiles, which ignore steps that other processes interrupted."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else list(values)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12, help="measured epochs per model, after one warm-up epoch")
    parser.add_argument(
        "--steps", type=int, default=2, help="steps per epoch of ResNet-18; TextCNN has ten times as many"
    )
    parser.add_argument("--wait", type=float, default=0.0, help="maximum seconds to wait for a quiet machine")
    parser.add_argument(
        "--clock", choices=("time", "cpu"), default="time", help="time: elapsed seconds; cpu: processor seconds"
    )
    arguments = parser.parse_args()
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    torch.set_num_threads(THREADS)
    wait_until_quiet(arguments.wait)
    print(machine())
    epochs = arguments.epochs + WARM_UP_EPOCHS
    configs = {
        "ResNet-18, 16 images of 224": vision_config("resnet18", batch=16, steps=arguments.steps, epochs=epochs),
        "TextCNN, 64 texts of up to 400": text_config(batch=64, steps=10 * arguments.steps, epochs=epochs),
        "minimal model, 16 vectors": minimal_config(batch=16, steps=200 * arguments.steps, epochs=epochs),
    }
    rows: list[dict[str, str]] = []
    fixed = 0.0
    for name, config in configs.items():
        others = OtherProcesses()
        all_epochs = measure(config, clock)
        counted = all_epochs[WARM_UP_EPOCHS:]
        engine, plain, differences = ([m[0] for m in counted], [m[1] for m in counted], [m[0] - m[1] for m in counted])
        percent = [(m[0] / m[1] - 1) * 100 for m in counted]
        fixed = statistics.median(differences)
        # Processor seconds of one thread exclude the time in which other processes run.
        busy = others.cpu_fraction() if arguments.clock == "time" else 0.0
        rows.append(
            {
                "model": name,
                "engine, ms": spread(engine, ".2f"),
                "plain, ms": spread(plain, ".2f"),
                "difference, ms": f"{fixed:.2f}",
                "overhead, %": spread(percent, ".2f"),
                "other processes": f"{others.cpu_fraction():.0%}",
                "max loss difference": f"{max(abs(m[2] - m[3]) for m in all_epochs):.1e}",
                "": verdict(_quartiles(percent), TARGET_PERCENT, busy, at_least=False) if len(rows) < 2 else "",
            }
        )
    print(f"per step; n = {arguments.epochs} alternating epochs, median (minimum to maximum); overhead by pairs")
    print_table(rows)
    for row in rows[:2]:
        step = float(row["plain, ms"].split()[0])
        print(f"{row['model']}: {fixed:.2f} ms, the difference of the minimal model, is {fixed / step:.2%} of a step")


if __name__ == "__main__":
    main()
