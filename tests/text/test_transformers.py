"""Every contract on small random checkpoints, saved and loaded like pretrained ones."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transfer_transformers import Transformers
from transformers import AlbertConfig, AutoModel, BertConfig, DistilBertConfig, PreTrainedTokenizerFast

import transfer
from transfer.testing import contracts
from transfer.testing.cases import TEXTS

FOLDERS = ("bert", "distilbert", "albert")
OPTIONS = [
    {"model": "bert"},
    {"model": "bert", "readout": "pooler", "max_length": 5},
    {"model": "distilbert", "readout": "sequence"},
    {"model": "albert", "readout": "mean"},
]
CONTRACTS = contracts("transfer-transformers", {"transformers": OPTIONS})


@pytest.fixture(scope="module", autouse=True)
def _checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in TEXTS for word in text.split()}), "##s"]
    tokenizer = Tokenizer(models.WordPiece({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    size = {"vocab_size": len(tokens), "max_position_embeddings": 24, "pad_token_id": 0}
    wide = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    configs = (
        BertConfig(**size, **wide),
        DistilBertConfig(**size, dim=8, n_layers=2, n_heads=2, hidden_dim=16),
        AlbertConfig(**size, **wide, embedding_size=6),
    )
    for name, config in zip(FOLDERS, configs, strict=True):
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **special).save_pretrained(
            folder / name
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.mark.parametrize("contract", CONTRACTS, ids=str)
def test_contract(contract):
    contract.check()


@pytest.mark.parametrize("folder", FOLDERS)
def test_states_match_transformers_model(folder):
    backbone = Transformers(model=folder, readout="sequence")
    loaded = backbone.load_pretrained()
    assert loaded == {"weights": folder, "tensors": len(backbone.stages.state_dict()), "left_out": []}
    tokens, mask = backbone.preprocessing.collate(backbone.preprocessing.encode(TEXTS))
    assert tokens[1].tolist()[0] == 2
    assert not mask.all()
    with torch.no_grad():
        states, _ = backbone.eval()((tokens, mask))
        expected = AutoModel.from_pretrained(folder).eval()(input_ids=tokens, attention_mask=mask.long())
    torch.testing.assert_close(states[mask], expected.last_hidden_state[mask])


def test_stages_are_model_layers():
    assert Transformers(model="bert").stage_names == ("embeddings", "layer.0", "layer.1", "readout")
    assert Transformers(model="albert").stage_names == ("encoder", "readout")


def test_run_predicts_without_checkpoint(tmp_path, monkeypatch):
    config = {
        "data": {"name": "mini_reviews"},
        "backbone": {"name": "transformers", "model": "bert", "readout": "mean", "max_length": 12},
        "train": {"batch_size": 64, "phases": [{"epochs": 1, "freeze": ["embeddings", "layer"]}]},
    }
    _, parts = transfer.check(config)
    assert parts.phases[0].frozen.stages == {"embeddings", "layer.0", "layer.1"}
    run = transfer.run(config, output=tmp_path, quick=True)
    described = dict(transfer.check(config)[1].backbone.preprocessing.describe())
    assert (described["tokenizer"], described["max_length"]) == ("WordPiece", 12)
    monkeypatch.chdir(tmp_path)
    (prediction,) = transfer.predict(run.folder, ["a warm , funny film"], explain=True)
    assert prediction["label"] in ("positive", "negative")
    assert [piece["piece"] for piece in prediction["explanation"]["pieces"]] == ["a ", "warm ", ", ", "funny ", "film"]
    with pytest.raises(transfer.DataError, match="there is no such file"):
        list(transfer.predict(run.folder, [Path("reviews/absent.txt")]))


@pytest.mark.parametrize("change", ["prefix", "missing", "layer too many", "head"])
def test_every_tensor_of_a_checkpoint_is_accounted_for(change, tmp_path):
    folder = shutil.copytree("bert", tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    layer = "encoder.layer.1.output.dense.weight"
    if change == "prefix":
        tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    elif change == "missing":
        del tensors[layer]
    else:
        name = {"head": "cls.predictions.bias", "layer too many": layer.replace("1", "2", 1)}[change]
        tensors[name] = torch.zeros(8, 16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    backbone = Transformers(model=str(folder))
    if change == "head":
        assert backbone.load_pretrained()["left_out"] == ["cls.predictions.bias"]
        return
    with pytest.raises(transfer.WeightsError, match="lack|does not have"):
        backbone.load_pretrained()


def test_backbone_starts_from_an_earlier_run(tmp_path, monkeypatch):
    config = {
        "data": {"name": "mini_reviews", "limit": 8},
        "backbone": {"name": "transformers", "model": "bert", "max_length": 12},
        "train": {"phases": [{"epochs": 1}], "report": False},
    }
    first = transfer.run(config, output=tmp_path).folder
    monkeypatch.chdir(tmp_path)  # the checkpoint is not needed
    config["backbone"]["weights"] = str(first)
    config["train"]["phases"][0]["freeze"] = "backbone"
    run = transfer.run(config, output=tmp_path)
    before, after = (transfer.saved_backbone(folder).tensors()[0] for folder in (first, run.folder))
    assert run.summary["pretrained"]["tensors"] == len(before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_encoded_texts_are_compact_and_complete():
    preprocessing = Transformers(model="bert").preprocessing
    texts = [TEXTS[index % len(TEXTS)] for index in range(3000)]
    encoded = preprocessing.encode(texts)
    assert len(encoded) == 3000
    assert encoded.indices.dtype == "int32"
    expected = [encoding.ids for encoding in preprocessing.tokenizer.encode_batch(texts)]
    assert [tokens.tolist() for tokens in encoded] == expected
    assert preprocessing.lengths(encoded).tolist() == [len(ids) for ids in expected]
    tokens, mask = preprocessing.collate(encoded[:5])
    assert (tokens[~mask] == 0).all()
    assert tokens[0][mask[0]].tolist() == expected[0]


def test_pair_of_texts_is_encoded_as_in_pretraining():
    preprocessing = Transformers(model="bert").preprocessing
    first, second = TEXTS[:2]
    (pair,) = preprocessing.encode([f"{first} [SEP] {second}"])
    assert pair.tolist() == preprocessing.tokenizer.encode(first, second).ids


def test_mostly_unknown_tokens_are_reported():
    preprocessing = Transformers(model="bert").preprocessing
    assert preprocessing.warning(TEXTS) is None
    assert "100% of the tokens" in preprocessing.warning(["жизнь хороша"])


def test_preview_shows_tokens_and_truncation():
    config = {
        "data": {"name": "mini_reviews", "limit": 20},
        "backbone": {"name": "transformers", "model": "bert", "max_length": 8},
        "train": {"batch_size": 4},
    }
    content = transfer.preview_batch(config).content
    assert "[CLS]" in content
    assert "[more tokens cut]" in content
    assert "8 tokens at most" in content


def test_missing_model_and_pooler_are_reported(monkeypatch, tmp_path):
    with pytest.raises(transfer.WeightsError, match="there is no model './absent'"):
        Transformers(model="./absent")
    with pytest.raises(transfer.WeightsError, match="has no pooler"):
        Transformers(model="distilbert", readout="pooler")
