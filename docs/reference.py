"""Write docs/reference.md from the code: signatures, docstrings and the command line. Run: make reference."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from transfer.cli import app as cli
from transfer.config.option_schema import Option, describe_fields, describe_options, options_model, summary
from transfer.config.run_config import RunConfigSchema
from transfer.config.torch_classes import OPTIMIZERS, RESERVED_OPTIONS, SCHEDULERS, options_set_by_framework
from transfer.config.train_settings import (
    Checkpoint,
    DataOptions,
    MixupCutmix,
    NamedBlock,
    OptimizerOptions,
    PhaseSettings,
    Recipe,
    TrainConfig,
)
from transfer.registry import entry_points as registry

PAGE = Path(__file__).parent / "reference.md"
HEAD = """\
# Reference

Written by `make reference` from signatures, docstrings and the command line; `transfer show KIND NAME` shows the same
of any installed plugin. What an option is *for* stands in the pages of [the index](index.md).
"""
BLOCKS = {
    "train": TrainConfig,
    "train.phases": PhaseSettings,
    "train.recipe": Recipe,
    "train.mix": MixupCutmix,
    "train.checkpoint": Checkpoint,
}
EXIT_STATUSES = {
    "0": "done",
    "1": "it failed: the loss is not finite, memory ran out, the disk is full",
    "2": "the input is wrong; nothing was written, or what is there is unchanged",
    "130, 143": "interrupted by Ctrl-C or SIGTERM, and saved",
}


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *_config(), *_plugins(), *_torch_parts(), *_commands()]) + "\n"


def _config() -> Iterator[str]:
    yield "## The config\n"
    yield from _options(describe_fields(RunConfigSchema))
    for name, block in BLOCKS.items():
        yield f"### `{name}`\n\n{summary(block)}\n"
        yield from _options(describe_fields(block))


def _plugins() -> Iterator[str]:
    for kind in registry.KINDS:
        yield f"## {kind.capitalize()}s\n"
        if kind == "dataset":
            yield "Every `data` block takes, beside the dataset's own options:\n"
            yield from _options(_without_name(describe_fields(DataOptions)))
        for plugin in registry.plugins(kind):
            if plugin.distribution == "transfer":
                cls = registry.load(kind, plugin.qualified_name)
                yield f"### {kind} `{plugin.name}`\n\n{summary(cls)}\n"
                yield from _options(describe_options(cls))


def _torch_parts() -> Iterator[str]:
    yield "## Optimizers and schedulers\n"
    yield "Torch's own classes with their options, which torch's documentation describes. Every optimizer also takes:\n"
    yield from _options(_without_name(describe_fields(OptimizerOptions)))
    yield "| optimizer | torch's options, and their defaults |\n|---|---|"
    for name, cls in OPTIMIZERS.items():
        yield _torch_row(f"`{name}`", options_model(cls, OptimizerOptions, skip=RESERVED_OPTIONS), OptimizerOptions)
    yield "\n| scheduler | torch's options, and their defaults |\n|---|---|"
    for cls in dict.fromkeys(SCHEDULERS.values()):
        names = ", ".join(f"`{name}`" for name, other in SCHEDULERS.items() if other is cls)
        yield _torch_row(names, options_model(cls, NamedBlock, skip=options_set_by_framework(cls)), NamedBlock)
    yield ""


def _torch_row(names: str, model: Any, base: Any) -> str:
    options = [option for option in describe_fields(model) if option.name not in base.model_fields]
    return f"| {names} | {', '.join(f'`{o.name}` {o.default}'.rstrip() for o in options) or 'none'} |"


def _commands() -> Iterator[str]:
    yield "## The command line\n"
    group: Any = typer.main.get_command(cli.app)
    commands = {**group.commands}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            del commands[name]
            commands |= {f"{name} {inner}": one for inner, one in command.commands.items()}
    yield "`transfer --debug COMMAND` shows the traceback of an error.\n"
    for name, command in commands.items():
        arguments = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
        yield f"### `{' '.join(['transfer', name, *arguments])}`\n\n{command.help}\n"
        rows = [_parameter(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            yield "| argument or option | default | |\n|---|---|---|"
            yield from rows
            yield ""
    yield "### Exit statuses\n\n| status | says |\n|---|---|"
    for status, says in EXIT_STATUSES.items():
        yield f"| {status} | {says} |"


def _parameter(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"| `{parameter.metavar or parameter.name.upper()}` | | {_cell(parameter.help or '')} |"
    default = "" if parameter.default in (None, False) else f"`{parameter.default}`"
    return f"| `{parameter.opts[0]}` | {default} | {_cell(parameter.help or '')} |"


def _options(options: Iterable[Option]) -> Iterator[str]:
    rows = [f"| `{o.name}` | {_cell(o.type)} | {_default(o.default)} | {_cell(o.description)} |" for o in options]
    if not rows:
        yield "No options.\n"
        return
    yield "| option | type | default | |\n|---|---|---|---|"
    yield from rows
    yield ""


def _default(default: str) -> str:
    return f"`{_cell(default)}`" if default not in ("", "required") else default


def _without_name(options: Iterable[Option]) -> list[Option]:
    return [option for option in options if option.name != "name"]


def _cell(text: str) -> str:
    """Keep a text inside its cell."""
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
