"""Mixup and CutMix: batches that are mixed with a permutation of themselves, for any task with losses per example."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer.config.train_settings import MixupCutmix
from transfer.errors import ConfigError


@dataclass(frozen=True)
class MixedBatch:
    """A batch in which each example is mixed with another one.

    Args:
        inputs: Mixed inputs (B, ...).
        permutation: int64 (B,), index of the second example of each pair.
        lam: Weight of the first example of each pair, 0 to 1.
    """

    inputs: Tensor
    permutation: Tensor
    lam: float

    def loss(self, losses: Tensor, permuted_losses: Tensor) -> Tensor:
        """Return the mixed losses (B,).

        Args:
            losses: Losses (B,) for the targets of the first examples.
            permuted_losses: Losses (B,) for the targets of the second examples.
        """
        return self.lam * losses + (1 - self.lam) * permuted_losses


def check_mixable(inputs: object, mix: MixupCutmix) -> Tensor:
    """Return the backbone's input if its examples can be mixed. The meta device is supported.

    Raises:
        ConfigError: The input is not a float tensor, or not a batch of images (B, C, H, W) for CutMix.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        message = f"train.mix cannot mix the backbone's input: expected a float tensor, got {_type_name(inputs)}"
        raise ConfigError(message, fix="remove train.mix")
    if mix.cutmix is not None and inputs.dim() != 4:
        shape = ", ".join(["B", *map(str, inputs.shape[1:])])
        raise ConfigError(f"cutmix needs a batch of images: expected (B, C, H, W), got ({shape})", fix="use mixup")
    return inputs


def mix_batch(inputs: object, mix: MixupCutmix) -> MixedBatch:
    """Mix a batch with a random permutation of itself, drawn from torch's global generator.

    Mixup (Zhang et al. 2018) averages two examples with a weight lam that is drawn from Beta(a, a). CutMix (Yun et al.
    2019) pastes a rectangle that covers 1 - lam of the image. Its lam is then corrected to the pixels that are kept,
    because the rectangle is clipped at the border of the image.

    Args:
        inputs: float (B, ...); float (B, C, H, W) for CutMix.
        mix: Options of mixup and CutMix. If both are set, each batch uses one of them with equal probability.

    Raises:
        ConfigError: The input cannot be mixed (:func:`check_mixable`).
    """
    inputs = check_mixable(inputs, mix)
    use_cutmix = mix.cutmix is not None and (mix.mixup is None or bool(torch.rand(()) < 0.5))
    concentration = torch.tensor(mix.cutmix if use_cutmix else mix.mixup)
    # All numbers are drawn on the CPU: reading one from a GPU would force a synchronization.
    lam = float(torch.distributions.Beta(concentration, concentration).sample())
    permutation = torch.randperm(len(inputs)).to(inputs.device)
    if not use_cutmix:
        return MixedBatch(torch.lerp(inputs[permutation], inputs, lam), permutation, lam)
    # The rectangle has the aspect ratio of the image and a uniform center, so that it may reach over the border.
    height, width = inputs.shape[2:]
    cut_height, cut_width = (round(side * math.sqrt(1 - lam)) for side in (height, width))
    top, left = (int(torch.randint(side, ())) - cut // 2 for side, cut in ((height, cut_height), (width, cut_width)))
    rows = slice(max(0, top), max(0, min(height, top + cut_height)))
    columns = slice(max(0, left), max(0, min(width, left + cut_width)))
    mixed = inputs.clone()
    mixed[:, :, rows, columns] = inputs[permutation][:, :, rows, columns]
    pasted_pixels = (rows.stop - rows.start) * (columns.stop - columns.start)
    return MixedBatch(mixed, permutation, 1 - pasted_pixels / (height * width))


def _type_name(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
