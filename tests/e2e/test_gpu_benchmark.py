"""The GPU benchmark: its configs are valid, and the loops over JPEG files run, on the CPU with small inputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from transfer.config.check import load_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    yield gpu
    for name in ("gpu", "common"):
        sys.modules.pop(name, None)


def test_cases_of_gpu_benchmark_have_valid_configs(benchmark: Any, tmp_path: Path) -> None:
    sizes = benchmark.TINY
    folder = benchmark.write_jpegs(tmp_path / "jpegs", sizes)
    cases = {case[0]: case for case in benchmark.cases(sizes, on_gpu=True)}  # one of each model
    for name, precision, compiled, frozen, cached in cases.values():
        if name.endswith("JPEG"):
            load_config(benchmark.jpeg_config(name, sizes, folder, precision=precision, keep=cached))
        else:
            load_config(
                benchmark.make_config(name, sizes, precision=precision, compiled=compiled, frozen=frozen, cached=cached)
            )


@pytest.mark.slow
def test_loops_of_gpu_benchmark_over_jpegs(benchmark: Any, tmp_path: Path) -> None:
    sizes = benchmark.TINY
    folder = benchmark.write_jpegs(tmp_path / "jpegs", sizes)
    config = benchmark.jpeg_config("ResNet-18 JPEG", sizes, folder, precision="fp32", keep=False)
    engine, plain = benchmark.Rate(), benchmark.Rate()
    benchmark.run_engine(config, torch.device("cpu"), engine)
    benchmark.run_plain(config, torch.device("cpu"), plain)
    assert len(engine.examples_per_second) == len(plain.examples_per_second) == sizes.epochs - 1
    assert 0 <= engine.waiting[0] <= 1
