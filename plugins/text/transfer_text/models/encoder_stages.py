"""Stages of the encoders of Hugging Face transformers: one per layer.

A stage passes on the states of all tokens, float (B, T, D), and the mask, bool (B, T), False at padding. The library
also gives its layers tensors that are the same for all of them: attention masks, rotary tables, relative positions.
These depend only on the mask and the length, so every stage computes them, and the feature cache need not store them.
Parameters that several layers use belong to the stage ``embeddings``; the other stages refer to them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transfer import find_chain

States = tuple[Tensor, Tensor]
"""The states of all tokens, float (B, T, D), and the mask, bool (B, T), False at padding."""


def encoder_stages(network: nn.Module) -> dict[str, nn.Module]:
    """Return the stages of an encoder whose layers form a chain, up to its last layer. They share its modules."""
    kind = _side_inputs(network)
    embeddings, projection, norm = _ends(network)
    layers = _layers(network)
    assert embeddings is not None
    assert layers is not None
    first = EncoderEmbeddings(embeddings, projection, kind.shared_modules(network), masked=kind.masks_embeddings)
    stages: dict[str, nn.Module] = {"embeddings": first}
    for number, layer in enumerate(layers):
        last = norm if number == len(layers) - 1 else None
        stages[f"layer.{number}"] = EncoderLayer(layer, kind(network, layer, first.shared), last)
    return stages


def is_chain(network: nn.Module) -> bool:
    """Return whether the layers of a model on the meta device form a chain.

    In a chain, each layer receives the tensor that the previous one returned. Apart from it, the layers of an
    architecture without known side inputs may receive only a mask. Tokens must be visible in both directions.
    """
    (embeddings, projection, norm), layers = _ends(network), _layers(network)
    if layers is None or embeddings is None or getattr(getattr(network, "encoder", None), "conv", None) is not None:
        return False
    if any(getattr(module, "is_causal", False) for module in layers.modules()):
        return False
    named = {"embeddings": embeddings, "projection": projection, **dict(layers.named_children()), "norm": norm}
    links = {name: module for name, module in named.items() if module is not None}
    kind = _side_inputs(network)
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long, device="meta")}
    if kind is RelativePositions:  # without a mask, the model looks for padding among the tokens
        inputs["attention_mask"] = inputs["input_ids"]
    try:
        names = find_chain(
            links, lambda: network.eval()(**inputs).last_hidden_state, side_inputs=kind is not SideInputs
        )
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError):
        return False  # the model cannot be run on the meta device
    return names is not None and len(names) == len(links)


class EncoderEmbeddings(nn.Module):
    """The first stage: embeddings of the tokens, and the parameters that several layers share.

    Args:
        embeddings: Module of the library that embeds tokens.
        projection: Layer from the width of the embeddings to that of the states; None if they are equal.
        shared: Modules that several layers use, by name.
        masked: Whether the embeddings take the mask, to set padding to zero.
    """

    def __init__(
        self, embeddings: nn.Module, projection: nn.Module | None, shared: Mapping[str, nn.Module], *, masked: bool
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.projection = nn.Identity() if projection is None else projection
        self.shared = nn.ModuleDict(shared)
        self.masked = masked

    def forward(self, batch: States) -> States:
        """Embed token ids, int64 (B, T)."""
        tokens, mask = batch
        states = self.embeddings(tokens, mask=mask) if self.masked else self.embeddings(tokens)
        return self.projection(states), mask


class EncoderLayer(nn.Module):
    """A layer of an encoder.

    Args:
        layer: Layer of the library.
        side_inputs: Computes the further arguments of the layer.
        norm: Normalization after the last layer; None after the others.
    """

    def __init__(self, layer: nn.Module, side_inputs: SideInputs, norm: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer
        self.side_inputs = side_inputs
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, batch: States) -> States:
        """Run the layer."""
        states, mask = batch
        output = self.layer(states, **self.side_inputs(states, mask))
        states = output[0] if isinstance(output, tuple) else output
        return self.norm(states), mask


class SideInputs(nn.Module):
    """Arguments of a layer beside the states. For BERT and its relatives, this is only the attention mask.

    Args:
        network: Complete model.
        layer: Layer that receives the arguments.
        shared: Modules that several layers use, by name.
    """

    masks_embeddings = False
    """Whether the embeddings take the mask, too."""

    def __init__(self, network: nn.Module, layer: nn.Module, shared: nn.ModuleDict) -> None:
        super().__init__()
        # In a tuple, because a submodule would be saved and frozen with this stage, too.
        self._shared = (shared,)

    @staticmethod
    def shared_modules(network: nn.Module) -> dict[str, nn.Module]:
        """Return the modules with parameters that several layers use."""
        return {}

    def forward(self, states: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return the arguments by name: the mask, (B, 1, 1, T)."""
        return {"attention_mask": _additive(mask[:, None, None, :], states)}


class RotaryTables(SideInputs):
    """Side inputs of ModernBERT, EuroBERT and others: rotary tables, and for some layers the mask of a window."""

    def __init__(self, network: nn.Module, layer: nn.Module, shared: nn.ModuleDict) -> None:
        super().__init__(network, layer, shared)
        model: Any = network
        self.rotary: nn.Module = copy.deepcopy(model.rotary_emb)  # it has tables, but no parameters
        self.kind = getattr(layer, "attention_type", None)
        self.window = model.config.sliding_window if self.kind == "sliding_attention" else None

    def forward(self, states: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return the mask, (B, 1, 1, T) or (B, 1, T, T) with a window, and the two tables, (1, T, D / heads)."""
        positions = torch.arange(states.shape[1], device=states.device)
        visible = mask[:, None, None, :]
        if self.window is not None:
            visible = visible & ((positions[:, None] - positions).abs() <= self.window)
        kind = () if self.kind is None else (self.kind,)
        tables = self.rotary(states, positions[None], *kind)
        return {"attention_mask": _additive(visible, states), "position_embeddings": tables}


class RelativePositions(SideInputs):
    """Side inputs of DeBERTa v2 and v3: relative positions, and their embeddings, which all layers share."""

    masks_embeddings = True

    def __init__(self, network: nn.Module, layer: nn.Module, shared: nn.ModuleDict) -> None:
        from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

        super().__init__(network, layer, shared)
        encoder: Any = network.encoder
        self.buckets, self.max_position = encoder.position_buckets, encoder.max_relative_positions
        self.build = build_relative_position

    @staticmethod
    def shared_modules(network: nn.Module) -> dict[str, nn.Module]:
        """Return the embeddings of relative positions, and their normalization if there is one."""
        encoder: Any = network.encoder
        norm = {"norm": encoder.LayerNorm} if "layer_norm" in encoder.norm_rel_ebd else {}
        return {"relative": encoder.rel_embeddings, **norm}

    def forward(self, states: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return the mask of pairs, bool (B, 1, T, T), the relative positions, (1, T, T), and their embeddings."""
        (shared,) = self._shared
        embeddings: Any = shared["relative"].weight
        return {
            "attention_mask": (mask[:, :, None] & mask[:, None, :])[:, None],
            "relative_pos": self.build(states, states, bucket_size=self.buckets, max_position=self.max_position),
            "rel_embeddings": shared["norm"](embeddings) if "norm" in shared else embeddings,
        }


class PositionBias(SideInputs):
    """Side inputs of MPNet: the mask, and a bias for each relative position, which all layers share."""

    def __init__(self, network: nn.Module, layer: nn.Module, shared: nn.ModuleDict) -> None:
        super().__init__(network, layer, shared)
        model: Any = network
        self.bucket = model.encoder.relative_position_bucket
        self.buckets: int = model.config.relative_attention_num_buckets

    @staticmethod
    def shared_modules(network: nn.Module) -> dict[str, nn.Module]:
        """Return the embedding of the biases."""
        encoder: Any = network.encoder
        return {"relative_attention_bias": encoder.relative_attention_bias}

    def forward(self, states: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return the mask, (B, 1, 1, T), and the bias, (B, heads, T, T)."""
        positions = torch.arange(states.shape[1], device=states.device)
        buckets = self.bucket(positions[None, :] - positions[:, None], num_buckets=self.buckets)
        bias = self._shared[0]["relative_attention_bias"](buckets).permute(2, 0, 1)
        return {**super().forward(states, mask), "position_bias": bias[None].expand(len(states), -1, -1, -1)}


def _side_inputs(network: nn.Module) -> type[SideInputs]:
    """Return the class for the architecture of a model."""
    encoder = getattr(network, "encoder", None)
    if hasattr(network, "rotary_emb"):
        return RotaryTables
    if hasattr(encoder, "rel_embeddings"):
        return RelativePositions
    return PositionBias if hasattr(encoder, "relative_attention_bias") else SideInputs


def _ends(network: nn.Module) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
    """Return what surrounds the layers: embeddings, the projection after them, and the normalization at the end."""
    embeddings = getattr(network, "embeddings", None) or getattr(network, "embed_tokens", None)
    norm = getattr(network, "final_norm", None) or getattr(network, "norm", None)
    return embeddings, getattr(network, "embeddings_project", None), norm


def _layers(network: nn.Module) -> nn.ModuleList | None:
    count = getattr(network.config, "num_hidden_layers", 0)  # absent if the model has parts of its own
    return next((m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)


def _additive(visible: Tensor, states: Tensor) -> Tensor:
    """Return an additive attention mask: 0 at visible tokens, otherwise the most negative value."""
    bias = torch.zeros(visible.shape, dtype=states.dtype, device=states.device)
    return bias.masked_fill(~visible, torch.finfo(states.dtype).min)
