"""Digests of objects by their content: data, attributes and reachable code, equal in every process.

The key of the feature cache contains the digests of the frozen stages and of the preprocessing. A digest covers

* tensors and arrays by dtype, shape and bytes, with buffers that are not in the state dict;
* containers, dataclasses and every other object by class and attributes, recursively;
* functions and classes by their compiled code, defaults, closures and base classes, and by the globals that the code
  names. No source file is read: code from a notebook or from ``exec`` counts like any other.

Installed packages count by name and version. Modules of this framework count by the code of the complete module.

Nothing in a digest depends on addresses, on the order of sets or on file paths.
"""

from __future__ import annotations

import functools
import marshal
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transfer.feature_cache.code_digest import (
    PRIMITIVES,
    code_digest,
    framework_module_digest,
    imported_in,
    is_special,
    join_digests,
    module_code_digests,
    names_in,
)
from transfer.feature_cache.libraries import FRAMEWORK, library_of_class, library_of_module, library_of_path, version_of

_BUILTIN_CALLABLES = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
# State of a module that does not change its output in eval mode, or that is keyed by counters of this process.
_MODULE_CONTENT = frozenset({"_buffers", "_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters"})
_MODULE_BOOKKEEPING = vars(nn.Module()).keys() - _MODULE_CONTENT | {"_compiled_call_impl", "_is_torch_compile"}
_CLASS_BOOKKEEPING = frozenset(
    (
        *("__annotate__", "__annotate_func__", "__annotations__", "__annotations_cache__", "__signature__"),
        *("__orig_bases__", "__parameters__", "__type_params__", "__abstractmethods__", "_abc_impl"),
        *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__dict__", "__weakref__"),
        *("__doc__", "__firstlineno__", "__module__", "__qualname__", "__static_attributes__"),
    )
)


def content_digest(value: object) -> str:
    """Return the SHA-256 of an object's content in hexadecimal.

    A module counts by its attributes. Any other object counts by its class and the state that pickle would store. If
    the class defines a method ``cache_state()``, the returned value counts instead: define it if the state contains
    memos or statistics that do not change the results.

    Raises:
        RecursionError: The attributes are nested too deeply.
    """
    return _Digester().digest(value)


class _Digester:
    """The digest of one object.

    Data is digested recursively. Functions and classes are numbered in the order in which they are first met, and
    digested one after the other at the end, because chains of functions are longer than Python's recursion limit.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._definitions: list[Any] = []
        self._finished: dict[int, bytes] = {}
        self._open: dict[int, int] = {}
        self._alive: list[object] = []  # an id is unique only as long as its object lives
        self._libraries: set[str] = set()

    def digest(self, value: object) -> str:
        parts = [self._value(value)]
        for definition in self._definitions:  # grows while it is iterated over
            is_class = isinstance(definition, type)
            parts.append(self._class(definition) if is_class else self._function(definition))
        versions = [f"{name} {version_of(name)}" for name in sorted(self._libraries)]
        return join_digests("content", *parts, marshal.dumps(versions, 0)).hex()

    # ------------------------------------------------------------------------------------------------------------ data

    def _value(self, value: Any) -> bytes:
        # Version 0 of marshal writes no references, which would depend on the strings that this process has interned.
        if type(value) in PRIMITIVES:
            return marshal.dumps(value, 0)
        if isinstance(value, type):
            return self._class_reference(value)
        if isinstance(value, types.FunctionType):
            return self._function_reference(value)
        if id(value) in self._finished:
            return self._finished[id(value)]
        if id(value) in self._open:  # a cycle: the number of steps back to the object, from wherever the walk started
            return join_digests("cycle", marshal.dumps(len(self._open) - self._open[id(value)], 0))
        self._open[id(value)] = len(self._open)
        self._alive.append(value)
        try:
            digest = self._compound(value)
        finally:
            del self._open[id(value)]
        self._finished[id(value)] = digest
        return digest

    def _compound(self, value: Any) -> bytes:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, np.generic):
            return join_digests("scalar", str(value.dtype).encode(), value.tobytes())
        if isinstance(value, nn.Module):
            return self._module(value)
        if type(value) in (tuple, list):
            return join_digests(type(value).__name__, *self._items(value))
        # A dictionary counts in its order, which is part of its content: it may be the order of the classes.
        if type(value) in (dict, types.MappingProxyType):
            return join_digests("dict", *self._items(value.keys()), *self._items(value.values()))
        if type(value) in (set, frozenset):
            if PRIMITIVES.issuperset(map(type, value)):
                return join_digests(type(value).__name__, *sorted(marshal.dumps(item, 0) for item in value))
            # Each item by itself: numbers of definitions would depend on the order of the set.
            return join_digests(type(value).__name__, *sorted(content_digest(item).encode() for item in value))
        if isinstance(value, torch.fx.Graph):
            return join_digests("graph", str(value).encode())  # its nodes are a linked list, too long for the recursion
        if isinstance(value, types.CodeType):
            return code_digest(value)
        if isinstance(value, types.ModuleType):
            return self._module_of_code(value)
        return self._wrapper(value) or self._object(value)

    def _items(self, items: Iterable[Any]) -> Iterator[bytes]:
        items = list(items)
        if PRIMITIVES.issuperset(map(type, items)):
            yield marshal.dumps(items, 0)  # in one call: a vocabulary has hundreds of thousands of items
        else:
            yield from map(self._value, items)

    def _tensor(self, tensor: Tensor) -> bytes:
        kind = "" if type(tensor) in (Tensor, nn.Parameter) else type(tensor).__qualname__
        facts = [kind, str(tensor.dtype), *tensor.shape]
        if hasattr(tensor, "__tensor_flatten__"):  # a subclass that wraps other tensors (weights in four bits)
            names, context = tensor.__tensor_flatten__()
            inner = [self._value(getattr(tensor, name)) for name in names]
            return join_digests("wrapper", marshal.dumps(facts, 0), self._value(context), *inner)
        if tensor.is_meta:
            return join_digests("meta", marshal.dumps(facts, 0))
        tensor = tensor.detach()
        if tensor.is_quantized:
            facts.append(str(tensor.qscheme()))
            tensor = tensor.dequantize()
        if tensor.layout != torch.strided:
            facts.append(str(tensor.layout))
            tensor = tensor.to_dense()
        flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        return join_digests("tensor", marshal.dumps(facts, 0), flat.numpy().data)

    def _array(self, array: np.ndarray[Any, Any]) -> bytes:
        facts = marshal.dumps([type(array).__qualname__, str(array.dtype), *array.shape], 0)
        if array.dtype.hasobject:  # the bytes are addresses
            return join_digests("objects", facts, *self._items(array.ravel().tolist()))
        return join_digests("array", facts, np.ascontiguousarray(array).tobytes())

    def _module(self, module: nn.Module) -> bytes:
        attributes = vars(module)
        if isinstance(original := attributes.get("_modules", {}).get("_orig_mod"), nn.Module):
            return self._value(original)  # a module of torch.compile
        code = str(module.code).encode() if isinstance(module, torch.jit.ScriptModule) else b""
        parts = []
        for name in sorted(attributes.keys() - _MODULE_BOOKKEEPING):
            value = attributes[name]
            if name in ("_forward_hooks", "_forward_pre_hooks"):  # keyed by counters of this process
                value = list(value.values())
            if not _is_cached_property(type(module), name):
                parts += [name.encode(), self._value(value)]
        return join_digests("module", code, self._class_reference(type(module)), *parts)

    def _object(self, value: Any) -> bytes:
        cls = type(value)
        reference = self._class_reference(cls)
        if library_of_class(cls) is None and callable(getattr(cls, "cache_state", None)):
            return join_digests("cache state", reference, self._value(value.cache_state()))
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # it cannot be pickled: a lock, a generator, a context variable
            reduced = (None, (), getattr(value, "__dict__", None))
        if isinstance(reduced, str):  # the name of a global
            return join_digests("global", reference, reduced.encode())
        constructor, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        parts = [self._value(constructor), *(self._value(item) for item in arguments if item is not cls)]
        parts += [self._state(cls, part) for part in (state if isinstance(state, tuple) else (state,))]
        parts += [join_digests("items", *self._items(items or ())), *(self._value(tuple(pair)) for pair in pairs or ())]
        return join_digests("object", reference, *parts)

    def _state(self, cls: type, state: Any) -> bytes:
        if state is None:  # no attributes, or none yet
            state = {}
        if type(state) is not dict or not all(type(name) is str for name in state):
            return self._value(state)
        names = [name for name in sorted(state) if not _is_cached_property(cls, name)]
        return join_digests("state", marshal.dumps(names, 0), *(self._value(state[name]) for name in names))

    # ------------------------------------------------------------------------------------------------------------ code

    def _wrapper(self, value: Any) -> bytes | None:
        """Return the digest of a callable that wraps another one, or that is built in; None of anything else."""
        if isinstance(value, types.MethodType):
            return join_digests("method", self._value(value.__func__), self._value(value.__self__))
        if isinstance(value, staticmethod | classmethod):
            return join_digests(type(value).__name__, self._value(value.__func__))
        if isinstance(value, property):
            return join_digests("property", *map(self._value, (value.fget, value.fset)))
        if isinstance(value, functools.cached_property):
            return join_digests("property", self._value(value.func))
        if isinstance(value, functools.partial):
            return join_digests("partial", *map(self._value, (value.func, value.args, value.keywords, vars(value))))
        if isinstance(value, functools._lru_cache_wrapper):
            return join_digests("wrapped", self._value(value.__wrapped__))
        if isinstance(value, _BUILTIN_CALLABLES):
            owner = getattr(value, "__self__", None)
            bound = b"" if owner is None or isinstance(owner, types.ModuleType) else self._value(owner)
            return join_digests("builtin", f"{getattr(value, '__module__', '')}.{value.__qualname__}".encode(), bound)
        return None

    def _reference(self, definition: Any) -> bytes:
        number = self._numbers.setdefault(id(definition), len(self._numbers))
        if number == len(self._definitions):
            self._definitions.append(definition)
        return join_digests("definition", marshal.dumps([definition.__qualname__, number], 0))

    def _function_reference(self, function: types.FunctionType) -> bytes:
        library = library_of_path(function.__code__.co_filename)
        if library is None:
            return self._reference(function)
        # A function that a library defines within another one may wrap the user's code: a decorator's result.
        wrapped = [self._cell(cell) for cell in function.__closure__ or ()]
        if isinstance(original := vars(function).get("_torchdynamo_orig_callable"), types.FunctionType):
            wrapped = [self._value(original)]  # the closure of torch.compile contains compiled code
        if library == FRAMEWORK and function.__module__ in sys.modules:
            module = framework_module_digest(function.__module__)
            return join_digests("framework", function.__qualname__.encode(), module, *wrapped)
        self._libraries.add(library)
        return join_digests("function", f"{function.__module__}.{function.__qualname__}".encode(), *wrapped)

    def _class_reference(self, cls: type) -> bytes:
        library = library_of_class(cls)
        if library is None:
            return self._reference(cls)
        if library == FRAMEWORK:
            return join_digests("framework", cls.__qualname__.encode(), framework_module_digest(cls.__module__))
        self._libraries.add(library)
        return join_digests("class", f"{cls.__module__}.{cls.__qualname__}".encode())

    def _module_of_code(self, module: types.ModuleType) -> bytes:
        library = library_of_module(module)
        if library is None:
            return join_digests("code", module.__name__.encode(), *module_code_digests(module))
        self._libraries.add(library)
        return join_digests("library", module.__name__.encode())

    def _class(self, cls: type) -> bytes:
        # All base classes: a method that is inherited is code of the object, too.
        bases = [self._class_reference(base) for base in cls.__mro__[1:]]
        parts = [self._class_reference(type(cls))]
        for name, member in sorted(vars(cls).items()):
            if name not in _CLASS_BOOKKEEPING and not name.startswith("__pydantic"):
                parts += [name.encode(), self._value(member)]
        return join_digests("class", *bases, *parts)

    def _function(self, function: types.FunctionType) -> bytes:
        code = function.__code__
        parts = [code_digest(code), self._value(function.__defaults__), self._value(function.__kwdefaults__)]
        parts += [self._cell(cell) for cell in function.__closure__ or ()]
        # Compiled code lists the names of globals and attributes together. Those that exist as globals are digested:
        # the digest may cover more than the function uses.
        names = sorted(names_in(code))
        parts += self._globals(names, function.__globals__)
        for module in imported_in(code, function.__globals__):
            parts.append(self._named_in_module(module, names, set()))
        parts += [name.encode() + self._value(value) for name, value in sorted(vars(function).items())]
        return join_digests("function", *parts)

    def _cell(self, cell: types.CellType) -> bytes:
        try:
            return self._value(cell.cell_contents)
        except ValueError:  # an empty cell
            return b""

    def _globals(self, names: Iterable[str], namespace: Mapping[str, Any]) -> Iterator[bytes]:
        """Yield the digests of the globals that a function names. Most names are attributes, and not among them."""
        for name in names:
            if name in namespace and not is_special(name):
                value = namespace[name]
                is_module = isinstance(value, types.ModuleType)
                content = self._named_in_module(value, names, set()) if is_module else self._value(value)
                yield name.encode() + content

    def _named_in_module(self, module: types.ModuleType, names: Iterable[str], visited: set[str]) -> bytes:
        """Return the digest of the definitions and values in a module that have one of these names."""
        if (library := library_of_module(module)) is not None:
            if library != FRAMEWORK:
                self._libraries.add(library)
            return join_digests("library", module.__name__.encode())
        parts = []
        visited.add(module.__name__)
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, types.ModuleType):
                if value.__name__ not in visited:
                    parts += [name.encode(), self._named_in_module(value, names, visited)]
            elif name in vars(module) and not is_special(name):
                parts += [name.encode(), self._value(value)]
        return join_digests("names", *parts)


def _is_cached_property(cls: type, name: str) -> bool:
    return any(isinstance(vars(base).get(name), functools.cached_property) for base in cls.__mro__)
