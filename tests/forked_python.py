# ruff: noqa: T201
"""Python processes that start in a tenth of a second, because they are forked from one that has imported torch."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

LIBRARIES = (
    *("torch", "torchvision", "torchmetrics", "torchmetrics.classification", "torchmetrics.regression"),
    *("pydantic.json_schema", "safetensors.torch", "yaml", "typer.rich_utils", "rich.live", "rich.progress"),
)
"""Modules to import before forking. None belongs to the project: a forked process imports the code that its
``PYTHONPATH`` names."""


class ForkedPython:
    """A process that imports modules once, and forks itself for each command.

    Args:
        modules: Names of the modules to import.
    """

    def __init__(self, modules: Sequence[str] = LIBRARIES) -> None:
        self.modules = modules

    def __enter__(self) -> Self:
        command = [sys.executable, __file__, *self.modules]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def fork(
        self,
        arguments: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str],
        *,
        streams: Sequence[str | Path] = (os.devnull, "log", "log"),
    ) -> int:
        """Start ``python ARGUMENTS``, and return its process ID, which stays valid until ``wait``.

        Several processes may run at a time.

        Args:
            arguments: ``-W error`` or none, ``-m MODULE`` or ``-c CODE``, and the arguments of the program.
            cwd: Working directory.
            environment: Environment variables.
            streams: Files for standard input, output and error. Output is appended.
        """
        order = {"arguments": list(arguments), "cwd": str(cwd), "environment": dict(environment)}
        self._write(json.dumps({**order, "streams": [str(path) for path in streams]}))
        return int(self._read())

    def wait(self, pid: int) -> int:
        """Wait for a process that ``fork`` started, and return its exit status, or minus the signal."""
        self._write(json.dumps(pid))
        return int(self._read())

    def run(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python ARGUMENTS`` to its end, as ``subprocess.run`` does.

        Args:
            arguments: Arguments of the interpreter, see ``fork``.
            cwd: Working directory. None means that of this process.
            environment: All environment variables. None means those of this process.
            stdin: Text for the standard input.
        """
        command = list(map(str, arguments))
        with tempfile.TemporaryDirectory() as name:
            files = [Path(name, stream) for stream in ("in", "out", "err")]
            files[0].write_text(stdin, encoding="utf-8")
            variables = os.environ if environment is None else environment
            status = self.wait(self.fork(command, cwd or Path.cwd(), variables, streams=files))
            out, err = (path.read_text(encoding="utf-8") for path in files[1:])
        return subprocess.CompletedProcess([sys.executable, *command], status, out, err)

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def _serve(modules: Sequence[str]) -> list[str]:
    """Fork or wait for each line of standard input; return the arguments of the interpreter in a forked process."""
    # A process that a shell starts in the background ignores Ctrl-C, and its children would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for module in modules:
        importlib.import_module(module)
    print("ready", flush=True)
    while line := sys.stdin.readline():
        order = json.loads(line)
        if isinstance(order, int):
            # Until its status is asked for, a process keeps its ID, so that no other process is killed by mistake.
            _, status = os.waitpid(order, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if not pid:
            return _prepare(order)
        print(pid, flush=True)
    os._exit(0)


def _prepare(order: Mapping[str, Any]) -> list[str]:
    os.setsid()
    os.chdir(order["cwd"])
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(order["environment"])
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = ["", *filter(None, added), *(path for path in sys.path[1:] if path not in inherited)]
    importlib.invalidate_caches()
    for descriptor, path in enumerate(order["streams"]):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if descriptor else os.O_RDONLY
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    arguments: list[str] = order["arguments"]
    return arguments


if __name__ == "__main__":
    rest = _serve(sys.argv[1:])
    if rest[0] == "-W":
        warnings.simplefilter("error")
        rest = rest[2:]
    option, target, *sys.argv[1:] = rest
    if option == "-m":
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = "-c"
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(target, "<string>", "exec"), vars(main))
