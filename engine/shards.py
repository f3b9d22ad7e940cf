"""Shards: a view that is too big for a node is served by several, each of which holds one range of the key hashes.

A store is one shard of `count`: of the space of the first key hash, in its signed order, which is the order of
published files, it holds the `number`th of so many equal ranges. Clients compute the same ranges to know whom to ask.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from engine.errors import KeyOutsideShard, SettingsInvalid

MOST_SHARDS = 65_536
_LEAST_HASH = -(1 << 63)
_HASHES = 1 << 64
_TEXT = re.compile(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Shard:
    """The `number`th, from 1, of `count` ranges of the first key hash."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The shard that a text such as `2/4` names.

        Raises:
            SettingsInvalid: it names none.
        """
        match = _TEXT.fullmatch(text)
        if match is not None:
            number, count = map(int, match.groups())
            if number <= count <= MOST_SHARDS:
                return cls(number, count)
        raise SettingsInvalid(
            f"shard is {text!r}; write which of how many, such as 2/4 for the second of four (of {MOST_SHARDS} at most)"
        )

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @cached_property
    def first(self) -> int:
        """The least first hash that belongs to it, signed."""
        return _LEAST_HASH + _HASHES * (self.number - 1) // self.count

    @cached_property
    def last(self) -> int:
        """The greatest first hash that belongs to it, signed."""
        return _LEAST_HASH + _HASHES * self.number // self.count - 1

    def holds_all(self, least: int, greatest: int) -> bool:
        """Whether all hashes from `least` to `greatest` belong to it."""
        return self.first <= least and greatest <= self.last

    def touches(self, least: int, greatest: int) -> bool:
        """Whether any hash from `least` to `greatest` belongs to it."""
        return least <= self.last and self.first <= greatest

    def rows_inside(self, first: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of some first hashes belong to it."""
        inside: npt.NDArray[np.bool_] = (first >= self.first) & (first <= self.last)
        return inside

    def check_keys(self, view: str, hashes: npt.NDArray[np.int64], nowhere: int) -> None:
        """Check that keys belong to it.

        Args:
            hashes: int64[2, keys], both hashes of each.
            nowhere: both hashes of a key that no row has, and that any shard can say so of.

        Raises:
            KeyOutsideShard: some do not.
        """
        outside = ~self.rows_inside(hashes[0])
        if not outside.any():
            return
        outside &= (hashes[0] != nowhere) | (hashes[1] != nowhere)
        if outside.any():
            row = int(outside.argmax())
            theirs = self.of_hash(int(hashes[0, row]))
            raise KeyOutsideShard(
                f"{int(outside.sum())} of {outside.size} keys of view {view!r} are not of this store, which is shard "
                f"{self}: that in row {row} belongs to shard {theirs}; ask there, or have shoal_client split requests"
            )

    def of_hash(self, first: int) -> "Shard":
        """The shard, of as many, that a first hash belongs to."""
        # The last range that begins at or before it, where each begins at the whole part of its share of the space.
        return Shard(-(-(first - _LEAST_HASH + 1) * self.count // _HASHES), self.count)
