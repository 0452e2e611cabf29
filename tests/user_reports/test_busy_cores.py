"""Training beside other programs that use all cores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import transfer
from transfer.system.devices import busy_cores_warning
from transfer.training.events import Note

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (9.5, 1.0, 1.0))


def test_busy_cores_are_reported_by_a_run(config: dict[str, Any], tmp_path: Path) -> None:
    notes: list[str] = []
    transfer.run(
        config, output=tmp_path, quick=True, observe=lambda e: notes.append(e.text) if isinstance(e, Note) else None
    )
    (warning,) = [text for text in notes if "OMP_WAIT_POLICY" in text]
    assert "the load average is 9.5 on 4 cores" in warning


def test_no_warning_if_the_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert busy_cores_warning(CPU) is not None
    for variable in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            assert busy_cores_warning(CPU) is None


def test_no_warning_for_gpu_single_thread_or_free_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert busy_cores_warning(torch.device("cuda")) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 1)
        assert busy_cores_warning(CPU) is None
    monkeypatch.setattr(os, "getloadavg", lambda: (4.0, 9.0, 9.0))
    assert busy_cores_warning(CPU) is None


def test_no_warning_without_a_load_average(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> tuple[float, float, float]:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", unknown)
    assert busy_cores_warning(CPU) is None
    monkeypatch.delattr(os, "getloadavg")
    assert busy_cores_warning(CPU) is None
