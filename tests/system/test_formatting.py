"""Values as text, and arguments of command lines."""

from __future__ import annotations

import shlex

import pytest

from transfer.system.formatting import format_names, quote_for_shell


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("runs/a", "runs/a"),
        ("runs/a b", "'runs/a b'"),
        ("it's", "'it'\"'\"'s'"),
        ("-rf", "./-rf"),
        ("a\nb'\\", r"$'a\x0ab\x27\x5c'"),
        ("\udcff", r"$'\xff'"),
    ],
    ids=["plain", "blank", "quote", "dash", "control", "bytes"],
)
def test_argument_is_quoted_for_a_shell(argument: str, quoted: str) -> None:
    assert quote_for_shell(argument) == quoted
    if "$" not in quoted and not argument.startswith("-"):
        assert shlex.split(quoted) == [argument]


def test_format_names_counts_the_others() -> None:
    assert format_names(["a", "b"], 2) == "a, b"
    assert format_names(["a", "b", "c", "d"], 2) == "a, b and 2 more"
