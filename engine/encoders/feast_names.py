"""The names of join keys and features in an answer to Feast's clients."""

from collections import Counter
from collections.abc import Sequence

from shoal.engine.base.errors import AmbiguousFeature
from shoal.engine.format.schema import split_reference


def answer_names(join_keys: Sequence[str], references: Sequence[str], *, full: bool) -> list[str]:
    """Return the names of all join keys and features in an answer, join keys first.

    Raises:
        AmbiguousFeature: two names are the same.
    """
    names = [*join_keys, *feature_names(references, full=full)]
    _check_distinct(names)
    return names


def feature_names(references: Sequence[str], *, full: bool) -> list[str]:
    """Return the names of features in an answer: `view__feature` if `full`, else `feature`.

    Raises:
        AmbiguousFeature: two names are the same.
    """
    names = [reference.replace(":", "__", 1) if full else split_reference(reference)[1] for reference in references]
    _check_distinct(names)
    return names


def _check_distinct(names: Sequence[str]) -> None:
    if len(set(names)) == len(names):
        return
    repeated = ", ".join(name for name, count in Counter(names).items() if count > 1)
    raise AmbiguousFeature(
        f"the answer would have more than one {repeated}; request each feature once, and set "
        f"full_feature_names to distinguish features of several views"
    )
