"""A custom backbone in a script: a convolutional network over bytes. Run: python custom_backbone.py."""

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
    """Encode texts as byte values. There is no vocabulary to learn or to save."""

    encode_once = True  # encoded texts are small: keep them in memory, and batch texts of similar length together

    def encode(self, values: Sequence[str]) -> list[Tensor]:
        """Return an int64 tensor (T,) of byte values for each text."""
        if not all(values):
            raise ValueError("the text is empty")
        return [torch.tensor(list(text.lower().encode()[:512])) for text in values]

    def collate(self, encoded: Sequence[Tensor]) -> Tensor:
        """Return int64 (B, T), padded with BYTES, one more than the largest byte value."""
        return nn.utils.rnn.pad_sequence(list(encoded), batch_first=True, padding_value=BYTES)

    def length(self, encoded: Tensor) -> int:
        """Return the number of bytes of an encoded text."""
        return len(encoded)

    def read(self, source: str) -> str:
        """Return the content of the file, or the text itself if there is no such file."""
        return Path(source).read_text(encoding="utf-8") if len(source) < 256 and Path(source).is_file() else source

    def read_bytes(self, content: bytes) -> str:
        """Return a text from a Python list, a line of standard input or a request: never a path."""
        return content.decode()

    def example(self) -> str:
        """Return a text for checking shapes."""
        return "a text"


class Grams(nn.Module):
    """Convolution over five adjacent byte vectors, ReLU, and the maximum over the text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, 5, padding=4, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D).

        Padding has zero vectors and the convolution has no bias, so padding never exceeds a ReLU output.
        """
        return self.convolution(vectors.transpose(1, 2)).relu().amax(2)


@transfer.register("backbone", "byte_grams")
class ByteGrams(transfer.Backbone):
    """Max-pooled convolution over bytes, with two stages: embedding and grams.

    Args:
        width: Size of the byte vectors and of the features.
    """

    field = "text"  # the input: any dataset with this field fits

    def __init__(self, *, width: Annotated[int, Field(ge=1)] = 128) -> None:
        super().__init__({"embedding": nn.Embedding(BYTES + 1, width, padding_idx=BYTES), "grams": Grams(width)})
        self.width = width

    @property
    def features(self) -> transfer.FeatureSpec:
        """One vector per text."""
        return transfer.FeatureSpec("vector", self.width)

    @property
    def preprocessing(self) -> transfer.Preprocessing:
        """Encoding of texts as bytes."""
        return BytesOf()

    # A backbone with pretrained weights reads them in load_pretrained(). A backbone that needs the training texts
    # first, for a vocabulary, implements from_data(), and saves and restores the result by assets() and from_assets().


if __name__ == "__main__":
    config: dict[str, Any] = {
        "data": {"name": "mini_reviews"},
        "backbone": {"name": "byte_grams", "width": 128},
        "train": {"optimizer": {"name": "adam", "lr": 3e-3}, "phases": [{"epochs": 8}]},
    }
    run = transfer.run(config)
    print(run.summary["test"], list(transfer.predict(run.folder, ["worth every minute"])), run.folder)
