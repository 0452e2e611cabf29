"""What the engine costs per step, beside a plain loop with the same model, weights, batches and optimizer.

`transfer.run` trains; whenever it tells that an epoch ended, the plain loop trains the same epoch on its own copy: so
the two alternate within one process. The engine's time is that of its training epoch, with its loader, metrics and
checks for finite losses, divided by its steps; validation and the checkpoint at the epoch's end are not in it. The
plain loop sums the loss and computes no metric. The third model is next to nothing: what is left is the loop itself.

On a machine that others use, `OMP_NUM_THREADS=1 ... --clock cpu` counts the seconds of the processor on one thread.
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
    Others,
    PlainLoop,
    machine,
    print_table,
    small_config,
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
    """Return for each epoch the milliseconds of a step and the mean loss, of the engine and of the plain loop."""
    plain = PlainLoop(config, torch.device("cpu"))
    steps = len(plain.batch_indices(0))
    found: list[tuple[float, float, float, float]] = []
    times = {"started": 0.0, "trained": 0.0}

    def observe(event: Event) -> None:
        if isinstance(event, EpochStarted):
            times["started"] = clock()
        elif isinstance(event, EvaluationStarted) and event.split == "validation":
            times["trained"] = clock() - times["started"]
        elif isinstance(event, EpochEnded):
            plain_seconds, plain_loss = plain.epoch(event.record["epoch"] - 1, clock)
            milliseconds = times["trained"] / steps * 1e3, plain_seconds / steps * 1e3
            found.append((*milliseconds, event.record["train"]["loss"], plain_loss))

    with tempfile.TemporaryDirectory() as folder:
        transfer.run(config, output=folder, observe=observe)
    return found


def _middle(values: Sequence[float]) -> list[float]:
    """Return the quartiles: a step that others interrupt says nothing of the engine."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else list(values)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12, help="measured epochs of each model, beside one to warm up")
    parser.add_argument("--steps", type=int, default=2, help="of ResNet-18 in an epoch; TextCNN has ten times as many")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--clock", choices=("time", "cpu"), default="time", help="cpu: seconds of the processor")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    torch.set_num_threads(THREADS)
    wait_until_quiet(arguments.wait)
    print(machine())
    epochs = arguments.epochs + WARM_UP_EPOCHS
    configs = {
        "ResNet-18, 16 pictures of 224": vision_config("resnet18", batch=16, steps=arguments.steps, epochs=epochs),
        "TextCNN, 64 texts of up to 400": text_config(batch=64, steps=10 * arguments.steps, epochs=epochs),
        "next to nothing, 16 vectors": small_config(batch=16, steps=200 * arguments.steps, epochs=epochs),
    }
    rows: list[dict[str, str]] = []
    fixed = 0.0
    for name, config in configs.items():
        others = Others()
        measured = measure(config, clock)
        kept = measured[WARM_UP_EPOCHS:]
        engine, plain, differences = ([m[0] for m in kept], [m[1] for m in kept], [m[0] - m[1] for m in kept])
        percent = [(m[0] / m[1] - 1) * 100 for m in kept]
        fixed = statistics.median(differences)
        # On one thread the processor's clock does not run while others do.
        busy = others.share() if arguments.clock == "time" else 0.0
        rows.append(
            {
                "model": name,
                "engine, ms": spread(engine, ".2f"),
                "plain, ms": spread(plain, ".2f"),
                "difference, ms": f"{fixed:.2f}",
                "overhead, %": spread(percent, ".2f"),
                "others": f"{others.share():.0%}",
                "losses differ by": f"{max(abs(m[2] - m[3]) for m in measured):.1e}",
                "": verdict(_middle(percent), TARGET_PERCENT, busy, at_least=False) if len(rows) < 2 else "",
            }
        )
    print(f"per step; n = {arguments.epochs} alternating epochs, median (least to greatest); overhead: of the pairs")
    print_table(rows)
    for row in rows[:2]:
        step = float(row["plain, ms"].split()[0])
        print(f"{row['model']}: {fixed:.2f} ms, as of next to nothing, is {fixed / step:.2%} of a step")


if __name__ == "__main__":
    main()
