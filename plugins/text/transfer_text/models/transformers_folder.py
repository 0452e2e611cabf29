"""Folders that ``from_pretrained`` of transformers and sentence-transformers load, written from a trained encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from transfer import ForeignFolder

POOLINGS = {"first": "cls", "mean": "mean", "max": "max"}
"""The pooling of sentence-transformers for each readout that has one."""


def pretrained_folder(
    config: Any,
    tokenizer: Any,
    padding: int,
    *,
    readout: str,
    normalize: bool,
    fill: Callable[[nn.Module], None],
    head: nn.Linear | None,
    classes: Sequence[str],
) -> ForeignFolder:
    """Return the folder of an encoder.

    It contains the head only with the readout ``pooler``: the models for classification of transformers have other
    layers between the states and the classes.

    Args:
        config: Configuration of the library.
        tokenizer: Tokenizer with truncation enabled.
        padding: Id of the padding token.
        readout: Readout of the backbone.
        normalize: Whether vectors are scaled to length 1.
        fill: Function that copies the trained weights into a model of the library without a head.
        head: Head of the model if it is one linear layer, otherwise None.
        classes: Names of the classes; empty if there are none.
    """
    labels = dict(enumerate(classes)) if head is not None and len(classes) == head.out_features else {}
    model_class = "AutoModel"
    if head is not None and readout == "pooler":
        model_class = "AutoModelForSequenceClassification"
    max_length = tokenizer.truncation["max_length"]
    pooling = POOLINGS.get(readout)

    def write(folder: Path) -> None:
        import transformers

        # Without the path of the model on this machine.
        options = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        if model_class != "AutoModel":
            assert head is not None
            options |= {"num_labels": head.out_features}
            if labels:
                options |= {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
        network = getattr(transformers, model_class).from_config(transformers.AutoConfig.for_model(**options))
        fill(network if model_class == "AutoModel" else network.base_model)
        if model_class != "AutoModel":
            assert head is not None
            network.classifier.load_state_dict(head.state_dict())
        network.save_pretrained(folder)
        tokens = {"pad_token": tokenizer.id_to_token(padding), "unk_token": getattr(tokenizer.model, "unk_token", None)}
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            model_max_length=max_length,
            # Stages receive no token types, and some architectures have none.
            model_input_names=["input_ids", "attention_mask"],
            **{name: token for name, token in tokens.items() if token is not None},
        ).save_pretrained(folder)
        if pooling is not None:
            for name, content in _sentence_files(pooling, config.hidden_size, max_length, normalize=normalize).items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")

    files = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
    if pooling is not None:
        files += _sentence_files(pooling, config.hidden_size, max_length, normalize=normalize)
    result = "logits" if model_class != "AutoModel" else _RESULTS[readout]
    if normalize:
        result = f"torch.nn.functional.normalize({result})"
    code = _CODE.format(model_class=model_class, result=result)
    usage = _SENTENCES if pooling is not None else _USAGE.format(model_class=model_class)
    return ForeignFolder("transformers", files, write, code, usage, has_head=model_class != "AutoModel")


def _sentence_files(pooling: str, size: int, max_length: int, *, normalize: bool) -> Mapping[str, Any]:
    """Return the files of sentence-transformers by name, in the form that all its versions read."""
    kinds = {"0": ("Transformer", ""), "1": ("Pooling", "1_Pooling")}
    if normalize:
        kinds["2"] = ("Normalize", "2_Normalize")
    modules = [
        {"idx": int(name), "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for name, (kind, path) in kinds.items()
    ]
    modes = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max"}
    return {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": size,
            **{name: kind == pooling for name, kind in modes.items()},
        },
    }


_RESULTS = {
    "first": "states[:, 0]",
    "mean": "(states * mask).sum(1) / mask.sum(1)",
    "max": "states.masked_fill(mask == 0, torch.finfo(states.dtype).min).amax(1)",
    "pooler": "output.pooler_output",
    "sequence": "states * mask",
}
"""Features as an expression of the states (B, T, D) and the mask (B, T, 1), by readout."""
_CODE = """import torch
from transformers import {model_class}

model = {model_class}.from_pretrained(".").eval()


def run(inputs):
    tokens, mask = map(torch.from_numpy, inputs)
    with torch.no_grad():
        output = model(input_ids=tokens, attention_mask=mask.long())
        logits, states = output.get("logits"), output.get("last_hidden_state")
        mask = mask[:, :, None].float()
        return ({result}).numpy()
"""
_USAGE = """from transformers import AutoTokenizer, {model_class}

tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
model = {model_class}.from_pretrained("THIS FOLDER")"""
_SENTENCES = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("THIS FOLDER")
print(model.encode(["A TEXT"]))"""
