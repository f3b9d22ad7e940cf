"""Shards: a view that is too big for one node is served by several nodes. Each node holds one range of the key hashes.

The space of the first key hash is divided into `count` equal ranges, in signed order (published files have the same
order). A shard holds the range with the number `number`. Clients compute the same ranges to find the node of a key.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from shoal.engine.base.errors import KeyOutsideShard, SettingsInvalid

MOST_SHARDS = 65_536
_LEAST_HASH = -(1 << 63)
_HASHES = 1 << 64
_TEXT = re.compile(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Shard:
    """The range number `number`, counted from 1, of the `count` equal ranges of first key hashes."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the shard that a text such as `2/4` names.

        Raises:
            SettingsInvalid: the text is not NUMBER/COUNT, or a number is out of range.
        """
        match = _TEXT.fullmatch(text)
        if match is not None:
            number, count = map(int, match.groups())
            if number <= count <= MOST_SHARDS:
                return cls(number, count)
        raise SettingsInvalid(
            f"shard is {text!r}; give NUMBER/COUNT, such as 2/4 for the second of four (COUNT is at most {MOST_SHARDS})"
        )

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @cached_property
    def first(self) -> int:
        """The least first hash in the shard, as a signed number."""
        return _LEAST_HASH + _HASHES * (self.number - 1) // self.count

    @cached_property
    def last(self) -> int:
        """The greatest first hash in the shard, as a signed number."""
        return _LEAST_HASH + _HASHES * self.number // self.count - 1

    def holds_all(self, least: int, greatest: int) -> bool:
        """Return whether all hashes from `least` to `greatest` belong to the shard."""
        return self.first <= least and greatest <= self.last

    def touches(self, least: int, greatest: int) -> bool:
        """Return whether any hash from `least` to `greatest` belongs to the shard."""
        return least <= self.last and self.first <= greatest

    def rows_inside(self, first: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return, for each first hash, whether it belongs to the shard."""
        inside: npt.NDArray[np.bool_] = (first >= self.first) & (first <= self.last)
        return inside

    def check_keys(self, view: str, hashes: npt.NDArray[np.int64], nowhere: int) -> None:
        """Check that keys belong to the shard.

        Args:
            hashes: int64[2, keys], both hashes of each key.
            nowhere: the value of both hashes of a key that matches no row; every shard accepts such a key.

        Raises:
            KeyOutsideShard: a key belongs to another shard.
        """
        outside = ~self.rows_inside(hashes[0])
        if not outside.any():
            return
        outside &= (hashes[0] != nowhere) | (hashes[1] != nowhere)
        if outside.any():
            row = int(outside.argmax())
            theirs = self.of_hash(int(hashes[0, row]))
            raise KeyOutsideShard(
                f"{int(outside.sum())} of {outside.size} keys of view {view!r} are not in this store, which is shard "
                f"{self}: the key in row {row} belongs to shard {theirs}; send the request there, or let shoal.client "
                f"split requests"
            )

    def of_hash(self, first: int) -> "Shard":
        """Return the shard to which a first hash belongs, if there are as many shards as this shard's `count`."""
        # This is the last range that begins at or before the hash. The beginning of each range is rounded down.
        return Shard(-(-(first - _LEAST_HASH + 1) * self.count // _HASHES), self.count)
