"""Tokenizers and vectors that packages bring, by what a config calls them: ``NAME`` or ``NAME/ARGUMENT``."""

from __future__ import annotations

from typing import cast

from transfer import find_plugin, load_plugin, plugins
from transfer_text.interfaces import Tokenizer, Vectors


def names(kind: str) -> list[str]:
    """Return the names of all plugins of a kind, those that cannot be loaded included."""
    return [plugin.name for plugin in plugins(kind)]


def is_plugin(kind: str, written: str) -> bool:
    """Say whether what a config writes begins with the name of a plugin; ``./NAME/...`` is a path whatever there is."""
    name = _name(written)
    return any(name in (plugin.name, plugin.qualified_name) for plugin in plugins(kind))


def make_tokenizer(written: str) -> Tokenizer:
    """Return the tokenizer that a config names.

    Raises:
        transfer.PluginError: It cannot be loaded here; the message says why and what to install.
        transfer.ConfigError: It does not take that argument.
    """
    return cast(Tokenizer, load_plugin("tokenizer", _name(written))(*_argument(written)))


def make_vectors(written: str) -> Vectors:
    """Return the source of vectors that a config names.

    Raises:
        transfer.PluginError, transfer.ConfigError: As :func:`make_tokenizer`.
    """
    return cast(Vectors, load_plugin("vectors", _name(written))(*_argument(written)))


def requirement(kind: str, written: str) -> str:
    """Return what pip is to install to have exactly that plugin; empty of one that is registered in this process."""
    return find_plugin(kind, _name(written)).requirement


def _name(written: str) -> str:
    return written.partition("/")[0]


def _argument(written: str) -> tuple[str, ...]:
    _, slash, argument = written.partition("/")
    return (argument,) if slash else ()
