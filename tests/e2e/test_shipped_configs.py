"""Every shipped config: counted, its header holds its command, and it passes the check without data or weights."""

from __future__ import annotations

from pathlib import Path

import pytest

import transfer

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.yaml"))


def test_all_are_here():
    assert [path.stem for path in CONFIGS] == [
        "hotdog_finetune",
        "hymenoptera_efficientnet",
        "hymenoptera_features",
        "hymenoptera_finetune",
        "imdb_bilstm",
        "imdb_textcnn",
        "quickstart_text",
        "quickstart_vision",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_holds_the_command(path):
    assert (ROOT / path).read_text().splitlines()[0] == f"# transfer run {path}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_check_passes_without_data_and_without_weights(path, monkeypatch, tmp_path):
    if path.stem == "hymenoptera_efficientnet":
        pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.setenv("TRANSFER_DATA", str(tmp_path))
    config, parts = transfer.check(ROOT / path)
    assert config.name == path.stem
    assert list(parts.model.stages)[-1] == "head"
    assert all(parameter.is_meta for parameter in parts.model.parameters())


def test_hotdog_is_the_books_recipe():
    config, parts = transfer.check(ROOT / "configs/hotdog_finetune.yaml")
    (phase,) = parts.phases
    rates = {group.stage: group.lr for group in phase.groups}
    assert rates["head"] == pytest.approx(10 * rates["layer4"])
    assert (config.optimizer.name, phase.epochs, config.optimizer.options["weight_decay"]) == ("sgd", 5, 0.001)


def test_bilstm_config_has_published_size_and_frozen_vectors():
    _, parts = transfer.check(ROOT / "configs/imdb_bilstm.yaml")
    stages = parts.model.stages
    assert (stages["lstm"].num_layers, stages["lstm"].hidden_size, stages["lstm"].bidirectional) == (2, 100, True)
    assert not list(stages["embedding"].parameters())
    assert sum(phase.epochs for phase in parts.phases) <= 5
