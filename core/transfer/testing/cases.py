"""Test cases (a plugin with options) and contracts."""

from __future__ import annotations

import importlib
import inspect
import json
import unittest
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

from transfer.config.check import load_component
from transfer.config.component import Component
from transfer.registry.entry_points import Kind

Cost = Literal["quick", "weights", "training", "data"]
"""quick: at most the meta device. weights: the model is built. training: a few steps. data: the data is read."""

BATCH = 4
TEXTS = (
    "a warm , funny film that i would gladly watch again",
    "two hours of my life",
    "dull",
    "not a good film , but a warm one all the same",
)


@dataclass(frozen=True, eq=False)
class Case:
    """A plugin with options, on which contracts are checked.

    Args:
        kind: Kind of the plugin.
        name: Name of the plugin in a config, ``distribution:name`` or ``name``.
        options: Options of the plugin in a config. Small values keep the tests fast.
        values: Four or more different raw values of a backbone's field; None: texts, images, or variants of the
                preprocessing's example.
        sources: Arguments of the command line that the preprocessing can read (paths of files, or texts); None: made
            from the values if these are texts or images.
    """

    kind: Kind
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    values: Sequence[Any] | None = None
    sources: Sequence[str] | None = None

    def __str__(self) -> str:
        options = ",".join(f"{key}={_short(value)}" for key, value in self.options.items())
        return f"{self.kind}-{self.name.rpartition(':')[2]}" + (f"[{options}]" if options else "")

    def component(self) -> Component:
        """Import the plugin and check the options.

        Raises:
            PluginError, ConfigError: The plugin cannot be loaded, or an option is wrong.
        """
        return load_component(self.kind, {"name": self.name, **self.options}, f"options of {self.kind} {self.name!r}")


def _short(value: Any) -> str:
    if isinstance(value, str) and Path(value).is_absolute():
        value = Path(value).name  # a temporary folder has another name in each process that collects tests
    text = json.dumps(value, default=str).replace('"', "")
    return text if len(text) <= 24 else text[:21] + "..."


class ContractError(AssertionError):
    """A plugin violates a contract; the message names the contract, the deviation, and the docstring that states it."""


class Broken(Exception):  # noqa: N818  # only raised inside the kit, which converts it to a ContractError
    """The deviation that a contract's function found."""


def require(condition: object, found: str) -> None:
    """Raise :class:`Broken` with the deviation ``found`` if the condition is false."""
    __tracebackhide__ = True
    if not condition:
        raise Broken(found)


_FAILED: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()
"""Name of the first contract that failed, by case and deviation."""


@dataclass(frozen=True, eq=False)
class Contract:
    """One contract of one plugin.

    Args:
        case: Plugin with options.
        name: Short name of the contract.
        promise: Complete text of the contract.
        written: Public name under ``transfer`` whose docstring states the contract.
        cost: Cost of the check.
        function: Function that checks the contract.
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
        """Check the contract.

        Raises:
            ContractError: The plugin violates the contract.
            unittest.SkipTest: The contract cannot be checked here, because data is missing; pytest skips the test.
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

    def _require_new(self, found: str) -> None:
        """Skip the contract if another one of the same case has failed for the same reason.

        A backbone that cannot be built, for example, would fail every contract with one message.
        """
        first = _FAILED.setdefault(self.case, {}).setdefault(found, self.name)
        if first != self.name:
            raise unittest.SkipTest(f"it fails for the same reason as the contract {first!r}")

    def _failure(self, found: str) -> str:
        self._require_new(found)
        lines = (
            f"{self.case} breaks the contract '{self.name}'",
            f"  promised: {self.promise}",
            f"  found: {found}",
            f"  written: {self._place()}",
        )
        return "\n".join(lines)

    def _place(self) -> str:
        """Return the public name of the contract's docstring with file and line."""
        module, _, name = self.written.rpartition(".")
        owner = inspect.unwrap(getattr(importlib.import_module(module), name))
        return f"{self.written} ({inspect.getsourcefile(owner)}:{inspect.getsourcelines(owner)[1]})"


@dataclass(frozen=True)
class Promise:
    """A contract without a plugin. Its name and text are those of the function that checks it.

    Args:
        function: Function that takes the case.
        written: Public name under ``transfer`` whose docstring states the contract.
        cost: Cost of the check.
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
    """Return a decorator that makes a contract of a function."""
    return lambda function: Promise(function, f"transfer.{written}", cost)


@dataclass(frozen=True, eq=False)
class ConfigCase:
    """A config file of a package."""

    path: Path

    def __str__(self) -> str:
        return f"config-{self.path.name}"
