"""How many bytes an answer may take: asked as it is gathered, and again as it is encoded."""

from engine.errors import RequestTooLarge


class Allowance:
    """One answer may take up to `most` bytes; any number if that is None."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._taken = 0

    def take(self, size: int) -> None:
        """Count bytes that an answer takes besides those before; raises RequestTooLarge if that is too many."""
        self._taken += size
        self.check(self._taken)

    def check(self, size: int) -> None:
        """Raise RequestTooLarge if an answer of so many bytes is too large."""
        if self._most is not None and size > self._most:
            raise RequestTooLarge(
                f"the answer takes at least {size} bytes, more than the limit of {self._most}; request fewer keys or "
                f"features at a time, or raise the server's max_answer_bytes"
            )


UNLIMITED = Allowance(None)
