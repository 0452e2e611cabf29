"""TextCNN: convolutions over word vectors, and the maximum over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from transfer import ConfigError, FeatureSpec
from transfer_text.encoding.encoded_texts import Truncation
from transfer_text.encoding.vocabulary import MIN_FREQUENCY, PADDING, Vocabulary
from transfer_text.models.embedding import Count, TextBackbone, Unknown, Variant, in_batch_terms, look_up

BLOCK_WORDS = 64


class TextCNN(TextBackbone):
    """A convolutional network over word vectors (Kim 2014, EMNLP, https://aclanthology.org/D14-1181).

    Its features are the largest value that each filter takes anywhere in the text, float (B, the sum of ``filters``).

    Stages: ``embedding``, ``convolution``.

    Args:
        variant: ``rand``: random vectors, tuned. ``static``: pretrained ones, frozen. ``nonstatic``: pretrained ones,
            tuned. ``multichannel``: a frozen and a tuned channel side by side. null: multichannel with
            vectors, else rand.
        kernel_sizes: How many words each convolution spans.
        filters: Number of filters of each convolution, or one number for all.
    """

    pretrained_variants: ClassVar[tuple[Variant, ...]] = ("multichannel", "static", "nonstatic")

    def __init__(
        self,
        vocabulary: Vocabulary | None = None,
        width: int | None = None,
        *,
        variant: Variant | None = None,
        vectors: str | None = None,
        dimensions: Count | None = None,
        unknown: Unknown = "random",
        vectors_vocabulary: bool = False,
        kernel_sizes: tuple[Count, ...] = (3, 4, 5),
        filters: Count | tuple[Count, ...] = 100,
        tokenizer: str = "glove",
        min_frequency: Count = MIN_FREQUENCY,
        max_size: Count | None = None,
        max_length: Count | None = 512,
        truncation: Truncation = "head",
    ) -> None:
        counts = (filters,) * len(kernel_sizes) if isinstance(filters, int) else filters
        if not kernel_sizes or len(counts) != len(kernel_sizes):
            raise ConfigError(
                f"there are {len(kernel_sizes)} kernel_sizes and {len(counts)} numbers of filters",
                fix="give one number of filters for each kernel size, or a single one for all",
            )
        super().__init__(
            vocabulary,
            width,
            lambda dimensions: {"convolution": Convolutions(dimensions, kernel_sizes, counts)},
            FeatureSpec("vector", sum(counts)),
            variant=variant,
            vectors=vectors,
            dimensions=dimensions,
            unknown=unknown,
            vectors_vocabulary=vectors_vocabulary,
            tokenizer=tokenizer,
            max_length=max_length,
            truncation=truncation,
        )


class Convolutions(nn.Module):
    """Convolve with several kernel sizes, and take each filter's maximum over time.

    Args:
        dimensions: D, the width of a vector.
        kernel_sizes: How many steps each convolution spans.
        filters: The number of filters of each.
    """

    def __init__(self, dimensions: int, kernel_sizes: Sequence[int], filters: Sequence[int]) -> None:
        super().__init__()
        # In two dimensions, because torch then takes (B, T, D) as channels-last memory as it is. It is a third
        # faster on the CPU than one dimension, which transposes.
        self.convolutions = nn.ModuleList(
            nn.Conv2d(dimensions, count, (1, size)) for size, count in zip(kernel_sizes, filters, strict=True)
        )
        self.kernel_sizes = tuple(kernel_sizes)

    def forward(self, words: tuple[Tensor, Tensor]) -> Tensor:
        """Return the features, float (B, the sum of filters), of a table of vectors (U, D) and rows of it (B, T).

        A text shorter than a kernel counts as padded with zeros to its size, and has one window.
        """
        table, rows = words
        lengths = (rows != PADDING).sum(1)
        widest = max(self.kernel_sizes)
        if in_batch_terms(rows):
            convolve, missing = _convolve_words, max(0, widest - rows.shape[1])
        else:
            convolve, missing = _convolve, widest  # a recorded graph must not depend on the length
        rows = functional.pad(rows, (0, missing), value=PADDING)
        # The maximum commutes with adding the bias and with ReLU.
        return functional.relu(
            torch.cat(
                [
                    convolve(table, rows, weight, (lengths - weight.shape[3] + 1).clamp(min=1)) + bias
                    for weight, bias in (tuple(layer.parameters()) for layer in self.convolutions)
                ],
                dim=1,
            )
        )


def _convolve(table: Tensor, rows: Tensor, weight: Tensor, windows: Tensor) -> Tensor:
    """Return each filter's maximum over time, float (B, F), by convolving vector after vector.

    Args:
        table: float (U, D).
        rows: int64 (B, T).
        weight: float (F, D, 1, k).
        windows: int64 (B,), how many of each text count.
    """
    image = look_up(table, rows).transpose(1, 2).unsqueeze(2)  # (B, D, 1, T)
    responses = functional.conv2d(image, weight).squeeze(2)  # (B, F, T - k + 1)
    beyond = torch.arange(responses.shape[2], device=rows.device) >= windows[:, None]
    return responses.masked_fill(beyond[:, None], -torch.inf).amax(2)


def _convolve_words(table: Tensor, rows: Tensor, weight: Tensor, windows: Tensor) -> Tensor:
    """Do the same with less work: one product per different word and tap, then a sum of looked-up rows per window."""
    if torch.is_grad_enabled():
        best: Tensor = _MaximumOverTime.apply(table, rows, weight, windows)
        return best
    return _responses(table, rows, weight, windows).amax(1)


def _responses(table: Tensor, rows: Tensor, weight: Tensor, windows: Tensor) -> Tensor:
    """Return the responses of each window, float (B, T - k + 1, F), -inf beyond the last that counts."""
    taps = weight.shape[3]
    projected = _project(table, weight)  # (U k, F)
    # One bag for each window, with the row of each of its taps.
    places = rows.mul(taps).unfold(1, taps, 1) + torch.arange(taps)  # (B, T - k + 1, k)
    responses = functional.embedding_bag(places.reshape(-1, taps), projected, mode="sum")
    responses = responses.view(*places.shape[:2], -1)
    first = int(windows.min())  # texts of a batch are of like length: only their ends differ
    beyond = torch.arange(first, places.shape[1]) >= windows[:, None]
    responses[:, first:].masked_fill_(beyond[:, :, None], -torch.inf)
    return responses


def _project(table: Tensor, weight: Tensor) -> Tensor:
    """Return what each word gives each filter at each tap: float (U k, F), the taps of a word one after the other.

    It is a matrix product, done as a convolution of width one over blocks of words: oneDNN then does it at twice the
    rate of torch's own product on processors that MKL does not favour, and at the same rate on others.
    """
    filters, dimensions, _, taps = weight.shape
    blocks = functional.pad(table, (0, 0, 0, -len(table) % BLOCK_WORDS)).view(-1, 1, BLOCK_WORDS, dimensions)
    kernel = weight.permute(3, 0, 1, 2).reshape(taps * filters, dimensions, 1, 1)
    projected = functional.conv2d(blocks.permute(0, 3, 1, 2), kernel)
    # Under autocast the product is in lower precision; the sum is not.
    return projected.permute(0, 2, 3, 1).reshape(-1, taps * filters)[: len(table)].to(table).reshape(-1, filters)


class _MaximumOverTime(torch.autograd.Function):
    """The maximum over time, with its gradient: only each filter's best window has one, which takes B F k products."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, weight: Tensor, windows: Tensor) -> Tensor:
        best, window = _responses(table, rows, weight, windows).max(1)
        ctx.save_for_backward(table, rows, weight, window)
        return best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        table, rows, weight, window = ctx.saved_tensors  # (U, D), (B, T), (F, D, 1, k), (B, F)
        batch, filters = window.shape
        taps = weight.shape[3]
        used = (window[:, :, None] + torch.arange(taps)).view(batch, -1)
        words = rows.gather(1, used)  # (B, F k)
        gradients = gradient.repeat_interleave(taps, dim=1)
        of_table = of_weight = None
        if ctx.needs_input_grad[2]:  # for each filter and tap the sum over the texts of gradient times vector
            of_weight = functional.embedding_bag(
                words.t().contiguous(), table, per_sample_weights=gradients.t().contiguous(), mode="sum"
            )
            of_weight = of_weight.view(filters, taps, -1).permute(0, 2, 1).unsqueeze(2)
        if ctx.needs_input_grad[0]:  # for each word the sum over its uses of gradient times the tap's weights
            words, order = words.view(-1).sort()
            of_table = functional.embedding_bag(
                order % (filters * taps),
                weight.permute(0, 3, 1, 2).reshape(filters * taps, -1),
                torch.searchsorted(words, torch.arange(len(table))),
                per_sample_weights=gradients.view(-1)[order],
                mode="sum",
            )
        return of_table, None, of_weight, None
