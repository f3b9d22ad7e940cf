"""The limit on the size of an answer in bytes: checked when the answer is gathered, and again when it is encoded."""

from shoal.engine.base.errors import RequestTooLarge


class Allowance:
    """A limit of `most` bytes for one answer. If `most` is None, there is no limit."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._taken = 0

    def take(self, size: int) -> None:
        """Add bytes to the size of the answer; raise RequestTooLarge if the total is over the limit."""
        self._taken += size
        self.check(self._taken)

    def check(self, size: int) -> None:
        """Raise RequestTooLarge if an answer of `size` bytes is over the limit."""
        if self._most is not None and size > self._most:
            raise RequestTooLarge(
                f"the answer takes at least {size} bytes, more than the limit of {self._most}; request fewer keys or "
                f"features at a time, or raise the server's max_answer_bytes"
            )


UNLIMITED = Allowance(None)
