"""Mixup and cutmix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from transfer import ConfigError
from transfer.config.train_settings import MixupCutmix
from transfer.training.mixup import mix_batch


def batch(count: int = 6) -> torch.Tensor:
    """Return pictures (B, 3, 20, 30), each of one value of its own."""
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 20, 30).clone()


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 5, 5), (6, 7, 2)])
def test_mixup_is_the_weighted_mean_with_the_partner(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(shape)
    before = inputs.clone()
    made = mix_batch(inputs, MixupCutmix(mixup=1.0))
    assert sorted(made.permutation.tolist()) == list(range(6))
    assert 0 < made.lam < 1
    torch.testing.assert_close(made.inputs, made.lam * inputs + (1 - made.lam) * inputs[made.permutation])
    assert torch.equal(inputs, before)


def test_the_share_is_of_the_first_example() -> None:
    """With a great parameter the share is a half; a small one keeps one of the two nearly whole."""
    torch.manual_seed(0)
    assert mix_batch(batch(), MixupCutmix(mixup=1e6)).lam == pytest.approx(0.5, abs=0.01)
    shares = torch.tensor([mix_batch(batch(), MixupCutmix(mixup=0.01)).lam for _ in range(200)])
    assert ((shares < 0.01) | (shares > 0.99)).float().mean() > 0.9
    assert 0.4 < shares.mean() < 0.6


def test_shares_follow_the_beta_distribution() -> None:
    torch.manual_seed(0)
    shares = torch.tensor([mix_batch(torch.zeros(2, 1), MixupCutmix(mixup=0.4)).lam for _ in range(2000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.08)


def test_cutmix_pastes_one_rectangle_of_the_area_it_says() -> None:
    torch.manual_seed(0)
    areas = []
    for _ in range(50):
        inputs = batch()
        made = mix_batch(inputs, MixupCutmix(cutmix=1.0))
        for index, partner in enumerate(made.permutation.tolist()):
            picture = made.inputs[index]
            assert set(picture.unique().tolist()) <= {float(index), float(partner)}
            assert torch.equal(picture[0], picture[2])
            if index == partner:
                continue
            pasted = picture[0] == partner
            rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
            assert pasted.sum() == rows * columns  # a rectangle
            assert made.lam == pytest.approx(1 - float(pasted.float().mean()), abs=1e-6)
        areas.append(1 - made.lam)
        assert torch.equal(inputs, batch())
    assert min(areas) < 0.2
    assert max(areas) > 0.5


def test_both_draw_one_of_the_two() -> None:
    torch.manual_seed(0)
    cut = 0
    for _ in range(40):
        made = mix_batch(batch(), MixupCutmix(mixup=1.0, cutmix=1.0))
        index = next(i for i, partner in enumerate(made.permutation.tolist()) if partner != i)
        own, other = float(index), float(made.permutation[index])
        cut += set(made.inputs[index].unique().tolist()) <= {own, other}
    assert 8 < cut < 32


def test_losses_are_blended_as_the_inputs_are() -> None:
    torch.manual_seed(0)
    made = mix_batch(batch(), MixupCutmix(mixup=1.0))
    own, partners = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 0.0])
    torch.testing.assert_close(made.loss(own, partners), made.lam * own + (1 - made.lam) * partners)


def test_a_batch_of_one_is_blended_with_itself() -> None:
    inputs = torch.randn(1, 3, 8, 8)
    for mix in (MixupCutmix(mixup=1.0), MixupCutmix(cutmix=1.0)):
        torch.testing.assert_close(mix_batch(inputs, mix).inputs, inputs)


def test_the_global_generator_decides() -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(mix_batch(batch(), MixupCutmix(mixup=0.4, cutmix=1.0)))
    assert torch.equal(made[0].inputs, made[1].inputs)
    assert made[0].lam == made[1].lam != made[2].lam


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(4, 7, dtype=torch.int64), (torch.zeros(4, 7), torch.ones(4, 7, dtype=torch.bool))],
    ids=["word indices", "a pair"],
)
def test_what_is_no_tensor_of_numbers_is_refused(inputs: Any) -> None:
    with pytest.raises(ConfigError, match="no tensor of numbers"):
        mix_batch(inputs, MixupCutmix(mixup=1.0))


def test_cutmix_of_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ConfigError, match="rectangles of pictures") as caught:
        mix_batch(torch.zeros(4, 7), MixupCutmix(cutmix=1.0))
    assert caught.value.problems[0].fix == "use mixup"


def test_neither_is_refused() -> None:
    with pytest.raises(ValidationError, match="mixup, cutmix or both"):
        MixupCutmix()
