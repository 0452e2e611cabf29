"""BiLSTM: a recurrent network over word vectors that reads the text from both ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from transfer import ConfigError, FeatureSpec
from transfer_text.encoding.encoded_texts import Truncation
from transfer_text.encoding.vocabulary import MIN_FREQUENCY, PADDING, Vocabulary
from transfer_text.models.embedding import Count, TextBackbone, Unknown, in_batch_terms, look_up

Pooling = Literal["first_last", "last_states", "max", "mean"]
Readout = Literal["first_last", "last_states", "max", "mean", "sequence"]
TunableVariant = Literal["rand", "static", "nonstatic"]


class BiLSTM(TextBackbone):
    """A bidirectional LSTM over word vectors (Graves and Schmidhuber 2005, Neural Networks 18; torch's equations).

    Its features are as ``readout`` says: float (B, 4 H) of ``first_last``, (B, 2 H) of the others that are vectors,
    (B, T, 2 H) with its mask of ``sequence``.

    Stages: ``embedding``, ``lstm``, and ``readout`` where the features are a vector.

    Args:
        variant: ``rand``: random vectors, tuned. ``static``: pretrained ones, frozen. ``nonstatic``: pretrained ones,
            tuned. null: static with vectors, else rand.
        layers: Number of layers; each reads what both directions of the one below return.
        hidden_size: H, the size of the state of each direction.
        dropout: Share of what leaves each layer but the last that is dropped in training.
        readout: ``first_last``: outputs at the first and at the last word. ``last_states``: each direction's state
            after it has read everything. ``max``, ``mean``: over all words. ``sequence``: all outputs, for a head that
            takes a sequence (attention).
    """

    def __init__(
        self,
        vocabulary: Vocabulary | None = None,
        width: int | None = None,
        *,
        variant: TunableVariant | None = None,
        vectors: str | None = None,
        dimensions: Count | None = None,
        unknown: Unknown = "random",
        vectors_vocabulary: bool = False,
        layers: Count = 2,
        hidden_size: Count = 100,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        readout: Readout = "first_last",
        tokenizer: str = "glove",
        min_frequency: Count = MIN_FREQUENCY,
        max_size: Count | None = None,
        max_length: Count | None = 512,
        truncation: Truncation = "head",
    ) -> None:
        if dropout and layers == 1:
            raise ConfigError(
                f"dropout of {dropout:g} is between layers, and there is one",
                fix="set the head's dropout, or layers: 2",
            )

        def above(dimensions: int) -> Mapping[str, nn.Module]:
            lstm = BidirectionalLSTM(dimensions, hidden_size, layers, dropout=dropout, bidirectional=True)
            return {"lstm": lstm} if readout == "sequence" else {"lstm": lstm, "readout": ReadOut(readout)}

        states = 2 * hidden_size
        super().__init__(
            vocabulary,
            width,
            above,
            FeatureSpec("sequence", states)
            if readout == "sequence"
            else FeatureSpec("vector", 2 * states if readout == "first_last" else states),
            variant=variant,
            vectors=vectors,
            dimensions=dimensions,
            unknown=unknown,
            vectors_vocabulary=vectors_vocabulary,
            tokenizer=tokenizer,
            max_length=max_length,
            truncation=truncation,
        )


class BidirectionalLSTM(nn.LSTM):
    """Torch's LSTM, with its parameters and their names, over texts that end in padding."""

    def forward(self, words: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the outputs, float (B, T, 2 H), zero at padding, and the mask, bool (B, T).

        Args:
            words: A table of vectors, float (U, D), and rows of it, int64 (B, T), 0 at padding.
        """
        table, rows = words
        mask = rows != PADDING
        if rows.device.type == "cuda":  # where cuDNN takes packed sequences as they are
            packed = pack_padded_sequence(
                look_up(table, rows), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False
            )
            states, _ = pad_packed_sequence(super().forward(packed)[0], batch_first=True, total_length=rows.shape[1])
            return states, mask
        return self._from_both_ends(table, rows, mask), mask

    def _from_both_ends(self, table: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        """Turn each text around within its own length for the second direction, so that padding is last in both.

        Packed sequences do the same on the CPU, but step by step, at a sixth of the speed.
        """
        steps = torch.arange(rows.shape[1], device=rows.device)
        lengths = mask.sum(1)
        turned = torch.where(mask, lengths[:, None] - 1 - steps, steps)  # its own inverse
        ahead, back = look_up(table, rows.t()), look_up(table, rows.gather(1, turned).t())  # (T, B, D)
        # In the rows of (T B, ...), where a step of a text is found.
        texts = rows.shape[0]  # len() would fix the number in an exported graph
        places = (turned * texts + torch.arange(texts, device=rows.device)[:, None]).t()
        for layer in range(self.num_layers):
            if layer:
                ahead = functional.dropout(ahead, self.dropout, self.training)
                back = _take(ahead, places)
            second = _take(self._run(back, f"l{layer}_reverse"), places)
            ahead = torch.cat([self._run(ahead, f"l{layer}"), second], dim=2)
        states = ahead.transpose(0, 1)
        if torch.is_grad_enabled() or not in_batch_terms(rows):
            return states * mask[:, :, None]
        first = int(lengths.min())  # texts of a batch are of like length: only their ends differ
        states[:, first:] *= mask[:, first:, None]
        return states

    def _run(self, inputs: Tensor, name: str) -> Tensor:
        """Run one direction of one layer, (T, B, D) -> (T, B, H)."""
        weights = [getattr(self, f"{kind}_{name}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        zeros = inputs.new_zeros(1, inputs.shape[1], self.hidden_size)
        outputs, _, _ = torch.lstm(inputs, (zeros, zeros), weights, True, 1, 0.0, self.training, False, False)
        return outputs


def _take(steps: Tensor, places: Tensor) -> Tensor:
    """Return steps (T, B, D) in another order of time, as places (T, B) among their T B rows say."""
    return functional.embedding(places, steps.flatten(0, 1))


class ReadOut(nn.Module):
    """From outputs at each word to one vector for the text.

    Args:
        kind: See :class:`BiLSTM`.
    """

    def __init__(self, kind: Pooling) -> None:
        super().__init__()
        self.kind: Pooling = kind

    def forward(self, sequence: tuple[Tensor, Tensor]) -> Tensor:
        """Return float (B, 2 H or 4 H) of outputs, float (B, T, 2 H), and their mask, bool (B, T)."""
        states, mask = sequence
        if self.kind == "max":
            return states.masked_fill(~mask[:, :, None], -torch.inf).amax(1)
        lengths = mask.sum(1)
        if self.kind == "mean":
            return (states * mask[:, :, None]).sum(1) / lengths[:, None]
        last = states[torch.arange(states.shape[0], device=states.device), lengths - 1]
        if self.kind == "first_last":
            return torch.cat([states[:, 0], last], dim=1)
        half = states.shape[2] // 2
        return torch.cat([last[:, :half], states[:, 0, half:]], dim=1)  # the second direction ends at the first word
