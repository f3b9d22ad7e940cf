"""Abbreviate values from outside Shoal for messages."""

import reprlib

_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxstring = _short.maxother = 60


def abbreviated(value: object) -> str:
    """Return a shortened `repr` of a value. This works for values of any length and depth, even if `repr` itself would
    fail."""
    return _short.repr(value)
