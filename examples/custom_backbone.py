"""A backbone of one's own in a script: a network over characters. Run: python custom_backbone.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

import transfer

BYTES = 256


class BytesOf(transfer.Preprocessing):
    """Texts to the numbers of their bytes: nothing to learn, nothing to store."""

    encode_once = True  # encoded values are small: keep them, and put texts of like length into one batch

    def encode(self, values: Sequence[str]) -> list[Tensor]:
        """Return int64 (T,) for each text."""
        if not all(values):
            raise ValueError("the text is empty")
        return [torch.tensor(list(text.lower().encode()[:512])) for text in values]

    def collate(self, encoded: Sequence[Tensor]) -> Tensor:
        """Return int64 (B, T), padded with one more than the largest byte."""
        return nn.utils.rnn.pad_sequence(list(encoded), batch_first=True, padding_value=BYTES)

    def length(self, encoded: Tensor) -> int:
        """Return the number of bytes."""
        return len(encoded)

    def read(self, source: str) -> str:
        """Return the content of a file, or the text itself."""
        return Path(source).read_text(encoding="utf-8") if len(source) < 256 and Path(source).is_file() else source

    def example(self) -> str:
        """Return a text to check shapes with."""
        return "a text"


class Grams(nn.Module):
    """Sums of each five neighbouring bytes' vectors, rectified, and their maximum over the text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, 5, padding=4, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (B, D) of (B, T, D); padding, whose vectors are zeros, never beats a rectified value."""
        return self.convolution(vectors.transpose(1, 2)).relu().amax(2)


@transfer.register("backbone", "byte_grams")
class ByteGrams(transfer.Backbone):
    """Max-pooled convolutions over bytes, two stages: embedding and grams.

    Args:
        width: Width of a byte's vector and of the features.
    """

    field = "text"  # what it consumes: any dataset with that field fits

    def __init__(self, *, width: Annotated[int, Field(ge=1)] = 128) -> None:
        super().__init__({"embedding": nn.Embedding(BYTES + 1, width, padding_idx=BYTES), "grams": Grams(width)})
        self.width = width

    @property
    def features(self) -> transfer.FeatureSpec:
        """A vector per text."""
        return transfer.FeatureSpec("vector", self.width)

    @property
    def preprocessing(self) -> transfer.Preprocessing:
        """Bytes."""
        return BytesOf()

    # A backbone with weights of its own reads them in load_pretrained(); one that must see the training
    # texts first (a vocabulary) does so in from_data(), and keeps what it learned by assets() and from_assets().


if __name__ == "__main__":
    config: dict[str, Any] = {
        "data": {"name": "mini_reviews"},
        "backbone": {"name": "byte_grams", "width": 128},
        "train": {"optimizer": {"name": "adam", "lr": 3e-3}, "phases": [{"epochs": 8}]},
    }
    run = transfer.run(config)
    print(run.summary["test"], list(transfer.predict(run.folder, ["worth every minute"])), run.folder)
