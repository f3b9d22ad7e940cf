"""The sizes of a run of the benchmarks."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Scale:
    """The sizes of a run. A run with the sizes of `full` gives meaningful figures. A run with the sizes of `small` only
    shows that everything runs."""

    directory: Path
    rows: int
    many_rows: int
    load_rows: int
    huge_rows: int
    rounds: int
    requests: int
    small: bool


def full(directory: Path) -> Scale:
    """Return the sizes to which the targets (bars) apply."""
    return Scale(directory, 1_000_000, 20_000_000, 10_000_000, 100_000_000, 5, 2_000, small=False)


def small(directory: Path) -> Scale:
    """Return sizes for a run of a few minutes. The figures of such a run mean nothing."""
    return Scale(directory, 20_000, 100_000, 50_000, 200_000, 1, 20, small=True)
