"""Check a caller's arguments before anything is sent.

Each mistake raises RequestInvalid. Its message names the argument, the value found, and the expected value.
"""

from collections.abc import Iterable, Mapping, Set
from datetime import timedelta
from functools import cache
from numbers import Integral, Real
from typing import Any, get_args

from shoal.client.errors import RequestInvalid
from shoal.client.quoting import abbreviated
from shoal.client.wire import MEDIA_TYPES, Partial, Stale

LONGEST_SECONDS = 86_400
"""The longest deadline that servers accept from a client."""
_UNITS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
_TOO_LONG = 10**7
_STALE = get_args(Stale)
_PARTIAL = get_args(Partial)


def check_seconds(name: str, value: Any, least: float = 0.0) -> None:
    """Raise RequestInvalid if a value is not a number of seconds: more than 0, at least `least`, at most a day."""
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else 0
    if not (number > 0 and least <= number <= LONGEST_SECONDS):
        wanted = f"{least:g} or more" if least else "more than 0"
        raise RequestInvalid(f"{name} is {abbreviated(value)}; give seconds, {wanted}, at most {LONGEST_SECONDS}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise RequestInvalid if a value is not a whole number of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise RequestInvalid(f"{name} is {abbreviated(value)}; give a whole number, {least} or more")


def check_amount(name: str, value: Any) -> None:
    """Raise RequestInvalid if a value is not a number of at least 0."""
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else -1
    if not number >= 0:
        raise RequestInvalid(f"{name} is {abbreviated(value)}; give a number, 0 or more")


def check_header(name: str, value: Any) -> None:
    """Raise RequestInvalid if a value cannot be sent in a header."""
    if not isinstance(value, str):
        raise RequestInvalid(f"the {name} is a {type(value).__name__}; give a str")
    if not value or not value.isascii() or not value.isprintable():
        raise RequestInvalid(f"the {name} is empty or has characters that a header cannot have; give printable ASCII")


def check_how(stale: Any, partial: Any, form: Any) -> None:
    """Raise RequestInvalid if an option of a lookup has an unknown value."""
    for name, value, known in (("stale", stale, _STALE), ("partial", partial, _PARTIAL), ("format", form, MEDIA_TYPES)):
        if not isinstance(value, str) or value not in known:
            raise RequestInvalid(f"{name} is {abbreviated(value)}; it must be one of: {', '.join(known)}")
    if form == "arrow" and not _has_pyarrow():
        raise RequestInvalid(
            "format='arrow' needs PyArrow, which is not installed: pip install 'shoal[arrow]', or use format='npy' or "
            "format='json'"
        )


@cache
def _has_pyarrow() -> bool:
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def read_max_age(max_age: Any) -> str | None:
    """Return `max_age` in the form that the server reads; raise RequestInvalid if its type is wrong."""
    if max_age is None or isinstance(max_age, str):
        return max_age
    if isinstance(max_age, timedelta):
        return _duration(max_age)
    raise RequestInvalid(f'max_age is {abbreviated(max_age)}; give a text such as "12h", a timedelta, or None')


def _duration(age: timedelta) -> str:
    """Return a duration in the form that the server reads."""
    seconds = age.total_seconds()
    if seconds < 1 or seconds != int(seconds):
        raise RequestInvalid(f"max_age is {age}; the server takes whole seconds, at least 1")
    unit = next(unit for unit in _UNITS if seconds % _UNITS[unit] == 0)
    if seconds // _UNITS[unit] < _TOO_LONG:
        return f"{int(seconds) // _UNITS[unit]}{unit}"
    # A server accepts at most seven digits. If the age has more digits, it is rounded up to a larger unit.
    rounded = ((-int(-seconds // length), unit) for unit, length in reversed(_UNITS.items()))
    count, unit = next(((count, unit) for count, unit in rounded if count < _TOO_LONG), (_TOO_LONG - 1, "d"))
    return f"{count}{unit}"


def read_features(features: Any) -> str | list[str]:
    """Return the name of a feature service, or a list of references; raise RequestInvalid if the value is neither."""
    if isinstance(features, str):
        if ":" in features or not features:
            raise RequestInvalid(
                f"features is the text {features!r}, which is not a feature service's name; give references in a list"
            )
        return features
    is_list = isinstance(features, Iterable) and not isinstance(features, Mapping | Set)
    references = list(features) if is_list else []
    if not references or not all(isinstance(reference, str) for reference in references):
        raise RequestInvalid(
            f"features is {abbreviated(features)}; give a list of view:feature, or a feature service's name"
        )
    return references
