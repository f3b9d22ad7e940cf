"""A digest of everything that a kernel is compiled from, so that machine code from other source code is never used.

A kernel's machine code also contains the constants that the kernel names, wherever they are defined, and the functions
that the kernel calls or inlines. All these constants and functions are read from the running process, not from source
files. So the digest is correct even while an upgrade replaces files, or if two files have the same size and
modification time.
"""

import hashlib
import sys
from collections.abc import Iterator
from enum import Enum
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import llvmlite
import numba
import numpy as np

VERSIONS = f"{sys.version} numba {numba.__version__} llvmlite {llvmlite.__version__} numpy {np.__version__}"

_COMPILER = frozenset(("llvmlite", "numba", "numpy"))
_KNOWN_BY_VERSION = _COMPILER | sys.stdlib_module_names
"""The packages whose functions and types are in the digest only by name, because `VERSIONS` identifies their code."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def fingerprint(kernel: Any) -> str:
    """Return the digest of a kernel or a plain function, as 64 hexadecimal digits.

    Raises:
        TypeError: the kernel refers to a kind of value whose influence on machine code is unknown.
    """
    function = _function_of(kernel)
    digest = hashlib.sha256(VERSIONS.encode())
    places = {function: 0}
    waiting = [function]
    while waiting:
        own, others = _own(waiting.pop())
        digest.update(own)
        for other in others:
            if other not in places:
                places[other] = len(places)
                waiting.append(other)
            # Add the function's position in the order of discovery, so that the digest changes if two functions swap
            # names.
            digest.update(b"%d " % places[other])
    return digest.hexdigest()


@cache
def _own(function: Any) -> tuple[bytes, tuple[FunctionType, ...]]:
    """Return a digest of a function's own parts, and the functions that it refers to, in order."""
    digest = hashlib.sha256()
    others = []
    for part in _parts(function):
        if isinstance(part, FunctionType):
            others.append(part)
            part = "function"
        digest.update(f"{len(part)} {part}\n".encode())
    return digest.digest(), tuple(others)


def _function_of(value: Any) -> Any:
    """Return a Python function itself. For the result of a Numba decorator, return the Python function behind the
    result. Return None for any other value."""
    function = getattr(value, "__wrapped__", value)
    return function if isinstance(function, FunctionType) else None


def _parts(function: FunctionType) -> Iterator[str | FunctionType]:
    """Yield all parts of a function: texts, and the functions that it refers to."""
    code = function.__code__
    yield from _code(code, function.__doc__)
    names = _names(code)
    yield from _value((function.__defaults__, *(function.__kwdefaults__ or {}).items()), names, function)
    yield from _value(tuple(cell.cell_contents for cell in function.__closure__ or ()), names, function)
    for name in sorted(names & function.__globals__.keys()):
        yield name
        yield from _value(function.__globals__[name], names, function)


def _code(code: CodeType, docstring: str | None = None) -> Iterator[str]:
    """Yield the bytecode and the constants of some code, without line numbers, file names and docstring."""
    yield f"{code.co_code!r} {code.co_exceptiontable!r} {code.co_flags} {code.co_argcount}"
    yield f"{code.co_names} {code.co_varnames} {code.co_freevars} {code.co_cellvars}"
    for number, constant in enumerate(code.co_consts):
        if number == 0 and docstring is not None and constant == docstring:
            continue
        if isinstance(constant, CodeType):
            yield from _code(constant)
        elif isinstance(constant, frozenset):
            # The order of a set differs from process to process.
            yield f"{sorted(map(repr, constant))}"
        else:
            yield repr(constant)


def _names(code: CodeType) -> set[str]:
    """Return the names of all globals and attributes that some code uses, nested functions included."""
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, nested))


def _value(value: Any, names: set[str], function: FunctionType) -> Iterator[str | FunctionType]:
    """Yield the content of a value that a function refers to. If the value is a module, yield only its attributes in
    `names`."""
    wrapped = _function_of(value)
    if isinstance(value, _PLAIN):
        yield f"{type(value).__qualname__} {value!r}"
    elif isinstance(value, np.ndarray | np.generic):
        yield f"{value.dtype.str} {value.shape} {value.tobytes()!r}"
    elif isinstance(value, tuple):
        yield f"{len(value)} values"
        for element in value:
            yield from _value(element, names, function)
    elif isinstance(value, type) and issubclass(value, Enum):
        yield f"{[(member.name, member.value) for member in value]}"
    elif wrapped is not None and not _is_known_by_version(wrapped):
        # The result of a Numba decorator has compiler options. An intrinsic has no options that matter here.
        yield f"{getattr(value, 'targetoptions', None)}"
        yield wrapped
    elif _is_known_by_version(value):
        yield f"{_module_of(value)} {getattr(value, '__qualname__', value)}"
    elif isinstance(value, ModuleType):
        for name in sorted(names & vars(value).keys()):
            yield name
            yield from _value(vars(value)[name], names, function)
    else:
        raise TypeError(
            f"{function.__module__}.{function.__qualname__} refers to {value!r}, a {type(value).__name__}, which a "
            f"fingerprint cannot cover; a kernel may refer to numbers, texts, tuples, arrays, enumerations, modules "
            f"and other kernels"
        )


def _module_of(value: Any) -> str:
    """Return the name of the module that defines a value. If the value is itself a module, return its own name. If the
    value does not say where it is defined, return the name of the module that defines its type."""
    if isinstance(value, ModuleType):
        return value.__name__
    return str(getattr(value, "__module__", type(value).__module__))


def _is_known_by_version(value: Any) -> bool:
    """Return whether a value's name and `VERSIONS` together identify the value's content. The result is false for an
    instance of a Python type, such as a list. The result is true for a type of the compiler, because the name of such a
    type contains all of its content."""
    is_named = isinstance(value, ModuleType) or hasattr(value, "__qualname__")
    return _module_of(value).partition(".")[0] in (_KNOWN_BY_VERSION if is_named else _COMPILER)
