"""A worker's answers, from the lookup until clients have read them: limited in bytes, and encoded outside the event
loop.

An answer that the client does not read stays in memory, and so does one that waits to be encoded. All of these bytes
are counted here, and lookups are rejected while there are too many.

The event loop answers no request while it encodes, and above all /health should not wait for a large answer. So one
thread encodes the large answers, one after the other. It encodes a copy, because the store may move on to another
version.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from engine.allowance import Allowance
from engine.errors import Overloaded
from engine.result import LookupResult, MatrixResult
from engine.settings import ServerSettings

_LARGE_BYTES = 1 << 20
"""From this many gathered bytes on, encoding takes some milliseconds, and a thread is worth its cost."""


class Outgoing:
    """The outgoing answers of one worker, over HTTP and gRPC."""

    def __init__(self, settings: ServerSettings) -> None:
        self._most_of_one = settings.max_answer_bytes
        self._most = settings.max_unsent_bytes
        self._held = 0
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder")

    @property
    def is_short(self) -> bool:
        """Whether so much is held that clients that read too slowly must be disconnected."""
        return self._held > self._most // 2

    def check(self) -> None:
        """Raise Overloaded while too much is held. Call this before a lookup."""
        if self._held > self._most:
            raise Overloaded(
                f"{self._held} bytes of answers wait for clients to read them, more than the worker's "
                f"max_unsent_bytes, {self._most}; try again later",
                "unsent",
            )

    def hold(self, size: int) -> None:
        """Add bytes that are held from now on."""
        self._held += size

    def release(self, size: int) -> None:
        """Subtract bytes that were sent or dropped."""
        self._held -= size

    async def encode(self, result: LookupResult | MatrixResult, encoding: Callable[[Allowance], bytes]) -> bytes:
        """Encode a result within its allowance; raise what `encoding` raises, and RequestTooLarge."""
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
