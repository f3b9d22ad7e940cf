"""Parse keys from the command line into the entities of a lookup."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shoal.engine.base.errors import LookupInvalid
from shoal.engine.format.schema import ViewSchema

_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,19}")


def join_key_types(schemas: Iterable[ViewSchema]) -> dict[str, str]:
    """Return the join keys of the requested views, and their types.

    Raises:
        LookupInvalid: two of the views have a join key of the same name with different types.
    """
    first: dict[str, tuple[str, str]] = {}
    for schema in schemas:
        for key in schema.join_keys:
            view, type_name = first.setdefault(key.name, (schema.name, key.type))
            if type_name != key.type:
                raise LookupInvalid(
                    f"join key {key.name!r} is {type_name} in view {view!r} and {key.type} in view {schema.name!r}; "
                    f"look the two views up one after the other"
                )
    return {name: type_name for name, (_, type_name) in first.items()}


def given_keys(items: Sequence[str], types: Mapping[str, str]) -> dict[str, list[Any]]:
    """Return the entities of `join_key=value` items. A name with several items becomes a list; a name with one item
    applies to every row.

    Raises:
        LookupInvalid: an item is malformed, names no join key, or the lists are of different lengths.
    """
    columns: dict[str, list[Any]] = {}
    for item in items:
        name, separator, text = item.partition("=")
        if not separator:
            raise LookupInvalid(f"--key {item!r} has no value; write it as join_key=value")
        if name not in types:
            raise LookupInvalid(
                f"--key {item!r}: {name!r} is not a join key of the requested views; they have {', '.join(types)}"
            )
        columns.setdefault(name, []).append(_whole_number(item, name, text) if types[name] == "int64" else text)
    if missing := [name for name in types if name not in columns]:
        raise LookupInvalid(f"--key lacks the join key {missing[0]!r}; the requested features need {', '.join(types)}")
    rows = max(len(values) for values in columns.values())
    for name, values in columns.items():
        if len(values) not in (1, rows):
            raise LookupInvalid(
                f"--key {name} is given {len(values)} times, but another key {rows} times; give both equally "
                f"often, or one of them once"
            )
    return {name: values * (rows // len(values)) for name, values in columns.items()}


def _whole_number(item: str, name: str, text: str) -> int:
    # int() alone would also accept 1_000, and non-ASCII digits.
    if _WHOLE_NUMBER.fullmatch(text) and -(2**63) <= (number := int(text)) < 2**63:
        return number
    raise LookupInvalid(
        f"--key {item!r}: {name} is int64, but {text!r} is not a whole number from -9223372036854775808 to "
        f"9223372036854775807"
    )
