"""What has been written to a store under test, in memory that the processes of a benchmark share, to hold answers
against: of each document the change that everybody must see, and the newest that anybody may see."""

from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from perf.dataset import Dataset, changes_seen, matrix


class Ledger:
    """Of one view. `begun[document]` is the last change whose writing has begun, `done[document]` the last of which it
    is known that it is served. Each document has one writer, who counts its changes from 1."""

    def __init__(self, path: Path, data: Dataset) -> None:
        self.data = data
        self.begun, self.done = np.memmap(path, np.int64, "r+", shape=(2, data.rows))

    @classmethod
    def make(cls, path: Path, data: Dataset) -> Self:
        """A ledger of documents that nobody has changed yet."""
        path.write_bytes(bytes(2 * 8 * data.rows))
        return cls(path, data)

    def fault(
        self, documents: npt.NDArray[np.int64], found: npt.NDArray[np.float32], done_before: npt.NDArray[np.int64]
    ) -> str | None:
        """What is wrong with an answer that has just come; None if nothing is.

        Args:
            found: float32[documents, features].
            done_before: `done[documents]` from before the request was sent.
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
