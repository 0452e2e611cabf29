"""What backbones over word vectors share: the vocabulary, the vectors, and the first stage, which looks them up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from transfer import Backbone, ConfigError, FeatureSpec, WeightsError
from transfer_text.encoding.encoded_texts import Truncation, truncation_loss
from transfer_text.encoding.plugin_vocabulary import read_vocabulary, vocabulary_class
from transfer_text.encoding.preprocessing import TextPreprocessing
from transfer_text.encoding.vocabulary import PADDING, Vocabulary
from transfer_text.vectors.word_vectors import coverage, read_vectors, width_of, words_of

Variant = Literal["rand", "static", "nonstatic", "multichannel"]
Unknown = Literal["random", "zero", "mean"]
Count = Annotated[int, Field(gt=0)]

RANDOM_DIMENSIONS = 100
RANDOM_RANGE = 0.25  # Kim's


class TextBackbone(Backbone):
    """A network over word vectors.

    Its input is word indices, int64 (B, T), padded with 0, and padding never changes a result. Its first stage is
    ``embedding``.

    Args:
        vocabulary: What was learned from the training split; None for a nominal one.
        width: The width of the vectors where it was learned before, so that no file is needed.
        above: Makes the stages above the embedding, given the width of what leaves that.
        features: What the last of them returns.
        variant: ``rand``: random vectors, tuned. ``static``: pretrained ones, frozen. ``nonstatic``: pretrained ones,
            tuned.
        vectors: Pretrained word vectors: a known name (``glove.6B.100d``), ``mini``, a file in GloVe's format, or
            those of a plugin (``torchtext/glove.6B.100d``).
        dimensions: Width of random vectors, 100 by default; that of pretrained ones is their own.
        unknown: Vector of a word that the pretrained ones lack: random with their spread, zero, or their mean.
        vectors_vocabulary: Keep the vectors of words that training never saw, too, for prediction. They are never
            trained: in a tuned channel they stay as they were pretrained.
        tokenizer: ``glove`` (that of GloVe's own text), ``basic_english`` (torchtext's), ``whitespace``, the path of a
            ``tokenizer.json``, which brings its own vocabulary, or that of a plugin (``torchtext/basic_english``).
        min_frequency: Words that occur less often in the training split are unknown.
        max_size: The most words in the vocabulary, the frequent ones first; null keeps all.
        max_length: The most words of a text that are kept; null keeps all.
        truncation: Which words of a longer text are kept: the first (``head``), the last (``tail``), or half from each
            end (``both``).
    """

    field: ClassVar[str] = "text"
    pretrained_variants: ClassVar[tuple[Variant, ...]] = ("static", "nonstatic")
    """The variants that read vectors, the default first."""

    def __init__(
        self,
        vocabulary: Vocabulary | None,
        width: int | None,
        above: Callable[[int], Mapping[str, nn.Module]],
        features: FeatureSpec,
        *,
        variant: Variant | None,
        vectors: str | None,
        dimensions: int | None,
        unknown: Unknown,
        vectors_vocabulary: bool,
        tokenizer: str,
        max_length: int | None,
        truncation: Truncation,
    ) -> None:
        variant = self._variant(variant, vectors)
        width = _width(width, vectors, dimensions)
        if vocabulary is None:  # a nominal one is as good as any for checking shapes
            vocabulary = vocabulary_class(tokenizer).nominal(tokenizer)
            if vectors_vocabulary:
                vocabulary = _with_words_of(vectors, vocabulary, [])
                vocabulary.placeholder_note = f"learned from the training texts, and the words that {vectors} knows"
        embedding = WordEmbedding(
            len(vocabulary) - vocabulary.extra,
            width,
            frozen=variant in ("static", "multichannel"),
            tuned=variant != "static",
            further=vocabulary.extra,
        )
        super().__init__({"embedding": embedding, **above(embedding.out_dimensions)})
        self.vocabulary = vocabulary
        self.width = width
        self.vectors = vectors
        self.unknown: Unknown = unknown
        self._features = features
        self._preprocessing = TextPreprocessing(vocabulary, max_length, truncation)

    @classmethod
    def from_data(cls, values: Sequence[str], **options: Any) -> Self:
        """Build with the vocabulary of the training texts, and perhaps the further words that the vectors know."""
        learned = {name: options[name] for name in ("tokenizer", "min_frequency", "max_size") if name in options}
        vocabulary = vocabulary_class(options.get("tokenizer", "glove")).build(values, **learned)
        if options.get("vectors_vocabulary"):
            vocabulary = _with_words_of(options.get("vectors"), vocabulary)
        return cls(vocabulary, **options)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build with the vocabulary and the width of a saved model; no file of vectors is needed."""
        embedding = json.loads(assets["embedding.json"])
        vocabulary = read_vocabulary(assets["vocabulary.json"], embedding.get("further_words", 0))
        return cls(vocabulary, embedding["width"], **options)

    def assets(self) -> Mapping[str, str]:
        """Return the vocabulary with its tokenizer, and the width of the vectors."""
        embedding = {"width": self.width, "further_words": self.vocabulary.extra}
        return {"vocabulary.json": self.vocabulary.to_json(), "embedding.json": json.dumps(embedding)}

    def learned(self) -> Mapping[str, Any]:
        """Return the number of words, and what the longest length drops (see :func:`truncation_loss`)."""
        further, lengths = self.vocabulary.extra, self.vocabulary.lengths
        words = {"words": len(self.vocabulary) - 2 - further, **({"further_words": further} if further else {})}
        return words | ({} if lengths is None else truncation_loss(lengths, self._preprocessing.max_length))

    def load_pretrained(self) -> Mapping[str, Any]:
        """Read the word vectors into the embedding.

        Returns:
            ``vectors`` and their coverage of the vocabulary (see :func:`transfer_text.vectors.word_vectors.coverage`).
        """
        if self.vectors is None:
            return {}
        special, words = self.vocabulary.tokens[:2], self.vocabulary.tokens[2:]
        vectors = read_vectors(self.vectors, words)
        own = len(words) - self.vocabulary.extra
        if not vectors.found[:own].any():
            raise WeightsError(
                f"{self.vectors!r} has a vector for none of the {own} words of the training texts",
                fix="choose vectors of the texts' language and case, or another tokenizer",
            )
        if vectors.matrix.shape[1] != self.width:
            raise WeightsError(f"{self.vectors!r} is {vectors.matrix.shape[1]} wide, the model {self.width}")
        rows = ((len(special), 0), (0, 0))
        embedding = self.stages[0]
        assert isinstance(embedding, WordEmbedding)
        embedding.load(np.pad(vectors.matrix[:own], rows), np.pad(vectors.found[:own], rows[0]), self.unknown)
        embedding.load_further(vectors.matrix[own:])
        counts = self.vocabulary.counts
        report = coverage(words, vectors.found, None if counts is None else counts[len(special) :])
        return {"vectors": self.vectors, **report}

    @classmethod
    def without_pretrained(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Choose random vectors of the same width, all of them tuned."""
        vectors = options.get("vectors")
        if vectors is None:
            return {}
        return {"variant": "rand", "vectors": None, "dimensions": width_of(vectors), "vectors_vocabulary": False}

    @property
    def features(self) -> FeatureSpec:
        """What the options ask for."""
        return self._features

    @property
    def preprocessing(self) -> TextPreprocessing:
        """Tokenize, numericalise, pad."""
        return self._preprocessing

    def _variant(self, variant: Variant | None, vectors: str | None) -> Variant:
        if variant is None:
            return "rand" if vectors is None else self.pretrained_variants[0]
        if variant == "rand" and vectors is not None:
            raise ConfigError(
                f"variant 'rand' begins with random vectors and reads none, but vectors names {vectors!r}",
                available=self.pretrained_variants,
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


def _with_words_of(source: str | None, vocabulary: Vocabulary, words: Sequence[str] | None = None) -> Vocabulary:
    """Extend a vocabulary by the words that a source of vectors knows, or by those given."""
    if source is None:
        raise ConfigError(
            "vectors_vocabulary keeps the words of the vectors, but vectors is null",
            fix="name vectors (glove.6B.100d), or leave vectors_vocabulary out",
        )
    return vocabulary.extended(words_of(source) if words is None else words)


class WordEmbedding(nn.Module):
    """Look up a frozen vector, a tuned one, or both side by side for each word.

    Args:
        size: V, the size of the vocabulary.
        dimensions: D, the width of a vector.
        frozen: Have a channel that is never trained, whatever a config's phases say.
        tuned: Have a channel that is.
        further: F, how many words beyond the V have a vector that is the same in every channel and never trained.
    """

    recompute = True
    """Looking up is cheaper than reading stored features back."""

    def __init__(self, size: int, dimensions: int, *, frozen: bool, tuned: bool, further: int = 0) -> None:
        super().__init__()
        weight = torch.empty(size, dimensions).uniform_(-RANDOM_RANGE, RANDOM_RANGE)
        weight[PADDING] = 0
        self.static: Tensor | None
        self.register_buffer("static", weight.clone() if frozen else None)
        self.tuned = nn.Parameter(weight) if tuned else None
        # No rows of the parameter: an optimizer would pass over them at every step, and weight decay would move them.
        self.further: Tensor | None
        self.register_buffer("further", torch.zeros(further, dimensions) if further else None)
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
        for channel in self._channels():
            channel.copy_(weight)

    @torch.no_grad()
    def load_further(self, matrix: npt.NDArray[np.float32]) -> None:
        """Take the vectors of the words beyond the vocabulary of the training texts, float32 (F, D)."""
        if self.further is not None:
            self.further.copy_(torch.from_numpy(matrix))

    def forward(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return a table of vectors, float (U, D or 2 D), and the row of each word in it, int64 (B, T).

        Row 0 is padding and holds zeros. The table has a row for each different word of the batch, so that what
        follows can do once what depends on the word alone; off the CPU, and where a graph is recorded that must not
        depend on the batch, it is the whole vocabulary's.

        Args:
            indices: Word indices, int64 (B, T).
        """
        channels = self._channels()
        if not in_batch_terms(indices):
            table = torch.cat(channels, dim=1) if len(channels) > 1 else channels[0]
            if self.further is not None:
                table = torch.cat([table, self.further.repeat(1, len(channels))])
            return table, indices
        own = len(channels[0])
        size = own if self.further is None else own + len(self.further)
        occurs = torch.zeros(size, dtype=torch.bool)
        occurs[indices] = True
        occurs[PADDING] = True
        words = occurs.nonzero().squeeze(1)
        rows = torch.empty(size, dtype=torch.int64)  # of the words that occur; nobody reads the others
        rows[words] = torch.arange(len(words))
        known = words if self.further is None else words[words < own]
        table = torch.cat([functional.embedding(known, c, padding_idx=PADDING) for c in channels], dim=1)
        if self.further is not None and len(known) < len(words):
            table = torch.cat([table, self.further[words[len(known) :] - own].repeat(1, len(channels))])
        return table, rows[indices]

    def _channels(self) -> list[Tensor]:
        return [channel for channel in (self.static, self.tuned) if channel is not None]


def in_batch_terms(indices: Tensor) -> bool:
    """Say whether to work with the different words of a batch: on the CPU, where nothing waits to learn how many."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return indices.device.type == "cpu" and not recorded


def look_up(table: Tensor, rows: Tensor) -> Tensor:
    """Return the vectors, float (B, T, D), of rows (B, T) of a table (U, D); padding gets no gradient."""
    return functional.embedding(rows, table, padding_idx=PADDING)
