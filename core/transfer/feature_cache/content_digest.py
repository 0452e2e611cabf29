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

import dis
import functools
import hashlib
import marshal
import platform
import site
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import transfer

_PRIMITIVES = frozenset({type(None), bool, int, float, complex, str, bytes})
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
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the flag that types written in C as static structures lack
_FRAMEWORK = "transfer"
_PYTHON = "python"


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
        versions = [f"{name} {_version(name)}" for name in sorted(self._libraries)]
        return _join("content", *parts, marshal.dumps(versions, 0)).hex()

    # ------------------------------------------------------------------------------------------------------------ data

    def _value(self, value: Any) -> bytes:
        # Version 0 of marshal writes no references, which would depend on the strings that this process has interned.
        if type(value) in _PRIMITIVES:
            return marshal.dumps(value, 0)
        if isinstance(value, type):
            return self._class_reference(value)
        if isinstance(value, types.FunctionType):
            return self._function_reference(value)
        if id(value) in self._finished:
            return self._finished[id(value)]
        if id(value) in self._open:  # a cycle: the number of steps back to the object, from wherever the walk started
            return _join("cycle", marshal.dumps(len(self._open) - self._open[id(value)], 0))
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
            return _join("scalar", str(value.dtype).encode(), value.tobytes())
        if isinstance(value, nn.Module):
            return self._module(value)
        if type(value) in (tuple, list):
            return _join(type(value).__name__, *self._items(value))
        # A dictionary counts in its order, which is part of its content: it may be the order of the classes.
        if type(value) in (dict, types.MappingProxyType):
            return _join("dict", *self._items(value.keys()), *self._items(value.values()))
        if type(value) in (set, frozenset):
            if _PRIMITIVES.issuperset(map(type, value)):
                return _join(type(value).__name__, *sorted(marshal.dumps(item, 0) for item in value))
            # Each item by itself: numbers of definitions would depend on the order of the set.
            return _join(type(value).__name__, *sorted(content_digest(item).encode() for item in value))
        if isinstance(value, torch.fx.Graph):
            return _join("graph", str(value).encode())  # its nodes are a linked list, too long for the recursion
        if isinstance(value, types.CodeType):
            return _code(value)
        if isinstance(value, types.ModuleType):
            return self._module_of_code(value)
        return self._wrapper(value) or self._object(value)

    def _items(self, items: Iterable[Any]) -> Iterator[bytes]:
        items = list(items)
        if _PRIMITIVES.issuperset(map(type, items)):
            yield marshal.dumps(items, 0)  # in one call: a vocabulary has hundreds of thousands of items
        else:
            yield from map(self._value, items)

    def _tensor(self, tensor: Tensor) -> bytes:
        kind = "" if type(tensor) in (Tensor, nn.Parameter) else type(tensor).__qualname__
        facts = [kind, str(tensor.dtype), *tensor.shape]
        if hasattr(tensor, "__tensor_flatten__"):  # a subclass that wraps other tensors (weights in four bits)
            names, context = tensor.__tensor_flatten__()
            inner = [self._value(getattr(tensor, name)) for name in names]
            return _join("wrapper", marshal.dumps(facts, 0), self._value(context), *inner)
        if tensor.is_meta:
            return _join("meta", marshal.dumps(facts, 0))
        tensor = tensor.detach()
        if tensor.is_quantized:
            facts.append(str(tensor.qscheme()))
            tensor = tensor.dequantize()
        if tensor.layout != torch.strided:
            facts.append(str(tensor.layout))
            tensor = tensor.to_dense()
        flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        return _join("tensor", marshal.dumps(facts, 0), flat.numpy().data)

    def _array(self, array: np.ndarray[Any, Any]) -> bytes:
        facts = marshal.dumps([type(array).__qualname__, str(array.dtype), *array.shape], 0)
        if array.dtype.hasobject:  # the bytes are addresses
            return _join("objects", facts, *self._items(array.ravel().tolist()))
        return _join("array", facts, np.ascontiguousarray(array).tobytes())

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
        return _join("module", code, self._class_reference(type(module)), *parts)

    def _object(self, value: Any) -> bytes:
        cls = type(value)
        reference = self._class_reference(cls)
        if _library_of_class(cls) is None and callable(getattr(cls, "cache_state", None)):
            return _join("cache state", reference, self._value(value.cache_state()))
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # it cannot be pickled: a lock, a generator, a context variable
            reduced = (None, (), getattr(value, "__dict__", None))
        if isinstance(reduced, str):  # the name of a global
            return _join("global", reference, reduced.encode())
        constructor, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        parts = [self._value(constructor), *(self._value(item) for item in arguments if item is not cls)]
        parts += [self._state(cls, part) for part in (state if isinstance(state, tuple) else (state,))]
        parts += [_join("items", *self._items(items or ())), *(self._value(tuple(pair)) for pair in pairs or ())]
        return _join("object", reference, *parts)

    def _state(self, cls: type, state: Any) -> bytes:
        if state is None:  # no attributes, or none yet
            state = {}
        if type(state) is not dict or not all(type(name) is str for name in state):
            return self._value(state)
        names = [name for name in sorted(state) if not _is_cached_property(cls, name)]
        return _join("state", marshal.dumps(names, 0), *(self._value(state[name]) for name in names))

    # ------------------------------------------------------------------------------------------------------------ code

    def _wrapper(self, value: Any) -> bytes | None:
        """Return the digest of a callable that wraps another one, or that is built in; None of anything else."""
        if isinstance(value, types.MethodType):
            return _join("method", self._value(value.__func__), self._value(value.__self__))
        if isinstance(value, staticmethod | classmethod):
            return _join(type(value).__name__, self._value(value.__func__))
        if isinstance(value, property):
            return _join("property", *map(self._value, (value.fget, value.fset)))
        if isinstance(value, functools.cached_property):
            return _join("property", self._value(value.func))
        if isinstance(value, functools.partial):
            return _join("partial", *map(self._value, (value.func, value.args, value.keywords, vars(value))))
        if isinstance(value, functools._lru_cache_wrapper):
            return _join("wrapped", self._value(value.__wrapped__))
        if isinstance(value, _BUILTIN_CALLABLES):
            owner = getattr(value, "__self__", None)
            bound = b"" if owner is None or isinstance(owner, types.ModuleType) else self._value(owner)
            return _join("builtin", f"{getattr(value, '__module__', '')}.{value.__qualname__}".encode(), bound)
        return None

    def _reference(self, definition: Any) -> bytes:
        number = self._numbers.setdefault(id(definition), len(self._numbers))
        if number == len(self._definitions):
            self._definitions.append(definition)
        return _join("definition", marshal.dumps([definition.__qualname__, number], 0))

    def _function_reference(self, function: types.FunctionType) -> bytes:
        library = _library_of_path(function.__code__.co_filename)
        if library is None:
            return self._reference(function)
        # A function that a library defines within another one may wrap the user's code: a decorator's result.
        wrapped = [self._cell(cell) for cell in function.__closure__ or ()]
        if isinstance(original := vars(function).get("_torchdynamo_orig_callable"), types.FunctionType):
            wrapped = [self._value(original)]  # the closure of torch.compile contains compiled code
        if library == _FRAMEWORK and function.__module__ in sys.modules:
            module = _framework_module(function.__module__)
            return _join("framework", function.__qualname__.encode(), module, *wrapped)
        self._libraries.add(library)
        return _join("function", f"{function.__module__}.{function.__qualname__}".encode(), *wrapped)

    def _class_reference(self, cls: type) -> bytes:
        library = _library_of_class(cls)
        if library is None:
            return self._reference(cls)
        if library == _FRAMEWORK:
            return _join("framework", cls.__qualname__.encode(), _framework_module(cls.__module__))
        self._libraries.add(library)
        return _join("class", f"{cls.__module__}.{cls.__qualname__}".encode())

    def _module_of_code(self, module: types.ModuleType) -> bytes:
        library = _library_of_module(module)
        if library is None:
            return _join("code", module.__name__.encode(), *_codes_in(module))
        self._libraries.add(library)
        return _join("library", module.__name__.encode())

    def _class(self, cls: type) -> bytes:
        # All base classes: a method that is inherited is code of the object, too.
        bases = [self._class_reference(base) for base in cls.__mro__[1:]]
        parts = [self._class_reference(type(cls))]
        for name, member in sorted(vars(cls).items()):
            if name not in _CLASS_BOOKKEEPING and not name.startswith("__pydantic"):
                parts += [name.encode(), self._value(member)]
        return _join("class", *bases, *parts)

    def _function(self, function: types.FunctionType) -> bytes:
        code = function.__code__
        parts = [_code(code), self._value(function.__defaults__), self._value(function.__kwdefaults__)]
        parts += [self._cell(cell) for cell in function.__closure__ or ()]
        # Compiled code lists the names of globals and attributes together. Those that exist as globals are digested:
        # the digest may cover more than the function uses.
        names = sorted(_names_in(code))
        parts += self._globals(names, function.__globals__)
        for module in _imported_in(code, function.__globals__):
            parts.append(self._named_in_module(module, names, set()))
        parts += [name.encode() + self._value(value) for name, value in sorted(vars(function).items())]
        return _join("function", *parts)

    def _cell(self, cell: types.CellType) -> bytes:
        try:
            return self._value(cell.cell_contents)
        except ValueError:  # an empty cell
            return b""

    def _globals(self, names: Iterable[str], namespace: Mapping[str, Any]) -> Iterator[bytes]:
        """Yield the digests of the globals that a function names. Most names are attributes, and not among them."""
        for name in names:
            if name in namespace and not _is_special(name):
                value = namespace[name]
                is_module = isinstance(value, types.ModuleType)
                content = self._named_in_module(value, names, set()) if is_module else self._value(value)
                yield name.encode() + content

    def _named_in_module(self, module: types.ModuleType, names: Iterable[str], visited: set[str]) -> bytes:
        """Return the digest of the definitions and values in a module that have one of these names."""
        if (library := _library_of_module(module)) is not None:
            if library != _FRAMEWORK:
                self._libraries.add(library)
            return _join("library", module.__name__.encode())
        parts = []
        visited.add(module.__name__)
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, types.ModuleType):
                if value.__name__ not in visited:
                    parts += [name.encode(), self._named_in_module(value, names, visited)]
            elif name in vars(module) and not _is_special(name):
                parts += [name.encode(), self._value(value)]
        return _join("names", *parts)


def _join(kind: str, *parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        # The length makes ("ab", "c") and ("a", "bc") differ.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_cached_property(cls: type, name: str) -> bool:
    return any(isinstance(vars(base).get(name), functools.cached_property) for base in cls.__mro__)


def _code(code: types.CodeType) -> bytes:
    """Return the digest of compiled code. File name and line numbers do not count."""
    counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
    names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
    constants = map(_constant, code.co_consts)
    return _join("code", code.co_code, code.co_exceptiontable, marshal.dumps([*counts, *names], 0), *constants)


def _constant(constant: Any) -> bytes:
    if isinstance(constant, types.CodeType):
        return _code(constant)
    if isinstance(constant, tuple):
        return _join("tuple", *map(_constant, constant))
    if isinstance(constant, frozenset):
        return _join("frozenset", *sorted(map(_constant, constant)))
    return repr(constant).encode() if constant is ... else marshal.dumps(constant, 0)


def _names_in(code: types.CodeType) -> set[str]:
    """Return the names of globals and attributes in compiled code, nested functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _imported_in(code: types.CodeType, namespace: Mapping[str, Any]) -> list[types.ModuleType]:
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
            modules += _imported_in(constant, namespace)
    return modules


# ------------------------------------------------------------------------------------------------------------ libraries


def _library_of_class(cls: type) -> str | None:
    """Return the installed package that defines a class; None of the user's own code and that of plugins."""
    # `__module__` is a claim that any class can make: it is believed if the name leads back to the class.
    module = sys.modules.get(cls.__module__)
    value: Any = module
    for name in cls.__qualname__.split("."):
        value = getattr(value, name, None)
    if value is cls and module is not None:
        return _library_of_module(module)
    # Its name leads elsewhere: it was defined in a function or by exec, where __module__ may be anything, or is static.
    return None if cls.__flags__ & _HEAP_TYPE else _PYTHON


def _library_of_module(module: types.ModuleType) -> str | None:
    path = getattr(module, "__file__", None)
    if path is not None:
        return _library_of_path(path)
    top = module.__name__.partition(".")[0]
    return _PYTHON if top in sys.stdlib_module_names and top != "__main__" else None


@functools.cache
def _library_of_path(path: str) -> str | None:
    """Return the installed package that a file of code belongs to; None of the user's own code and that of plugins."""
    if path.startswith("<frozen "):
        return _PYTHON
    if path.startswith("<"):  # a notebook's cell, exec, code that dataclasses and others generate
        return None
    for root, library in _roots():
        if path.startswith(root):
            if library is not None:
                return library
            top = path[len(root) :].partition("/")[0].partition(".")[0]
            return None if top in _plugin_packages() or _version(top) is None else top
    return None


@functools.cache
def _roots() -> tuple[tuple[str, str | None], ...]:
    """Return folders of code and the package that they contain, None for a folder of packages; the first match wins."""
    named = {_FRAMEWORK: transfer} | {name: sys.modules.get(name) for name in ("torch", "torchvision", "numpy")}
    roots: list[tuple[Path, str | None]] = [
        (Path(module.__file__).parent, name)
        for name, module in named.items()
        if module is not None and module.__file__ is not None
    ]
    paths = sysconfig.get_paths()
    packages = {paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()}
    roots += [(Path(folder), None) for folder in sorted(packages)]
    roots += [(Path(paths[name]), _PYTHON) for name in ("stdlib", "platstdlib")]
    # Code may have been imported through a link or not.
    return tuple((f"{path}/", library) for root, library in roots for path in {root: 0, root.resolve(): 0})


@functools.cache
def _plugin_packages() -> frozenset[str]:
    """Return the import names of the packages that declare plugins: their code counts, installed or not."""
    installed = metadata.entry_points()
    groups = [group for group in installed.groups if group.startswith("transfer.")]
    points = [point for group in groups for point in installed.select(group=group)]
    return frozenset(point.value.partition(":")[0].partition(".")[0] for point in points) - {_FRAMEWORK}


@functools.cache
def _version(library: str) -> str | None:
    if library == _PYTHON:
        return f"{platform.python_implementation()} {platform.python_version()}"
    try:
        return metadata.version(library)
    except (metadata.PackageNotFoundError, ValueError):
        version = getattr(sys.modules.get(library), "__version__", None)
        return None if version is None else str(version)


@functools.cache
def _framework_module(name: str) -> bytes:
    """Return the digest of the code and the plain constants of a module of this framework."""
    return _join("module", *_codes_in(sys.modules[name]))


def _codes_in(owner: Any) -> Iterator[bytes]:
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
                yield _join("function", name.encode(), _code(part.__code__))
            elif isinstance(part, type) and part.__qualname__ == f"{prefix}{name}":
                if _defined_in(owner, part):
                    yield _join("class", name.encode(), *_codes_in(part))
            elif type(part) in _PRIMITIVES and not _is_special(name):
                yield _join("constant", name.encode(), marshal.dumps(part, 0))


def _defined_in(owner: Any, cls: type) -> bool:
    return cls.__module__ == (owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__)
