"""Raw values that the kit makes, and comparison of encoded values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from transfer.testing.cases import BATCH, TEXTS


def images() -> list[Image.Image]:
    """Return four images of noise, always the same ones."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(BATCH)]


def variants(example: Any) -> list[Any] | None:
    """Return four different values like an example of numbers or images; None if the kit cannot make them."""
    generator = np.random.default_rng(0)
    if isinstance(example, Image.Image):
        pixels = generator.integers(0, 256, (BATCH, example.height, example.width, 3), dtype=np.uint8)
        return [Image.fromarray(one).convert(example.mode) for one in pixels]
    if isinstance(example, Tensor):
        arrays = variants(example.numpy(force=True))
        return None if arrays is None else [torch.from_numpy(array) for array in arrays]
    if isinstance(example, np.ndarray) and example.dtype == np.uint8:
        return list(generator.integers(0, 256, (BATCH, *example.shape), dtype=np.uint8))
    if isinstance(example, np.ndarray) and np.issubdtype(example.dtype, np.floating):
        # Noise of the example's own magnitude, and not negative, so that counts and amounts stay valid.
        noise = generator.uniform(0, np.abs(example).max(initial=0) or 1, (BATCH, *example.shape))
        return [(example + one).astype(example.dtype) for one in noise]
    if isinstance(example, list | tuple) and example and all(isinstance(number, float) for number in example):
        numbers = variants(np.array(example))
        return None if numbers is None else [type(example)(one.tolist()) for one in numbers]
    if isinstance(example, tuple):  # one value per part of a fusion
        columns = [TEXTS if isinstance(part, str) else variants(part) for part in example]
        return None if None in columns else list(zip(*(column or [] for column in columns), strict=True))
    return None


def unchanged(value: Any, before: Any) -> bool:
    """Return whether an encoded value, of any nested type, is equal to a copy from before."""
    if isinstance(value, Tensor):
        return torch.equal(value, before)
    if isinstance(value, np.ndarray):
        return np.array_equal(value, before)
    if isinstance(value, Mapping):
        return value.keys() == before.keys() and all(unchanged(value[key], before[key]) for key in value)
    if isinstance(value, list | tuple):
        return len(value) == len(before) and all(map(unchanged, value, before))
    return bool(value == before)
