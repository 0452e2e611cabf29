"""Digests by content, and the cache keys that are made of them."""

from __future__ import annotations

import contextvars
import functools
import math
import os
import subprocess
import sys
import textwrap
import threading
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import POINT_SIZE, PointPreprocessing
from torch import Tensor, nn

from transfer import Backbone, FeatureSpec, Preprocessing, Split
from transfer.builtin.heads import Linear
from transfer.data.loader import Loader
from transfer.feature_cache.content_digest import content_digest
from transfer.feature_cache.prefix import FrozenPrefix
from transfer.feature_cache.store import FeatureCache
from transfer.models.model import Model


def execute(source: str, name: str = "__main__", **values: Any) -> dict[str, Any]:
    """Run code as a notebook's cell does, without a file; return its names."""
    namespace: dict[str, Any] = {"__name__": name, "torch": torch, "nn": nn, **values}
    exec(textwrap.dedent(source), namespace)
    return namespace


@dataclass
class Settings:
    scale: float = 1.0
    names: list[str] = field(default_factory=list)


class Color(Enum):
    RED = 1
    BLUE = 2


class Plain:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Memo:
    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.memo: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"scale": self.scale}


class Stated:
    def __init__(self, scale: float, statistics: Any) -> None:
        self.scale = scale
        self.statistics = statistics

    def cache_state(self) -> float:
        return self.scale


class Lazy:
    @functools.cached_property
    def table(self) -> list[int]:
        return [1, 2, 3]


def scaled(factor: float) -> Callable[[float], float]:
    return lambda value: value * factor


# ---------------------------------------------------------------------------------------------------------- differences

PAIRS: dict[str, tuple[Any, Any]] = {
    "type of a number": (1, 1.0),
    "boolean and number": (True, 1),
    "sign of zero": (0.0, -0.0),
    "text and bytes": ("a", b"a"),
    "boundaries of texts": (["ab", "c"], ["a", "bc"]),
    "tuple and list": ((1, 2), [1, 2]),
    "order of a list": ([1, 2], [2, 1]),
    "value in a dictionary": ({"a": [1]}, {"a": [2]}),
    "key of a dictionary": ({"a": 1}, {"b": 1}),
    "order of a dictionary": (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
    "item of a set": ({"a", "b"}, {"a", "c"}),
    "value of an array": (np.zeros(3), np.array([0.0, 0.0, 1e-9])),
    "dtype of an array": (np.zeros(3, dtype=np.int64), np.zeros(3)),
    "shape of an array": (np.zeros((2, 3)), np.zeros((3, 2))),
    "array of objects": (np.array(["a", None], dtype=object), np.array(["b", None], dtype=object)),
    "scalar of numpy": (np.float32(1), np.float64(1)),
    "value of a tensor": (torch.zeros(3), torch.tensor([0.0, 0.0, 1e-9])),
    "dtype of a tensor": (torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)),
    "shape of a tensor": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "sparse tensor": (torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse()),
    "field of a dataclass": (Settings(), Settings(2.0)),
    "list in a dataclass": (Settings(names=["a"]), Settings(names=["b"])),
    "member of an enumeration": (Color.RED, Color.BLUE),
    "attribute of an object": (Plain(a=1), Plain(a=2)),
    "name of an attribute": (Plain(a=1), Plain(b=1)),
    "array in an object in a list": ([Plain(a=np.zeros(2))], [Plain(a=np.ones(2))]),
    "dtype": (torch.float32, torch.float16),
    "device": (torch.device("cpu"), torch.device("meta")),
    "shape": (torch.Size([1, 2]), torch.Size([2, 1])),
    "graph": tuple(torch.fx.symbolic_trace(module) for module in (nn.Dropout(0.1), nn.ReLU())),
    "built-in function": (torch.relu, torch.sigmoid),
    "function of a library": (nn.functional.relu, nn.functional.gelu),
    "class of a library": (nn.ReLU, nn.GELU),
    "closure of a function": (scaled(1.0), scaled(2.0)),
    "argument of a partial function": (functools.partial(math.pow, 2), functools.partial(math.pow, 3)),
    "object of a bound method": (Memo(1.0).__getstate__, Memo(2.0).__getstate__),
    "state for pickle": (Memo(1.0), Memo(2.0)),
    "state for caches": (Stated(1.0, None), Stated(2.0, None)),
    "attribute of a module of a library": (nn.Dropout(0.1), nn.Dropout(0.2)),
    "order of modules": (nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.ReLU())),
    "type of a cycle": (Plain(a=[]), Plain(a=())),
}


@pytest.mark.parametrize("name", PAIRS)
def test_different_content_has_different_digests(name: str) -> None:
    one, other = PAIRS[name]
    assert content_digest(one) == content_digest(one)
    assert content_digest(one) != content_digest(other)


def test_function_options_of_one_kind_differ() -> None:
    assert content_digest(lambda x: torch.relu(x)) != content_digest(lambda x: x * x)
    assert content_digest(lambda x: x * 2) != content_digest(lambda x: x * 3)


CODE: dict[str, tuple[str, str]] = {
    "body": ("def f(x): return x + 1", "def f(x): return x - 1"),
    "constant": ("def f(x): return x + 1", "def f(x): return x + 2"),
    "default": ("def f(x, y=1): return x + y", "def f(x, y=2): return x + y"),
    "keyword default": ("def f(x, *, y=1): return x + y", "def f(x, *, y=2): return x + y"),
    "attribute of the function": ("def f(x): return f.k\nf.k = 1", "def f(x): return f.k\nf.k = 2"),
    "global number": ("K = 1\ndef f(x): return x + K", "K = 2\ndef f(x): return x + K"),
    "global dictionary": ("K = {'a': 1}\ndef f(x): return K[x]", "K = {'a': 2}\ndef f(x): return K[x]"),
    "global tensor": (
        "K = torch.zeros(2)\ndef f(x): return x + K",
        "K = torch.ones(2)\ndef f(x): return x + K",
    ),
    "helper": ("def h(x): return x\ndef f(x): return h(x)", "def h(x): return -x\ndef f(x): return h(x)"),
    "helper of a helper": (
        "def g(x): return x\ndef h(x): return g(x)\ndef f(x): return h(x)",
        "def g(x): return -x\ndef h(x): return g(x)\ndef f(x): return h(x)",
    ),
    "helper in a nested function": (
        "def h(x): return x\ndef f(x): return [h(y) for y in x]",
        "def h(x): return -x\ndef f(x): return [h(y) for y in x]",
    ),
    "class that a function makes": (
        "class C:\n  k = 1\ndef f(x): return C().k",
        "class C:\n  k = 2\ndef f(x): return C().k",
    ),
    "set of constants": ("def f(x): return x in {'a', 'b'}", "def f(x): return x in {'a', 'c'}"),
    "method": ("class f:\n  def m(self): return 1", "class f:\n  def m(self): return 2"),
    "static method": (
        "class f:\n  @staticmethod\n  def m(): return 1",
        "class f:\n  @staticmethod\n  def m(): return 2",
    ),
    "property": ("class f:\n  @property\n  def m(self): return 1", "class f:\n  @property\n  def m(self): return 2"),
    "base class": (
        "class B:\n  def m(self): return 1\nclass f(B): pass",
        "class B:\n  def m(self): return 2\nclass f(B): pass",
    ),
    "function that a library has decorated": (
        "@torch.no_grad()\ndef f(x): return x + 1",
        "@torch.no_grad()\ndef f(x): return x - 1",
    ),
    "context manager": (
        "import contextlib\n@contextlib.contextmanager\ndef f(x): yield x + 1",
        "import contextlib\n@contextlib.contextmanager\ndef f(x): yield x - 1",
    ),
    "private global": ("__k = 1\ndef f(x): return x + __k", "__k = 2\ndef f(x): return x + __k"),
    "memoized helper": (
        "import functools\n@functools.cache\ndef h(x): return x\ndef f(x): return h(x)",
        "import functools\n@functools.cache\ndef h(x): return -x\ndef f(x): return h(x)",
    ),
}


@pytest.mark.parametrize("module", ["__main__", "builtins", "torch.nn"])
@pytest.mark.parametrize("name", CODE)
def test_different_code_has_different_digests(name: str, module: str) -> None:
    one, other = (execute(source, module)["f"] for source in CODE[name])
    again = execute("\n\n# moved by a comment\n" + CODE[name][0], module)["f"]
    assert content_digest(one) == content_digest(again)
    assert content_digest(one) != content_digest(other)


def test_digest_contains_named_helper_of_a_module() -> None:
    def function(helper: str, unused: str = "0") -> str:
        module = types.ModuleType("some_helpers")
        exec(f"def h(x): return {helper}\ndef unused(x): return {unused}", vars(module))
        return content_digest(execute("def f(x): return some_helpers.h(x)", some_helpers=module)["f"])

    assert function("x") == function("x", "1")
    assert function("x") != function("-x")


def test_digest_contains_helper_imported_in_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(helper: str) -> str:
        module = types.ModuleType("some_package.helpers")
        exec(f"def h(x): return {helper}", vars(module))
        monkeypatch.setitem(sys.modules, "some_package.helpers", module)
        absolute = "def f(x):\n  from some_package.helpers import h\n  return h(x)"
        relative = absolute.replace("some_package.helpers", ".helpers")
        made = [execute(source, __package__="some_package")["f"] for source in (absolute, relative)]
        return content_digest(made)

    assert function("x") == function("x")
    assert function("x") != function("-x")


# --------------------------------------------------------------------------------------------------------- same content


def test_equal_content_has_equal_digests() -> None:
    for one, other in (
        ({"a", "b", "c"}, {"c", "b", "a"}),
        ([[1], [1]], [[1]] * 2),
        (torch.zeros(3, 2), torch.zeros(2, 3).T),
        (nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)),
        (nn.Linear(2, 2, device="meta").train(), nn.Linear(2, 2, device="meta").eval()),
        (scaled(2.0), scaled(2.0)),
        (Plain(a=1, b=2), Plain(b=2, a=1)),
        (Stated(1.0, [1]), Stated(1.0, [2])),
    ):
        assert content_digest(one) == content_digest(other)


def test_digest_of_graph_module_of_many_nodes() -> None:
    def traced() -> nn.Module:
        return torch.fx.symbolic_trace(nn.Sequential(*(nn.ReLU() for _ in range(1000))))

    assert content_digest(traced()) == content_digest(traced())


def test_compiled_function_has_the_digest_of_the_function() -> None:
    def compiled(source: str) -> str:
        return content_digest(torch.compile(execute(source)["f"]))

    assert compiled("def f(x): return x") == compiled("def f(x): return x")
    assert compiled("def f(x): return x") != compiled("def f(x): return -x")
    assert content_digest(torch.compile(nn.Dropout(0.1))) == content_digest(nn.Dropout(0.1))


def test_digest_ignores_memos() -> None:
    lazy, memo = Lazy(), Memo(1.0)
    before = content_digest([lazy, memo])
    assert lazy.table
    memo.memo["a"] = 1
    assert content_digest([lazy, memo]) == before


def test_digest_of_objects_without_content() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    values = [threading.Lock(), variable, (n for n in [1]), sys.stdout, torch, np.random.default_rng(0)]
    assert content_digest(values) == content_digest(values)


def test_digest_of_cyclic_references() -> None:
    def cycle(value: int) -> Plain:
        one = Plain(value=value)
        one.other = [Plain(one=one)]
        return one

    assert content_digest(cycle(1)) == content_digest(cycle(1))
    assert content_digest(cycle(1)) != content_digest(cycle(2))


def test_digest_of_long_chain_of_functions() -> None:
    def chain(last: str) -> str:
        lines = [f"def f{i}(x): return f{i + 1}(x)" for i in range(2000)]
        return content_digest(execute("\n".join([*lines, f"def f2000(x): return {last}"]))["f0"])

    assert chain("x") == chain("x")
    assert chain("x") != chain("-x")


# ----------------------------------------------------------------------------------------------------------------- keys


class Activation(nn.Module):
    """A linear layer and a function that an option chooses."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu, offset: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(POINT_SIZE, 3)
        self.act = act
        self.register_buffer("offset", torch.full((3,), offset), persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        return self.act(self.linear(points)) + self.offset


class Tabled(PointPreprocessing):
    """Points, shifted by a table; the settings are not described."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def describe(self) -> dict[str, Any]:
        return {}


class One(Backbone):
    field = "point"

    def __init__(self, stage: nn.Module) -> None:
        super().__init__({"stage": stage})

    @property
    def features(self) -> FeatureSpec:
        return FeatureSpec("vector", 3)

    @property
    def preprocessing(self) -> Preprocessing:
        return PointPreprocessing()


def prefix_and_loader(
    stage: nn.Module | None = None, preprocessing: Preprocessing | None = None, *, training: bool = False
) -> tuple[FrozenPrefix, Loader]:
    """Return a prefix of one stage, whose weights are the same each time, and a loader."""
    stage = stage or Activation()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    backbone = One(stage)
    split = Split({"point": [[float(i + j) for j in range(POINT_SIZE)] for i in range(10)]}, np.arange(10) % 2)
    loader = Loader(split, ("point",), preprocessing or backbone.preprocessing, batch_size=4, training=training)
    return FrozenPrefix(Model(backbone, Linear(backbone.features, 2)), 1, {}, "fp32"), loader


def key(stage: nn.Module | None = None, preprocessing: Preprocessing | None = None, view: int | None = None) -> str:
    prefix, loader = prefix_and_loader(stage, preprocessing, training=view is not None)
    return prefix.key(loader, view)


def square(values: Tensor) -> Tensor:
    return values * values


def test_key_contains_option_stored_as_function() -> None:
    keys = {
        key(Activation(act)) for act in (torch.relu, square, lambda x: x * 3, functools.partial(torch.clamp, min=0))
    }
    assert len(keys) == 4
    assert key(Activation(square)) in keys


def test_key_contains_buffers_outside_the_state_dict() -> None:
    assert "offset" not in Activation().state_dict()
    assert key(Activation(offset=1.0)) == key(Activation(offset=1.0)) != key(Activation(offset=2.0))


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, lambda v: {"a": [v]}, lambda v: Settings(v), lambda v: {v}])
def test_key_contains_attributes_of_the_preprocessing(make: Callable[[float], Any]) -> None:
    assert key(preprocessing=Tabled(make(1.0))) == key(preprocessing=Tabled(make(1.0)))
    assert key(preprocessing=Tabled(make(1.0))) != key(preprocessing=Tabled(make(2.0)))


STAGE = """
def act(x):
    return {act}

class Base(nn.Module):
    def forward(self, points):
        return {base}

class Stage(Base):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
"""


def test_key_contains_code_of_redefined_notebook_class() -> None:
    def made(act: str = "x", base: str = "act(self.linear(points))") -> str:
        return key(execute(STAGE.format(act=act, base=base))["Stage"]())

    assert made() == made()
    # Each one computes the same features, so only the code makes the difference.
    assert len({made(), made(act="x + 0"), made(base="act(self.linear(points + 0))")}) == 3


def test_key_contains_forward_hooks() -> None:
    stages = Activation(), Activation(), Activation()
    for stage, factor in zip(stages, (1, 1, 2), strict=True):
        stage.linear.register_forward_hook(lambda module, inputs, output, factor=factor: output * factor)
    one, same, other = map(key, stages)
    assert one == same != other


MODE = contextvars.ContextVar("MODE", default=1.0)


class Unlisted(Activation):
    """A stage whose output depends on a value that no digest of attributes and code can contain."""

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points) * MODE.get()


def test_key_contains_a_sample_of_the_features() -> None:
    before = key(Unlisted())
    assert content_digest(MODE) == content_digest(MODE)
    token = MODE.set(2.0)
    assert key(Unlisted()) != before
    MODE.reset(token)
    assert key(Unlisted()) == before


class UnlistedNoise(PointPreprocessing):
    def augment(self, encoded: Tensor) -> Tensor:
        return encoded + MODE.get() * torch.rand(POINT_SIZE)


def test_key_of_view_contains_augmented_sample() -> None:
    before, plain = key(preprocessing=UnlistedNoise(), view=0), key(preprocessing=UnlistedNoise())
    token = MODE.set(2.0)
    assert key(preprocessing=UnlistedNoise(), view=0) != before
    assert key(preprocessing=UnlistedNoise()) == plain
    MODE.reset(token)


class Random(Activation):
    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points) + torch.rand(3)


def test_key_preserves_mode_and_random_state() -> None:
    prefix, loader = prefix_and_loader(Random(), UnlistedNoise(), training=True)
    prefix.model.train()
    state = torch.get_rng_state()
    prefix.key(loader, 0)
    assert prefix.model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_deeply_nested_attributes_are_not_cached(tmp_path: Path) -> None:
    nested: list[Any] = []
    for _ in range(sys.getrecursionlimit()):
        nested = [nested]
    stage = Activation()
    stage.nested = nested  # type: ignore[assignment]
    reason = FeatureCache(2**20, folder=tmp_path).load_or_compute(*prefix_and_loader(stage))
    assert isinstance(reason, str)
    assert "nested too deeply" in reason


PROCESS = """
import sys
sys.path[:0] = {path!r}
import torch
from some_stage import Stage, Settings
from test_content_digest import key
print(key(Stage(Settings({{"b", "a", "c"}}, ("x", 1)))))
"""
SOME_STAGE = """
from dataclasses import dataclass
import torch
from torch import nn
import some_helper

@dataclass(frozen=True)
class Settings:
    names: set
    pair: tuple

class Stage(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        self.by_function = {len: "len", some_helper.scale: "scale"}
        self.linear = nn.Linear(4, 3)

    def forward(self, points):
        return some_helper.scale(self.linear(points))
"""


def process_code(folder: Path) -> str:
    here = Path(__file__).parent
    return PROCESS.format(path=[str(folder), str(here), str(here.parent)])


def key_in_a_new_process(folder: Path, seed: int) -> str:
    process = subprocess.run(
        [sys.executable, "-c", process_code(folder)],
        env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_keys_across_processes_change_with_edited_helper(tmp_path: Path, python: Any) -> None:
    def write(name: str, content: str) -> None:
        (tmp_path / f"{name}.py").write_text(content, encoding="utf-8")

    write("some_stage", SOME_STAGE)
    write("some_helper", "def scale(values):\n    return values * 1.0\n")
    before = python("-c", process_code(tmp_path)).stdout.strip()
    assert before
    (tmp_path / "moved").mkdir()
    for file in tmp_path.glob("*.py"):
        file.rename(tmp_path / "moved" / file.name)
    assert key_in_a_new_process(tmp_path / "moved", 2) == before  # other hashes, addresses and paths
    tmp_path = tmp_path / "moved"
    write("some_helper", "def scale(values):\n    return values / 1.0\n")  # it computes the same
    assert python("-c", process_code(tmp_path)).stdout.strip() not in ("", before)
