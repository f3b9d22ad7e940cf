"""Queue pushes for the store: the pushes that arrive during the commit of one group form the next group."""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

from shoal.engine.base.errors import PushesFull, ShoalError
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import Push, Pushed, push

log = logging.getLogger("shoal.writer")

MOST_WAITING_BYTES = 128 << 20
"""The maximum size of the waiting rows in bytes, measured as Arrow columns in memory. A push that would exceed the
maximum is refused, unless no rows are waiting."""
_GROUP_BYTES = 16 << 20
_COMMIT_SECONDS = 0.01
"""The minimum time from one commit of a view to the next, because each commit makes every worker read the catalog
again."""
_THREADS = 16

_Waiting = tuple[Push, int, asyncio.Future[Pushed]]
"""A push, its size in bytes, and the future for its answer."""


class PushQueue:
    """A queue that applies pushes: views in parallel, and the groups of one view one after the other.

    Args:
        committed: called with the view's name after each group.
    """

    def __init__(self, writer: StoreWriter, committed: Callable[[str], None]) -> None:
        self._writer = writer
        self._committed = committed
        self._waiting: defaultdict[str, deque[_Waiting]] = defaultdict(deque)
        self._waiting_bytes = 0
        self._draining: dict[str, asyncio.Task[None]] = {}
        # The queue has its own threads, because threads that load snapshots are busy for minutes.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="push")

    async def submit(self, view: str, order: Push) -> Pushed:
        """Apply a push; when this returns, the push is on the disk and visible.

        Raises:
            PushesFull: too many bytes are waiting already.
            IdempotencyKeyReused: another push to the view was applied under the same id.
            ShoalError: any error that `push` raises.
        """
        size = sum(batch.nbytes for batch in order.rows)
        if self._waiting_bytes and self._waiting_bytes + size > MOST_WAITING_BYTES:
            raise PushesFull(
                f"{self._waiting_bytes >> 20} MiB of pushed rows wait to be written, the limit is "
                f"{MOST_WAITING_BYTES >> 20} MiB; push again in {PushesFull.retry_after} s"
            )
        self._waiting_bytes += size
        future: asyncio.Future[Pushed] = asyncio.get_running_loop().create_future()
        self._waiting[view].append((order, size, future))
        if view not in self._draining:
            self._draining[view] = asyncio.create_task(self._drain(view))
        return await future

    async def _drain(self, view: str) -> None:
        while group := self._next_group(view):
            started = monotonic()
            try:
                await self._apply(view, group)
            finally:
                self._waiting_bytes -= sum(size for _, size, _ in group)
            self._committed(view)
            if self._waiting[view]:
                await asyncio.sleep(started + _COMMIT_SECONDS - monotonic())
        del self._draining[view]

    def _next_group(self, view: str) -> list[_Waiting]:
        waiting = self._waiting[view]
        total = 0
        group: list[_Waiting] = []
        while waiting and (not group or total + waiting[0][1] <= _GROUP_BYTES):
            group.append(waiting.popleft())
            total += group[-1][1]
        return group

    async def _apply(self, view: str, group: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        orders = [order for order, _, _ in group]
        try:
            answers = await loop.run_in_executor(self._threads, push, self._writer, view, orders)
        except Exception as error:
            if len(group) > 1:
                # Apply each push alone: one push may have made the whole group fail, even with an unexpected error.
                for one in group:
                    await self._apply(view, [one])
                return
            if not isinstance(error, ShoalError):
                log.exception("%s: a push failed with an unexpected error; the last version stays in use", view)
            self._answer(group[0][2], error)
        else:
            for (_, _, future), answer in zip(group, answers, strict=True):
                self._answer(future, answer)

    @staticmethod
    def _answer(future: asyncio.Future[Pushed], answer: Pushed | Exception) -> None:
        if future.done():
            return  # The client is gone.
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
