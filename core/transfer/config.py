"""From YAML to a RunConfig: every problem found at once, each with file, line and the nearest valid key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, WrapValidator
from pydantic_core import PydanticCustomError

from transfer import registry
from transfer.document import Document, Key, make_document, read_document
from transfer.errors import ConfigError, PluginError, Problem, UserError, nearest
from transfer.optim import HANDED_OVER, OPTIMIZERS, SCHEDULERS
from transfer.registry import Kind
from transfer.schema import Block, options_model, validate


def _one_of(text: str) -> WrapValidator:
    """Say what a union takes in one sentence, where pydantic would list the complaint of every member."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValueError as error:
            raise PydanticCustomError("one_of", "it should be {text}", {"text": text}) from error

    return WrapValidator(check)


QUICK_EXAMPLES = 64
"""Examples per class of each split in a quick try."""


class Until(Block):
    """Freeze a stage and all before it."""

    until: str


class Parameters(Block):
    """Freeze every parameter whose name a pattern matches (``re.search``)."""

    parameters: Annotated[tuple[str, ...], Field(min_length=1)]


Freeze = Annotated[
    Literal["none", "backbone"] | Until | Parameters | tuple[str, ...],
    _one_of("none, backbone, {until: STAGE}, a list of stages, or {parameters: [REGEX, ...]}"),
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LearningRate = Annotated[
    Positive | Annotated[dict[str, Positive], Field(min_length=1)],
    _one_of("a positive number, or a positive number for each of head, backbone, any stage, and layer_decay"),
]


class Named(Block):
    """A block that names a plugin or one of torch's classes; the options of what it names stand beside the name."""

    name: str


class DataOptions(Named):
    """What every dataset's block takes beside the dataset's own options.

    Args:
        validation: The share of ``train`` that is cut off to pick the best epoch, where the data has no split for it.
        limit: Take only the first so many examples per class of each split.
    """

    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    limit: Annotated[int, Field(ge=1)] | None = None


class OptimizerOptions(Named):
    """What every optimizer's block takes beside torch's own options.

    Args:
        lr: The learning rate: of all parameters, or by group.
    """

    lr: LearningRate = 1e-3


class Phase(Block):
    """One stretch of training with one freeze policy.

    Args:
        epochs: Passes over the training split.
        freeze: What does not change in this phase.
        lr: Learning rates of this phase, instead of the optimizer's.
        scheduler: Scheduler of this phase, instead of the run's.
    """

    epochs: Annotated[int, Field(ge=1)]
    freeze: Freeze = "none"
    lr: LearningRate | None = None
    scheduler: dict[str, Any] | None = None


class TrainConfig(Block):
    """How the model is trained.

    Args:
        batch_size: Examples per step.
        evaluation_batch_size: Examples per step where nothing is trained; by default twice the batch size.
        optimizer: One of torch's optimizers by its lower-case name, with its options; lr may differ by group.
        scheduler: One of torch's schedulers by its lower-case name, with its options.
        phases: Run in order.
        bucket: Put examples of like length into one batch (texts); the order stays random by seed.
        workers: Loader processes; 0 loads in the training process.
    """

    batch_size: Annotated[int, Field(ge=1)] = 32
    evaluation_batch_size: Annotated[int, Field(ge=1)] | None = None
    optimizer: dict[str, Any] = Field(default_factory=lambda: {"name": "adam", "lr": 1e-3})
    scheduler: dict[str, Any] | None = None
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = (Phase(epochs=5),)
    bucket: bool = True
    workers: Annotated[int, Field(ge=0)] = 0


class _Sections(Block):
    """The top level of a config."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: dict[str, Any]
    backbone: dict[str, Any]
    head: dict[str, Any] = Field(default_factory=lambda: {"name": "linear"})
    task: dict[str, Any] = Field(default_factory=lambda: {"name": "classification"})
    train: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Component:
    """A plugin that a config names, and the options it gives.

    Args:
        kind: Its kind.
        plugin: Where it comes from.
        cls: Its class.
        options: Checked options, defaults filled in.
        plain: The whole block as JSON, name included.
        where: File and line of its block.
    """

    kind: Kind
    plugin: registry.Plugin
    cls: type[Any]
    options: Mapping[str, Any]
    plain: Mapping[str, Any]
    where: str

    def make(self, *handed_over: Any) -> Any:
        """Build it from what the framework hands over and its options; its mistakes name the line of its block."""
        with located(self.where):
            return self.cls(*handed_over, **self.options)


@dataclass(frozen=True)
class TorchPart:
    """One of torch's optimizers or schedulers that a config names.

    Args:
        name: Its lower-case name.
        cls: Its class.
        options: Checked options as the config gives them (torch's own defaults fill in the rest), without lr.
    """

    name: str
    cls: type[Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class ResolvedPhase:
    """A phase with everything that it inherits from the run filled in."""

    epochs: int
    freeze: Freeze
    lr: float | Mapping[str, float]
    scheduler: TorchPart | None


@dataclass(frozen=True)
class RunConfig:
    """A checked config.

    Args:
        seed: Of everything that is random.
        data, backbone, head, task: The components.
        data_options: Core's own options of the data block.
        train: How the model is trained.
        optimizer: The optimizer, without its learning rate, which is each phase's.
        phases: In order.
        document: Where each value was written.
        plain: The whole config as plain data, defaults filled in: what ``config.yaml`` of a run holds.
    """

    seed: int
    data: Component
    backbone: Component
    head: Component
    task: Component
    data_options: DataOptions
    train: TrainConfig
    optimizer: TorchPart
    phases: tuple[ResolvedPhase, ...]
    document: Document
    plain: dict[str, Any]

    @property
    def name(self) -> str:
        """What a run of this config is called."""
        source = Path(self.document.source)
        return source.stem if source.suffix in (".yaml", ".yml") else "run"

    def quick(self) -> RunConfig:
        """Return the config of a quick try: one epoch per phase over a few examples of each class."""
        limit = min(self.data_options.limit or QUICK_EXAMPLES, QUICK_EXAMPLES)
        plain = self.plain | {"data": {**self.plain["data"], "limit": limit}}
        phases = [{**phase, "epochs": 1} for phase in plain["train"]["phases"]]
        plain["train"] = plain["train"] | {"phases": phases}
        return replace(
            self,
            data_options=self.data_options.model_copy(update={"limit": limit}),
            phases=tuple(replace(phase, epochs=1) for phase in self.phases),
            plain=plain,
        )

    def at(self, *key: str | int) -> AbstractContextManager[None]:
        """Give an error raised inside the file and line of the value at ``key``, where it does not know better."""
        return located(self.document.where(key))


@contextmanager
def located(where: str) -> Iterator[None]:
    """Give an error raised inside a place, where it does not know better; a plain ValueError becomes a ConfigError."""
    try:
        yield
    except UserError as error:
        error.problems = tuple(p if p.where else replace(p, where=where) for p in error.problems)
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error), where=where) from error


def load_component(kind: Kind, block: Mapping[str, Any], source: str) -> Component:
    """Check the block of one component on its own (in a model folder).

    Raises:
        ConfigError: With every problem found.
    """
    section = "data" if kind == "dataset" else kind
    check = _Check(make_document({section: block}, source=source))
    component, _ = check.component(kind, check.document.data[section], Named)
    if component is None:
        raise ConfigError.of(check.problems)
    return component


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a config; of the plugins it imports those that the config names, and it reads no data.

    Args:
        source: The path of a YAML file, or the config as plain data.
        overrides: ``path.to.key=value`` each, as on the command line.

    Raises:
        ConfigError: With every problem found.
    """
    if isinstance(source, Mapping):
        return _Check(make_document(source, overrides)).config()
    return _Check(read_document(source, overrides)).config()


class _Check:
    """Checks a document part by part and collects the problems."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []

    def config(self) -> RunConfig:
        top = self.block(_Sections, self.document.data, (), "the config")
        # A mistake at the top level must not hide those inside the sections that are there.
        raw = {name: self.document.data.get(name) for name in _Sections.model_fields} if top is None else dict(top)
        dataset, data_options = self.component("dataset", raw["data"], DataOptions)
        backbone, _ = self.component("backbone", raw["backbone"], Named)
        head, _ = self.component("head", raw["head"], Named)
        task, _ = self.component("task", raw["task"], Named)
        train = self.block(TrainConfig, raw["train"], ("train",), "train") if isinstance(raw["train"], dict) else None
        optimizer, phases = self.training(train) if train else (None, [])
        if self.problems:
            raise ConfigError.of(self.problems)
        # Every part that is missing has put a problem on the list.
        assert top and dataset and data_options and backbone and head and task and train and optimizer  # noqa: PT018
        plain: dict[str, Any] = {"seed": top.seed, "data": dataset.plain}
        plain |= {"backbone": backbone.plain, "head": head.plain, "task": task.plain}
        plain |= {"train": train.model_dump(mode="json")}
        return RunConfig(
            top.seed, dataset, backbone, head, task, data_options, train, optimizer, tuple(phases), self.document, plain
        )

    def block(self, model: type[_M], value: Any, key: Key, what: str) -> _M | None:
        checked, problems = validate(model, value, self.document, key, what)
        self.problems += problems
        return checked

    def component(self, kind: Kind, raw: Any, base: type[_N]) -> tuple[Component | None, _N | None]:
        section = "data" if kind == "dataset" else kind
        if not isinstance(raw, dict):
            return None, None  # already reported
        name = raw.get("name")
        if not isinstance(name, str):
            names = sorted({p.name for p in registry.plugins(kind)})
            where = self.document.where((section,))
            self.problems.append(Problem(f"{section} needs a name", where, tuple(names), f"add name: ... to {section}"))
            return None, None
        try:
            plugin, cls = registry.find(kind, name), registry.load(kind, name)
            model = options_model(cls, base)
        except PluginError as error:
            where = self.document.where((section, "name"))
            # An import error knows the entry point at fault; the config's line still says who asked for it.
            self.problems += (replace(p, where=f"{where} -> {p.where}" if p.where else where) for p in error.problems)
            return None, None
        block = self.block(model, raw, (section,), f"{kind} {name!r}")
        if block is None:
            return None, None
        options = {field: getattr(block, field) for field in model.model_fields if field not in base.model_fields}
        where = self.document.where((section,))
        return Component(kind, plugin, cls, options, block.model_dump(mode="json"), where), block

    def training(self, train: TrainConfig) -> tuple[TorchPart | None, list[ResolvedPhase]]:
        key: Key = ("train", "optimizer")
        optimizer, block = self.torch_part(
            train.optimizer, key, "optimizer", OPTIMIZERS, OptimizerOptions, {"params", "lr"}
        )
        phases = []
        for index, phase in enumerate(train.phases):
            key = ("train", "phases", index, "scheduler") if phase.scheduler else ("train", "scheduler")
            scheduler = None
            if raw := phase.scheduler or train.scheduler:
                scheduler, _ = self.torch_part(raw, key, "scheduler", SCHEDULERS, Named, HANDED_OVER)
            lr = phase.lr if phase.lr is not None else block.lr if block else 1e-3
            phases.append(ResolvedPhase(phase.epochs, phase.freeze, lr, scheduler))
        return optimizer, phases

    def torch_part(
        self, raw: dict[str, Any], key: Key, what: str, known: Mapping[str, type[Any]], base: type[_N], skip: set[str]
    ) -> tuple[TorchPart | None, _N | None]:
        name = raw.get("name")
        if not isinstance(name, str) or name not in known:
            close = nearest(str(name), known)
            fix = f"did you mean {close!r}?" if close else f"choose one of torch's {what}s"
            where = self.document.where((*key, "name"))
            self.problems.append(Problem(f"there is no {what} called {name!r}", where, tuple(sorted(known)), fix))
            return None, None
        block = self.block(options_model(known[name], base, skip=skip), raw, key, f"{what} {name!r}")
        if block is None:
            return None, None
        given = {k: getattr(block, k) for k in sorted(block.model_fields_set) if k not in base.model_fields}
        return TorchPart(name, known[name], given), block


_M = TypeVar("_M", bound=BaseModel)
_N = TypeVar("_N", bound=Named)
