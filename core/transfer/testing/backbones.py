"""What a backbone promises."""

from __future__ import annotations

import importlib
import json
import pickle
import unittest
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from transfer.data.batch import move
from transfer.interfaces import Backbone, FeatureSpec, Head, Preprocessing
from transfer.models.model import Model
from transfer.testing.cases import BATCH, TEXTS, Case, pictures, promise, require

OUTPUTS = 3
TARGETS = (0, 1, 2, 0)


class AnyHead(Head):
    """Dropout and one linear layer over a vector, or over the mean of a sequence's real steps."""

    layouts = frozenset({"vector", "sequence"})

    def __init__(self, features: FeatureSpec, out_features: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.output = nn.Linear(features.size, out_features)

    def forward(self, features: Any) -> Any:
        """Return (B, out_features)."""
        if not isinstance(features, Tensor):
            steps, mask = features
            weights = mask.unsqueeze(-1).to(steps.dtype)
            features = (steps * weights).sum(1) / weights.sum(1)
        return self.output(self.dropout(features))


class Subject:
    """A backbone as a case builds it, on the CPU with random weights, the same ones every time, in eval mode.

    Args:
        case: Its name and options.
        seed: Of its weights.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        component = case.component()
        self.cls: type[Backbone] = component.cls
        self.options: Mapping[str, Any] = component.options
        self.values = self._values(case)
        torch.manual_seed(seed)
        self.backbone = self.cls.from_data(self.values, **self.options).eval()
        self.inputs = self.batch(self.backbone)

    def batch(self, backbone: Backbone, values: Sequence[Any] | None = None) -> Any:
        """Return a batch as a backbone's preprocessing makes it, by default of the first four values."""
        preprocessing = backbone.preprocessing
        return preprocessing.collate(preprocessing.encode(self.values[:BATCH] if values is None else values))

    def model(self) -> Model:
        """Return the backbone under a head."""
        return Model(self.backbone, AnyHead(self.backbone.features, OUTPUTS))

    def _values(self, case: Case) -> Sequence[Any]:
        """Return the case's own values, those usual for the fields, or the preprocessing's example four times."""
        backbone = on_meta(case)
        fields = getattr(backbone, "fields", (None,))
        named = all(isinstance(field, str) and field for field in fields)
        require(named, f"the class attribute field is {fields[0]!r}, and not the name of a field")
        if case.values is not None:
            require(len(case.values) >= BATCH, f"{len(case.values)} raw values are given, and {BATCH} are needed")
            return case.values
        if set(fields) <= {"text", "image"}:
            columns = [TEXTS if field == "text" else pictures() for field in fields]
            return columns[0] if len(columns) == 1 else list(zip(*columns, strict=False))
        example = backbone.preprocessing.example()
        fix = f"give contracts(values={{{case.name!r}: [...]}}), or let Preprocessing.example return one"
        require(example is not None, f"nothing says what values of {' and '.join(map(str, fields))} look like: {fix}")
        return [example] * BATCH


@lru_cache(maxsize=1)  # contracts of one case follow each other
def subject(case: Case) -> Subject:
    """Return the case's backbone; no contract changes it."""
    return Subject(case)


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors of what passes between two stages."""
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in tensors(item)]


def same(one: Any, other: Any) -> bool:
    """Tell whether two batches, or two outputs, are equal bit by bit."""
    pairs = list(zip(tensors(one), tensors(other), strict=False))
    alike = len(tensors(one)) == len(tensors(other)) and isinstance(one, Tensor) == isinstance(other, Tensor)
    return alike and all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def outputs(backbone: Backbone, inputs: Any) -> Any:
    """Run a backbone as it predicts."""
    return backbone.eval()(inputs)


def require_as_declared(backbone: Backbone, value: Any, batch: int = BATCH) -> None:
    """Hold an output to the backbone's FeatureSpec."""
    spec = backbone.features
    if spec.layout == "vector":
        require(isinstance(value, Tensor), f"features says a vector, and forward returns a {type(value).__name__}")
        found = f"{tuple(value.shape)} of {value.dtype}"
        good = value.shape == (batch, spec.size) and value.dtype == torch.float32
        require(good, f"features says {spec}, and forward returns {found}, where (B, D) is {(batch, spec.size)}")
        return
    pair = isinstance(value, tuple) and len(value) == 2
    require(
        pair, f"features says a sequence, and forward returns a {type(value).__name__}, not a pair of steps and mask"
    )
    steps, mask = value
    found = f"{tuple(steps.shape)} of {steps.dtype} and {tuple(mask.shape)} of {mask.dtype}"
    good = (*mask.shape, spec.size) == tuple(steps.shape) and mask.dim() == 2 and len(steps) == batch
    good = good and (steps.dtype, mask.dtype) == (torch.float32, torch.bool)
    require(
        good, f"features says {spec}, and forward returns {found}, where (B, T, D) of float32 and (B, T) of bool belong"
    )


def on_meta(case: Case) -> Backbone:
    """Build a case's backbone as a config is checked: its architecture alone."""
    with torch.device("meta"):
        backbone: Backbone = case.component().make()
    return backbone


@promise("interfaces.Backbone", "quick")
def it_is_built_on_the_meta_device(case: Case) -> None:
    """The constructor builds the whole architecture from its options alone, under torch.device("meta"): no memory."""
    real = [name for name, tensor in on_meta(case).state_dict().items() if not tensor.is_meta]
    require(
        not real, f"these are built in memory: {', '.join(real[:5])}; make tensors in the constructor, on no device"
    )


@promise("interfaces.Backbone", "quick")
def stages_cover_every_parameter_and_buffer_once(case: Case) -> None:
    """Every parameter and every buffer belongs to one stage, and to one alone."""
    backbone = on_meta(case)
    stages = dict(backbone.stages.named_children())
    for kind in ("named_parameters", "named_buffers"):
        staged = {f"stages.{s}.{name}" for s, stage in stages.items() for name, _ in getattr(stage, kind)()}
        outside = {name for name, _ in getattr(backbone, kind)()} - staged
        require(not outside, f"outside the stages: {', '.join(sorted(outside))}")
    owners: dict[int, str] = {}
    for name, stage in stages.items():
        for parameter in stage.parameters():
            owner = owners.setdefault(id(parameter), name)
            require(owner == name, f"the stages {owner!r} and {name!r} share a parameter")


@promise("interfaces.FeatureSpec", "quick")
def features_are_as_declared_on_the_meta_device(case: Case) -> None:
    """A batch of the preprocessing's example goes through on the meta device and comes out as ``features`` says."""
    backbone = on_meta(case)
    example = backbone.preprocessing.example()
    if example is None:
        raise unittest.SkipTest("its preprocessing has no example")
    inputs = backbone.preprocessing.collate(backbone.preprocessing.encode([example] * BATCH))
    require_as_declared(backbone, outputs(backbone, move(inputs, torch.device("meta"))))


@promise("interfaces.Preprocessing", "quick")
def preprocessing_describes_itself_in_json(case: Case) -> None:
    """``describe`` returns the settings that decide what the model sees, as JSON."""
    described = on_meta(case).preprocessing.describe()
    try:
        json.dumps(dict(described))
    except TypeError as error:
        require(False, f"describe returns {described!r}: {error}")


@promise("interfaces.Backbone", "weights")
def stages_chain(case: Case) -> None:
    """``forward`` is the chain of stages: each takes what the one before it returns, a tensor or a tuple of tensors."""
    built = subject(case)
    value = built.inputs
    with torch.no_grad():
        for name, stage in built.backbone.stages.named_children():
            value = stage(value)
            good = isinstance(value, Tensor) or (isinstance(value, tuple) and value)
            require(good, f"the stage {name!r} returns a {type(value).__name__}")
    require(
        same(value, outputs(built.backbone, built.inputs)), "forward returns something else than its stages in turn"
    )


@promise("interfaces.FeatureSpec", "weights")
def features_are_as_declared(case: Case) -> None:
    """The last stage returns what ``features`` says, finite; every example of a sequence has a real step."""
    built = subject(case)
    value = outputs(built.backbone, built.inputs)
    require_as_declared(built.backbone, value)
    require(tensors(value)[0].isfinite().all(), "a feature is not finite")
    if built.backbone.features.layout == "sequence":
        require(value[1].any(1).all(), "an example has no real step")


@promise("interfaces.Backbone", "weights")
def examples_do_not_depend_on_their_batch(case: Case) -> None:
    """In eval mode an example's features are the same alone and beside others, padding included."""
    built = subject(case)
    together = tensors(outputs(built.backbone, built.inputs))
    alone = tensors(outputs(built.backbone, built.batch(built.backbone, built.values[1:2])))
    for one, other in zip(alone, together, strict=True):
        if built.backbone.features.layout == "sequence":
            other = other[:, : one.shape[1]]
        scale = float(other.float().abs().max())
        difference = float((one[0].float() - other[1].float()).abs().max())
        require(
            difference <= 1e-3 * scale, f"alone and in a batch the features differ by {difference:.2g} of {scale:.2g}"
        )


@promise("interfaces.Backbone", "weights")
def the_state_dict_makes_another_one_the_same(case: Case) -> None:
    """A backbone built from the same options with other random weights and this one's state dict computes the same."""
    built, other = subject(case), Subject(case, seed=1)
    drawn = not same(outputs(other.backbone, built.inputs), outputs(built.backbone, built.inputs))
    require(drawn or not list(built.backbone.parameters()), "another seed gives the same weights")
    other.backbone.load_state_dict(built.backbone.state_dict())
    equal = same(outputs(other.backbone, built.inputs), outputs(built.backbone, built.inputs))
    require(equal, "with the same state dict it computes something else: a tensor is neither parameter nor buffer")


@promise("interfaces.Backbone", "weights")
def assets_and_state_dict_bring_it_back_without_data(case: Case) -> None:
    """``from_assets`` with what ``assets`` returned, and the state dict, make the same backbone and preprocessing."""
    built = subject(case)
    assets = built.backbone.assets()
    good = all(isinstance(text, str) and name == name.rsplit("/")[-1] for name, text in assets.items())
    require(good, f"assets returns {dict.fromkeys(assets)}: texts by file name belong there")
    other = built.cls.from_assets(assets, **built.options)
    other.load_state_dict(built.backbone.state_dict())
    require(same(built.batch(other), built.inputs), "what came back makes other batches")
    require(
        same(outputs(other, built.inputs), outputs(built.backbone, built.inputs)), "what came back computes otherwise"
    )
    require(other.features == built.backbone.features, f"what came back says {other.features}")
    described = other.preprocessing.describe() == built.backbone.preprocessing.describe()
    require(described, "what came back describes its preprocessing otherwise")


@promise("interfaces.Preprocessing", "weights")
def preprocessing_is_deterministic(case: Case) -> None:
    """``encode`` and ``collate`` give the same for the same values, whatever the seed and however they are grouped."""
    built = subject(case)
    torch.manual_seed(99)
    require(same(built.batch(built.backbone), built.inputs), "the same values make another batch the second time")
    preprocessing = built.backbone.preprocessing
    one_by_one = [preprocessing.encode([value])[0] for value in built.values[:BATCH]]
    require(same(preprocessing.collate(one_by_one), built.inputs), "values encoded one by one make another batch")


@promise("interfaces.Preprocessing", "weights")
def preprocessing_survives_pickling(case: Case) -> None:
    """A pickled copy, as loader processes get it, encodes, measures and describes as the original does."""
    built = subject(case)
    original = built.backbone.preprocessing
    copy: Preprocessing = pickle.loads(pickle.dumps(original))  # noqa: S301  # just pickled here
    values = built.values[:BATCH]
    require(same(copy.collate(copy.encode(values)), built.inputs), "the copy makes another batch")
    require(copy.describe() == original.describe(), "the copy describes itself otherwise")
    lengths = [[p.length(value) for value in p.encode(values)] for p in (copy, original)]
    require(lengths[0] == lengths[1], f"lengths are {lengths[0]} in the copy and {lengths[1]} here")


@promise("interfaces.Preprocessing", "weights")
def the_same_seed_gives_the_same_augmentation(case: Case) -> None:
    """``augment`` draws from the global generators alone: as they are seeded, so is the result."""
    built = subject(case)
    preprocessing = built.backbone.preprocessing
    if not preprocessing.augments:
        require(preprocessing.augment("as it is") == "as it is", "augments is False, and augment changes a value")
        return
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        encoded = preprocessing.encode(built.values[:BATCH])
        drawn.append(preprocessing.collate([preprocessing.augment(value) for value in encoded]))
    require(same(drawn[0], drawn[1]), "the same seed gives another augmentation")
    require(not same(drawn[0], drawn[2]), "another seed gives the same augmentation: augments should be False")


@promise("interfaces.Preprocessing", "weights")
def its_example_goes_through(case: Case) -> None:
    """``example`` returns a raw value that the backbone takes, or None."""
    built = subject(case)
    example = built.backbone.preprocessing.example()
    if example is not None:
        require_as_declared(built.backbone, outputs(built.backbone, built.batch(built.backbone, [example] * BATCH)))


@promise("interfaces.Backbone", "training")
def gradients_are_finite(case: Case) -> None:
    """In training every parameter gets a finite gradient, and no stage gets none but zeros."""
    built = Subject(case)
    model = built.model().train()
    loss: Tensor = torch.nn.functional.cross_entropy(model(built.inputs), torch.tensor(TARGETS))
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        require(parameter.grad is not None, f"{name} takes no part in the output: leave it out, or make it a buffer")
        require(parameter.grad is not None and parameter.grad.isfinite().all(), f"the gradient of {name} is not finite")
    for name, stage in model.stages.items():
        gradients = [p.grad for p in stage.parameters() if p.grad is not None]
        require(
            not gradients or any(g.abs().sum() > 0 for g in gradients), f"every gradient of the stage {name!r} is zero"
        )


@promise("interfaces.ForeignModel", "weights")
def networks_of_other_libraries_take_its_weights(case: Case) -> None:
    """Each of ``foreign_models`` takes the backbone's tensors by the names given, and computes the same outputs."""
    built = subject(case)
    for name, foreign in built.backbone.foreign_models(OUTPUTS).items():
        require(json.loads(json.dumps(dict(foreign.options))) == foreign.options, f"the options of {name} are no JSON")
        last = nn.Linear(built.backbone.features.size, OUTPUTS)
        weights = {foreign.names[ours]: tensor for ours, tensor in built.backbone.state_dict().items()}
        weights |= {f"{foreign.output}.{ours}": tensor for ours, tensor in last.state_dict().items()}
        module, _, function = foreign.factory.partition(":")
        theirs: nn.Module = getattr(importlib.import_module(module), function)(**foreign.options)
        theirs.load_state_dict(weights, strict=True)
        with torch.no_grad():
            ours_out, theirs_out = last(outputs(built.backbone, built.inputs)), theirs.eval()(built.inputs)
        require(torch.allclose(ours_out, theirs_out, rtol=1e-4, atol=1e-5), f"{name} gives other outputs")
