"""Parse the durations in views.yaml and in requests: `90s`, `15m`, `12h`, `7d`, `2w`."""

import re
from datetime import timedelta

_DURATION = re.compile(r"([1-9][0-9]{0,6})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_duration(text: str) -> timedelta:
    """Return the duration of a text such as `12h`; raise ValueError, with the expected format, for any other text."""
    match = _DURATION.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a duration; give a whole number and one of s, m, h, d, w, such as 12h")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})
