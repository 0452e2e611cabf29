"""BiLSTM: a bidirectional recurrent network over word vectors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from transfer import ConfigError, FeatureSpec
from transfer_text.encoding.encoded_texts import Truncation
from transfer_text.encoding.vocabulary import MIN_FREQUENCY, PADDING, Vocabulary
from transfer_text.models.embedding import Count, TextBackbone, Unknown, is_recorded, look_up, use_batch_vocabulary

Pooling = Literal["first_last", "last_states", "max", "mean"]
Readout = Literal["first_last", "last_states", "max", "mean", "sequence"]
TunableVariant = Literal["rand", "static", "nonstatic"]


class BiLSTM(TextBackbone):
    """A bidirectional LSTM over word vectors (Graves and Schmidhuber 2005, Neural Networks 18; torch's equations).

    ``readout`` determines the features: float (B, 4 H) for ``first_last``, (B, 2 H) for the other vectors, and
    (B, T, 2 H) with a mask for ``sequence``.

    Stages: ``embedding``, ``lstm``, and ``readout`` if the features are a vector.

    Args:
        variant: ``rand``: random vectors, tuned. ``static``: pretrained vectors, frozen. ``nonstatic``: pretrained
            vectors, tuned. null: static if vectors are named, otherwise rand.
        layers: Number of layers. Each layer reads both directions of the layer below.
        hidden_size: Size of the hidden state of each direction, H.
        dropout: Probability of dropout between layers.
        readout: ``first_last``: outputs at the first and the last word. ``last_states``: final state of each direction.
            ``max``, ``mean``: pooled over all words. ``sequence``: all outputs, for a head that takes a sequence
            (attention).
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
        tokenizer: str = "auto",
        min_frequency: Count = MIN_FREQUENCY,
        max_size: Count | None = None,
        max_length: Count | None = 512,
        truncation: Truncation = "head",
    ) -> None:
        if dropout and layers == 1:
            raise ConfigError(
                f"dropout {dropout:g} applies between layers, but layers is 1",
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
    """Torch's LSTM over padded texts; parameters have the same names as in ``nn.LSTM``."""

    def flatten_parameters(self) -> None:
        """Store the weights of each direction of each layer on a GPU as one piece of memory.

        cuDNN needs the weights of a call like this, and each call computes one direction of one layer. ``nn.LSTM``
        calls this method in its constructor and after a move to another device.
        """
        weights: list[Any] = [*self._flat_weights]
        cudnn: Any = torch.backends.cudnn
        if not all(isinstance(w, Tensor) and w.is_cuda and cudnn.is_acceptable(w) for w in weights):
            return
        with torch.cuda.device(weights[0].device), torch.no_grad():
            for group in self.all_weights:
                sizes = (len(group), group[0].shape[1], cudnn.rnn.get_cudnn_mode(self.mode), self.hidden_size)
                # No projection, one layer, time first, one direction.
                torch._cudnn_rnn_flatten_weight([*group], *sizes, 0, 1, False, False)

    def forward(self, words: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the outputs, float (B, T, 2 H), zero at padding, and the mask, bool (B, T).

        Both directions run over padded texts. For the second one each text is reversed within its own length, so that
        padding is last in both. Packed sequences give the same result, but they run step by step on the CPU, at a sixth
        of the speed, and on a GPU their lengths must be read from the device, which empties its queue.

        Args:
            words: Table of vectors, float (U, D), or vectors of all words in order, float (B, T, D); and the row of
                each word in a table, int64 (B, T), 0 at padding.
        """
        vectors, rows = words
        mask = rows != PADDING
        steps = torch.arange(rows.shape[1], device=rows.device)
        lengths = mask.sum(1)
        reversed_steps = torch.where(mask, lengths[:, None] - 1 - steps, steps)  # this permutation is its own inverse
        # Row in (T B, ...) of each step of each text.
        texts = rows.shape[0]  # len() would be a constant in an exported graph
        positions = (reversed_steps * texts + torch.arange(texts, device=rows.device)[:, None]).t()
        if vectors.dim() == 3:
            ahead = vectors.transpose(0, 1).contiguous()  # (T, B, D)
            back = _take(ahead, positions)
        else:
            ahead, back = look_up(vectors, rows.t()), look_up(vectors, rows.gather(1, reversed_steps).t())
        for layer in range(self.num_layers):
            if layer:
                ahead = functional.dropout(ahead, self.dropout, self.training)
                back = _take(ahead, positions)
            zeros = ahead.new_zeros(1, texts, self.hidden_size)
            second = _take(self._run(back, zeros, f"l{layer}_reverse"), positions)
            ahead = torch.cat([self._run(ahead, zeros, f"l{layer}"), second], dim=2)
        states = ahead.transpose(0, 1)
        if torch.is_grad_enabled() or not use_batch_vocabulary(rows):
            return states * mask[:, :, None], mask
        first = int(lengths.min())  # texts of a batch have similar lengths: only the ends contain padding
        states[:, first:] *= mask[:, first:, None]
        return states, mask

    def _run(self, inputs: Tensor, zeros: Tensor, name: str) -> Tensor:
        """Run one direction of one layer, (T, B, D) -> (T, B, H), from a state of zeros (1, B, H)."""
        weights = [getattr(self, f"{kind}_{name}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        with _supported_precision(inputs.device):
            outputs, _, _ = torch.lstm(inputs, (zeros, zeros), weights, True, 1, 0.0, self.training, False, False)
        return outputs


def _supported_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return the context of an LSTM. Without bf16 instructions of the CPU, oneDNN's LSTM exists in fp32 only."""
    if device.type != "cpu" or is_recorded() or _has_bf16_lstm():
        return nullcontext()
    return torch.autocast("cpu", enabled=False)


@functools.cache
def _has_bf16_lstm() -> bool:
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not has_onednn or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _take(steps: Tensor, positions: Tensor) -> Tensor:
    """Gather steps (T, B, D) by positions (T, B), row numbers of (T B, D), a permutation that is its own inverse."""
    if torch.is_grad_enabled() and not is_recorded():
        taken: Tensor = _Permutation.apply(steps, positions)
        return taken
    return functional.embedding(positions, steps.flatten(0, 1))


class _Permutation(torch.autograd.Function):
    """A gather by a permutation that is its own inverse: the backward pass is the same gather, not a sorted sum."""

    @staticmethod
    def forward(ctx: Any, steps: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        return functional.embedding(positions, steps.flatten(0, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        return functional.embedding(positions, gradient.flatten(0, 1)), None


class ReadOut(nn.Module):
    """Pooling of the outputs at each word into one vector for the text.

    Args:
        kind: ``first_last``, ``last_states``, ``max`` or ``mean``, as in :class:`BiLSTM`.
    """

    def __init__(self, kind: Pooling) -> None:
        super().__init__()
        self.kind: Pooling = kind

    def forward(self, sequence: tuple[Tensor, Tensor]) -> Tensor:
        """Pool outputs, float (B, T, 2 H), with their mask, bool (B, T), into float (B, 2 H or 4 H)."""
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
