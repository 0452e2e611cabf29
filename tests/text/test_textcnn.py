from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from transfer import ConfigError, FeatureSpec, WeightsError
from transfer_text.models import embedding, textcnn
from transfer_text.models.embedding import WordEmbedding
from transfer_text.models.textcnn import Convolutions, TextCNN

TEXTS = ["a fine film with a fine cast", "it is n't a film", "so slow , so very slow , I left"]
SMALL: Mapping[str, Any] = {"kernel_sizes": (2, 3), "filters": (4, 5)}
VARIANTS = ("rand", "static", "nonstatic", "multichannel")


@pytest.fixture
def source(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 6, generator=generator).tolist()
    words = ("a", "fine", "film", "slow")
    (tmp_path / "own.txt").write_text(
        "".join(f"{word} {' '.join(map(str, row))}\n" for word, row in zip(words, rows, strict=True))
    )
    return str(tmp_path / "own.txt")


def build(source: str, variant: str = "multichannel", **options: Any) -> TextCNN:
    torch.manual_seed(0)
    vectors = None if variant == "rand" else source
    backbone = TextCNN.from_data(TEXTS, variant=variant, vectors=vectors, **{**SMALL, **options})
    backbone.load_pretrained()
    return backbone


def inputs(backbone: TextCNN, texts: list[str]) -> Tensor:
    return backbone.preprocessing.model_inputs(backbone.preprocessing.encode(texts))


def vector(source: str, word: str) -> Tensor:
    for line in Path(source).read_text().splitlines():
        if line.split(" ")[0] == word:
            return torch.tensor([float(number) for number in line.split(" ")[1:]])
    raise KeyError(word)


def index(backbone: TextCNN, word: str) -> int:
    return backbone.vocabulary.tokens.index(word)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_one_number_per_filter(source: str, variant: str) -> None:
    backbone = build(source, variant)
    assert backbone.features == FeatureSpec("vector", 9)
    assert backbone(inputs(backbone, TEXTS)).shape == (3, 9)
    assert [name for name, _ in backbone.stages.named_children()] == ["embedding", "convolution"]


def test_one_number_of_filters_is_for_every_kernel(source: str) -> None:
    assert build(source, kernel_sizes=(1, 2, 3), filters=7).features.size == 21


def test_features_are_the_definition_of_the_paper(source: str) -> None:
    backbone = build(source, "multichannel")
    (ids,) = backbone.preprocessing.encode([TEXTS[0]])
    features = backbone(inputs(backbone, [TEXTS[0]]))[0]
    embedding = backbone.stages[0]
    words = torch.cat([embedding.static[ids.tolist()], embedding.tuned[ids.tolist()]], dim=1)  # (T, 2 D)
    expected = []
    for convolution in backbone.stages[1].convolutions:
        size = convolution.kernel_size[1]
        windows = torch.stack([words[t : t + size] for t in range(len(words) - size + 1)])  # (T', k, 2 D)
        responses = torch.einsum("tkd,fdk->tf", windows, convolution.weight.squeeze(2)) + convolution.bias
        expected.append(functional.relu(responses).max(0).values)
    torch.testing.assert_close(features, torch.cat(expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_do_not_depend_on_batch(source: str, variant: str) -> None:
    backbone = build(source, variant)
    for parameter in backbone.stages[1].parameters():
        torch.nn.init.uniform_(parameter, -1, 1)  # a bias that is large shows padding that counts
    texts = ["film", "a film", *TEXTS]
    together = backbone(inputs(backbone, [*texts, "slow " * 40]))[: len(texts)]
    alone = torch.cat([backbone(inputs(backbone, [text])) for text in texts])
    torch.testing.assert_close(together, alone)


def test_a_text_shorter_than_every_kernel_works(source: str) -> None:
    backbone = build(source, kernel_sizes=(3, 5), filters=2)
    assert torch.isfinite(backbone(inputs(backbone, ["film", "a"]))).all()


def test_vectors_are_read_into_both_channels(source: str) -> None:
    embedding = (backbone := build(source)).stages[0]
    for word in ("a", "slow"):
        torch.testing.assert_close(embedding.static[index(backbone, word)], vector(source, word))
    torch.testing.assert_close(embedding.static, embedding.tuned.detach())
    assert embedding.static.data_ptr() != embedding.tuned.data_ptr()


def test_only_the_tuned_channel_is_trained(source: str) -> None:
    backbone = build(source)
    embedding = backbone.stages[0]
    before = embedding.static.clone()
    optimizer = torch.optim.Adam(backbone.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        backbone(inputs(backbone, TEXTS)).sum().backward()
        optimizer.step()
    assert torch.equal(embedding.static, before)
    assert not torch.equal(embedding.tuned, before)
    assert not embedding.tuned[0].any()  # padding


def test_the_channels_of_each_variant(source: str) -> None:
    channels = {}
    for variant in VARIANTS:
        embedding = build(source, variant).stages[0]
        channels[variant] = (embedding.static is not None, embedding.tuned is not None, embedding.out_dimensions)
    assert channels == {
        "rand": (False, True, 100),
        "static": (True, False, 6),
        "nonstatic": (False, True, 6),
        "multichannel": (True, True, 12),
    }


def test_vectors_of_unknown_words_by_option(source: str) -> None:
    known = torch.stack([vector(source, word) for word in ("a", "fine", "film", "slow")])
    rows = {}
    for unknown in ("zero", "mean", "random"):
        backbone = build(source, unknown=unknown)
        rows[unknown] = backbone.stages[0].static[[1, index(backbone, "cast"), index(backbone, "left")]]
        assert not backbone.stages[0].static[0].any()
    assert not rows["zero"].any()
    torch.testing.assert_close(rows["mean"], known.mean(0).expand(3, -1))
    reach = known.std(0, unbiased=False) * 3**0.5
    assert (rows["random"].abs() <= reach).all()
    assert len(rows["random"].unique(dim=0)) == 3


def test_random_vectors_follow_torchs_seed(source: str) -> None:
    assert torch.equal(build(source).stages[0].static, build(source).stages[0].static)


def test_loading_reports_coverage(source: str) -> None:
    backbone = TextCNN.from_data(TEXTS, vectors=source, **SMALL)
    report = backbone.load_pretrained()
    words = backbone.vocabulary.tokens[2:]
    assert report["vectors"] == source
    assert (report["words"], report["found"]) == (len(words), 4)
    assert report["tokens"] == round(9 / 21, 4)
    assert report["missing"][:2] == [",", "so"]
    assert json.loads(json.dumps(report)) == report


def test_vectors_of_another_language_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("xyzzy 1 2 3\n")
    backbone = TextCNN.from_data(TEXTS, vectors=str(tmp_path / "other.txt"), **SMALL)
    with pytest.raises(WeightsError, match="no vector for any"):
        backbone.load_pretrained()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_comes_back_without_the_vectors(source: str, variant: str) -> None:
    options = {**SMALL, "variant": variant, "vectors": None if variant == "rand" else source, "max_length": 5}
    backbone = TextCNN.from_data(TEXTS, **options)
    backbone.load_pretrained()
    assets, state = backbone.assets(), backbone.state_dict()
    Path(source).unlink()
    again = TextCNN.from_assets(assets, **options)
    again.load_state_dict(state)
    assert again.preprocessing.describe() == backbone.preprocessing.describe()
    assert torch.equal(again(inputs(again, TEXTS)), backbone(inputs(backbone, TEXTS)))


def test_the_vocabulary_follows_its_options() -> None:
    backbone = TextCNN.from_data(TEXTS, tokenizer="whitespace", min_frequency=2, max_size=3)
    assert backbone.vocabulary.tokens[2:] == ("a", ",", "film")


@pytest.mark.parametrize("vectors", [None, "mini", "glove.840B.300d"])
def test_config_check_on_meta_device(vectors: str | None) -> None:
    with torch.device("meta"):
        backbone = TextCNN(vectors=vectors)
        assert backbone(torch.ones(2, 7, dtype=torch.int64)).shape == (2, backbone.features.size)
    assert all(tensor.is_meta for tensor in backbone.state_dict().values())


def test_the_variant_follows_the_vectors_when_left_out(source: str) -> None:
    assert TextCNN().stages[0].static is None
    assert TextCNN(vectors=source).stages[0].out_dimensions == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "rand", "vectors": "mini"}, "uses random vectors"),
        ({"variant": "static"}, "needs pretrained vectors"),
        ({"vectors": "mini", "dimensions": 50}, "dimensions is 50, but mini has width 100"),
        ({"kernel_sizes": (3, 4), "filters": (10,)}, "differ in length: 2 and 1"),
        ({"kernel_sizes": ()}, "differ in length: 0 and 0"),
        ({"vectors": "glove.6B.101d"}, "unknown word vectors 'glove.6B.101d'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TextCNN(**options)
    assert caught.value.problems[0].fix


def test_a_saved_width_counts_for_dimensions_too() -> None:
    assets = TextCNN.from_data(TEXTS, dimensions=8).assets()
    assert TextCNN.from_assets(assets, dimensions=8).width == 8
    with pytest.raises(ConfigError, match="has width 8"):
        TextCNN.from_assets(assets, dimensions=9)


def test_training_learns_to_distinguish_words() -> None:
    torch.manual_seed(0)
    texts = [f"the film was {word}" for word in ("fine", "slow")] * 8
    backbone = TextCNN.from_data(texts, dimensions=8, **SMALL)
    head = torch.nn.Linear(backbone.features.size, 2)
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=0.05)
    batch, targets = inputs(backbone, texts), torch.tensor([0, 1] * 8)
    for _ in range(20):
        loss = functional.cross_entropy(head(backbone(batch)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


# ---------------------------------------------------------------------------------- one product per different word


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[int]]:
    """Return a table of 12 vectors of width 6, rows of it for texts of 1 to 9 words, and their lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 9, 4, 2, 1]
    table = torch.randn(12, 6, generator=generator, dtype=dtype)
    table[0] = 0
    rows = torch.randint(1, 12, (5, 9), generator=generator)
    for row, length in zip(rows, lengths, strict=True):
        row[length:] = 0
    return table.requires_grad_(), rows, lengths


def convolutions(dtype: torch.dtype = torch.float32) -> Convolutions:
    torch.manual_seed(1)
    layers = Convolutions(6, (1, 3, 4), (7, 5, 3)).to(dtype)
    for parameter in layers.parameters():
        torch.nn.init.uniform_(parameter, -1, 1)
    return layers


def by_conv1d(layers: Convolutions, table: Tensor, rows: Tensor, lengths: list[int]) -> Tensor:
    """Convolve each text alone by torch's own layer, in one dimension."""
    features = []
    for row, length in zip(rows, lengths, strict=True):
        for layer in layers.convolutions:
            plain = torch.nn.Conv1d(layer.in_channels, layer.out_channels, layer.kernel_size[1])
            words = functional.embedding(row[: max(length, layer.kernel_size[1])], table, padding_idx=0)
            parameters = {"weight": layer.weight.squeeze(2), "bias": layer.bias}
            responses = torch.func.functional_call(plain, parameters, (words.T,))
            features.append(functional.relu(responses).amax(1))
    return torch.cat(features).view(len(rows), -1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("by_words", [True, False])
def test_outputs_and_gradients_are_those_of_conv1d(
    by_words: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textcnn, "use_batch_vocabulary", lambda rows: by_words)
    table, rows, lengths = batch(dtype)
    layers = convolutions(dtype)
    wanted = [table, *layers.parameters()]
    features, expected = layers((table, rows)), by_conv1d(layers, table, rows, lengths)
    torch.testing.assert_close(features, expected, rtol=0, atol=tolerance * 10)
    direction = torch.randn(features.shape, dtype=dtype)
    gradients = torch.autograd.grad(features, wanted, direction)
    for name, found, right in zip(
        ["table", *(name for name, _ in layers.named_parameters())],
        gradients,
        torch.autograd.grad(expected, wanted, direction),
        strict=True,
    ):
        if name == "table":  # by words, the row of padding is left to the embedding
            found, right = found[1:], right[1:]
        torch.testing.assert_close(found, right, rtol=0, atol=tolerance * 10, msg=lambda text, n=name: f"{n}: {text}")


def test_the_gradient_is_that_of_small_differences() -> None:
    table, rows, _ = batch(torch.float64)
    layers = convolutions(torch.float64)
    assert torch.autograd.gradcheck(lambda *_: layers((table, rows)), [table, *layers.parameters()])


def test_without_gradients_the_features_are_the_same() -> None:
    table, rows, _ = batch()
    layers = convolutions()
    with torch.inference_mode():
        found = layers((table, rows))
    assert torch.equal(found, layers((table, rows)))


def test_lower_precision_is_near() -> None:
    table, rows, _ = batch()
    layers = convolutions()
    with torch.autocast("cpu", torch.bfloat16):
        found = layers((table, rows))
    torch.testing.assert_close(found.float(), layers((table, rows)), rtol=0.05, atol=0.05)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in layers.parameters())


def test_table_contains_distinct_words_of_batch() -> None:
    embedded = WordEmbedding(50, 6, frozen=True, tuned=True)
    indices = torch.tensor([[7, 3, 7, 49], [3, 3, 0, 0]])
    table, rows = embedded(indices)
    assert table.shape == (4, 12)  # padding, 3, 7, 49
    assert not table[0].any()
    assert torch.equal(rows == 0, indices == 0)
    assert torch.equal(table[rows], torch.cat([embedded.static, embedded.tuned], 1)[indices])


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_and_gradients_agree_on_gpu_and_cpu(
    source: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {} if variant == "rand" else {"vectors_vocabulary": True}
    backbone = build(source, variant, kernel_sizes=(3, 5), **options)
    ids = inputs(backbone, [*TEXTS, "film slow", "slow"])  # two texts shorter than a kernel
    features = backbone(ids)
    gradients = torch.autograd.grad(features.sum(), list(backbone.parameters()))
    for module in (embedding, textcnn):
        monkeypatch.setattr(module, "use_batch_vocabulary", lambda rows: False)
    vectors, rows = backbone.stages[0](ids)
    assert vectors.shape == (*ids.shape, backbone.stages[0].out_dimensions)
    assert rows is ids
    torch.testing.assert_close(backbone(ids), features)
    for one, other in zip(
        torch.autograd.grad(backbone(ids).sum(), list(backbone.parameters())), gradients, strict=True
    ):
        torch.testing.assert_close(one, other)


def test_gpu_looks_up_words_once_for_all_kernels(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (embedding, textcnn):
        monkeypatch.setattr(module, "use_batch_vocabulary", lambda rows: False)
    names: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    backbone = build(source, "multichannel", kernel_sizes=(1, 2, 3), filters=2)
    ids = inputs(backbone, TEXTS)
    with Recorder():
        backbone(ids).sum().backward()
    assert [names.count(name) for name in ("embedding", "embedding_dense_backward", "eq", "convolution")] == [
        2,
        1,
        1,
        3,
    ]


def test_padding_gets_no_gradient(source: str) -> None:
    backbone = build(source, "nonstatic", kernel_sizes=(5,), filters=3)
    torch.nn.init.ones_(backbone.stages[1].convolutions[0].bias)
    backbone(inputs(backbone, ["a film", "a fine film with a fine cast"])).sum().backward()
    gradient = backbone.stages[0].tuned.grad
    assert not gradient[0].any()
    assert gradient[index(backbone, "film")].any()


def test_state_dict_has_one_convolution_per_kernel_size(source: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in build(source).state_dict().items()}
    size = len(build(source).vocabulary)
    assert shapes == {
        "stages.embedding.static": (size, 6),
        "stages.embedding.tuned": (size, 6),
        "stages.convolution.convolutions.0.weight": (4, 12, 1, 2),
        "stages.convolution.convolutions.0.bias": (4,),
        "stages.convolution.convolutions.1.weight": (5, 12, 1, 3),
        "stages.convolution.convolutions.1.bias": (5,),
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_gives_the_same_features(source: str, variant: str) -> None:
    backbone = build(source, variant)
    encoded = backbone.preprocessing.encode(TEXTS)
    expected = backbone(backbone.preprocessing.model_inputs(encoded))
    ids = backbone.preprocessing.model_inputs(encoded, torch.device("cuda"))
    assert ids.shape == (3, 16)  # a bucket: the longest text has 9 words
    torch.testing.assert_close(backbone.cuda()(ids).cpu(), expected, rtol=1e-3, atol=1e-4)
