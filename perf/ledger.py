"""A record of the changes that were written to a store under test. It is used to check answers: for each document it
has the oldest and the newest change that a reader may see. The processes of a benchmark share the record's memory."""

from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from perf.dataset import Dataset, changes_seen, matrix


class Ledger:
    """The ledger of one view. `begun[document]` is the last change that a writer began to write. `done[document]` is
    the last change known to be served. Each document has one writer, and its changes are counted from 1."""

    def __init__(self, path: Path, data: Dataset) -> None:
        self.data = data
        self.begun, self.done = np.memmap(path, np.int64, "r+", shape=(2, data.rows))

    @classmethod
    def make(cls, path: Path, data: Dataset) -> Self:
        """Create a ledger in which no document has changed yet."""
        path.write_bytes(bytes(2 * 8 * data.rows))
        return cls(path, data)

    def fault(
        self, documents: npt.NDArray[np.int64], found: npt.NDArray[np.float32], done_before: npt.NDArray[np.int64]
    ) -> str | None:
        """Return a description of what is wrong with a new answer; None if the answer is right.

        Args:
            found: the answer, float32[documents, features].
            done_before: the value of `done[documents]` before the request was sent.
        """
        changes = changes_seen(documents, found[:, 0])
        whole = (found == matrix(documents, self.data.features, changes)).all(axis=1)
        right = whole & (done_before <= changes) & (changes <= self.begun[documents])
        if right.all():
            return None
        wrong = int(np.argmin(right))
        kind = "of one change" if whole[wrong] else "no row of any change"
        return (
            f"{self.data.view}: {np.count_nonzero(~right)} of {documents.size} rows are wrong; document "
            f"{documents[wrong]} is {kind} ({changes[wrong]}), it was at {done_before[wrong]} before and may be at "
            f"{self.begun[documents[wrong]]}; its first values are {found[wrong, :3]}"
        )
