"""Contracts of backbones and their preprocessing."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import pickle
import unittest
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from transfer.interfaces import Backbone, FeatureSpec, Head, Preprocessing
from transfer.interfaces.preprocessing import move
from transfer.models.model import Model
from transfer.testing.cases import BATCH, TEXTS, Broken, Case, promise, require
from transfer.testing.values import images, unchanged, variants

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
        """Return float (B, out_features)."""
        if not isinstance(features, Tensor):
            steps, mask = features
            weights = mask.unsqueeze(-1).to(steps.dtype)
            features = (steps * weights).sum(1) / weights.sum(1)
        return self.output(self.dropout(features))


class Subject:
    """A case's backbone on the CPU in eval mode, with random weights from a fixed seed.

    Args:
        case: Backbone with options.
        seed: Seed of the weights.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        component = case.component()
        self.cls: type[Backbone] = component.cls
        self.options: Mapping[str, Any] = component.options
        self.values = self._values(case)
        torch.manual_seed(seed)
        self.backbone = self.cls.from_data(self.values, **self.options).eval()
        self.inputs = self.batch(self.backbone)
        self._require_different_values()

    def batch(self, backbone: Backbone, values: Sequence[Any] | None = None) -> Any:
        """Return a batch of raw values for a backbone; None: of the first four values of the case."""
        preprocessing = backbone.preprocessing
        return preprocessing.model_inputs(preprocessing.encode(self.values[:BATCH] if values is None else values))

    def model(self) -> Model:
        """Return the backbone with a head."""
        return Model(self.backbone, AnyHead(self.backbone.features, OUTPUTS))

    def _values(self, case: Case) -> Sequence[Any]:
        """Return the values of the case, or values that the kit makes for the fields of the backbone."""
        backbone = on_meta(case)
        fields = getattr(backbone, "fields", (None,))
        named = all(isinstance(field, str) and field for field in fields)
        require(named, f"the class attribute field is {fields[0]!r}: expected the name of a field")
        if case.values is not None:
            require(len(case.values) >= BATCH, f"expected {BATCH} or more raw values, got {len(case.values)}")
            return case.values
        if set(fields) <= {"text", "image"}:
            columns = [TEXTS if field == "text" else images() for field in fields]
            return columns[0] if len(columns) == 1 else list(zip(*columns, strict=False))
        example = backbone.preprocessing.example()
        made = None if example is None else variants(example)
        if made is None:
            name = case.name.rpartition(":")[2]
            fix = f"give {BATCH} different ones, contracts(values={{{name!r}: [...]}})"
            raise Broken(f"the kit cannot make raw values of {' and '.join(map(str, fields))}: {fix}")
        return made

    def _require_different_values(self) -> None:
        """Require that the first four values are different inputs; with equal ones, batches would prove nothing."""
        inputs = [self.batch(self.backbone, [value]) for value in self.values[:BATCH]]
        pairs = itertools.combinations(range(BATCH), 2)
        equal = [f"{i} and {j}" for i, j in pairs if same(inputs[i], inputs[j])]
        require(not equal, f"the raw values {', '.join(equal)} are the same input: give {BATCH} different values")


@lru_cache(maxsize=1)  # the contracts of one case are checked one after the other
def subject(case: Case) -> Subject:
    """Return the case's backbone, which no contract may change."""
    return Subject(case)


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a value that passes between two stages."""
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in tensors(item)]


def same(one: Any, other: Any) -> bool:
    """Return whether two batches or two outputs are bit-identical."""
    pairs = list(zip(tensors(one), tensors(other), strict=False))
    alike = len(tensors(one)) == len(tensors(other)) and isinstance(one, Tensor) == isinstance(other, Tensor)
    return alike and all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def outputs(backbone: Backbone, inputs: Any) -> Any:
    """Run a backbone in eval mode without gradients."""
    return backbone.eval()(inputs)


def require_as_declared(backbone: Backbone, value: Any, batch: int = BATCH) -> None:
    """Require that an output agrees with the backbone's FeatureSpec."""
    spec = backbone.features
    if spec.layout == "vector":
        require(isinstance(value, Tensor), f"features is a vector, but forward returns a {type(value).__name__}")
        described = f"{tuple(value.shape)} of {value.dtype}"
        good = value.shape == (batch, spec.size) and value.dtype == torch.float32
        require(
            good, f"forward returns {described} for {spec}: expected (B, D) = {(batch, spec.size)} of torch.float32"
        )
        return
    pair = isinstance(value, tuple) and len(value) == 2
    require(
        pair, f"features is a sequence, but forward returns a {type(value).__name__}: expected a pair of steps and mask"
    )
    steps, mask = value
    described = f"{tuple(steps.shape)} of {steps.dtype} and {tuple(mask.shape)} of {mask.dtype}"
    good = (*mask.shape, spec.size) == tuple(steps.shape) and mask.dim() == 2 and len(steps) == batch
    good = good and (steps.dtype, mask.dtype) == (torch.float32, torch.bool)
    require(good, f"forward returns {described} for {spec}: expected (B, T, D) of float32 and (B, T) of bool")


def on_meta(case: Case) -> Backbone:
    """Build a case's backbone as in the check of a config: on the meta device, without memory."""
    with torch.device("meta"):
        backbone: Backbone = case.component().make()
    return backbone


@promise("interfaces.Backbone", "quick")
def it_is_built_on_the_meta_device(case: Case) -> None:
    """The constructor builds the complete architecture from its options under torch.device("meta"), without memory."""
    real = [name for name, tensor in on_meta(case).state_dict().items() if not tensor.is_meta]
    require(not real, f"not on the meta device: {', '.join(real[:5])}; create tensors without a device")


@promise("interfaces.Backbone", "quick")
def stages_cover_every_parameter_and_buffer_once(case: Case) -> None:
    """Every parameter and every buffer belongs to exactly one stage."""
    backbone = on_meta(case)
    stages = dict(backbone.stages.named_children())
    for kind in ("named_parameters", "named_buffers"):
        staged = {f"stages.{s}.{name}" for s, stage in stages.items() for name, _ in getattr(stage, kind)()}
        outside = {name for name, _ in getattr(backbone, kind)()} - staged
        require(not outside, f"outside of the stages: {', '.join(sorted(outside))}")
    # A shared parameter could be frozen in one stage and trained in the other.
    owners: dict[int, str] = {}
    for name, stage in stages.items():
        for parameter in stage.parameters():
            owner = owners.setdefault(id(parameter), name)
            require(owner == name, f"the stages {owner!r} and {name!r} share a parameter")


@promise("interfaces.FeatureSpec", "quick")
def features_are_as_declared_on_the_meta_device(case: Case) -> None:
    """The example of the preprocessing runs on the meta device, and the output agrees with ``features``."""
    backbone = on_meta(case)
    example = backbone.preprocessing.example()
    if example is None:
        raise unittest.SkipTest("the preprocessing has no example")
    # Encoding runs outside of the meta device: only the forward pass is checked without memory.
    inputs = backbone.preprocessing.model_inputs(backbone.preprocessing.encode([example] * BATCH))
    require_as_declared(backbone, outputs(backbone, move(inputs, torch.device("meta"))))


@promise("interfaces.Preprocessing", "quick")
def preprocessing_describes_itself_in_json(case: Case) -> None:
    """``describe`` returns the settings that change the model's input, as JSON values."""
    described = on_meta(case).preprocessing.describe()
    try:
        json.dumps(dict(described))
    except TypeError as error:
        require(False, f"describe returns {described!r}, which is no JSON: {error}")


@promise("interfaces.Backbone", "weights")
def stages_chain(case: Case) -> None:
    """``forward`` runs the stages in order. A tensor or a tuple of tensors passes from each stage to the next."""
    built = subject(case)
    value = built.inputs
    with torch.no_grad():
        for name, stage in built.backbone.stages.named_children():
            value = stage(value)
            good = isinstance(value, Tensor) or (isinstance(value, tuple) and value)
            require(
                good, f"the stage {name!r} returns a {type(value).__name__}: expected a tensor or a tuple of tensors"
            )
    require(
        same(value, outputs(built.backbone, built.inputs)), "forward and the stages in order return different outputs"
    )


@promise("interfaces.FeatureSpec", "weights")
def features_are_as_declared(case: Case) -> None:
    """The last stage returns finite features as ``features`` declares; every sequence has at least one real step."""
    built = subject(case)
    value = outputs(built.backbone, built.inputs)
    require_as_declared(built.backbone, value)
    require(tensors(value)[0].isfinite().all(), "a feature is not finite")
    if built.backbone.features.layout == "sequence":
        require(value[1].any(1).all(), "a sequence has no real step")


@promise("interfaces.Backbone", "weights")
def examples_do_not_depend_on_their_batch(case: Case) -> None:
    """In eval mode the features of an example do not depend on the other examples and the padding of its batch."""
    built = subject(case)
    together = tensors(outputs(built.backbone, built.inputs))
    alone = tensors(outputs(built.backbone, built.batch(built.backbone, built.values[1:2])))
    for one, other in zip(alone, together, strict=True):
        if built.backbone.features.layout == "sequence":
            other = other[:, : one.shape[1]]
        # Kernels may add in another order for another batch size: the tolerance is relative to the largest feature.
        scale = float(other.float().abs().max())
        difference = float((one[0].float() - other[1].float()).abs().max())
        require(
            difference <= 1e-3 * scale,
            f"other examples in the batch change the features of an example by {difference:.2g} of {scale:.2g}",
        )


@promise("interfaces.Backbone", "weights")
def the_state_dict_restores_the_backbone(case: Case) -> None:
    """A second backbone with the same options, other weights and the state dict of the first computes the same."""
    built, other = subject(case), Subject(case, seed=1)
    # Another seed must change the features. Otherwise the comparison after loading proves nothing.
    drawn = not same(outputs(other.backbone, built.inputs), outputs(built.backbone, built.inputs))
    require(drawn or not list(built.backbone.parameters()), "another seed results in the same weights")
    other.backbone.load_state_dict(built.backbone.state_dict())
    equal = same(outputs(other.backbone, built.inputs), outputs(built.backbone, built.inputs))
    require(equal, "with the same state dict the features differ: a tensor is neither parameter nor buffer")


@promise("interfaces.Backbone", "weights")
def assets_and_state_dict_restore_the_backbone_without_data(case: Case) -> None:
    """``from_assets`` with the result of ``assets``, and the state dict, restore the backbone and its preprocessing."""
    built = subject(case)
    assets = built.backbone.assets()
    good = all(isinstance(text, str) and name == name.rsplit("/")[-1] for name, text in assets.items())
    require(good, f"assets returns {dict.fromkeys(assets)}: expected texts by file name")
    other = built.cls.from_assets(assets, **built.options)
    other.load_state_dict(built.backbone.state_dict())
    require(same(built.batch(other), built.inputs), "the restored backbone makes other batches")
    require(
        same(outputs(other, built.inputs), outputs(built.backbone, built.inputs)),
        "the restored backbone computes other features",
    )
    require(other.features == built.backbone.features, f"the restored backbone declares {other.features}")
    described = other.preprocessing.describe() == built.backbone.preprocessing.describe()
    require(described, "the preprocessing of the restored backbone has another description")


@promise("interfaces.Preprocessing", "weights")
def preprocessing_is_deterministic(case: Case) -> None:
    """``encode`` and ``collate`` depend only on the values, not on the random seed or the grouping of the values."""
    built = subject(case)
    torch.manual_seed(99)
    require(same(built.batch(built.backbone), built.inputs), "encoding the same values again makes another batch")
    preprocessing = built.backbone.preprocessing
    # Workers encode other groups of values than the cache, so the grouping must not matter.
    one_by_one = [preprocessing.encode([value])[0] for value in built.values[:BATCH]]
    require(
        same(preprocessing.model_inputs(one_by_one), built.inputs), "encoding values one by one makes another batch"
    )


@promise("interfaces.Preprocessing", "weights")
def preprocessing_survives_pickling(case: Case) -> None:
    """A pickled copy, as in loader processes, has the same batches, lengths and description as the original."""
    built = subject(case)
    original = built.backbone.preprocessing
    pickled: Preprocessing = pickle.loads(pickle.dumps(original))  # noqa: S301  # pickled on this line
    values = built.values[:BATCH]
    require(same(pickled.model_inputs(pickled.encode(values)), built.inputs), "the copy makes another batch")
    require(pickled.describe() == original.describe(), "the copy has another description")
    lengths = [[p.length(value) for value in p.encode(values)] for p in (pickled, original)]
    require(lengths[0] == lengths[1], f"the lengths are {lengths[0]} in the copy and {lengths[1]} in the original")


@promise("interfaces.Preprocessing", "weights")
def the_same_seed_gives_the_same_augmentation(case: Case) -> None:
    """``augment`` only draws from the global random generators: the seed decides the result."""
    built = subject(case)
    preprocessing = built.backbone.preprocessing
    if not preprocessing.augments:  # then the framework never calls it
        return
    drawn = []
    # The first two results must be equal, and the third must differ.
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        encoded = preprocessing.encode(built.values[:BATCH])
        drawn.append(preprocessing.model_inputs([preprocessing.augment(value) for value in encoded]))
    require(same(drawn[0], drawn[1]), "the same seed results in another augmentation")
    require(not same(drawn[0], drawn[2]), "another seed results in the same augmentation: augments should be False")


@promise("interfaces.Preprocessing", "weights")
def augmentation_does_not_change_its_argument(case: Case) -> None:
    """``augment`` returns a new value: encoded values are kept in memory and augmented again in every epoch."""
    preprocessing = subject(case).backbone.preprocessing
    if not preprocessing.augments:
        return
    for value in preprocessing.encode(subject(case).values[:BATCH]):
        before = copy.deepcopy(value)
        torch.manual_seed(1)
        preprocessing.augment(value)
        require(unchanged(value, before), "augment works in place on the encoded value: return a new one")


@promise("interfaces.Preprocessing", "weights")
def the_example_is_a_valid_input(case: Case) -> None:
    """``example`` returns a raw value that the backbone accepts, or None."""
    built = subject(case)
    example = built.backbone.preprocessing.example()
    if example is not None:
        require_as_declared(built.backbone, outputs(built.backbone, built.batch(built.backbone, [example] * BATCH)))


@promise("interfaces.Backbone", "training")
def gradients_are_finite(case: Case) -> None:
    """In training every parameter has a finite gradient, and no stage has only zeros as gradients."""
    built = Subject(case)
    model = built.model().train()
    loss: Tensor = torch.nn.functional.cross_entropy(model(built.inputs), torch.tensor(TARGETS))
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        require(parameter.grad is not None, f"{name} has no gradient: remove it, or make it a buffer")
        require(parameter.grad is not None and parameter.grad.isfinite().all(), f"the gradient of {name} is not finite")
    for name, stage in model.stages.items():
        gradients = [p.grad for p in stage.parameters() if p.grad is not None]
        require(
            not gradients or any(g.abs().sum() > 0 for g in gradients), f"all gradients of the stage {name!r} are zero"
        )


@promise("interfaces.ForeignModel", "weights")
def foreign_models_take_the_weights(case: Case) -> None:
    """Each of ``foreign_models`` takes the backbone's tensors under its names, and computes the same outputs."""
    built = subject(case)
    for name, foreign in built.backbone.foreign_models(OUTPUTS).items():
        require(json.loads(json.dumps(dict(foreign.options))) == foreign.options, f"the options of {name} are no JSON")
        last = nn.Linear(built.backbone.features.size, OUTPUTS)
        weights = {foreign.names[ours]: tensor for ours, tensor in built.backbone.state_dict().items()}
        weights |= {f"{foreign.output}.{ours}": tensor for ours, tensor in last.state_dict().items()}
        # Imported by name, as in an export: the kit does not depend on that library.
        module, _, function = foreign.factory.partition(":")
        theirs: nn.Module = getattr(importlib.import_module(module), function)(**foreign.options)
        theirs.load_state_dict(weights, strict=True)
        with torch.no_grad():
            ours_out, theirs_out = last(outputs(built.backbone, built.inputs)), theirs.eval()(built.inputs)
        require(torch.allclose(ours_out, theirs_out, rtol=1e-4, atol=1e-5), f"{name} computes other outputs")
