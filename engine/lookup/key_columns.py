"""The entities of a request, and their hashes for the join keys of each requested view."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shoal.engine.base.errors import LookupInvalid
from shoal.engine.base.quoting import abbreviated
from shoal.engine.format.schema import JoinKey, arrow_type
from shoal.engine.kernels import hashing
from shoal.engine.store.version import ViewVersion

Entities = Mapping[str, Any]
"""Join key → its values: a list, a NumPy array or an Arrow array, or a scalar, which is repeated for every row."""

Hashes = npt.NDArray[np.int64]
"""int64[2, keys]: both hashes of each key."""

Incomplete = Literal["fail", "not_found"]
"""The treatment of keys with a part that is null or missing: fail the lookup, or return NOT_FOUND for these keys."""

_NOWHERE = 0
"""The value of both hashes of a key that matches no row. A stored key has these hashes only by a hash collision, which
is as unlikely as any other collision."""

_UNORDERED = (set, frozenset, dict)
_SCALARS = (str, int, float, bytes, np.generic)
_SEPARATOR = chr(hashing.SEPARATOR)


class KeyColumns:
    """The entities of a request, hashed on demand for each view. Views with the same join keys share the hashes.

    Raises:
        LookupInvalid: an entity is neither a scalar nor a list, or lists have different lengths.
    """

    def __init__(self, entities: Entities, incomplete: Incomplete = "fail") -> None:
        self._entities = entities
        self._incomplete = incomplete
        self.count = 1
        self._scalars = set()
        first_list = None
        for name, values in entities.items():
            if _is_scalar(values):
                self._scalars.add(name)
                continue
            length = _length(name, values)
            if first_list is not None and length != self.count:
                raise LookupInvalid(
                    f"entity {name!r} has {length} values, but {first_list!r} has {self.count}; lists must be of one "
                    f"length (a scalar is repeated)"
                )
            first_list = name
            self.count = length
        self._made: dict[tuple[JoinKey, ...], Hashes] = {}

    def hashes(self, view: ViewVersion) -> Hashes:
        """Return the hashes of a view's keys, one per row of the request.

        Raises:
            LookupInvalid: an entity is missing or null where it must not be, or its values are not of the join key's
                type.
            KeyOutsideShard: some keys belong to another shard.
        """
        made = self._made.get(view.join_keys)
        if made is None:
            made = self._made[view.join_keys] = self._hash(view)
            if view.shard is not None:
                view.shard.check_keys(view.name, made, _NOWHERE)
        return made

    def _hash(self, view: ViewVersion) -> Hashes:
        if not view.join_key_names <= self._entities.keys():
            return self._hash_in_part(view)
        scalars = self._scalars.issuperset(view.join_key_names)
        rows = 1 if scalars else self.count
        hashes = hashing.seeds(rows)
        nulls = []
        for key in view.join_keys:
            values = self._entities[key.name]
            if key.name in self._scalars:
                values = [values] * rows
            if not _chain_text(key, values, hashes):
                column = key_array(key, values)
                if column.null_count:
                    nulls.append(self._nulls(key, column))
                    column = column.fill_null("" if key.type == "string" else 0)
                hashing.chain_array(column, *hashes)
        for null in nulls:
            hashes[:, null] = _NOWHERE
        signed = hashes.view(np.int64)
        return signed if rows == self.count else np.repeat(signed, self.count, axis=1)

    def _hash_in_part(self, view: ViewVersion) -> Hashes:
        """Return the hashes of keys that lack a column. The other columns must still have the right types."""
        missing = [key.name for key in view.join_keys if key.name not in self._entities]
        if self._incomplete == "fail" or len(missing) == len(view.join_keys):
            given = ", ".join(self._entities) or "none"
            raise LookupInvalid(
                f"view {view.name!r} is looked up by {missing[0]!r}, which is not among the entities ({given})"
            )
        for key in view.join_keys:
            if key.name in self._entities:
                values = self._entities[key.name]
                key_array(key, [values] if key.name in self._scalars else values)
        return np.full((2, self.count), _NOWHERE, np.int64)

    def _nulls(self, key: JoinKey, column: pa.Array) -> npt.NDArray[np.bool_]:
        """Return a mask of the null values in a column with nulls; raise LookupInvalid if nulls are not allowed."""
        nulls: npt.NDArray[np.bool_] = column.is_null().to_numpy(zero_copy_only=False)
        if self._incomplete == "fail":
            raise LookupInvalid(
                f"entity {key.name!r} is null in row {nulls.argmax()}; leave such rows out of the request"
            )
        return nulls


def take_keys(hashes: Hashes, numbers: npt.NDArray[np.int64]) -> Hashes:
    """Return int64[2, numbers], the hashes of the keys at the given positions, each of the two contiguous in memory.

    With plain indexing, the two hashes of a key would lie side by side. The kernels would be compiled a second time for
    that memory layout.
    """
    return np.take(hashes, numbers, axis=1)


def _is_scalar(values: Any) -> bool:
    return values is None or isinstance(values, _SCALARS)


def _length(name: str, values: Any) -> int:
    try:
        if not isinstance(values, _UNORDERED):
            return len(values)
        raise TypeError("the rows of the answer are in the order of the values")
    except TypeError:
        raise LookupInvalid(
            f"entity {name!r} is of type {type(values).__name__}; give a scalar, a list, or a NumPy or Arrow array"
        ) from None


def _chain_text(key: JoinKey, values: Any, hashes: npt.NDArray[np.uint64]) -> bool:
    """Chain a list of str into hashes as one joined text. This is the fastest way to get the bytes of the strings. If
    the values are not a list of str, or a value contains the separator, return False and leave the hashes unchanged."""
    if key.type != "string" or not isinstance(values, list) or not values:
        return False
    try:
        text = _SEPARATOR.join(values).encode()
    except (TypeError, UnicodeEncodeError):
        return False
    return bool(hashing.chain_joined(np.frombuffer(text, np.uint8), *hashes))


def key_array(key: JoinKey, values: Any) -> pa.Array:
    """Return the values of a join key as one contiguous Arrow array, which may hold nulls."""
    wanted = arrow_type(key.type)
    try:
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        # The type is checked before the conversion, because a conversion would turn the float 1.5 into the key 1.
        column = values if isinstance(values, pa.Array) else pa.array(values)
        if column.type != wanted:
            if len(column) and not _fits(column.type, wanted):
                raise LookupInvalid(
                    f"entity {key.name!r} must be {key.type}, but holds {column.type}, such as {example_of(column)}"
                )
            column = column.cast(wanted)
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        raise LookupInvalid(f"entity {key.name!r} must be {key.type}: {error}") from None
    return column


def _fits(given: pa.DataType, wanted: pa.DataType) -> bool:
    """Return whether values of the type `given` can be keys of the type `wanted`. Nulls are accepted here, because
    other code checks nulls."""
    if pa.types.is_dictionary(given):
        given = given.value_type
    if pa.types.is_null(given):
        return True
    if pa.types.is_int64(wanted):
        return bool(pa.types.is_integer(given))
    return bool(pa.types.is_string(given) or pa.types.is_large_string(given) or pa.types.is_string_view(given))


def example_of(values: pa.Array) -> str:
    """Return a non-null value of an array, abbreviated for a message."""
    # Convert the values one by one. Some types store a repeated value only once, so all values together may need too
    # much memory.
    try:
        return abbreviated(next((value.as_py() for value in values if value.is_valid), None))
    except (ValueError, OverflowError, pa.ArrowException):
        return "a value that Python cannot represent"
