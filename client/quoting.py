"""Format a caller's values for messages."""

from typing import Any

_MOST_CHARACTERS = 60


def abbreviated(value: Any) -> str:
    """Return a value's type and the beginning of its text."""
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) <= _MOST_CHARACTERS else f'{text[:_MOST_CHARACTERS]}…'}"
