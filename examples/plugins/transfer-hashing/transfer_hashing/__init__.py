"""A feature-hashing text backbone and a cosine head: a minimal plugin package."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from transfer import Backbone, FeatureSpec, Head
from transfer_text.interfaces import TokenPreprocessing


class HashingPreprocessing(TokenPreprocessing):
    """Encode words and word bigrams as bucket indices by CRC-32. There is no vocabulary to learn or to save.

    Args:
        buckets: Number of hash buckets.
    """

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets

    def tokenize(self, text: str) -> list[str]:
        """Return the words and punctuation marks of one text, in lower case."""
        return re.findall(r"\w+|[^\w\s]", text.lower())

    def encode(self, values: Sequence[str]) -> list[Tensor]:
        """Return for each text an int64 tensor (number of words and bigrams,)."""
        encoded = []
        for text in values:
            words = self.tokenize(text)
            if not words:
                raise ValueError("the text is empty")
            grams = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
            encoded.append(torch.tensor([zlib.crc32(gram.encode()) % self.buckets for gram in grams]))
        return encoded

    def collate(self, encoded: Sequence[Tensor]) -> Tensor:
        """Return bucket indices, int64 (B, T), padded with ``buckets``, the padding index of the embedding."""
        return nn.utils.rnn.pad_sequence(list(encoded), batch_first=True, padding_value=self.buckets)


class Hashing(Backbone):
    """Mean of hashed word and bigram embeddings (Joulin et al. 2017, Bag of Tricks for Efficient Text Classification).

    Args:
        buckets: Number of rows of the embedding table; more rows cause fewer collisions.
        size: Size of the features.
    """

    field = "text"

    def __init__(self, *, buckets: Annotated[int, Field(ge=1)] = 2**16, size: Annotated[int, Field(ge=1)] = 50) -> None:
        bag = nn.EmbeddingBag(buckets + 1, size, mode="mean", padding_idx=buckets)
        nn.init.uniform_(bag.weight, -1 / size, 1 / size)  # the initialization of fastText
        super().__init__({"bag": bag})
        self.buckets, self.size = buckets, size

    @property
    def features(self) -> FeatureSpec:
        """One vector per text."""
        return FeatureSpec("vector", self.size)

    @property
    def preprocessing(self) -> HashingPreprocessing:
        """Hashing with the same number of buckets."""
        return HashingPreprocessing(self.buckets)


class Cosine(Head):
    """Scaled cosine similarity to a learned direction per class (Gidaris and Komodakis 2018).

    Args:
        scale: Initial value of the learned factor before the softmax.
    """

    def __init__(
        self, features: FeatureSpec, out_features: int, *, scale: Annotated[float, Field(gt=0)] = 10.0
    ) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.randn(out_features, features.size))
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, features: Tensor) -> Any:
        """Map features (B, D) to outputs (B, out_features)."""
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.directions, dim=1))
