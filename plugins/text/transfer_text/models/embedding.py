"""The base class of backbones over word vectors, and their first stage: the embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from transfer import Backbone, ConfigError, FeatureSpec, FileSchema, WeightsError
from transfer_text.encoding.encoded_texts import Truncation, truncation_loss
from transfer_text.encoding.plugin_vocabulary import read_vocabulary, vocabulary_class
from transfer_text.encoding.preprocessing import TextPreprocessing
from transfer_text.encoding.tokenization import AUTO
from transfer_text.encoding.vocabulary import PADDING, Vocabulary
from transfer_text.vectors.word_vectors import coverage, read_vectors, width_of, words_of

Variant = Literal["rand", "static", "nonstatic", "multichannel"]
Unknown = Literal["random", "zero", "mean"]
Count = Annotated[int, Field(gt=0)]

RANDOM_DIMENSIONS = 100
RANDOM_RANGE = 0.25  # the range of Kim (2014)


class _SavedEmbedding(FileSchema):
    """Content of ``embedding.json`` in a model folder."""

    width: Count
    further_words: Annotated[int, Field(ge=0)] = 0


class TextBackbone(Backbone):
    """A network over word vectors.

    The input is word indices, int64 (B, T), padded with 0. Padding never changes a result. The first stage is
    ``embedding``.

    Args:
        vocabulary: Vocabulary of the training split. None builds a placeholder, for checking shapes.
        width: Width of the word vectors of a saved model, whose vector file is not needed. None reads it from
            ``vectors``.
        above: Function that builds the stages above the embedding, given the width of the embedding's output.
        features: Layout and size of the output of the last stage.
        variant: ``rand``: random vectors, tuned. ``static``: pretrained vectors, frozen. ``nonstatic``: pretrained
            vectors, tuned.
        vectors: Pretrained word vectors: a known name (``glove.6B.100d``), ``mini``, a file in GloVe's format, or
            vectors of a plugin (``torchtext/glove.6B.100d``).
        dimensions: Width of random vectors, 100 by default. Pretrained vectors have their own width.
        unknown: Vector of a word without a pretrained vector: random with the same variance, zero, or the mean.
        vectors_vocabulary: Whether to keep the vectors of words that are not in the training texts, for prediction.
            They are never trained: in a tuned channel they keep their pretrained values.
        tokenizer: ``glove`` (the conventions of GloVe's training text), ``multilingual`` (the same, and each character
            of a script without blanks between words, such as Chinese, Japanese or Thai, is a token), ``basic_english``
            (torchtext's), ``whitespace``, the path of a ``tokenizer.json`` with its own vocabulary, or a plugin
            (``torchtext/basic_english``). ``auto`` chooses ``multilingual`` if at least 1 % of the characters of the
            training texts belong to such a script, otherwise ``glove``.
        min_frequency: Minimum number of occurrences of a word in the training split; rarer words are unknown.
        max_size: Maximum size of the vocabulary, most frequent words first. null keeps all words.
        max_length: Maximum number of words per text. null keeps all words.
        truncation: Words that remain of a longer text: the first (``head``), the last (``tail``), or half from each
            end (``both``).
    """

    field: ClassVar[str] = "text"
    # Measured on small sets (docs/log.md): few epochs underfit random vectors, and the best number depends on the data.
    default_head: ClassVar[Mapping[str, Any]] = {"name": "linear", "dropout": 0.5}
    default_phase: ClassVar[Mapping[str, Any]] = {"epochs": 20, "patience": 5}
    pretrained_variants: ClassVar[tuple[Variant, ...]] = ("static", "nonstatic")
    """Variants that read pretrained vectors; the first is the default."""

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
        if vocabulary is None:  # a placeholder is sufficient for checking shapes
            vocabulary = vocabulary_class(tokenizer).nominal(tokenizer)
            if vectors_vocabulary:
                vocabulary = _with_words_of(vectors, vocabulary, [])
                vocabulary.placeholder_note = f"learned from the training texts, plus the words of {vectors}"
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
        """Build with the vocabulary of the training texts, with ``vectors_vocabulary`` plus that of the vectors."""
        settings = {name: options[name] for name in ("min_frequency", "max_size") if name in options}
        tokenizer = options.get("tokenizer", AUTO)
        vocabulary = vocabulary_class(tokenizer).build(values, tokenizer, **settings)
        if options.get("vectors_vocabulary"):
            vocabulary = _with_words_of(options.get("vectors"), vocabulary)
        return cls(vocabulary, **options)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build with the vocabulary and the width of a saved model; the vector file is not needed."""
        embedding = _SavedEmbedding.model_validate_json(assets["embedding.json"])
        vocabulary = read_vocabulary(assets["vocabulary.json"], embedding.further_words)
        return cls(vocabulary, embedding.width, **options)

    def assets(self) -> Mapping[str, str]:
        """Return the vocabulary with its tokenizer, and the width of the vectors."""
        embedding = _SavedEmbedding(width=self.width, further_words=self.vocabulary.extra)
        return {"vocabulary.json": self.vocabulary.to_json(), "embedding.json": embedding.model_dump_json()}

    def learned(self) -> Mapping[str, Any]:
        """Return the number of words, a tokenizer other than the usual one, and the effect of truncation."""
        extra, lengths = self.vocabulary.extra, self.vocabulary.lengths
        words: dict[str, Any] = {
            "words": len(self.vocabulary) - 2 - extra,
            **({"further_words": extra} if extra else {}),
        }
        if self.vocabulary.tokenizer_name == "multilingual":  # probably chosen by the texts
            words["tokenizer"] = "multilingual"
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
        trained = len(words) - self.vocabulary.extra
        if not vectors.found[:trained].any():
            raise WeightsError(
                f"{self.vectors!r} contains no vector for any of the {trained} words of the training texts",
                fix="choose vectors of the texts' language and case, or another tokenizer",
            )
        if vectors.matrix.shape[1] != self.width:
            raise WeightsError(
                f"{self.vectors!r} has width {vectors.matrix.shape[1]}: expected {self.width}, the model's"
            )
        rows = ((len(special), 0), (0, 0))
        embedding = self.stages[0]
        assert isinstance(embedding, WordEmbedding)
        embedding.load(np.pad(vectors.matrix[:trained], rows), np.pad(vectors.found[:trained], rows[0]), self.unknown)
        embedding.load_further(vectors.matrix[trained:])
        counts = self.vocabulary.counts
        report = coverage(words, vectors.found, None if counts is None else counts[len(special) :])
        return {"vectors": self.vectors, **report}

    @classmethod
    def without_pretrained(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return options for random, tuned vectors of the same width."""
        vectors = options.get("vectors")
        if vectors is None:
            return {}
        return {"variant": "rand", "vectors": None, "dimensions": width_of(vectors), "vectors_vocabulary": False}

    @property
    def unsized_stages(self) -> tuple[str, ...]:
        """The embedding, as long as its vocabulary is a placeholder."""
        return ("embedding",) if self.vocabulary.placeholder_note else ()

    @property
    def features(self) -> FeatureSpec:
        """Layout and size of the features, as the options set them."""
        return self._features

    @property
    def preprocessing(self) -> TextPreprocessing:
        """Tokenization, encoding and padding."""
        return self._preprocessing

    def _variant(self, variant: Variant | None, vectors: str | None) -> Variant:
        if variant is None:
            return "rand" if vectors is None else self.pretrained_variants[0]
        if variant == "rand" and vectors is not None:
            raise ConfigError(
                f"variant 'rand' uses random vectors, but vectors is {vectors!r}",
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
            f"dimensions is {dimensions}, but {vectors or 'the saved embedding'} has width {width}",
            fix="leave dimensions out, or choose vectors of that width",
        )
    return width


def _with_words_of(source: str | None, vocabulary: Vocabulary, words: Sequence[str] | None = None) -> Vocabulary:
    """Return a vocabulary extended by the words of a source of vectors, or by the given words."""
    if source is None:
        raise ConfigError(
            "vectors_vocabulary keeps the words of the vectors, but vectors is null",
            fix="name vectors (glove.6B.100d), or leave vectors_vocabulary out",
        )
    return vocabulary.extended(words_of(source) if words is None else words)


class WordEmbedding(nn.Module):
    """The vectors of words: a frozen channel, a tuned channel, or both concatenated.

    Args:
        size: Size of the vocabulary, V.
        dimensions: Width of a vector, D.
        frozen: Whether there is a channel that is never trained, regardless of a config's phases.
        tuned: Whether there is a channel that is trained.
        further: Number of additional words, F, whose vectors are equal in all channels and never trained.
    """

    recompute = True
    """A look-up is cheaper than reading features from the cache."""

    def __init__(self, size: int, dimensions: int, *, frozen: bool, tuned: bool, further: int = 0) -> None:
        super().__init__()
        weight = torch.empty(size, dimensions).uniform_(-RANDOM_RANGE, RANDOM_RANGE)
        weight[PADDING] = 0
        self.static: Tensor | None
        self.register_buffer("static", weight.clone() if frozen else None)
        self.tuned = nn.Parameter(weight) if tuned else None
        # A buffer, not rows of the parameter: weight decay would change rows without a gradient. Saved models contain
        # this name.
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
        """Copy pretrained vectors into all channels.

        Args:
            matrix: Vectors, float32 (V, D).
            found: Whether each row contains a vector, bool (V,). The other rows are filled according to ``unknown``.
            unknown: ``random`` draws from a uniform distribution with the variance of the vectors, by torch's global
                generator; ``zero``; or ``mean``.
        """
        weight = torch.from_numpy(matrix)
        has_vector = torch.from_numpy(found)
        if unknown == "mean":
            weight[~has_vector] = weight[has_vector].mean(0)
        elif unknown == "random":
            # The uniform distribution on [-bound, bound] has the standard deviation bound / sqrt(3).
            bound = weight[has_vector].std(0, unbiased=False) * 3**0.5
            weight[~has_vector] = (2 * torch.rand_like(weight[~has_vector]) - 1) * bound
        else:
            weight[~has_vector] = 0
        weight[PADDING] = 0
        for channel in self._channels():
            channel.copy_(weight)

    @torch.no_grad()
    def load_further(self, matrix: npt.NDArray[np.float32]) -> None:
        """Copy the vectors of the additional words, float32 (F, D)."""
        if self.further is not None:
            self.further.copy_(torch.from_numpy(matrix))

    def forward(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return vectors of words, and the row of each word in them, int64 (B, T), 0 at padding.

        On the CPU the vectors are a table, float (U, D or 2 D), with one row per distinct word of the batch; row 0 is
        padding and contains zeros. The next stage then computes anything that depends on a single word only once per
        distinct word. On a GPU, and while a graph is recorded that must not depend on the batch, they are the vectors
        of all words in order, float (B, T, D or 2 D). :func:`look_up` accepts both.

        Args:
            indices: Word indices, int64 (B, T).
        """
        if not use_batch_vocabulary(indices):
            return self._vectors(indices), indices
        channels = self._channels()
        size_trained = len(channels[0])
        size = size_trained if self.further is None else size_trained + len(self.further)
        occurs = torch.zeros(size, dtype=torch.bool)
        occurs[indices] = True
        occurs[PADDING] = True
        words = occurs.nonzero().squeeze(1)
        rows = torch.empty(size, dtype=torch.int64)  # only entries of words that occur are set and read
        rows[words] = torch.arange(len(words))
        trained = words if self.further is None else words[words < size_trained]
        table = torch.cat([functional.embedding(trained, c, padding_idx=PADDING) for c in channels], dim=1)
        if self.further is not None and len(trained) < len(words):
            table = torch.cat([table, self.further[words[len(trained) :] - size_trained].repeat(1, len(channels))])
        return table, rows[indices]

    def _vectors(self, indices: Tensor) -> Tensor:
        """Return the vectors of words (B, T), float (B, T, D or 2 D); nothing of the size of the vocabulary is made."""
        channels = self._channels()
        if self.further is None:
            vectors = [functional.embedding(indices, channel, padding_idx=PADDING) for channel in channels]
        else:
            size = len(channels[0])
            further = functional.embedding((indices - size).clamp(min=0), self.further)
            is_further, trained = (indices >= size).unsqueeze(-1), indices.clamp(max=size - 1)
            vectors = [
                torch.where(is_further, further, functional.embedding(trained, channel, padding_idx=PADDING))
                for channel in channels
            ]
        return torch.cat(vectors, dim=-1) if len(vectors) > 1 else vectors[0]

    def _channels(self) -> list[Tensor]:
        return [channel for channel in (self.static, self.tuned) if channel is not None]


def use_batch_vocabulary(indices: Tensor) -> bool:
    """Return whether to look up only the distinct tokens of the batch.

    True on the CPU only: counting them on a GPU would force a synchronization. False while a graph is recorded.
    """
    return indices.device.type == "cpu" and not is_recorded()


def is_recorded() -> bool:
    """Return whether a graph is recorded (compiled, exported or traced), which must not depend on the batch."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def look_up(vectors: Tensor, rows: Tensor) -> Tensor:
    """Return the vector of each word, float (B, T, D), from the output of :class:`WordEmbedding`.

    Args:
        vectors: Table of vectors, float (U, D), or vectors of all words in order, float (B, T, D).
        rows: Row of each word in a table, int64 (B, T). Padding receives no gradient.
    """
    return vectors if vectors.dim() == 3 else functional.embedding(rows, vectors, padding_idx=PADDING)
