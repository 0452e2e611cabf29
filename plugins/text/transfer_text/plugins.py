"""Tokenizers and vectors of other packages, by their name in a config: ``NAME`` or ``NAME/ARGUMENT``."""

from __future__ import annotations

from typing import cast

from transfer import find_plugin, load_plugin, plugins
from transfer_text.interfaces import Tokenizer, Vectors


def names(kind: str) -> list[str]:
    """Return the names of all plugins of a kind, including those that cannot be loaded."""
    return [plugin.name for plugin in plugins(kind)]


def is_plugin(kind: str, written: str) -> bool:
    """Return whether a config value starts with the name of a plugin; ``./NAME/...`` is always a path."""
    name = _name(written)
    return any(name in (plugin.name, plugin.qualified_name) for plugin in plugins(kind))


def make_tokenizer(written: str) -> Tokenizer:
    """Return the tokenizer that a config names.

    Raises:
        transfer.PluginError: The plugin cannot be loaded; the message states the reason and the package to install.
        transfer.ConfigError: The plugin does not accept the argument.
    """
    return cast(Tokenizer, load_plugin("tokenizer", _name(written))(*_argument(written)))


def make_vectors(written: str) -> Vectors:
    """Return the source of vectors that a config names.

    Raises:
        transfer.PluginError, transfer.ConfigError: Same as for :func:`make_tokenizer`.
    """
    return cast(Vectors, load_plugin("vectors", _name(written))(*_argument(written)))


def requirement(kind: str, written: str) -> str:
    """Return the pip requirement of a plugin; empty if the plugin is registered in this process."""
    return find_plugin(kind, _name(written)).requirement


def _name(written: str) -> str:
    return written.partition("/")[0]


def _argument(written: str) -> tuple[str, ...]:
    _, slash, argument = written.partition("/")
    return (argument,) if slash else ()
