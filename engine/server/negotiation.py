"""Choose the format of an answer by the request's Accept header (RFC 9110, section 12.5.1)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from shoal.engine.base.errors import LookupInvalid, NotAcceptable
from shoal.engine.encoders import arrow_stream, json_lookup, npy
from shoal.engine.feature_store import FeatureStore
from shoal.engine.lookup.allowance import Allowance


@dataclass(frozen=True)
class Format:
    """A format of answers: its media type, its lookup method of `FeatureStore`, and its encoder."""

    media_type: str
    look_up: Callable[..., Any]
    encode: Callable[[Any, Allowance], bytes]


FORMATS = (
    Format(json_lookup.MEDIA_TYPE, FeatureStore.lookup, json_lookup.encode),
    Format(arrow_stream.MEDIA_TYPE, FeatureStore.lookup, arrow_stream.encode),
    Format(npy.MEDIA_TYPE, FeatureStore.lookup_matrix, npy.encode),
)
"""The formats of /v1/lookup; the first is the default."""


@lru_cache(maxsize=256)
def choose_format(accept: str) -> Format:
    """Return the format with the highest quality in an Accept header. Among formats of equal quality, prefer the format
    with the most specific media range, and then the first in FORMATS.

    Raises:
        NotAcceptable: the client accepts none of the formats.
        LookupInvalid: the header cannot be parsed.
    """
    ranges = [_parse_range(part) for part in accept.split(",") if part.strip()] or [("*/*", 1.0)]
    best = FORMATS[0]
    best_liking = (0.0, 0)
    for candidate in FORMATS:
        liking = _liking(candidate.media_type, ranges)
        if liking > best_liking:
            best = candidate
            best_liking = liking
    if best_liking[0] <= 0:
        offered = ", ".join(candidate.media_type for candidate in FORMATS)
        raise NotAcceptable(f"Accept: {accept} allows no format of lookups; the formats are {offered}")
    return best


def _parse_range(part: str) -> tuple[str, float]:
    """Return a media range and its quality; ignore other parameters."""
    media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return media_range, float(value)
            except ValueError:
                raise LookupInvalid(f"Accept gives {media_range} the quality {value!r}; write 0 to 1") from None
    return media_range, 1.0


def _liking(media_type: str, ranges: list[tuple[str, float]]) -> tuple[float, int]:
    """Return the quality of the most specific range that matches a media type, and how specific that range is."""
    by_closeness = ("*/*", media_type.partition("/")[0] + "/*", media_type)
    matching = [(by_closeness.index(name) + 1, quality) for name, quality in ranges if name in by_closeness]
    closeness, quality = max(matching, default=(0, 0.0))
    return quality, closeness
