"""Digests of compiled code, and the names that it uses. File names and line numbers do not count."""

from __future__ import annotations

import dis
import functools
import hashlib
import marshal
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

PRIMITIVES = frozenset({type(None), bool, int, float, complex, str, bytes})
"""Types whose values marshal writes equally in every process."""


def join_digests(kind: str, *parts: bytes | memoryview) -> bytes:
    """Return the digest of a kind of content and its parts."""
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        # The length makes ("ab", "c") and ("a", "bc") differ.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def is_special(name: str) -> bool:
    """Return whether a name has two leading and two trailing underscores."""
    return name.startswith("__") and name.endswith("__")


def code_digest(code: types.CodeType) -> bytes:
    """Return the digest of compiled code. File name and line numbers do not count."""
    counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
    names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
    constants = map(_constant, code.co_consts)
    return join_digests("code", code.co_code, code.co_exceptiontable, marshal.dumps([*counts, *names], 0), *constants)


def _constant(constant: Any) -> bytes:
    if isinstance(constant, types.CodeType):
        return code_digest(constant)
    if isinstance(constant, tuple):
        return join_digests("tuple", *map(_constant, constant))
    if isinstance(constant, frozenset):
        return join_digests("frozenset", *sorted(map(_constant, constant)))
    return repr(constant).encode() if constant is ... else marshal.dumps(constant, 0)


def names_in(code: types.CodeType) -> set[str]:
    """Return the names of globals and attributes in compiled code, nested functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= names_in(constant)
    return names


def imported_in(code: types.CodeType, namespace: Mapping[str, Any]) -> list[types.ModuleType]:
    """Return the modules that a function imports when it runs, in order of appearance."""
    modules = []
    if dis.opmap["IMPORT_NAME"] in code.co_code[::2]:  # instructions are pairs of bytes, the first one the operation
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                package = str(namespace.get("__package__") or "").split(".")
                prefixes = ["", *(".".join(package[:count]) + "." for count in range(len(package), 0, -1))]
                names = [f"{prefix}{instruction.argval}" for prefix in prefixes]
                modules += [sys.modules[name] for name in names if name in sys.modules][:1]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            modules += imported_in(constant, namespace)
    return modules


@functools.cache
def framework_module_digest(name: str) -> bytes:
    """Return the digest of the code and the plain constants of a module of this framework."""
    return join_digests("module", *module_code_digests(sys.modules[name]))


def module_code_digests(owner: Any) -> Iterator[bytes]:
    """Yield the digests of the code and the plain constants that a module or a class defines itself, by name."""
    prefix = "" if isinstance(owner, types.ModuleType) else f"{owner.__qualname__}."
    for name, value in sorted(vars(owner).items()):
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        elif isinstance(value, functools.cached_property):
            value = value.func
        accessors = (value.fget, value.fset) if isinstance(value, property) else (value,)
        for accessor in accessors:
            part: Any = getattr(accessor, "__wrapped__", accessor)
            if isinstance(part, types.FunctionType):
                yield join_digests("function", name.encode(), code_digest(part.__code__))
            elif isinstance(part, type) and part.__qualname__ == f"{prefix}{name}":
                if _defined_in(owner, part):
                    yield join_digests("class", name.encode(), *module_code_digests(part))
            elif type(part) in PRIMITIVES and not is_special(name):
                yield join_digests("constant", name.encode(), marshal.dumps(part, 0))


def _defined_in(owner: Any, cls: type) -> bool:
    return cls.__module__ == (owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__)
