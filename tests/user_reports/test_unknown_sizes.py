"""Numbers that a check cannot know before the data is read."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

import transfer
from transfer.cli.plan import render


def _plan(config: dict[str, Any]) -> str:
    output = io.StringIO()
    console = Console(width=200, file=output)
    for table in render(*transfer.check(config)):
        console.print(table)
    return output.getvalue()


def _row(text: str, stage: str) -> str:
    return next(line for line in text.partition("\nstages")[2].splitlines() if line.startswith(f"{stage} "))


def test_embedding_of_unread_vocabulary_has_no_size() -> None:
    text = _plan({"data": {"name": "mini_reviews"}, "backbone": {"name": "textcnn"}})
    assert "not known yet" in _row(text, "embedding")
    assert "not known yet" not in _row(text, "head")
    assert "120,300" in _row(text, "convolution")


def test_embedding_in_fusion_has_no_size() -> None:
    parts = {"image": {"name": "resnet18", "weights": None}, "text": {"name": "textcnn"}}
    data = {"name": "multimodal_csv", "train": "absent.csv", "label": "price", "target": "number"}
    text = _plan({"data": data, "backbone": {"name": "fusion", "parts": parts}, "task": {"name": "regression"}})
    assert "not known yet" in _row(text, "text.embedding")
    assert "9,408" not in _row(text, "text.embedding")


def test_head_for_unread_classes_has_no_size() -> None:
    text = _plan({"data": {"name": "text_csv", "train": "absent.csv"}, "backbone": {"name": "bilstm"}})
    assert "not known yet" in _row(text, "head")


def test_frozen_vectors_have_no_parameters() -> None:
    text = _plan({"data": {"name": "mini_reviews"}, "backbone": {"name": "bilstm", "vectors": "mini"}})
    assert "not known yet" not in text


@pytest.mark.parametrize("name", ["textcnn", "bilstm"])
def test_reason_for_no_cache_of_text_models(name: str) -> None:
    text = _plan({"data": {"name": "mini_reviews"}, "backbone": {"name": name}})
    assert "no: no leading stage is fully frozen and worth caching" in " ".join(text.split())
    assert "batch" not in text.partition("feature cache")[2]
    assert "nothing to cache" not in text
