"""Layout of the tensors that a stage passes on: axes of examples and steps, masks and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorLayout:
    """Layout of one tensor that a stage passes on.

    Args:
        name: Name of its file in the entry, without the suffix.
        dtype: Data type.
        shape: Size of each axis. ``"B"`` is the axis of examples and ``"T"`` an axis of steps, whose size differs
            between batches. A tensor without ``"B"`` is a table: all examples have it in common.
        is_mask: Whether it is the mask (B, T). The lengths of the sequences are stored instead.
        fill: Value at padding.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    is_mask: bool = False
    fill: float | int = 0

    @property
    def is_table(self) -> bool:
        """Whether all examples have the tensor in common."""
        return "B" not in self.shape

    @property
    def step_axis(self) -> int | None:
        """The axis of steps of a tensor that differs between examples; None if its shape is fixed."""
        return self.shape.index("T") if not self.is_table and "T" in self.shape else None

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """Sizes of the axes other than examples and steps."""
        return tuple(size for size in self.shape if isinstance(size, int))

    def sizes(self, examples: int, steps: int) -> tuple[int, ...]:
        """Return the shape for a number of examples and of steps."""
        return tuple({"B": examples, "T": steps}[size] if isinstance(size, str) else size for size in self.shape)

    def cut(self, table: Tensor, steps: int) -> Tensor:
        """Return the first steps of a table, along all of its axes of steps."""
        return table[tuple(slice(steps if size == "T" else None) for size in self.shape)]

    def to_json(self) -> dict[str, Any]:
        """Return the content for ``entry.json``."""
        # As text, because JSON has no infinity, which is a usual value of masks at padding.
        dtype = str(self.dtype).removeprefix("torch.")
        return {**vars(self), "dtype": dtype, "shape": list(self.shape), "fill": str(self.fill)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TensorLayout:
        """Return the layout from its content in ``entry.json``."""
        dtype: torch.dtype = getattr(torch, content["dtype"])
        fill = float(content["fill"]) if dtype.is_floating_point else int(content["fill"])
        return cls(str(content["name"]), dtype, tuple(content["shape"]), bool(content["is_mask"]), fill)


def find_mask(tensors: Sequence[Tensor]) -> int | None:
    """Return the position of the mask: a bool tensor (B, T) that is passed with values (B, T, ...)."""
    for number, mask in enumerate(tensors):
        if mask.dtype == torch.bool and mask.dim() == 2:
            values = (tensor for position, tensor in enumerate(tensors) if position != number)
            if any(tensor.shape[:2] == mask.shape for tensor in values):
                return number
    return None


def find_layouts(
    tensors: Sequence[Tensor], other: Sequence[Tensor], examples: tuple[int, int], mask_at: int | None
) -> list[TensorLayout] | None:
    """Return the layouts of the tensors of a batch, by comparison with another batch; None if they do not agree.

    Args:
        tensors: Tensors of the first batch.
        other: Tensors of a batch with another number of examples.
        examples: Number of examples of both.
        mask_at: Position of the mask (B, T); None if there is no mask.
    """
    if len(tensors) != len(other) or any(a.dim() != b.dim() for a, b in zip(tensors, other, strict=True)):
        return None
    mask = None if mask_at is None else tensors[mask_at]
    steps = None if mask_at is None else (tensors[mask_at].shape[1], other[mask_at].shape[1])
    layouts = []
    for number, (one, two) in enumerate(zip(tensors, other, strict=True)):
        shape: list[int | str] = []
        for axis, sizes in enumerate(zip(one.shape, two.shape, strict=True)):
            if axis == 0 and sizes == examples:
                shape.append("B")
            # If both batches have as many steps, only the axis next to the examples is one of steps.
            elif sizes == steps and (
                sizes[0] != sizes[1] or (axis == 1 and mask is not None and one.shape[:2] == mask.shape)
            ):
                shape.append("T")
            elif sizes[0] == sizes[1]:
                shape.append(sizes[0])
            else:
                return None
        if shape[:1] == ["B"] and shape.count("T") > 1:
            return None  # padding along two axes is not restored
        layouts.append(TensorLayout(str(number), one.dtype, tuple(shape), number == mask_at))
    return layouts


def mask_of(lengths: Tensor, longest: int | None = None) -> Tensor:
    """Return the mask (B, T) of B sequences with these lengths (B,); T is ``longest``, or the largest length."""
    return torch.arange(int(lengths.max()) if longest is None else longest) < lengths[:, None]


def as_tuple(features: Any) -> tuple[Any, ...]:
    """Return the output of a stage as a tuple: a tensor becomes a tuple of one."""
    return features if isinstance(features, tuple) else (features,)
