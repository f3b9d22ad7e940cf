"""A worker's answers, from the lookup until clients have read them: limited in bytes, and encoded outside the event
loop.

An answer that the client does not read stays in memory, and so does an answer that waits to be encoded. The bytes of
all these answers are counted here, and lookups are rejected while there are too many bytes.

While the event loop encodes an answer, it answers no other request. Above all, /health should not wait for a large
answer. So one thread encodes the large answers, one after the other. The thread encodes a copy of the values, because
the store may move on to another version.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from shoal.engine.base.errors import Overloaded
from shoal.engine.lookup.allowance import Allowance
from shoal.engine.lookup.result import LookupResult, MatrixResult
from shoal.engine.server.settings import ServerSettings

_LARGE_BYTES = 1 << 20
"""The size of a large answer, in gathered bytes. From this size on, encoding takes some milliseconds, and a thread is
worth its cost."""


class Outgoing:
    """The outgoing answers of one worker, over HTTP and gRPC."""

    def __init__(self, settings: ServerSettings) -> None:
        self._most_of_one = settings.max_answer_bytes
        self._most = settings.max_unsent_bytes
        self._held = 0
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder")

    @property
    def is_short(self) -> bool:
        """Whether memory is short; clients that read too slowly must then be disconnected."""
        return self._held > self._most // 2

    def check(self) -> None:
        """Raise Overloaded while too many bytes are held. Call this before a lookup."""
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
        """Encode a result; raise the errors of `encoding`, and RequestTooLarge if the answer is over its size limit."""
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
