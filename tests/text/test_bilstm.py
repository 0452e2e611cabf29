from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from transfer import ConfigError, FeatureSpec
from transfer.builtin.heads import Attention, Linear
from transfer.models.model import Model
from transfer_text.models import bilstm
from transfer_text.models.bilstm import BidirectionalLSTM, BiLSTM, ReadOut

TEXTS = ["a fine film with a fine cast", "it is n't a film", "so slow , so very slow , I left", "film"]
VARIANTS = ("rand", "static", "nonstatic")
READOUTS = ("first_last", "last_states", "max", "mean", "sequence")


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "own.txt").write_text("a 1 -1 2\nfine 0.5 1 1\nfilm -1 0.3 -0.4\nslow 2 1 0.1\n")
    return str(tmp_path / "own.txt")


def build(source: str | None = None, variant: str = "rand", **options: Any) -> BiLSTM:
    torch.manual_seed(0)
    vectors = None if variant == "rand" else source
    backbone = BiLSTM.from_data(TEXTS, variant=variant, vectors=vectors, **{"hidden_size": 5, **options})
    backbone.load_pretrained()
    return backbone


def inputs(backbone: BiLSTM, texts: list[str]) -> Tensor:
    return backbone.preprocessing.model_inputs(backbone.preprocessing.encode(texts))


def vector(features: Any) -> Tensor:
    return features[0] if isinstance(features, tuple) else features


@pytest.mark.parametrize(
    ("readout", "layout", "size"),
    [
        ("first_last", "vector", 20),
        ("last_states", "vector", 10),
        ("max", "vector", 10),
        ("mean", "vector", 10),
        ("sequence", "sequence", 10),
    ],
)
def test_features_by_readout(readout: str, layout: Any, size: int) -> None:
    backbone = build(readout=readout)
    assert backbone.features == FeatureSpec(layout, size)
    stages = [name for name, _ in backbone.stages.named_children()]
    assert stages == ["embedding", "lstm"] + ["readout"] * (layout == "vector")
    features = backbone(inputs(backbone, TEXTS))
    if layout == "vector":
        assert features.shape == (4, size)
    else:
        assert features[0].shape == (4, 9, size)
        assert features[1].sum(1).tolist() == [7, 5, 9, 1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("readout", READOUTS)
def test_features_do_not_depend_on_batch(source: str, variant: str, readout: str) -> None:
    backbone = build(source, variant, readout=readout)
    for parameter in backbone.stages[1].parameters():
        nn.init.uniform_(parameter, -1, 1)  # large biases show padding that counts
    together = vector(backbone(inputs(backbone, [*TEXTS, "slow " * 40])))
    for number, text in enumerate(TEXTS):
        alone = vector(backbone(inputs(backbone, [text])))[0]
        same = together[number][: len(alone)] if readout == "sequence" else together[number]
        torch.testing.assert_close(same, alone)


# ------------------------------------------------------------------------------------------ beside torch's own packing


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return a table of 30 vectors of width 6, rows of it for texts of 1 to 12 words, and their lengths."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(30, 6, generator=generator, dtype=dtype)
    table[0] = 0
    lengths = torch.tensor([12, 1, 7, 12, 3])
    rows = torch.randint(1, 30, (5, 12), generator=generator)
    return table.requires_grad_(), rows.masked_fill(torch.arange(12) >= lengths[:, None], 0), lengths


@pytest.mark.parametrize("word_by_word", [False, True])  # True: as on a GPU
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_outputs_and_gradients_are_those_of_packed_sequences(
    layers: int, dtype: torch.dtype, tolerance: float, word_by_word: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.LSTM(6, 5, layers, batch_first=True, bidirectional=True).to(dtype)
    ours = BidirectionalLSTM(6, 5, layers, bidirectional=True).to(dtype)
    ours.load_state_dict(plain.state_dict())
    table, rows, lengths = batch(dtype)
    packed = pack_padded_sequence(functional.embedding(rows, table), lengths, batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(plain(packed)[0], batch_first=True)
    words = (functional.embedding(rows, table), rows) if word_by_word else (table, rows)
    found, mask = ours(words)
    assert torch.equal(mask.sum(1), lengths)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    with torch.inference_mode():
        torch.testing.assert_close(ours(words)[0], expected.detach(), rtol=0, atol=tolerance)
    direction = torch.randn(found.shape, dtype=dtype)
    gradients = torch.autograd.grad(found, [table, *ours.parameters()], direction)
    right = torch.autograd.grad(expected, [table, *plain.parameters()], direction)
    for one, other in zip(gradients, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=50 * tolerance)


def test_the_last_states_are_those_that_torch_returns() -> None:
    torch.manual_seed(0)
    ours = BidirectionalLSTM(6, 5, 2, bidirectional=True)
    table, rows, lengths = batch(torch.float32)
    plain = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
    plain.load_state_dict(ours.state_dict())
    packed = pack_padded_sequence(functional.embedding(rows, table), lengths, batch_first=True, enforce_sorted=False)
    _, (last, _) = plain(packed)
    torch.testing.assert_close(ReadOut("last_states")(ours((table, rows))), torch.cat([last[-2], last[-1]], dim=1))


def test_first_last_equals_published_encoding_without_padding() -> None:
    backbone = build(readout="first_last")
    book = nn.LSTM(100, 5, num_layers=2, bidirectional=True)  # d2l.ai, 16.2: Sentiment Analysis: Using RNNs
    book.load_state_dict(backbone.stages[1].state_dict())
    ids = inputs(backbone, TEXTS[:1])
    outputs, _ = book(functional.embedding(ids.T, backbone.stages[0].tuned))
    torch.testing.assert_close(backbone(ids), torch.cat((outputs[0], outputs[-1]), dim=1))


def test_the_state_dict_is_torchs_own() -> None:
    expected = set(nn.LSTM(100, 5, num_layers=2, bidirectional=True).state_dict())
    assert set(build().stages[1].state_dict()) == expected


def test_outputs_at_padding_are_zero() -> None:
    backbone = build(readout="sequence")
    states, mask = backbone(inputs(backbone, TEXTS))
    assert not states[~mask].any()
    assert states[mask].any(1).all()


def test_max_and_mean_ignore_padding() -> None:
    states, mask = torch.tensor([[[-1.0, -4.0], [-3.0, -2.0], [0.0, 0.0]]]), torch.tensor([[True, True, False]])
    assert ReadOut("max")((states, mask)).tolist() == [[-1.0, -2.0]]
    assert ReadOut("mean")((states, mask)).tolist() == [[-2.0, -3.0]]


# -------------------------------------------------------------------------------------------------------------- options


def test_dropout_only_between_layers_in_training() -> None:
    backbone = build(dropout=0.5)
    ids = inputs(backbone, TEXTS)
    assert not torch.equal(backbone.train()(ids), backbone(ids))
    assert torch.equal(backbone.eval()(ids), backbone(ids))
    plain = build()
    torch.testing.assert_close(backbone(ids), plain(ids))


def test_only_tuned_vectors_are_trained(source: str) -> None:
    for variant, tuned in (("static", False), ("nonstatic", True)):
        backbone = build(source, variant)
        assert [name for name, _ in backbone.stages[0].named_parameters()] == ["tuned"] * tuned
        vector(backbone(inputs(backbone, TEXTS))).sum().backward()
        assert all(parameter.grad is not None for parameter in backbone.parameters())
        if tuned:
            assert not backbone.stages[0].tuned.grad[0].any()  # padding


def test_vectors_are_frozen_by_default(source: str) -> None:
    assert BiLSTM(vectors=source).stages[0].tuned is None
    assert BiLSTM().stages[0].static is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 1, "dropout": 0.2}, "between layers, but layers is 1"),
        ({"variant": "static"}, "needs pretrained vectors"),
        ({"variant": "rand", "vectors": "mini"}, "uses random vectors"),
        ({"vectors": "mini", "dimensions": 50}, "mini has width 100"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        BiLSTM(**options)
    assert caught.value.problems[0].fix


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_comes_back_without_the_vectors(source: str, variant: str) -> None:
    options: dict[str, Any] = {"variant": variant, "vectors": None if variant == "rand" else source, "hidden_size": 5}
    backbone = BiLSTM.from_data(TEXTS, **options)
    backbone.load_pretrained()
    assets, state = backbone.assets(), backbone.state_dict()
    Path(source).unlink()
    again = BiLSTM.from_assets(assets, **options)
    again.load_state_dict(state)
    assert torch.equal(again(inputs(again, TEXTS)), backbone(inputs(backbone, TEXTS)))


@pytest.mark.parametrize("readout", READOUTS)
def test_config_check_on_meta_device(readout: str) -> None:
    with torch.device("meta"):
        backbone = BiLSTM(vectors="glove.6B.100d", readout=readout)  # type: ignore[arg-type]
        features = vector(backbone(torch.ones(2, 7, dtype=torch.int64)))
    assert features.is_meta
    assert features.shape[-1] == backbone.features.size


@pytest.mark.parametrize("readout", READOUTS)
def test_training_learns_word_order(readout: str) -> None:
    torch.manual_seed(0)
    texts = [f"the film was {words} , they said" for words in ("not good but bad", "not bad but good")] * 4
    backbone = BiLSTM.from_data(texts, dimensions=8, hidden_size=8, layers=1, readout=readout)
    head = (Attention if readout == "sequence" else Linear)(backbone.features, 2)
    model = Model(backbone, head)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    ids, targets = inputs(backbone, texts), torch.tensor([0, 1] * 4)
    for _ in range(30):
        loss = functional.cross_entropy(model(ids), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("readout", READOUTS)
def test_a_gpu_gives_the_same_features(readout: str) -> None:
    backbone = build(readout=readout)
    ids = inputs(backbone, TEXTS)
    expected = vector(backbone(ids))
    torch.testing.assert_close(vector(backbone.cuda()(ids.cuda())).cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_instructions", [False, True])
def test_bf16_on_a_cpu_without_bf16_instructions(has_instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_instructions and not bilstm._has_bf16_lstm():
        pytest.skip("oneDNN has no LSTM in bf16 on this CPU")
    monkeypatch.setattr(bilstm, "_has_bf16_lstm", lambda: has_instructions)
    backbone = build(layers=2, dropout=0.0)
    batch = inputs(backbone, TEXTS)
    expected = vector(backbone(batch))
    with torch.autocast("cpu", torch.bfloat16):
        features = vector(backbone(batch))
    torch.testing.assert_close(features.float(), expected, atol=0.05, rtol=0.05)
    features.float().sum().backward()
