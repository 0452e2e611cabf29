"""Mixup and CutMix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from transfer import ConfigError
from transfer.config.train_settings import MixupCutmix
from transfer.training.mixup import mix_batch


def batch(count: int = 6) -> torch.Tensor:
    """Return images (B, 3, 20, 30), each filled with its index."""
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 20, 30).clone()


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 5, 5), (6, 7, 2)])
def test_mixup_is_weighted_mean_of_pair(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(shape)
    before = inputs.clone()
    mixed = mix_batch(inputs, MixupCutmix(mixup=1.0))
    assert sorted(mixed.permutation.tolist()) == list(range(6))
    assert 0 < mixed.lam < 1
    torch.testing.assert_close(mixed.inputs, mixed.lam * inputs + (1 - mixed.lam) * inputs[mixed.permutation])
    assert torch.equal(inputs, before)


def test_lam_is_weight_of_the_first_example() -> None:
    """A large concentration gives a lam of one half; a small one gives a lam near 0 or 1."""
    torch.manual_seed(0)
    assert mix_batch(batch(), MixupCutmix(mixup=1e6)).lam == pytest.approx(0.5, abs=0.01)
    lams = torch.tensor([mix_batch(batch(), MixupCutmix(mixup=0.01)).lam for _ in range(200)])
    assert ((lams < 0.01) | (lams > 0.99)).float().mean() > 0.9
    assert 0.4 < lams.mean() < 0.6


def test_lam_follows_the_beta_distribution() -> None:
    torch.manual_seed(0)
    lams = torch.tensor([mix_batch(torch.zeros(2, 1), MixupCutmix(mixup=0.4)).lam for _ in range(2000)])
    assert lams.mean() == pytest.approx(0.5, abs=0.03)
    assert lams.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.08)


def test_cutmix_rectangle_has_area_one_minus_lam() -> None:
    torch.manual_seed(0)
    areas = []
    for _ in range(50):
        inputs = batch()
        mixed = mix_batch(inputs, MixupCutmix(cutmix=1.0))
        for index, other_index in enumerate(mixed.permutation.tolist()):
            image = mixed.inputs[index]
            assert set(image.unique().tolist()) <= {float(index), float(other_index)}
            assert torch.equal(image[0], image[2])
            if index == other_index:
                continue
            pasted = image[0] == other_index
            rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
            assert pasted.sum() == rows * columns  # a rectangle
            assert mixed.lam == pytest.approx(1 - float(pasted.float().mean()), abs=1e-6)
        areas.append(1 - mixed.lam)
        assert torch.equal(inputs, batch())
    assert min(areas) < 0.2
    assert max(areas) > 0.5


def test_mixup_and_cutmix_alternate_randomly() -> None:
    torch.manual_seed(0)
    cut = 0
    for _ in range(40):
        mixed = mix_batch(batch(), MixupCutmix(mixup=1.0, cutmix=1.0))
        index = next(i for i, other_index in enumerate(mixed.permutation.tolist()) if other_index != i)
        own, other = float(index), float(mixed.permutation[index])
        cut += set(mixed.inputs[index].unique().tolist()) <= {own, other}
    assert 8 < cut < 32


def test_losses_are_mixed_like_inputs() -> None:
    torch.manual_seed(0)
    mixed = mix_batch(batch(), MixupCutmix(mixup=1.0))
    own, permuted = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 0.0])
    torch.testing.assert_close(mixed.loss(own, permuted), mixed.lam * own + (1 - mixed.lam) * permuted)


def test_batch_of_one_is_mixed_with_itself() -> None:
    inputs = torch.randn(1, 3, 8, 8)
    for mix in (MixupCutmix(mixup=1.0), MixupCutmix(cutmix=1.0)):
        torch.testing.assert_close(mix_batch(inputs, mix).inputs, inputs)


def test_mixing_uses_the_global_generator() -> None:
    mixed = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        mixed.append(mix_batch(batch(), MixupCutmix(mixup=0.4, cutmix=1.0)))
    assert torch.equal(mixed[0].inputs, mixed[1].inputs)
    assert mixed[0].lam == mixed[1].lam != mixed[2].lam


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(4, 7, dtype=torch.int64), (torch.zeros(4, 7), torch.ones(4, 7, dtype=torch.bool))],
    ids=["word indices", "a pair"],
)
def test_mixup_refuses_non_float_input(inputs: Any) -> None:
    with pytest.raises(ConfigError, match="expected a float tensor"):
        mix_batch(inputs, MixupCutmix(mixup=1.0))


def test_cutmix_of_non_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="cutmix needs a batch of images") as caught:
        mix_batch(torch.zeros(4, 7), MixupCutmix(cutmix=1.0))
    assert caught.value.problems[0].fix == "use mixup"


def test_mix_without_mixup_and_cutmix_is_refused() -> None:
    with pytest.raises(ValidationError, match="mixup, cutmix or both"):
        MixupCutmix()
