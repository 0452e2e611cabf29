"""The engine compared with a plain loop on a CUDA GPU: ResNets, a ViT, TextCNN and BiLSTM, on synthetic data and JPEGs.

For each model, fine-tuned and frozen, in fp32, bf16 and compiled, the script prints: examples per second of both loops,
peak memory, throughput as a fraction of this machine's measured matrix-product rate, and the fraction of time that the
engine waits for its loader. Runs of both loops alternate, and only one of them holds memory at a time. The first epoch
of each warms up and is not counted. In fp32 torch allows TF32 in convolutions, so fractions refer to the TF32 rate.
"cached": the engine trains the head on cached features; the plain loop runs the frozen backbone in every epoch.
"JPEG": both decode, augment and resize the files of a folder that the script writes, and all cores work for both. With
"kept" the engine keeps decoded images, so that it decodes them in the first epoch only, which is not counted. With
"GPU JPEG" the engine decodes on the GPU.
"IMDb": texts with the lengths of movie reviews, in small batches; the plain loop pads every text to the maximum length.
--json also writes all rows, with the rate of each epoch, to a file.

Losses of the engine on the GPU, with TF32 disabled, are compared with those of the plain loop on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Sizes of inputs and epochs.

    Args:
        image_size: Height and width of the images in pixels.
        batch: Images per batch.
        text_batch: Texts per batch.
        review_batch: Texts per batch of the cases named IMDb.
        reviews: Number of their training texts.
        length: Maximum number of words per text.
        max_review: Maximum number of words per text of the cases named IMDb.
        steps: Steps per epoch.
        epochs: Epochs per run, including the warm-up epoch.
        matrix: Rows and columns of the matrices whose product is timed.
        compiled: Models to compile; compilation takes about a minute each.
        jpegs: Number of JPEG files for training.
        vit: Vision transformer of torchvision.
    """

    image_size: int = 224
    batch: int = 128
    text_batch: int = 512
    review_batch: int = 64
    reviews: int = 6400
    length: int = 400
    max_review: int = 500
    steps: int = 16
    epochs: int = 4
    matrix: int = 8192
    compiled: tuple[str, ...] = ("ResNet-18", "ResNet-50", "TextCNN")
    jpegs: int = 3840
    vit: str = "vit_b_16"


TINY = Sizes(
    image_size=32,
    batch=4,
    text_batch=4,
    review_batch=4,
    reviews=8,
    length=24,
    max_review=50,
    steps=2,
    epochs=2,
    matrix=256,
    compiled=("TextCNN",),
    jpegs=8,
    vit="shufflenet_v2_x0_5",  # the smallest ViT takes a minute on a CPU
)
LOSS_TOLERANCE = 5e-3
"""Relative tolerance after a few fp32 steps without TF32. Another order of summation is amplified by batch norm."""


@dataclass
class Rate:
    """Throughput of one loop.

    Args:
        examples_per_second: Examples per second of each counted epoch.
        memory_bytes: Peak memory allocated on the device, in bytes.
        waiting: Fraction of the time that the loop waited for its loader, in each counted epoch; empty if not measured.
    """

    examples_per_second: list[float] = field(default_factory=list)
    memory_bytes: int = 0
    waiting: list[float] = field(default_factory=list)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small inputs, to test the script")
    parser.add_argument("--repeat", type=int, default=2, help="alternating runs of each loop")
    parser.add_argument("--seconds", type=float, default=420.0, help="start no case after this many seconds")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # before the import of torch: train.device is auto, which prefers a visible GPU
        )
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU is available; to test this script without one: --device cpu --tiny")
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRANSFER_CACHE"] = cache  # features of synthetic inputs are not worth keeping
        sys.exit(0 if benchmark(torch.device(arguments.device), arguments) else 1)


def benchmark(device: Any, arguments: argparse.Namespace) -> bool:
    """Run all cases and print the table; return whether the losses agree."""
    from common import machine, print_table, spread

    started = time.monotonic()
    sizes = TINY if arguments.tiny else Sizes()
    print(machine())
    agree = compare_losses(device, sizes)
    peak = {precision: matrix_rate(device, precision, sizes.matrix) for precision in ("fp32", "tf32", "bf16")}
    print("matrix product, TFLOP/s: " + ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in peak.items()))
    rows, results = [], []
    folder = write_jpegs(Path(os.environ["TRANSFER_CACHE"]) / "jpegs", sizes)
    for name, precision, compiled, frozen, cached in cases(sizes, on_gpu=device.type == "cuda"):
        if time.monotonic() - started > arguments.seconds:
            print(f"skipped after {arguments.seconds:g} s: {name} {precision} and the remaining cases")
            break
        reads_jpegs = name.endswith("JPEG")
        if reads_jpegs:
            config = jpeg_config(name, sizes, folder, precision=precision, keep=cached)
        else:
            config = make_config(name, sizes, precision=precision, compiled=compiled, frozen=frozen, cached=cached)
        engine, plain = Rate(), Rate()
        for _ in range(arguments.repeat):
            run_engine(config, device, engine)
            run_plain(config, device, plain)
        rates = [statistics.median(rate.examples_per_second) for rate in (engine, plain)]
        fraction = None
        if not cached and not reads_jpegs and not name.startswith("IMDb"):
            flops = count_flops(config, device)
            fraction = flops * rates[0] / peak["tf32" if precision == "fp32" and device.type == "cuda" else precision]
        trained = "all" if reads_jpegs or not frozen else "head"
        trained += (", kept" if reads_jpegs else ", cached") if cached else ""
        case = {"model": name, "trained": trained, "precision": precision, "compiled": compiled}
        results.append(
            {**case, "engine": asdict(engine), "plain": asdict(plain), "ratio": rates[0] / rates[1], "matrix": fraction}
        )
        rows.append(
            {
                "model": name,
                "trained": trained,
                "precision": f"{precision}, compiled" if compiled else precision,
                "engine, examples/s": spread(engine.examples_per_second, ",.0f"),
                "plain, examples/s": spread(plain.examples_per_second, ",.0f"),
                "engine / plain": f"{rates[0] / rates[1]:.3f}",
                "memory, MiB": "; ".join(
                    f"{r.memory_bytes / 2**20:,.0f}" if r.memory_bytes else "-" for r in (engine, plain)
                ),
                "fraction of matrix rate": "-" if fraction is None else f"{fraction:.1%}",
                "waiting for data": f"{statistics.median(engine.waiting):.1%}",
            }
        )
    print(
        f"batches of {sizes.batch} images of {sizes.image_size}, or of {sizes.text_batch} texts of up to "
        f"{sizes.length} words; {arguments.repeat} runs of {sizes.epochs - 1} counted epochs with {sizes.steps} steps; "
        "median (minimum to maximum); memory: engine; plain"
    )
    if rows:
        print_table(rows)
    if arguments.json is not None:
        content = {"machine": machine(), "torch_device": device.type, "losses_agree": agree, "cases": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"{time.monotonic() - started:.0f} s in total")
    return agree


def cases(sizes: Sizes, *, on_gpu: bool) -> Iterator[tuple[str, str, bool, bool, bool]]:
    """Yield (model, precision, compiled, frozen, cached), the most important cases first.

    ``on_gpu``: whether the device is a GPU, which decodes JPEG files and has LSTMs in bf16.
    """
    models = ("ResNet-18", "ResNet-50", "TextCNN")
    for name in models:
        yield name, "bf16", False, False, False
    for keep in (False, True):
        yield "ResNet-18 JPEG", "bf16", False, False, keep
    if on_gpu:
        yield "ResNet-18 GPU JPEG", "bf16", False, False, False
    yield "IMDb TextCNN", "bf16", False, False, False
    yield "IMDb BiLSTM", "bf16" if on_gpu else "fp32", False, False, False
    yield "ResNet-50 JPEG", "bf16", False, False, False
    if on_gpu:
        yield "ResNet-50 GPU JPEG", "bf16", False, False, False
    yield "ViT", "bf16", False, False, False
    for name in models:
        yield name, "fp32", False, False, False
    for cached in (False, True):
        for name in models[:2]:
            yield name, "bf16", False, True, cached
    for name in models:
        if name in sizes.compiled:
            yield name, "bf16", True, False, False


def make_config(name: str, sizes: Sizes, *, precision: str, compiled: bool, frozen: bool, cached: bool) -> Any:
    """Return the config of a case."""
    from common import text_config, vision_config

    train: dict[str, Any] = {"precision": precision, "compile": compiled, "cache": "auto" if cached else "off"}
    if name.startswith("IMDb"):
        steps = sizes.reviews // sizes.review_batch
        # All other options have their defaults: batches of texts of similar length, for example.
        config = text_config(
            batch=sizes.review_batch, steps=steps, epochs=sizes.epochs, length=sizes.max_review, mean=230, **train
        )
        if name.endswith("BiLSTM"):
            config["backbone"] = {"name": "bilstm", "tokenizer": "whitespace", "min_frequency": 1}
        return config
    if name == "TextCNN":
        return text_config(
            batch=sizes.text_batch, steps=sizes.steps, epochs=sizes.epochs, length=sizes.length, bucket=False, **train
        )
    config = vision_config(
        "torchvision" if name == "ViT" else name.replace("-", "").lower(),
        batch=sizes.batch,
        steps=sizes.steps,
        epochs=sizes.epochs,
        image_size=sizes.image_size,
        **train,
    )
    if name == "ViT":
        config["backbone"]["model"] = sizes.vit
    config["train"]["phases"][0]["freeze"] = "backbone" if frozen else "none"
    return config


def write_jpegs(folder: Path, sizes: Sizes, classes: int = 4) -> Path:
    """Write JPEG files of about 400 x 300 pixels, by split and class: smooth noise, which is as large as a photo."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", sizes.jpegs), ("val", sizes.batch)):
        for number in range(max(count, classes)):
            path = folder / split / f"class {number % classes}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            width, height = (int(side * generator.uniform(0.8, 1.2)) for side in (400, 300))
            coarse = Image.fromarray(generator.integers(256, size=(height // 4, width // 4, 3), dtype=np.uint8))
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def jpeg_config(name: str, sizes: Sizes, folder: Path, *, precision: str, keep: bool) -> Any:
    """Return the config of a case with JPEG files. ``keep``: whether decoded images are kept between epochs."""
    from common import vision_config

    model = name.split()[0].replace("-", "").lower()
    config = vision_config(
        model, batch=sizes.batch, steps=1, epochs=sizes.epochs, image_size=sizes.image_size, precision=precision
    )
    config["data"] = {"name": "image_folder", "root": str(folder), "val": "val", "test_fraction": 0}
    config["backbone"] = {"name": model, "weights": None, "image_size": sizes.image_size}
    config["backbone"]["cache_images"] = "auto" if keep else "off"
    config["backbone"]["decode"] = "gpu" if "GPU" in name else "cpu"
    return config


def run_engine(config: Any, device: Any, rate: Rate) -> None:
    """Train with the engine; record the throughput of all epochs but the first."""
    import transfer
    from transfer.training.events import EpochEnded, Event

    reset_memory(device)

    def observe(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.record["epoch"] > 1:
            rate.examples_per_second.append(event.record["examples_per_second"])
            rate.waiting.append(event.record["waiting_for_data"])
            rate.memory_bytes = max(rate.memory_bytes, peak_memory(device))

    with tempfile.TemporaryDirectory() as folder:
        transfer.run(config, output=folder, observe=observe)


def run_plain(config: Any, device: Any, rate: Rate) -> None:
    """Train with the plain loop; record the throughput of all epochs but the first."""
    from common import JpegLoop, PlainLoop

    reset_memory(device)
    loop = (JpegLoop if config["data"]["name"] == "image_folder" else PlainLoop)(config, device)
    for epoch in range(config["train"]["phases"][0]["epochs"]):
        seconds, _ = loop.epoch(epoch)
        if epoch:
            rate.examples_per_second.append(len(loop.examples) / seconds)
    rate.memory_bytes = max(rate.memory_bytes, peak_memory(device))


def reset_memory(device: Any) -> None:
    """Free the memory of the previous run and reset the peak."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: Any) -> int:
    """Return the peak memory allocated on the device in bytes; 0 on the CPU, where torch does not record it."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if device.type == "cuda" else 0


def count_flops(config: Any, device: Any) -> float:
    """Return the floating-point operations of a training step per example, counted by torch."""
    from common import PlainLoop
    from torch.utils.flop_counter import FlopCounterMode

    loop = PlainLoop({**config, "train": {**config["train"], "compile": False}}, device)
    inputs, targets = next(loop.batches(0))
    with FlopCounterMode(display=False) as counter:
        loop.step(inputs, targets)
    return float(counter.get_total_flops()) / len(targets)


def matrix_rate(device: Any, precision: str, size: int, rounds: int = 5, products: int = 20) -> float:
    """Return the operations per second of large matrix products: the median of the rounds after the first."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(rounds + 1):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(products):
            left @ right
        synchronize(device)
        rates.append(products * 2 * size**3 / (time.perf_counter() - started))
    torch.backends.cuda.matmul.allow_tf32 = False
    return statistics.median(rates[1:])


def synchronize(device: Any) -> None:
    """Wait until the device has finished all queued operations."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def compare_losses(device: Any, sizes: Sizes) -> bool:
    """Train three steps with the engine on the device and with the plain loop on the CPU; print the difference."""
    import torch
    from common import PlainLoop, text_config, vision_config

    import transfer
    from transfer.training.events import EpochEnded, Event

    size = min(sizes.image_size, 96)
    agree = True
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    exact: dict[str, Any] = {"precision": "fp32", "deterministic": True}
    for name, config in {
        "ResNet-18": vision_config("resnet18", batch=16, steps=3, epochs=1, image_size=size, **exact),
        "ResNet-50": vision_config("resnet50", batch=16, steps=3, epochs=1, image_size=size, **exact),
        "TextCNN": text_config(batch=16, steps=3, epochs=1, length=min(sizes.length, 100), **exact),
    }.items():
        losses: list[float] = []

        def observe(event: Event, losses: list[float] = losses) -> None:
            if isinstance(event, EpochEnded):
                losses.append(event.record["train"]["loss"])

        with tempfile.TemporaryDirectory() as folder:
            transfer.run(config, output=folder, observe=observe)
        _, on_cpu = PlainLoop(config, torch.device("cpu")).epoch(0)
        difference = abs(losses[0] - on_cpu) / on_cpu
        agree = agree and difference <= LOSS_TOLERANCE
        print(
            f"loss of {name}: engine on {device.type} {losses[0]:.6f}, plain loop on the CPU {on_cpu:.6f}, relative "
            f"difference {difference:.1e} ({'agrees' if difference <= LOSS_TOLERANCE else 'DIFFERS'})"
        )
    torch.backends.cudnn.allow_tf32 = tf32
    return agree


if __name__ == "__main__":
    main()
