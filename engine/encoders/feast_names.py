"""How an answer to Feast's clients names what is in it."""

from collections import Counter

from engine.errors import AmbiguousFeature


def names_of(join_keys: tuple[str, ...], references: tuple[str, ...], full: bool) -> tuple[str, ...]:
    """The names of an answer's columns: join keys, then a feature each reference, `view__feature` if `full`, else
    `feature`.

    Raises:
        AmbiguousFeature: two of them are the same.
    """
    pairs = (reference.split(":") for reference in references)
    names = (*join_keys, *(f"{view}__{name}" if full else name for view, name in pairs))
    if len(set(names)) < len(names):
        repeated = ", ".join(name for name, count in Counter(names).items() if count > 1)
        raise AmbiguousFeature(
            f"the answer would have more than one {repeated}; ask for each feature once, and set full_feature_names to "
            f"tell apart those of several views"
        )
    return names
