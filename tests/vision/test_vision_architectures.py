"""What every one of torchvision's classification models keeps to as a backbone: head off, in order, nothing lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from transfer import ConfigError
from transfer_vision.models import architectures
from transfer_vision.models.architectures import (
    AUXILIARY,
    Architecture,
    adapt_input_weight,
    build,
    model_names,
    smallest_image,
)
from transfer_vision.models.backbones import Torchvision
from transfer_vision.models.weights import default_weights

FAMILIES = {
    "alexnet": ["stem", "stage1", "stage2", "pool", "classifier"],
    "convnext_tiny": ["stem", "stage1", "stage2", "stage3", "stage4", "pool", "classifier"],
    "densenet121": [
        "stem",
        *(f"{kind}{n}" for n in (1, 2, 3) for kind in ("denseblock", "transition")),
        *("denseblock4", "norm5", "pool"),
    ],
    "efficientnet_b0": ["stem", *(f"stage{n}" for n in range(1, 9)), "pool"],
    "efficientnet_v2_s": ["stem", *(f"stage{n}" for n in range(1, 8)), "pool"],
    "googlenet": ["stem", "stage1", "stage2", "stage3", "pool"],
    "inception_v3": ["stem", "stage1", "stage2", "stage3", "pool"],
    "maxvit_t": ["stem", "stage1", "stage2", "stage3", "stage4", "classifier"],
    "mnasnet0_5": ["stem", *(f"stage{n}" for n in range(1, 7)), "pool"],
    "mobilenet_v2": ["stem", *(f"stage{n}" for n in range(1, 6)), "pool"],
    "mobilenet_v3_small": ["stem", *(f"stage{n}" for n in range(1, 5)), "pool", "classifier"],
    "regnet_x_400mf": ["stem", "block1", "block2", "block3", "block4", "pool"],
    "resnet18": ["stem", "layer1", "layer2", "layer3", "layer4", "pool"],
    "shufflenet_v2_x0_5": ["stem", "stage2", "stage3", "stage4", "conv5", "pool"],
    "squeezenet1_1": ["stem", "stage1", "stage2", "stage3", "pool"],
    "swin_t": ["stem", "stage1", "stage2", "stage3", "stage4", "pool"],
    "swin_v2_t": ["stem", "stage1", "stage2", "stage3", "stage4", "pool"],
    "vgg11": ["stem", "stage1", "stage2", "stage3", "stage4", "pool", "classifier"],
    "vit_b_32": ["embedding", *(f"encoder_layer_{n}" for n in range(12)), "pool"],
}
"""The smallest model of each family, and its stages."""


def with_slow_cases(names: Iterable[str], quick: set[str]) -> list[Any]:
    """Return the names as parameters of a test, all but the quick ones marked as slow."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


def size(name: str) -> int:
    """Return a size of image that the model can see, small but of more than one patch."""
    return 2 * smallest_image(name) if name.startswith("vit") else max(32, smallest_image(name))


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """Keep torchvision's own models as they are built: a backbone shares their layers."""
    kept: list[nn.Module] = []
    original: Callable[..., nn.Module] = models.get_model

    def get_model(name: str, **options: object) -> nn.Module:
        kept.append(original(name, **options))
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(architectures.models, "get_model", get_model)
        yield kept


def both(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Architecture, nn.Module]:
    with recorded(monkeypatch) as kept:
        built = build(name, image_size=size(name))
    return built, kept[0].eval()


def chained(built: Architecture, images: Tensor) -> Tensor:
    value = images
    for stage in built.stages.values():
        value = stage.eval()(value)
    return value


def test_contract_families_are_torchvision_models() -> None:
    assert len(model_names()) >= 80
    assert set(FAMILIES) <= set(model_names())


@pytest.mark.parametrize("name", with_slow_cases(model_names(), set(FAMILIES)))
def test_every_model_is_a_chain_without_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"), torch.no_grad():
        built, theirs = both(name, monkeypatch)
        images = torch.empty(2, 3, size(name), size(name))
        classifier = theirs.get_submodule(built.layout.classifier)

        # The head is off: the layer that gives 1000 classes, and it alone.
        weights = [t for stage in built.stages.values() for t in stage.state_dict(keep_vars=True).values()]
        assert not {id(t) for t in weights} & {id(t) for t in classifier.state_dict(keep_vars=True).values()}
        assert classifier.weight.shape[:2] == (1000, built.features)

        # Stages hold every other tensor exactly once, and their names map to torchvision's one to one.
        expected = {k: v for k, v in theirs.state_dict().items() if not k.startswith(f"{built.layout.classifier}.")}
        assert not [key for key in expected if key.startswith(AUXILIARY)]
        assert len({id(t) for t in weights}) == len(weights)
        assert sorted(built.layout.names.values()) == sorted(expected)
        own = {f"{stage}.{k}": v for stage, module in built.stages.items() for k, v in module.state_dict().items()}
        assert {built.layout.names[k]: v.shape for k, v in own.items()} == {k: v.shape for k, v in expected.items()}

        # Torchvision's model takes them back.
        back = theirs.state_dict()  # MNASNet wants the version that this dict carries
        back.update({name: own[key] for key, name in built.layout.names.items()})
        assert len(back) == len(own) + len(classifier.state_dict())
        theirs.load_state_dict(back, strict=True, assign=True)

        # They make a chain that ends in the vector which the classifier takes.
        assert chained(built, images).shape == (2, built.features)
        assert list(built.stages)[-1] in ("pool", "classifier")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_features_are_what_torchvision_gives_its_classifier(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        built, theirs = both(name, monkeypatch)
    assert list(built.stages) == FAMILIES[name]
    theirs.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for key, tensor in theirs.state_dict().items():
        fill(key, tensor, generator)
    if isinstance(theirs, models.VisionTransformer):
        built.stages["embedding"].class_token = theirs.class_token  # type: ignore[assignment]
        built.stages["embedding"].pos_embedding = theirs.encoder.pos_embedding  # type: ignore[assignment]
    given: list[Tensor] = []
    theirs.get_submodule(built.layout.classifier).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    images = torch.rand(2, 3, size(name), size(name), generator=generator)
    with torch.no_grad():
        theirs(images)
        features = chained(built, images)
    expected = given[0].mean((2, 3)) if given[0].dim() == 4 else given[0]  # SqueezeNet pools after its classifier
    assert features.abs().max() > 0
    assert not torch.equal(features[0], features[1])
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def fill(key: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Give a tensor values that keep activations in range."""
    if not tensor.is_floating_point():
        tensor.zero_()
    elif tensor.dim() > 1:
        bound = math.sqrt(6 / max(1, tensor[0].numel()))
        tensor.uniform_(-bound, bound, generator=generator)
    elif key.endswith(("running_var", "weight")):
        tensor.uniform_(0.8, 1.2, generator=generator)
    else:
        tensor.uniform_(-0.1, 0.1, generator=generator)


@pytest.mark.parametrize(("name", "tokens"), [("vit_b_32", 5), ("swin_t", 4)])
def test_transformers_give_their_tokens_as_a_sequence(name: str, tokens: int) -> None:
    with torch.device("meta"), torch.no_grad():
        backbone = Torchvision(model=name, weights=None, image_size=64, readout="sequence").eval()
        steps, mask = backbone(torch.empty(3, 3, 64, 64))
    assert backbone.features.layout == "sequence"
    assert steps.shape == (3, tokens, 768)
    assert (mask.shape, mask.dtype) == ((3, tokens), torch.bool)
    assert backbone.foreign_models(2) == {}


def test_sequence_readout_of_network_without_tokens() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="resnet18 has no tokens") as caught:
        Torchvision(model="resnet18", readout="sequence")
    assert "swin_t" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "image_size", "message"),
    [
        ("vit_b_16", 40, "vit_b_16 does not support images of 40 x 40"),
        ("maxvit_t", 256, "maxvit_t does not support images of 256 x 256"),
        ("inception_v3", 64, "expected 75 or more"),
    ],
)
def test_sizes_that_a_model_cannot_see_are_refused(model: str, image_size: int, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        Torchvision(model=model, weights=None, image_size=image_size)


def test_an_unknown_model_lists_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no classification model called 'densenet1211'") as caught:
        Torchvision(model="densenet1211")
    assert "did you mean 'densenet121'?" in str(caught.value)


def test_detectors_and_the_like_are_no_classification_models() -> None:
    assert not [name for name in model_names() if "rcnn" in name or "3d" in name or "deeplab" in name]


@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b3", "inception_v3", "swin_t", "vit_b_16"])
def test_preprocessing_comes_with_the_weights(name: str) -> None:
    facts = default_weights(name).transforms()
    with torch.device("meta"):
        described = Torchvision(model=name).preprocessing.describe()
    assert [described["image_size"], described["resize"]] == [facts.crop_size[0], facts.resize_size[0]]
    assert described["interpolation"] == facts.interpolation.value
    if name == "inception_v3":  # it scales to [-1, 1] inside, which is this
        assert (described["mean"], described["std"]) == ([0.5] * 3, [0.5] * 3)
    else:
        assert (described["mean"], described["std"]) == (facts.mean, facts.std)


def test_wishes_go_before_what_comes_with_the_weights() -> None:
    with torch.device("meta"):
        wished = {"interpolation": "nearest", "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "image_size": 448}
        described = Torchvision(model="resnet18", **wished).preprocessing.describe()
        assert described["resize"] == 512
        assert (described["interpolation"], described["mean"]) == ("nearest", [0.1, 0.2, 0.3])
        with pytest.raises(ConfigError, match="mean has 1 numbers for 3 channels"):
            Torchvision(model="resnet18", mean=(0.1,))


# ------------------------------------------------------------------------------------------------------ input channels


def test_gray_images_give_features_of_colored_ones() -> None:
    weight = torch.randn(4, 3, 3, 3)
    gray = torch.randn(2, 1, 8, 8)
    colored = torch.conv2d(gray.expand(-1, 3, -1, -1), weight)
    torch.testing.assert_close(torch.conv2d(gray, adapt_input_weight(weight, 1)), colored)


@pytest.mark.parametrize("channels", [2, 4, 6, 7])
def test_additional_channels_repeat_with_equal_scale(channels: int) -> None:
    weight = torch.randn(4, 3, 3, 3)
    adapted = adapt_input_weight(weight, channels)
    assert adapted.shape == (4, channels, 3, 3)
    for channel in range(channels):
        torch.testing.assert_close(adapted[:, channel], weight[:, channel % 3] * 3 / channels)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_other_channels(name: str) -> None:
    with torch.device("meta"):
        backbone = Torchvision(model=name, weights=None, image_size=size(name), in_channels=5)
        first = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
        assert first(torch.empty(2, 5, 64, 64)).shape[:2] == (2, first.out_channels)
    assert len(backbone.preprocessing.mean) == 5
    assert backbone.foreign_models(2) == {}


@pytest.mark.parametrize("name", with_slow_cases(FAMILIES, {"resnet18", "squeezenet1_1", "convnext_tiny"}))
def test_an_exported_graph_takes_batches_of_any_size(name: str) -> None:
    with torch.device("meta"):
        backbone = Torchvision(model=name, weights=None, image_size=size(name)).eval()
        images = torch.empty(2, 3, size(name), size(name))
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(backbone, (images,), dynamic_shapes=(batch,))
    assert len(program.range_constraints) == 1


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_go_through(channels: int) -> None:
    backbone = Torchvision(model="shufflenet_v2_x0_5", weights=None, image_size=32, in_channels=channels).eval()
    preprocessing = backbone.preprocessing
    inputs = preprocessing.model_inputs(preprocessing.encode([preprocessing.example()]))
    assert inputs.shape == (1, channels, 32, 32)
    assert backbone(inputs).shape == (1, 1024)
