"""What is tested (a plugin with options), and what a contract is."""

from __future__ import annotations

import importlib
import inspect
import json
import unittest
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from transfer.config.check import load_component
from transfer.config.component import Component
from transfer.registry.entry_points import Kind

Cost = Literal["quick", "weights", "training", "data"]
"""quick: nothing is loaded, the meta device at most. weights: the model is built. training: steps. data: it is read."""

BATCH = 4
TEXTS = (
    "a warm , funny film that i would gladly watch again",
    "two hours of my life",
    "dull",
    "not a good film , but a warm one all the same",
)


@dataclass(frozen=True, eq=False)
class Case:
    """A plugin with options: what a contract is checked on.

    Args:
        kind: Its kind.
        name: What a config calls it, ``distribution:name`` or ``name``.
        options: Its options, as a config would write them: small ones, so that its tests are fast.
        values: For a backbone, four or more raw values of its field which differ; by default texts, pictures, or the
            preprocessing's own example.
    """

    kind: Kind
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    values: Sequence[Any] | None = None

    def __str__(self) -> str:
        options = ",".join(f"{key}={_short(value)}" for key, value in self.options.items())
        return f"{self.kind}-{self.name.rpartition(':')[2]}" + (f"[{options}]" if options else "")

    def component(self) -> Component:
        """Import the plugin and check the options.

        Raises:
            PluginError, ConfigError: As for a config.
        """
        return load_component(self.kind, {"name": self.name, **self.options}, f"options of {self.kind} {self.name!r}")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str).replace('"', "")
    return text if len(text) <= 24 else text[:21] + "..."


class ContractError(AssertionError):
    """A plugin does not keep a contract; the message says which, what was found, and where the contract is written."""


class Broken(Exception):  # noqa: N818  # raised inside the kit alone, which makes a ContractError of it
    """What a contract's function found."""


def require(kept: object, found: str) -> None:
    """Say what was found where a promise is not kept."""
    __tracebackhide__ = True
    if not kept:
        raise Broken(found)


@dataclass(frozen=True, eq=False)
class Contract:
    """One promise of one plugin.

    Args:
        case: The plugin.
        name: What is promised, in a few words.
        promise: The whole promise.
        written: The public name under ``transfer`` whose docstring says so.
        cost: What it takes to check it.
        function: Checks it.
    """

    case: Any
    name: str
    promise: str
    written: str
    cost: Cost
    function: Callable[[Any], None] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.case}-{self.name.replace(' ', '_')}"

    def check(self) -> None:
        """Check it.

        Raises:
            ContractError: It is not kept.
            unittest.SkipTest: It cannot be told here (an option is required, the data is not there); pytest skips.
        """
        __tracebackhide__ = True
        try:
            self.function(self.case)
        except Broken as broken:
            raise ContractError(self._failure(str(broken))) from None
        except (unittest.SkipTest, ContractError):
            raise
        except Exception as error:
            raise ContractError(self._failure(f"{type(error).__name__}: {error}")) from error

    def _failure(self, found: str) -> str:
        lines = (
            f"{self.case} breaks the contract '{self.name}'",
            f"  promised: {self.promise}",
            f"  found: {found}",
            f"  written: {self._place()}",
        )
        return "\n".join(lines)

    def _place(self) -> str:
        """Return the contract's public name with file and line."""
        module, _, name = self.written.rpartition(".")
        owner = inspect.unwrap(getattr(importlib.import_module(module), name))
        return f"{self.written} ({inspect.getsourcefile(owner)}:{inspect.getsourcelines(owner)[1]})"


@dataclass(frozen=True)
class Promise:
    """A contract before it is put to a plugin: the function that checks it says its name and what it promises.

    Args:
        function: Takes the case.
        written: As :class:`Contract` has it.
        cost: As :class:`Contract` has it.
    """

    function: Callable[[Any], None]
    written: str
    cost: Cost

    def of(self, case: Any) -> Contract:
        """Return the contract of one plugin."""
        name = self.function.__name__.replace("_", " ")
        text = " ".join(inspect.cleandoc(self.function.__doc__ or "").split())
        return Contract(case, name, text, self.written, self.cost, self.function)


def promise(written: str, cost: Cost) -> Callable[[Callable[[Any], None]], Promise]:
    """Make a promise of the function below."""
    return lambda function: Promise(function, f"transfer.{written}", cost)


def pictures() -> list[Image.Image]:
    """Return four pictures of noise, the same ones every time."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(BATCH)]


@dataclass(frozen=True, eq=False)
class ConfigCase:
    """A config file that a package ships."""

    path: Path

    def __str__(self) -> str:
        return f"config-{self.path.name}"
