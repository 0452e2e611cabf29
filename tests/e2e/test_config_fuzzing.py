"""Whatever is dropped, renamed, retyped or swapped in a shipped config: it is checked, or refused in words."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings, strategies as st

from transfer.cli import app as cli
from transfer_vision.data.datasets import Shapes

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MUTATIONS = int(os.environ.get("TRANSFER_MUTATIONS", "300"))
"""Mutated configs per shipped one in the slow search; TRANSFER_MUTATIONS=5000 for a long one."""
COUNTS = [12, pytest.param(MUTATIONS, marks=pytest.mark.slow)]

Rank = tuple[Any, ...]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**9, -(10**40), 10**400, 0.1, -0.5, 1e300, float("inf"), float("-inf"), float("nan")]),
    st.sampled_from(
        ["", "none", "head", "layer4", "..", "/", "${HOME}", "${NOWHERE}", "\x1b[31mred", "a:b", "é", "[", "0"]
    ),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=4,
)


def places(node: Any, at: Rank = ()) -> Iterator[Rank]:
    """Yield the path of every value below a node."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from places(child, (*at, key))


def parent(config: Any, place: Rank) -> Any:
    """Return the mapping or list that holds a place."""
    for key in place[:-1]:
        config = config[key]
    return config


@st.composite
def mutated(draw: st.DrawFn, config: dict[str, Any]) -> dict[str, Any]:
    """Change one to three things anywhere in a config."""
    config = copy.deepcopy(config)
    for _ in range(draw(st.integers(1, 3))):
        everywhere = list(places(config))
        if not everywhere:
            break
        place = draw(st.sampled_from(everywhere))
        holder, key = parent(config, place), place[-1]
        match draw(st.sampled_from(["drop", "rename", "replace", "swap", "wrap", "add"])):
            case "drop":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw(st.text(max_size=8) | st.just(f"{key}s") | st.integers())] = holder.pop(key)
            case "swap":
                other = draw(st.sampled_from(everywhere))
                shorter = min(len(place), len(other))
                if place[:shorter] != other[:shorter]:  # neither holds the other
                    there, name = parent(config, other), other[-1]
                    holder[key], there[name] = there[name], holder[key]
            case "wrap":
                holder[key] = draw(st.sampled_from([lambda v: [v], lambda v: {"name": v}, lambda v: [v, v], str]))(
                    holder[key]
                )
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from([str(p[-1]) for p in everywhere]))] = draw(values)
            case _:
                holder[key] = draw(values)
    return config


def exit_status(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; return its exit status and what it printed."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr("sys.argv", ["transfer", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), printed.getvalue()
    return 0, printed.getvalue()


def answer(config: Any, folder: Path, *command: str) -> str:
    """Give a command a mutated config: it succeeds or refuses, in words."""
    path = folder / "mutated.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    status, printed = exit_status(command[0], str(path), *command[1:])
    assert status in (0, 2), f"exit status {status}: {printed}"
    assert "Traceback" not in printed
    assert "\x1b[31m" not in printed, "a control character of the config reached the terminal"
    return printed


def search(config: dict[str, Any], folder: Path, count: int, *command: str) -> None:
    """Pass ``count`` mutations of a config to a command."""

    @seed(0)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutated(config))
    def check(changed: dict[str, Any]) -> None:
        answer(changed, folder, *command)

    check()


@pytest.mark.parametrize("count", COUNTS, ids=["few", "many"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_check_accepts_or_refuses_mutated_config(path, count, tmp_path):
    search(yaml.safe_load(path.read_text(encoding="utf-8")), tmp_path, count, "check")


@pytest.mark.parametrize("count", COUNTS, ids=["few", "many"])
@pytest.mark.parametrize("name", ["quickstart_text", "quickstart_vision"])
def test_quick_run_accepts_or_refuses_mutated_config(name, count, tmp_path, monkeypatch):
    # Drawing all images takes longer than training on a few of them. The mutated options stay those of the config.
    monkeypatch.setitem(Shapes.__init__.__kwdefaults__, "per_class", 20)
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    search(config, tmp_path, count, "run", "--quick", "--output", str(tmp_path / "runs"))
