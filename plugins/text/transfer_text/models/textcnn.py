"""TextCNN: convolutions over word vectors, then the maximum over time."""

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
from transfer_text.models.embedding import (
    Count,
    TextBackbone,
    Unknown,
    Variant,
    is_recorded,
    look_up,
    use_batch_vocabulary,
)

BLOCK_WORDS = 64


class TextCNN(TextBackbone):
    """A convolutional network over word vectors (Kim 2014, EMNLP, https://aclanthology.org/D14-1181).

    The features are the maximum of each filter over the text, float (B, sum of ``filters``).

    Stages: ``embedding``, ``convolution``.

    Args:
        variant: ``rand``: random vectors, tuned. ``static``: pretrained vectors, frozen. ``nonstatic``: pretrained
            vectors, tuned. ``multichannel``: a frozen and a tuned channel, concatenated. null: multichannel if vectors
            are named, otherwise rand.
        kernel_sizes: Width of each convolution in words.
        filters: Number of filters of each convolution, or one number for all of them.
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
        tokenizer: str = "auto",
        min_frequency: Count = MIN_FREQUENCY,
        max_size: Count | None = None,
        max_length: Count | None = 512,
        truncation: Truncation = "head",
    ) -> None:
        counts = (filters,) * len(kernel_sizes) if isinstance(filters, int) else filters
        if not kernel_sizes or len(counts) != len(kernel_sizes):
            raise ConfigError(
                f"kernel_sizes and filters differ in length: {len(kernel_sizes)} and {len(counts)}",
                fix="set one number of filters per kernel size, or a single number",
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
    """Convolutions with several kernel sizes, and the maximum of each filter over time.

    Args:
        dimensions: Width of a word vector, D.
        kernel_sizes: Width of each convolution in words.
        filters: Number of filters of each convolution.
    """

    def __init__(self, dimensions: int, kernel_sizes: Sequence[int], filters: Sequence[int]) -> None:
        super().__init__()
        # Conv2d, not Conv1d: a (B, T, D) tensor is channels-last memory for it without a copy. This is a third faster
        # on the CPU than Conv1d, which transposes.
        self.convolutions = nn.ModuleList(
            nn.Conv2d(dimensions, count, (1, size)) for size, count in zip(kernel_sizes, filters, strict=True)
        )
        self.kernel_sizes = tuple(kernel_sizes)

    def forward(self, words: tuple[Tensor, Tensor]) -> Tensor:
        """Return the features, float (B, sum of filters), of the output of the embedding.

        A text shorter than a kernel is padded with zeros to the kernel's size and has one window.

        Args:
            words: Table of vectors, float (U, D), or vectors of all words in order, float (B, T, D); and the row of
                each word in a table, int64 (B, T), 0 at padding.
        """
        vectors, rows = words
        weights, biases = zip(*(layer.parameters() for layer in self.convolutions), strict=True)
        widest = max(self.kernel_sizes)
        # A recorded graph must not depend on the length.
        missing = widest if is_recorded() else max(0, widest - rows.shape[1])
        # The maximum commutes with adding the bias and with ReLU.
        if not use_batch_vocabulary(rows):
            best = _convolve(look_up(vectors, rows), rows == PADDING, weights, missing)
            return functional.relu(torch.cat(best, dim=1) + torch.cat(biases))
        lengths = (rows != PADDING).sum(1)
        rows = functional.pad(rows, (0, missing), value=PADDING)
        return functional.relu(
            torch.cat(
                [
                    _convolve_words(vectors, rows, weight, (lengths - weight.shape[3] + 1).clamp(min=1)) + bias
                    for weight, bias in zip(weights, biases, strict=True)
                ],
                dim=1,
            )
        )


def _convolve(vectors: Tensor, padding: Tensor, weights: Sequence[Tensor], missing: int) -> list[Tensor]:
    """Return the maximum over time of each filter, float (B, F) per kernel size, by ordinary convolutions.

    Args:
        vectors: Vectors of all words in order, float (B, T, D).
        padding: Whether each word is padding, bool (B, T).
        weights: Weights of the filters of each kernel size, float (F, D, 1, k).
        missing: Number of words of padding to append.
    """
    if missing:
        vectors = functional.pad(vectors, (0, 0, 0, missing))
        padding = functional.pad(padding, (0, missing), value=True)
    image, best = vectors.transpose(1, 2).unsqueeze(2), []  # (B, D, 1, T)
    for weight in weights:
        responses = functional.conv2d(image, weight)  # (B, F, 1, T - k + 1)
        # A window is beyond the end of a text if its last word is padding. The first one always counts: a text may be
        # shorter than the kernel.
        beyond = functional.pad(padding[:, weight.shape[3] :], (1, 0), value=False)
        # Not amax: its gradient takes five passes over the responses, this one two.
        best.append(responses.masked_fill_(beyond[:, None, None], -torch.inf).max(3).values.squeeze(2))
    return best


def _convolve_words(table: Tensor, rows: Tensor, weight: Tensor, windows: Tensor) -> Tensor:
    """Return the maximum over time of each filter, float (B, F): the same as :func:`_convolve` with less work.

    A window's response is a sum over its k words of (vector x weights of that tap). The product depends only on the
    word and the tap, so it is computed once per distinct word of the batch (:func:`_project`), and each window sums k
    rows of the result.

    Args:
        table: Word vectors, float (U, D).
        rows: Row of each word in ``table``, int64 (B, T).
        weight: Weights of the filters, float (F, D, 1, k).
        windows: Number of valid windows of each text, int64 (B,).
    """
    if torch.is_grad_enabled():
        best: Tensor = _MaximumOverTime.apply(table, rows, weight, windows)
        return best
    return _responses(table, rows, weight, windows).amax(1)


def _responses(table: Tensor, rows: Tensor, weight: Tensor, windows: Tensor) -> Tensor:
    """Return the response of each window, float (B, T - k + 1, F); -inf for windows beyond the end of a text."""
    taps = weight.shape[3]
    projected = _project(table, weight)  # (U k, F)
    # One bag per window, with the row in `projected` of each of its k taps.
    tap_rows = rows.mul(taps).unfold(1, taps, 1) + torch.arange(taps)  # (B, T - k + 1, k)
    responses = functional.embedding_bag(tap_rows.reshape(-1, taps), projected, mode="sum")
    responses = responses.view(*tap_rows.shape[:2], -1)
    first = int(windows.min())  # texts of a batch have similar lengths: only the ends need masking
    beyond = torch.arange(first, tap_rows.shape[1]) >= windows[:, None]
    responses[:, first:].masked_fill_(beyond[:, :, None], -torch.inf)
    return responses


def _project(table: Tensor, weight: Tensor) -> Tensor:
    """Return the product of each word vector with each tap of each filter, float (U k, F), taps of a word in a row.

    This is the matrix product (U, D) x (D, k F). It is written as a 1 x 1 convolution over blocks of BLOCK_WORDS words,
    because oneDNN computes that at twice the rate of torch's matrix product on non-Intel processors, and at the same
    rate on Intel's.
    """
    filters, dimensions, _, taps = weight.shape
    blocks = functional.pad(table, (0, 0, 0, -len(table) % BLOCK_WORDS)).view(-1, 1, BLOCK_WORDS, dimensions)
    kernel = weight.permute(3, 0, 1, 2).reshape(taps * filters, dimensions, 1, 1)
    projected = functional.conv2d(blocks.permute(0, 3, 1, 2), kernel)
    # Under autocast the product has lower precision; the sum over taps is in the precision of the table.
    return projected.permute(0, 2, 3, 1).reshape(-1, taps * filters)[: len(table)].to(table).reshape(-1, filters)


class _MaximumOverTime(torch.autograd.Function):
    """The maximum over time with a sparse backward pass.

    Only the best window of each filter receives a gradient, so the backward pass takes B F k products instead of
    B T F k.
    """

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
        table_gradient = weight_gradient = None
        if ctx.needs_input_grad[2]:  # per filter and tap: sum over texts of gradient x vector
            weight_gradient = functional.embedding_bag(
                words.t().contiguous(), table, per_sample_weights=gradients.t().contiguous(), mode="sum"
            )
            weight_gradient = weight_gradient.view(filters, taps, -1).permute(0, 2, 1).unsqueeze(2)
        if ctx.needs_input_grad[0]:  # per word: sum over its uses of gradient x weights
            words, order = words.view(-1).sort()
            table_gradient = functional.embedding_bag(
                order % (filters * taps),
                weight.permute(0, 3, 1, 2).reshape(filters * taps, -1),
                torch.searchsorted(words, torch.arange(len(table))),
                per_sample_weights=gradients.view(-1)[order],
                mode="sum",
            )
        return table_gradient, None, weight_gradient, None
