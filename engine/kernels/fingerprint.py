"""A digest of everything that a kernel is compiled from, so that machine code is never used for another source.

A kernel's machine code contains more than the kernel: the constants that it names, wherever they are defined, and the
functions that it calls or inlines. All of these are read from the running process, not from source files. So the digest
is right while an upgrade replaces files, and when two files have the same size and time.
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
"""Packages whose functions and types the digest only names: `VERSIONS` says what they are."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def fingerprint(kernel: Any) -> str:
    """Return the digest of a kernel or a plain function, as 64 hexadecimal digits.

    Raises:
        TypeError: it refers to a value of a kind whose influence on machine code is not known.
    """
    function = _function_of(kernel)
    digest = hashlib.sha256(VERSIONS.encode())
    places, waiting = {function: 0}, [function]
    while waiting:
        own, others = _own(waiting.pop())
        digest.update(own)
        for other in others:
            if other not in places:
                places[other] = len(places)
                waiting.append(other)
            # Which of the functions found so far it is: two that exchange their names make another kernel.
            digest.update(b"%d " % places[other])
    return digest.hexdigest()


@cache
def _own(function: Any) -> tuple[bytes, tuple[FunctionType, ...]]:
    """Return a digest of what a function says itself, and the functions that it refers to, in order."""
    digest, others = hashlib.sha256(), []
    for part in _parts(function):
        if isinstance(part, FunctionType):
            others.append(part)
            part = "function"
        digest.update(f"{len(part)} {part}\n".encode())
    return digest.digest(), tuple(others)


def _function_of(value: Any) -> Any:
    """Return the Python function behind what Numba's decorators return, or None."""
    function = getattr(value, "__wrapped__", value)
    return function if isinstance(function, FunctionType) else None


def _parts(function: FunctionType) -> Iterator[str | FunctionType]:
    """Yield all that a function is: texts, and the functions that it refers to."""
    code = function.__code__
    yield from _code(code)
    names = _names(code)
    yield from _value((function.__defaults__, *(function.__kwdefaults__ or {}).items()), names, function)
    yield from _value(tuple(cell.cell_contents for cell in function.__closure__ or ()), names, function)
    for name in sorted(names & function.__globals__.keys()):
        yield name
        yield from _value(function.__globals__[name], names, function)


def _code(code: CodeType) -> Iterator[str]:
    """Yield what the interpreter would run, without line numbers and file names."""
    yield f"{code.co_code!r} {code.co_exceptiontable!r} {code.co_flags} {code.co_argcount}"
    yield f"{code.co_names} {code.co_varnames} {code.co_freevars} {code.co_cellvars}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        elif isinstance(constant, frozenset):
            # Its order differs from process to process.
            yield f"{sorted(map(repr, constant))}"
        else:
            yield repr(constant)


def _names(code: CodeType) -> set[str]:
    """Return the names of all globals and attributes that some code uses, nested functions included."""
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, nested))


def _value(value: Any, names: set[str], function: FunctionType) -> Iterator[str | FunctionType]:
    """Yield what a value is that a function refers to. Of a module, only the attributes with these names count."""
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
        # What Numba's decorators return has options; those of an intrinsic have no influence here.
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
    """Return the name of the module that a value is, or that it or its type is defined in."""
    if isinstance(value, ModuleType):
        return value.__name__
    return str(getattr(value, "__module__", type(value).__module__))


def _is_known_by_version(value: Any) -> bool:
    """Return whether a name and `VERSIONS` say all about a value. They do not for a list or another instance that
    Python has; types of the compiler have all of it in their names."""
    is_named = isinstance(value, ModuleType) or hasattr(value, "__qualname__")
    return _module_of(value).partition(".")[0] in (_KNOWN_BY_VERSION if is_named else _COMPILER)
