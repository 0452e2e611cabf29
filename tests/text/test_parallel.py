"""Texts shared among processes: the same vocabulary and indices, whatever their number and whatever fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from transfer_text.encoding import parallel as sharing
from transfer_text.encoding.tokenization import TOKENIZERS
from transfer_text.encoding.vocabulary import Vocabulary

TEXTS = [
    f"No. {number} wasn't <br />good, word{number % 97}! caf\u00e9 \u201cfine\u201d\x1c\r {'so ' * (number % 7)}..."
    for number in range(3000)
]


@pytest.fixture(autouse=True)
def three_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "max_processes", lambda: 3)
    monkeypatch.setattr(sharing, "MIN_CHUNK_CHARACTERS", 1000)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    found = []
    start = subprocess.Popen

    def noted(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        found.append(start(*arguments, **options))  # type: ignore[call-overload]
        return found[-1]  # type: ignore[no-any-return]

    monkeypatch.setattr(subprocess, "Popen", noted)
    return found


def alone(monkeypatch: pytest.MonkeyPatch, name: str) -> Vocabulary:
    with monkeypatch.context() as patch:
        patch.setattr(sharing, "max_processes", lambda: 1)
        return Vocabulary.build(TEXTS, name, min_frequency=2)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_three_processes_learn_and_encode_what_one_does(
    name: str, monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]
) -> None:
    expected = alone(monkeypatch, name)
    assert not started
    vocabulary = Vocabulary.build(TEXTS, name, min_frequency=2)
    assert len(started) == 2
    assert vocabulary.to_json() == expected.to_json()
    assert np.array_equal(vocabulary.counts, expected.counts)
    assert np.array_equal(vocabulary.lengths, expected.lengths)
    others = [text.upper() for text in TEXTS[::-1]]
    shared = vocabulary.encode(others)
    assert [process.returncode for process in started] == [0] * 4
    with monkeypatch.context() as patch:
        patch.setattr(sharing, "max_processes", lambda: 1)
        once = expected.encode(others)
    assert np.array_equal(shared.indices, once.indices)
    assert np.array_equal(shared.offsets, once.offsets)


def test_a_helper_that_fails_is_done_without(
    monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]
) -> None:
    expected = alone(monkeypatch, "glove")
    monkeypatch.setattr(sharing, "__name__", "transfer_text.no_such_module")  # which is what it is to run
    vocabulary = Vocabulary.build(TEXTS, "glove", min_frequency=2)
    assert vocabulary.to_json() == expected.to_json()
    assert np.array_equal(vocabulary.lengths, expected.lengths)
    assert [process.returncode for process in started] == [1, 1]


def test_encoding_without_startable_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(monkeypatch, "glove")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert Vocabulary.build(TEXTS, "glove", min_frequency=2).to_json() == expected.to_json()


def test_nothing_is_left_running_or_lying_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    numbering = sharing.LocalIds("glove")
    parts = sharing.encode_in_parallel(TEXTS, "glove", numbering.table.encode, numbering.look_up)
    next(parts)
    assert len(list(tmp_path.iterdir())) == 2
    parts.close()  # as when training is interrupted
    assert [process.poll() is not None for process in started] == [True, True]
    assert not list(tmp_path.iterdir())


def test_a_helper_imports_no_torch() -> None:
    program = (
        "import sys; import transfer_text.encoding.parallel; "
        "sys.exit('torch' in sys.modules or 'transfer' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(("written", "most"), [("1", 1), ("2", 2), ("4,2", 4), ("", 4)])
def test_omp_num_threads_limits_processes(written: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", written)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert sharing.max_processes() == most


def test_few_texts_start_no_process(monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]) -> None:
    monkeypatch.setattr(sharing, "MIN_CHUNK_CHARACTERS", 4_000_000)
    Vocabulary.build(TEXTS, "glove")
    assert not started
