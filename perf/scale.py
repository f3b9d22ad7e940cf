"""How large a run of the benchmarks is."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Scale:
    """Sizes of a run: `full` gives figures worth quoting, `small` shows that everything runs."""

    directory: Path
    rows: int
    many_rows: int
    load_rows: int
    huge_rows: int
    rounds: int
    requests: int
    small: bool


def full(directory: Path) -> Scale:
    """The sizes that the bars are stated for."""
    return Scale(directory, 1_000_000, 20_000_000, 10_000_000, 100_000_000, 5, 2_000, small=False)


def small(directory: Path) -> Scale:
    """Minutes, for function only."""
    return Scale(directory, 20_000, 100_000, 50_000, 200_000, 1, 20, small=True)
