"""Pushes on their way into the store: what arrives while a group of them is being committed makes the next group."""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

from engine.errors import PushesFull, ShoalError
from loaders.push import Push, Pushed, push
from loaders.store_writer import StoreWriter

log = logging.getLogger("shoal.writer")

MOST_WAITING_BYTES = 128 << 20
"""Pushes that would make more rows wait, counted as Arrow columns in memory, are refused."""
_GROUP_BYTES = 16 << 20
_COMMIT_SECONDS = 0.01
"""The least time from one commit of a view to the next: each has every worker read the catalog anew."""
_THREADS = 16

_Waiting = tuple[Push, int, asyncio.Future[Pushed]]
"""A push, its bytes, and where its answer goes."""


class PushQueue:
    """Applies pushes, views side by side and one group of a view after the other.

    Args:
        committed: told the view after each group.
    """

    def __init__(self, writer: StoreWriter, committed: Callable[[str], None]) -> None:
        self._writer = writer
        self._committed = committed
        self._waiting: defaultdict[str, deque[_Waiting]] = defaultdict(deque)
        self._waiting_bytes = 0
        self._draining: dict[str, asyncio.Task[None]] = {}
        # Threads of its own: those that load snapshots are busy for minutes.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="push")

    async def submit(self, view: str, order: Push) -> Pushed:
        """Apply a push; when this returns it is on the disk and visible.

        Raises:
            PushesFull: too much waits already.
            IdempotencyKeyReused: another push to the view was applied under its id.
            ShoalError: what `push` raises.
        """
        size = sum(batch.nbytes for batch in order.rows)
        if self._waiting_bytes and self._waiting_bytes + size > MOST_WAITING_BYTES:
            raise PushesFull(
                f"{self._waiting_bytes >> 20} MiB of pushed rows wait to be written, {MOST_WAITING_BYTES >> 20} MiB "
                f"may; push again in {PushesFull.retry_after} s"
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
        waiting, total = self._waiting[view], 0
        group: list[_Waiting] = []
        while waiting and (not group or total + waiting[0][1] <= _GROUP_BYTES):
            group.append(waiting.popleft())
            total += group[-1][1]
        return group

    async def _apply(self, view: str, group: list[_Waiting]) -> None:
        loop, orders = asyncio.get_running_loop(), [order for order, _, _ in group]
        try:
            answers = await loop.run_in_executor(self._threads, push, self._writer, view, orders)
        except Exception as error:
            if len(group) > 1:
                # One of them may have spoiled it for the others, also by what nobody foresaw.
                for one in group:
                    await self._apply(view, [one])
                return
            if not isinstance(error, ShoalError):
                log.exception("%s: a push met something unexpected; the last version stands", view)
            self._answer(group[0][2], error)
        else:
            for (_, _, future), answer in zip(group, answers, strict=True):
                self._answer(future, answer)

    @staticmethod
    def _answer(future: asyncio.Future[Pushed], answer: Pushed | Exception) -> None:
        if future.done():
            return  # Who asked is gone.
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
