"""TextCNN: convolutions over word vectors, and the maximum over time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from transfer import Backbone, ConfigError, FeatureSpec, WeightsError
from transfer_text.preprocessing import TextPreprocessing
from transfer_text.vectors import coverage, read_vectors, width_of
from transfer_text.vocabulary import MIN_FREQUENCY, PADDING, TokenizerName, Vocabulary

Variant = Literal["rand", "static", "nonstatic", "multichannel"]
Unknown = Literal["random", "zero", "mean"]
Count = Annotated[int, Field(gt=0)]

RANDOM_DIMENSIONS = 100
RANDOM_RANGE = 0.25  # Kim's


class TextCNN(Backbone):
    """A convolutional network over word vectors (Kim 2014, EMNLP, https://aclanthology.org/D14-1181).

    Its input is word indices, int64 (B, T), padded with 0. Its features are the largest value that each filter
    takes anywhere in the text, float (B, the sum of ``filters``); padding never counts.

    Stages: ``embedding``, ``convolution``.

    Args:
        vocabulary: What was learned from the training split; None for a nominal one.
        width: The width of the vectors where it was learned before, so that no file is needed.
        variant: ``rand``: random vectors, tuned. ``static``: pretrained ones, frozen. ``nonstatic``: pretrained ones,
            tuned. ``multichannel``: a frozen and a tuned channel side by side. null: multichannel with
            vectors, else rand.
        vectors: Pretrained word vectors: a known name (``glove.6B.100d``), ``mini``, or a file in GloVe's format.
        dimensions: Width of random vectors, 100 by default; that of pretrained ones is their own.
        unknown: Vector of a word that the pretrained ones lack: random with their spread, zero, or their mean.
        kernel_sizes: How many words each convolution spans.
        filters: Number of filters of each convolution, or one number for all.
        tokenizer: ``glove`` (that of GloVe's own text), ``basic_english`` (torchtext's), or ``whitespace``.
        min_frequency: Words that occur less often in the training split are unknown.
        max_size: The most words in the vocabulary, the frequent ones first; null keeps all.
        max_length: Words of a text after so many are dropped; null keeps all.
    """

    field: ClassVar[str] = "text"

    def __init__(
        self,
        vocabulary: Vocabulary | None = None,
        width: int | None = None,
        *,
        variant: Variant | None = None,
        vectors: str | None = None,
        dimensions: Count | None = None,
        unknown: Unknown = "random",
        kernel_sizes: tuple[Count, ...] = (3, 4, 5),
        filters: Count | tuple[Count, ...] = 100,
        tokenizer: TokenizerName = "glove",
        min_frequency: Count = MIN_FREQUENCY,
        max_size: Count | None = None,
        max_length: Count | None = 512,
    ) -> None:
        variant = _variant(variant, vectors)
        width = _width(width, vectors, dimensions)
        counts = (filters,) * len(kernel_sizes) if isinstance(filters, int) else filters
        if not kernel_sizes or len(counts) != len(kernel_sizes):
            raise ConfigError(
                f"there are {len(kernel_sizes)} kernel_sizes and {len(counts)} numbers of filters",
                fix="give one number of filters for each kernel size, or a single one for all",
            )
        # A nominal vocabulary is as good as any for checking shapes.
        vocabulary = Vocabulary.nominal(tokenizer) if vocabulary is None else vocabulary
        embedding = WordEmbedding(
            len(vocabulary),
            width,
            frozen=variant in ("static", "multichannel"),
            tuned=variant != "static",
        )
        convolution = Convolutions(embedding.out_dimensions, kernel_sizes, counts)
        super().__init__({"embedding": embedding, "convolution": convolution})
        self.vocabulary = vocabulary
        self.width = width
        self.vectors = vectors
        self.unknown = unknown
        self._features = FeatureSpec("vector", sum(counts))
        self._preprocessing = TextPreprocessing(vocabulary, max_length)

    @classmethod
    def from_data(cls, values: Sequence[str], **options: Any) -> Self:
        """Build with the vocabulary of the training texts."""
        learned = {name: options[name] for name in ("tokenizer", "min_frequency", "max_size") if name in options}
        return cls(Vocabulary.build(values, **learned), **options)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build with the vocabulary and the width of a saved model; no file of vectors is needed."""
        width = json.loads(assets["embedding.json"])["width"]
        return cls(Vocabulary.from_json(assets["vocabulary.json"]), width, **options)

    def assets(self) -> Mapping[str, str]:
        """Return the vocabulary with its tokenizer, and the width of the vectors."""
        return {"vocabulary.json": self.vocabulary.to_json(), "embedding.json": json.dumps({"width": self.width})}

    def load_pretrained(self) -> Mapping[str, Any]:
        """Read the word vectors into the embedding.

        Returns:
            ``vectors`` and their coverage of the vocabulary (see :func:`transfer_text.vectors.coverage`).
        """
        if self.vectors is None:
            return {}
        special, words = self.vocabulary.tokens[:2], self.vocabulary.tokens[2:]
        vectors = read_vectors(self.vectors, words)
        if not vectors.found.any():
            raise WeightsError(
                f"{self.vectors!r} has a vector for none of the {len(words)} words of the vocabulary",
                fix="choose vectors of the texts' language and case, or another tokenizer",
            )
        if vectors.matrix.shape[1] != self.width:
            raise WeightsError(f"{self.vectors!r} is {vectors.matrix.shape[1]} wide, the model {self.width}")
        rows = ((len(special), 0), (0, 0))
        self._embedding.load(np.pad(vectors.matrix, rows), np.pad(vectors.found, rows[0]), self.unknown)
        counts = self.vocabulary.counts
        report = coverage(words, vectors.found, None if counts is None else counts[len(special) :])
        return {"vectors": self.vectors, **report}

    @property
    def _embedding(self) -> WordEmbedding:
        embedding = self.stages[0]
        assert isinstance(embedding, WordEmbedding)
        return embedding

    @property
    def features(self) -> FeatureSpec:
        """One number for each filter."""
        return self._features

    @property
    def preprocessing(self) -> TextPreprocessing:
        """Tokenize, numericalise, pad."""
        return self._preprocessing


def _variant(variant: Variant | None, vectors: str | None) -> Variant:
    if variant is None:
        return "rand" if vectors is None else "multichannel"
    if variant == "rand" and vectors is not None:
        raise ConfigError(
            f"variant 'rand' begins with random vectors and reads none, but vectors names {vectors!r}",
            available=("static", "nonstatic", "multichannel"),
            fix="set vectors: null, or choose a variant that reads vectors",
        )
    if variant != "rand" and vectors is None:
        raise ConfigError(
            f"variant {variant!r} needs pretrained vectors, but vectors is null",
            fix="name vectors (glove.6B.100d), or set variant: rand",
        )
    return variant


def _width(width: int | None, vectors: str | None, dimensions: int | None) -> int:
    if width is None and vectors is not None:
        try:
            width = width_of(vectors)
        except WeightsError as error:
            raise ConfigError.of(error.problems) from error
    if width is None:
        return RANDOM_DIMENSIONS if dimensions is None else dimensions
    if dimensions is not None and dimensions != width:
        raise ConfigError(
            f"dimensions is {dimensions}, but {vectors or 'the saved embedding'} is {width} wide",
            fix="leave dimensions out, or choose vectors of that width",
        )
    return width


class WordEmbedding(nn.Module):
    """Look up a frozen vector, a tuned one, or both side by side for each word.

    Args:
        size: V, the size of the vocabulary.
        dimensions: D, the width of a vector.
        frozen: Have a channel that is never trained, whatever a config's phases say.
        tuned: Have a channel that is.
    """

    recompute = True
    """Looking up is cheaper than reading stored features back."""

    def __init__(self, size: int, dimensions: int, *, frozen: bool, tuned: bool) -> None:
        super().__init__()
        weight = torch.empty(size, dimensions).uniform_(-RANDOM_RANGE, RANDOM_RANGE)
        weight[PADDING] = 0
        self.static: Tensor | None
        self.register_buffer("static", weight.clone() if frozen else None)
        self.tuned = nn.Parameter(weight) if tuned else None
        self.out_dimensions = dimensions * (frozen + tuned)

    @torch.no_grad()
    def load(
        self,
        matrix: npt.NDArray[np.float32],
        found: npt.NDArray[np.bool_],
        unknown: Unknown,
    ) -> None:
        """Take pretrained vectors.

        Args:
            matrix: float32 (V, D).
            found: bool (V,), which rows hold a vector; the others are filled as ``unknown`` says.
            unknown: ``random`` draws from torch's global generator, uniformly with the variance of the vectors found.
        """
        weight = torch.from_numpy(matrix)
        known = torch.from_numpy(found)
        if unknown == "mean":
            weight[~known] = weight[known].mean(0)
        elif unknown == "random":
            reach = weight[known].std(0, unbiased=False) * 3**0.5  # of a uniform distribution with that deviation
            weight[~known] = (2 * torch.rand_like(weight[~known]) - 1) * reach
        else:
            weight[~known] = 0
        weight[PADDING] = 0
        for channel in (self.static, self.tuned):
            if channel is not None:
                channel.copy_(weight)

    def forward(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors, float (B, T, D or 2 D), and the mask, bool (B, T), of word indices, int64 (B, T)."""
        channels = [
            functional.embedding(indices, channel, padding_idx=PADDING)  # no gradient reaches the row of padding
            for channel in (self.static, self.tuned)
            if channel is not None
        ]
        return torch.cat(channels, dim=2) if len(channels) > 1 else channels[0], indices != PADDING


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

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Return the features, float (B, the sum of filters), of vectors (B, T, D) and their mask (B, T).

        A text shorter than a kernel counts as padded with zeros to its size, and has one window.
        """
        vectors, mask = inputs
        lengths = mask.sum(1)
        short = max(self.kernel_sizes) - vectors.shape[1]
        if short > 0:
            vectors = functional.pad(vectors, (0, 0, 0, short))
        image = vectors.transpose(1, 2).unsqueeze(2)  # (B, D, 1, T)
        features = []
        for convolution, size in zip(self.convolutions, self.kernel_sizes, strict=True):
            responses = convolution(image).squeeze(2)  # (B, filters, windows)
            windows = (lengths - size + 1).clamp(min=1)
            beyond = torch.arange(responses.shape[2], device=windows.device) >= windows[:, None]
            features.append(responses.masked_fill(beyond[:, None], -torch.inf).max(2).values)
        return functional.relu(torch.cat(features, dim=1))  # the maximum and ReLU commute
