"""Text backbones from the encoders of Hugging Face transformers. They need the extra ``transformers``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field
from tokenizers import Tokenizer
from torch import Tensor, nn

from transfer import Backbone, FeatureSpec, FileSchema, ForeignFolder, PluginError, WeightsError
from transfer_text.interfaces import PAIR_SEPARATOR, EncodedTexts, TokenPreprocessing, render_tokens
from transfer_text.models.encoder_stages import States, encoder_stages, is_chain
from transfer_text.models.transformers_folder import pretrained_folder

Readout = Literal["first", "mean", "max", "pooler", "sequence"]
MAX_DEVIATION = 1e-4
"""Maximum difference between the stages and the model of the library, as a fraction of the largest state."""
BLOCK_TEXTS = 1024
"""Number of texts that are tokenized at a time."""


class _SavedReadout(FileSchema):
    """Content of ``readout.json`` in a model folder; version 0.1 wrote no such file, and read out the first token."""

    readout: Readout = "first"
    normalize: bool = False


class _SavedConfig(FileSchema):
    """Content of ``config.json`` in a model folder; transformers checks the other fields."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)

    model_type: str


class PiecePreprocessing(TokenPreprocessing):
    """Encode texts as token ids with the tokenizer of the model, including special tokens.

    A text with ``[SEP]`` between blanks is a pair of texts, which the tokenizer joins as in pretraining.

    Args:
        tokenizer: The tokenizer as JSON, with truncation enabled.
        padding: Id of the padding token.
    """

    def __init__(self, tokenizer: str, padding: int) -> None:
        self.tokenizer: Any = Tokenizer.from_str(tokenizer)
        self.padding = padding

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of one text, without special tokens."""
        tokens: list[str] = self.tokenizer.encode(text, add_special_tokens=False).tokens
        return tokens

    def encode(self, values: Sequence[str]) -> EncodedTexts:
        """Return the token ids of each text, int32 (number of tokens,), as a sequence over one flat array."""
        return EncodedTexts.of(self._blocks(values))

    def _blocks(self, values: Sequence[str]) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
        # In blocks: the library's result for a text takes a hundred times the memory of its token ids.
        encode = getattr(self.tokenizer, "encode_batch_fast", self.tokenizer.encode_batch)  # tokenizers >= 0.20
        for start in range(0, len(values), BLOCK_TEXTS):
            block = [_pair(text) for text in values[start : start + BLOCK_TEXTS]]
            ids = [encoding.ids for encoding in encode(block)]
            if not all(ids):
                raise ValueError("the text has no token")
            flat = np.fromiter(chain.from_iterable(ids), dtype=np.int32)
            yield flat, np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))

    def lengths(self, encoded: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each text, int64 (N,)."""
        return encoded.lengths if isinstance(encoded, EncodedTexts) else super().lengths(encoded)

    def collate(self, encoded: Sequence[npt.NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
        """Return the token ids, int64 (B, T), and the mask, bool (B, T), False at padding."""
        lengths = np.array([len(tokens) for tokens in encoded])
        tokens = np.full((len(encoded), lengths.max()), self.padding, dtype=np.int64)
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        tokens[mask] = np.concatenate(encoded)
        return torch.from_numpy(tokens), torch.from_numpy(mask)

    def count_unknown(self, texts: Sequence[str]) -> tuple[int, int]:
        """Return the numbers of unknown tokens and of all tokens in texts."""
        token = getattr(self.tokenizer.model, "unk_token", None)
        unknown = None if token is None else self.tokenizer.token_to_id(token)
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return sum(encoding.ids.count(unknown) for encoding in encodings), sum(map(len, encodings))

    def render_batch(
        self,
        inputs: tuple[Tensor, Tensor],
        values: Sequence[str],
        captions: Sequence[str],
        groups: Mapping[str, Sequence[int]],
    ) -> str:
        """Return the tokens of a batch as text, with special tokens and a mark at truncated texts."""
        shown = []
        for row, mask, value in zip(*inputs, values, strict=True):
            tokens = [self.tokenizer.id_to_token(index) for index in row[mask].tolist()]
            is_cut = bool(self.tokenizer.encode(*_as_arguments(_pair(value))).overflowing)
            shown.append([*tokens, "[more tokens cut]"] if is_cut else tokens)
        padding = 1 - float(inputs[1].float().mean())
        summary = f"{inputs[0].shape[1]} tokens at most; {padding:.0%} of the batch is padding"
        return f"{render_tokens(shown, captions, groups)}\n{summary}\n"

    def describe(self) -> Mapping[str, Any]:
        """Return the kind and size of the tokenizer, the maximum length and a digest of the tokenizer."""
        return {
            "tokenizer": type(self.tokenizer.model).__name__,
            "vocabulary_size": self.tokenizer.get_vocab_size(),
            "max_length": self.tokenizer.truncation["max_length"],
            "tokenizer_sha256": hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest(),
        }


def _pair(text: str) -> str | tuple[str, str]:
    """Return the two texts of a pair as a tuple, any other text unchanged."""
    first, separator, second = text.partition(PAIR_SEPARATOR)
    return (first, second) if separator else text


def _as_arguments(text: str | tuple[str, str]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


class Transformers(Backbone):
    """Any encoder of Hugging Face transformers (https://huggingface.co/docs/transformers), with its tokenizer.

    Stages are ``embeddings``, ``layer.0``, ``layer.1`` ... and ``readout``. If the layers do not form a chain, they are
    ``encoder`` and ``readout``.

    Args:
        model: Name of a model on the Hugging Face Hub, or a folder written by ``save_pretrained``.
        readout: ``first``: the state of the first token. ``mean``, ``max``: the mean or the maximum over all tokens.
            ``pooler``: the output of the model's pooler (BERT). ``sequence``: the states of all tokens, for a head that
            accepts a sequence. null: as the files of sentence-transformers with the model specify, otherwise ``mean``.
        normalize: Whether vectors are scaled to length 1; null: as the files of sentence-transformers specify.
        max_length: Maximum number of tokens of a text, longer texts are truncated; null: the maximum of the model.
        pretrained: Whether to load the weights. Otherwise only the architecture and the tokenizer are used.
    """

    field = "text"
    # Devlin et al. (2019) tune BERT at 2e-5 to 5e-5; small encoders need the upper end.
    fine_tuning_optimizer: ClassVar[Mapping[str, Any]] = {"name": "adamw", "lr": {"head": 1e-3, "backbone": 5e-5}}

    def __init__(
        self,
        saved: Mapping[str, str] | None = None,
        *,
        model: str,
        readout: Readout | None = None,
        normalize: bool | None = None,
        max_length: Annotated[int, Field(ge=3)] | None = None,
        pretrained: bool = True,
    ) -> None:
        from transformers import AutoConfig

        self._saved = _read(model, readout, max_length) if saved is None else saved
        own = _SavedReadout.model_validate_json(self._saved.get("readout.json", "{}"))
        self._readout: Readout = readout or own.readout
        is_vector = self._readout != "sequence"
        self._normalize = is_vector and (own.normalize if normalize is None else normalize)
        self._model, self._pretrained = model, pretrained
        self._config = AutoConfig.for_model(**_SavedConfig.model_validate_json(self._saved["config.json"]).model_dump())
        self._preprocessing = PiecePreprocessing(self._saved["tokenizer.json"], self._config.pad_token_id or 0)
        network = _create(self._config)
        if self._readout == "pooler" and getattr(network, "pooler", None) is None:
            raise WeightsError(f"{model} has no pooler", fix="choose another readout: first or mean")
        with torch.device("meta"):
            self._chain = is_chain(_create(self._config))
        super().__init__(self._split(network))

    def _split(self, network: nn.Module) -> dict[str, nn.Module]:
        pooler: nn.Module | None = getattr(network, "pooler", None)
        if pooler is not None:
            network.pooler = nn.Identity()  # SqueezeBERT calls it in any case
        stages = encoder_stages(network) if self._chain else {"encoder": _Encoder(network)}
        used = pooler if self._readout == "pooler" else None
        return {**stages, "readout": _ReadOut(self._readout, used, normalize=self._normalize)}

    @property
    def features(self) -> FeatureSpec:
        """One vector per text, or one per token with ``readout: sequence``."""
        return FeatureSpec("sequence" if self._readout == "sequence" else "vector", self._config.hidden_size)

    @property
    def preprocessing(self) -> PiecePreprocessing:
        """Encoding with the tokenizer of the model."""
        return self._preprocessing

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build the backbone from the configuration and the tokenizer in a model folder."""
        return cls(assets, **options)

    def assets(self) -> Mapping[str, str]:
        """Return the configuration, the tokenizer and the default of ``readout`` as JSON."""
        return dict(self._saved)

    def load_pretrained(self) -> Mapping[str, Any]:
        """Load the weights. Weights that do not cover all stages are an error.

        Returns:
            ``weights`` (the name), ``tensors`` (the number of loaded tensors) and ``left_out`` (the names of tensors
            that the encoder does not have, such as those of a head for pretraining).
        """
        if not self._pretrained:
            return {}
        from transformers import AutoModel

        try:
            network, report = AutoModel.from_pretrained(self._model, output_loading_info=True, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            raise WeightsError(f"the weights of {self._model} cannot be read: {error}", fix=_FIX) from error
        missing = [name for name in report["missing_keys"] if self._readout == "pooler" or "pooler" not in name]
        if missing:
            raise WeightsError(f"the weights of {self._model} lack {', '.join(sorted(missing)[:5])}", fix=_FIX)
        # Tensors of a head for pretraining are left out. Those of the encoder itself would be a part that is dropped.
        unexpected = sorted(report["unexpected_keys"])
        encoder = [name for name in unexpected if name.removeprefix(f"{network.base_model_prefix}.").startswith(_PARTS)]
        if encoder:
            raise WeightsError(f"the encoder of {self._model} does not have {', '.join(encoder[:5])}", fix=_FIX)
        # Submodule names must not contain dots; the state dict of the stages has the same keys.
        split = nn.Module()
        for name, stage in self._split(network).items():
            split.add_module(name.replace(".", "/"), stage)
        self.stages.load_state_dict(split.state_dict())
        self._require_same_states(network)
        return {"weights": self._model, "tensors": len(split.state_dict()), "left_out": unexpected}

    def _require_same_states(self, network: nn.Module) -> None:
        """Require that the stages compute what the library computes, which may change its layers between versions."""
        tokens = torch.arange(12).reshape(2, 6) % self._config.vocab_size
        mask = torch.arange(6) < torch.tensor([[6], [4]])
        encoder = self.stages[:-1].eval()
        with torch.no_grad():
            states, _ = encoder((tokens, mask))
            expected = network.eval()(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        deviation = float((states - expected)[mask].abs().max() / expected.abs().max())
        if not deviation <= MAX_DEVIATION:
            raise PluginError(
                f"the stages of {self._model} differ from the model of transformers {version('transformers')} by "
                f"{deviation:.1e} of its largest state: expected at most {MAX_DEVIATION:.0e}",
                fix="report it with the name of the model; another version of transformers may work",
            )

    @classmethod
    def is_pretrained(cls, options: Mapping[str, Any]) -> bool:
        """Return the option ``pretrained``."""
        return bool(options["pretrained"])

    @classmethod
    def without_pretrained(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the option that leaves the random weights."""
        return {"pretrained": False}

    def foreign_folders(self, head: nn.Linear | None, classes: Sequence[str]) -> Mapping[str, ForeignFolder]:
        """Return the folder that ``save_pretrained`` writes, with the pooling for sentence-transformers."""
        folder = pretrained_folder(
            self._config,
            self._preprocessing.tokenizer,
            self._preprocessing.padding,
            readout=self._readout,
            normalize=self._normalize,
            fill=self._fill,
            head=head,
            classes=classes,
        )
        return {"transformers": folder}

    def _fill(self, network: nn.Module) -> None:
        """Copy the weights of the stages into a model of the library."""
        pooler = getattr(network, "pooler", None)
        split = self._split(network)
        for stage, trained in zip(split.values(), self.stages, strict=True):
            stage.load_state_dict(trained.state_dict())
        if self._readout == "pooler":
            network.pooler = pooler  # type: ignore[assignment]


_PARTS = ("embeddings.", "encoder.", "layer.", "layers.", "transformer.")
"""Prefixes of the tensors of an encoder, without the prefix of its model."""
_FIX = "use a name on the Hugging Face Hub, or a folder written by save_pretrained"


def _read(model: str, readout: Readout | None, max_length: int | None) -> dict[str, str]:
    """Return the configuration, the tokenizer (with truncation) and the readout of a model as JSON."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise WeightsError(f"there is no model {model!r}: {str(error).splitlines()[0]}", fix=_FIX) from error
    own_length = (_json_file(model, "sentence_bert_config.json") or {}).get("max_seq_length")
    limits = (max_length or own_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(int(min(limit for limit in limits if limit)))
    return {
        "config.json": json.dumps(config.to_dict()),
        "tokenizer.json": backend.to_str(),
        "readout.json": json.dumps(_own_readout(model, readout)),
    }


_READOUTS: Mapping[str, Readout] = {
    "cls": "first",
    "cls_token": "first",
    "mean": "mean",
    "mean_tokens": "mean",
    "max": "max",
    "max_tokens": "max",
}
"""The readout for each pooling of sentence-transformers, in its present and its earlier spelling."""


def _own_readout(model: str, readout: Readout | None) -> dict[str, Any]:
    """Return the options ``readout`` and ``normalize`` that the files of sentence-transformers specify.

    Args:
        model: Name or folder of the model.
        readout: The option of the config, which takes precedence; null reads the files.

    Raises:
        WeightsError: The files specify a pooling that is not supported.
    """
    listed = _json_file(model, "modules.json") or []
    modules = {str(module.get("type", "")).rpartition(".")[2]: str(module.get("path")) for module in listed}
    normalize = "Normalize" in modules
    if readout is not None or "Pooling" not in modules:
        return {"readout": readout or "mean", "normalize": normalize}
    path = modules["Pooling"]
    pooling = (_json_file(model, f"{path}/config.json") if re.fullmatch(r"\w+", path) else None) or {}
    prefix = "pooling_mode_"
    names = sorted(key.removeprefix(prefix) for key, on in pooling.items() if key.startswith(prefix) and on is True)
    if "pooling_mode" in pooling:
        names = [str(pooling["pooling_mode"])]
    if len(names) != 1 or names[0] not in _READOUTS:
        raise WeightsError(
            f"the pooling of {model} is not supported: {', '.join(names) or 'none'}",
            fix="set a readout: first, mean or max",
        )
    return {"readout": _READOUTS[names[0]], "normalize": normalize}


def _json_file(model: str, name: str) -> Any:
    """Return the content of a JSON file of a model, or None if it has no such file."""
    from transformers.utils import cached_file

    try:
        path = cached_file(model, name)
    except OSError:
        return None
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"it is no JSON file: {error}", where=str(path), fix="repair or remove it") from error


def _create(config: Any) -> nn.Module:
    """Build a model with random weights on the current device.

    Constructors that compute with values of tensors fail on the meta device. They build on the CPU.
    """
    from transformers import AutoModel

    try:
        network: nn.Module = AutoModel.from_config(config)
    except (NotImplementedError, RuntimeError):
        if torch.get_default_device().type != "meta":
            raise
        with torch.device("cpu"):
            network = AutoModel.from_config(config)
        network.to("meta")
    return network


class _Encoder(nn.Module):
    """A complete encoder whose layers do not form a chain."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: States) -> States:
        tokens, mask = batch
        if mask.is_meta:
            # Many models test values of the tokens or of the mask, which the meta device does not have.
            return torch.empty(*tokens.shape, self.network.config.hidden_size, device="meta"), mask
        return self.network(input_ids=tokens, attention_mask=mask.long()).last_hidden_state, mask


class _ReadOut(nn.Module):
    def __init__(self, kind: Readout, pooler: nn.Module | None, *, normalize: bool) -> None:
        super().__init__()
        self.kind, self.pooler, self.normalize = kind, pooler, normalize

    def forward(self, batch: States) -> Any:
        states, mask = batch
        if self.kind == "sequence":
            return states, mask
        pooled = self._pooled(states, mask)
        return nn.functional.normalize(pooled, dim=1) if self.normalize else pooled

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.pooler is not None:
            vector: Tensor = self.pooler(states)
            return vector
        if self.kind == "mean":
            return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        if self.kind == "max":
            return states.masked_fill(~mask[:, :, None], torch.finfo(states.dtype).min).amax(1)
        return states[:, 0]
