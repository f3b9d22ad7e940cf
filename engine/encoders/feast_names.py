"""How an answer to Feast's clients names what is in it."""

from collections import Counter
from collections.abc import Sequence

from engine.errors import AmbiguousFeature


def answer_names(join_keys: Sequence[str], references: Sequence[str], *, full: bool) -> list[str]:
    """The names of all that is in an answer, join keys first.

    Raises:
        AmbiguousFeature: two are the same.
    """
    names = [*join_keys, *feature_names(references, full=full)]
    _check_distinct(names)
    return names


def feature_names(references: Sequence[str], *, full: bool) -> list[str]:
    """The names of features in an answer: `view__feature` if `full`, else `feature`.

    Raises:
        AmbiguousFeature: two are the same.
    """
    names = [reference.replace(":", "__", 1) if full else reference.partition(":")[2] for reference in references]
    _check_distinct(names)
    return names


def _check_distinct(names: Sequence[str]) -> None:
    if len(set(names)) == len(names):
        return
    repeated = ", ".join(name for name, count in Counter(names).items() if count > 1)
    raise AmbiguousFeature(
        f"the answer would have more than one {repeated}; ask for each feature once, and set full_feature_names to "
        f"tell apart those of several views"
    )
