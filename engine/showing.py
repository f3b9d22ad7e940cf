"""Values that came from outside, as a message shows them."""

import reprlib

_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxstring = _short.maxother = 60


def shown(value: object) -> str:
    """A value as Python writes it, cut short, however long it is and however deep, where `repr` would fail."""
    return _short.repr(value)
