"""A worker's answers, from the lookup until clients have taken them: bounded in bytes, encoded beside the event loop.

An answer that nobody reads stays in memory. So does one that waits for its turn to be encoded. All of those bytes are
counted here, and lookups are refused while there are too many of them.

The event loop answers nothing while it encodes, and health least of all should wait for a large answer. So one thread
encodes the large ones, one after the other. What it encodes is a copy: the version that it was read from may move on.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from engine.allowance import Allowance
from engine.errors import Overloaded
from engine.result import LookupResult, MatrixResult
from engine.settings import ServerSettings

_LARGE_BYTES = 1 << 20
"""From so many gathered bytes on, encoding takes some milliseconds, and a thread is worth its price."""


class Outgoing:
    """One worker's, of HTTP and gRPC alike."""

    def __init__(self, settings: ServerSettings) -> None:
        self._most_of_one = settings.max_answer_bytes
        self._most = settings.max_unsent_bytes
        self._held = 0
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder")

    @property
    def is_short(self) -> bool:
        """Whether so much is held that clients who take their answers too slowly have to go."""
        return self._held > self._most // 2

    def check(self) -> None:
        """Raise Overloaded while too much is held. To be called before a lookup."""
        if self._held > self._most:
            raise Overloaded(
                f"{self._held} bytes of answers wait for clients to read them, more than the worker's "
                f"max_unsent_bytes, {self._most}; try again later",
                "unsent",
            )

    def hold(self, size: int) -> None:
        """Count bytes that are held from now on."""
        self._held += size

    def release(self, size: int) -> None:
        """They have been taken, or dropped."""
        self._held -= size

    async def encode(self, result: LookupResult | MatrixResult, encoding: Callable[[Allowance], bytes]) -> bytes:
        """What `encoding` makes of a result within its allowance; raises what it raises, and RequestTooLarge."""
        allowance = Allowance(self._most_of_one)
        if result.nbytes < _LARGE_BYTES:
            content = encoding(allowance)
        else:
            self.hold(result.nbytes)
            try:
                content = await asyncio.get_running_loop().run_in_executor(self._encoder, encoding, allowance)
            finally:
                self.release(result.nbytes)
        allowance.check(len(content))
        return content

    def close(self) -> None:
        """End the thread."""
        self._encoder.shutdown()
