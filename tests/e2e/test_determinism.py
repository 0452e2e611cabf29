"""The same config, data and seed give the same bits, whatever has been prepared before and by whom."""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_harness import CONFIGS, outcome

import transfer


def test_the_cache_of_encoded_texts_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transfer_text.encoding import text_blocks as corpus

    monkeypatch.setenv("TRANSFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "MIN_CACHED_CHARACTERS", 1)
    first = transfer.run(CONFIGS["text"], output=tmp_path / "empty")
    assert list((tmp_path / "cache" / "text").iterdir())
    second = transfer.run(CONFIGS["text"], output=tmp_path / "filled")
    assert outcome(first.folder) == outcome(second.folder)


def test_loader_processes_and_memory_cache_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transfer_vision.preprocessing import ImagePreprocessing

    config = CONFIGS["vision, two loader processes"]
    kept = transfer.run(config, ["train.workers=0"], output=tmp_path / "kept")
    monkeypatch.setattr(ImagePreprocessing, "keep_bytes", 0)
    read = transfer.run(config, ["train.workers=2"], output=tmp_path / "read")
    assert outcome(kept.folder) == outcome(read.folder)
