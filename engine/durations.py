"""Durations as people write them, in views.yaml and in requests: `90s`, `15m`, `12h`, `7d`, `2w`."""

import re
from datetime import timedelta

_DURATION = re.compile(r"([1-9][0-9]{0,6})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_duration(text: str) -> timedelta:
    """The duration that a text such as `12h` means; raises ValueError, saying what to write."""
    match = _DURATION.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no duration; give a whole number and one of s, m, h, d, w, such as 12h")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})
