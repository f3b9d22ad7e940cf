"""Check the arguments of a lookup in this process: a caller may pass values that do not match the type hints."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from shoal.engine.base.errors import LookupInvalid
from shoal.engine.base.quoting import abbreviated
from shoal.engine.lookup.key_columns import Entities


def as_entities(given: Any) -> Entities:
    """Return the entities of a lookup. Return a mapping unchanged, and a DataFrame or an Arrow table as a mapping of
    its columns.

    Raises:
        LookupInvalid: `given` is not one of these types, or two columns have the same name.
    """
    if isinstance(given, dict | Mapping):  # Much cheaper to check for dict than for Mapping.
        return given
    # Arrow tables name their columns in `column_names`, DataFrames in `columns`.
    names = getattr(given, "column_names", None)
    if names is None and hasattr(given, "__getitem__"):
        names = getattr(given, "columns", None)
    if names is None:
        raise LookupInvalid(
            f"the entities are {abbreviated(given)}; give a DataFrame, or the values by join key: "
            f'{{"user_id": [1, 2], "country": "de"}}'
        )
    entities: dict[str, Any] = {}
    for name in names:
        if str(name) in entities:
            raise LookupInvalid(f"the entities have two columns {str(name)!r}; remove one")
        entities[str(name)] = given[name]
    return entities


def check_max_age(max_age: object) -> None:
    """Raise LookupInvalid if `max_age` is not a timedelta, or is negative."""
    if not isinstance(max_age, timedelta):
        raise LookupInvalid(f"max_age is {abbreviated(max_age)}; give a timedelta, such as timedelta(seconds=3600)")
    if max_age < timedelta(0):
        raise LookupInvalid(f"max_age is {max_age}; give a timedelta that is not negative")


def as_features(given: Any) -> str | tuple[str, ...]:
    """Return the features of a lookup: a feature service's name, or a list of references.
    `shoal.engine.lookup.columns.resolve_features` checks each reference.

    Raises:
        LookupInvalid: `given` is neither a str nor a list.
    """
    if isinstance(given, str):
        return given
    if isinstance(given, list | tuple | Sequence):
        features = tuple(given)
        try:
            hash(features)
        except TypeError:
            pass
        else:
            return features
    raise not_features(given)


def not_features(given: object) -> LookupInvalid:
    """Return the error for an invalid `features` argument."""
    return LookupInvalid(
        f"the features are {abbreviated(given)}; give a list such as ['docs:ctr', 'docs:*'], or the name of a "
        "feature service"
    )
