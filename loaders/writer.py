"""The writer process: watch the export root, apply new entries, merge overlays, and answer requests on a control
socket.

Views are processed in separate threads, so that a large load of one view does not delay the deltas of another. The
process may die at any instruction without losing a commit. The next writer continues from the last commit.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pydantic
from aiohttp import web
from watchfiles import Change, awatch

from shoal.engine.base.errors import (
    AddressUnusable,
    DefinitionError,
    LookupInvalid,
    ManifestInvalid,
    NotPublished,
    PushInvalid,
    RootSilent,
    RootUnreadable,
    RunDirectoryPrivate,
    ShoalError,
    StoreDamaged,
    StoreFull,
    StoreIsOtherShard,
    StoreMoved,
    StoreNotFound,
    StoreNotWritable,
    StoreUnreadable,
)
from shoal.engine.base.failpoints import reached
from shoal.engine.base.shards import Shard
from shoal.engine.format.schema import ViewSchema
from shoal.engine.process.control import (
    CONTENT_HEADER,
    REQUEST_ID_HEADER,
    error_document,
    listen_unix,
    writer_socket_path,
)
from shoal.engine.process.malloc import limit_malloc_arenas, return_freed_memory
from shoal.engine.process.run_directory import is_same_file
from shoal.engine.push.pushed_rows import deserialize_rows
from shoal.engine.root.export_root import LOG, MANIFEST, SERVICES, ExportRoot
from shoal.engine.store.environment import open_live
from shoal.engine.store.open_version import read_version
from shoal.loaders.apply.compaction import fold, should_fold
from shoal.loaders.apply.definition import define_view, drop_view, follow_drops
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import AppliedEntry, catch_up
from shoal.loaders.follow.plan import ApplyDelta, LoadSnapshot
from shoal.loaders.follow.recurring import RecurringFailures
from shoal.loaders.follow.reload import ReloadOrder, reload_or_tell, views_to_reload
from shoal.loaders.follow.replication import ReplicationKeeper
from shoal.loaders.push.push import Push
from shoal.loaders.push.push_queue import PushQueue
from shoal.loaders.scrub.scheduling import leave_room_for_lookups
from shoal.loaders.scrub.scrub import Scrub, no_scrub

log = logging.getLogger("shoal.writer")

_DEBOUNCE_MS = 50
_STEP_MS = 10
_GATHER_SECONDS = 0.05
_LARGEST_ORDER = 1 << 30
_SILENT_SECONDS = 15.0
_THREADS = 64
_MEND_SECONDS = 1.0


class LogObserver:
    """An observer that logs the progress of loads, and records the replication status of each view."""

    def __init__(
        self, failures: RecurringFailures | None = None, root: str = "", standing: ReplicationKeeper | None = None
    ) -> None:
        self._failures = failures if failures is not None else RecurringFailures(log)
        self._root = root
        self._standing = standing

    def started(self, step: LoadSnapshot | ApplyDelta) -> Callable[[int], None]:
        manifest = step.manifest
        if self._standing is not None:
            self._standing.started(step)
        if isinstance(step, LoadSnapshot):
            log.info("%s: loading snapshot %s: %s", manifest.view.name, manifest.snapshot_id, step.reason)
        return lambda rows: None

    def finished(self, applied: AppliedEntry) -> None:
        log.info(
            "%s: applied %s %d: %d rows, %d tombstones in %.3f s",
            applied.view,
            applied.kind,
            applied.seq,
            applied.rows,
            applied.tombstones,
            applied.seconds,
        )
        if self._standing is not None:
            self._standing.finished(applied.view, applied.kind)

    def failed(self, view: str, error: ShoalError) -> None:
        # An error of the whole root is logged once, for the root, not for each view.
        if not (isinstance(error, RootUnreadable | NotPublished) and self._failures.is_failing(self._root)):
            self._failures.failed(view, f"{view}: {type(error).__name__}: {error}")
        if self._standing is not None:
            self._standing.failed(view, error)


class WriterProcess:
    """The writer process, which follows one export root into one store until it receives a signal to stop."""

    def __init__(self, writer: StoreWriter, root: ExportRoot | None, poll_seconds: float, scrub_seconds: float) -> None:
        self._writer = writer
        self._scrub_seconds = scrub_seconds
        self._root = root
        self._poll_seconds = poll_seconds
        self._standing = ReplicationKeeper(writer, root) if root is not None else None
        self._failures = RecurringFailures(log)
        self._observer = LogObserver(self._failures, str(root), self._standing)
        self._locks: dict[str, asyncio.Lock] = {}
        self._woken = asyncio.Event()
        self._stop = asyncio.Event()
        self._root_answers = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._news: set[str] = set()
        self._catching_up: set[str] = set()
        self._folding: set[str] = set()
        self._pushes = PushQueue(writer, self._fold_if_due)

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT. At SIGHUP, check the root for new publications at once.

        Raises:
            Exception: the task that follows the root, or the task that keeps the process reachable, ended with an
                error. Only a new process can start the task again.
        """
        loop = asyncio.get_running_loop()
        # Many threads are needed, because a root that does not answer may block one thread per view.
        loop.set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="view"))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._woken.set)
        runner = web.AppRunner(self._control(), handle_signals=False, access_log=None)
        await runner.setup()
        await self._listen(runner)
        reached("writer.listening")
        scrub = self._start_scrub()
        watch = asyncio.create_task(self._watch())
        follow = asyncio.create_task(self._follow())
        stay = asyncio.create_task(self._stay_reachable(runner))
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({stop, follow, stay}, return_when=asyncio.FIRST_COMPLETED)
        for task in (follow, stay):
            if task.done():
                task.result()
        for task in (watch, follow, stay):
            task.cancel()
        await runner.cleanup()
        if scrub is not None:
            scrub.stop()
        self._writer.sync()
        if self._standing is not None:
            self._standing.close()

    async def _listen(self, runner: web.AppRunner) -> None:
        path = writer_socket_path(self._writer.store)
        self._site = web.SockSite(runner, listen_unix(path, private=True))
        await self._site.start()
        self._is_own_socket = is_same_file(path)

    async def _stay_reachable(self, runner: web.AppRunner) -> None:
        """Create the control socket and the store's lock again whenever they are removed.

        Raises:
            StoreLocked: another process has begun to write to the store.
        """
        path = writer_socket_path(self._writer.store)
        was_missing = False
        while True:
            await asyncio.sleep(_MEND_SECONDS)
            try:
                self._writer.check_in_place()
                if not path.parent.is_dir():
                    continue  # The supervisor creates this directory, unless the whole store is being deleted.
                self._writer.mend_lock()
                is_missing = not self._is_own_socket(path)
                if is_missing and was_missing:
                    before = self._site
                    await self._listen(runner)
                    await before.stop()
                    log.warning("%s was removed, and was created again", path)
                was_missing = is_missing
            except StoreMoved:
                continue  # Another store is at the path now, and this process must not change it.
            except (OSError, AddressUnusable, RunDirectoryPrivate, StoreNotWritable) as error:
                log.error("the writer cannot create again what was removed: %s", error)

    def _start_scrub(self) -> Scrub | None:
        """Start to verify the store in the background, unless the scrub is turned off."""
        if not self._scrub_seconds:
            no_scrub(self._writer)
            return None
        loop = asyncio.get_running_loop()

        def found(view: str) -> None:
            # The check for new publications also repairs damaged views.
            with suppress(RuntimeError):  # The loop has ended.
                loop.call_soon_threadsafe(self._woken.set)

        scrub = Scrub(self._writer, self._scrub_seconds, found)
        scrub.start()
        return scrub

    async def _watch(self) -> None:
        """Wake the follower at every publication. While the root cannot be watched, only the polling wakes the
        follower."""
        while self._root is not None and self._root.is_directory:
            # Wait until the root answers: the start of the watch walks through the whole root, and blocks this process
            # meanwhile.
            await self._root_answers.wait()
            # The watch begins when this task first waits for a change. Wake the follower at that moment, so that it
            # also finds earlier changes.
            asyncio.get_running_loop().call_soon(self._woken.set)
            try:
                is_news = partial(_may_be_publication, self._root.path)
                async for _ in awatch(self._root.path, watch_filter=is_news, debounce=_DEBOUNCE_MS, step=_STEP_MS):
                    self._woken.set()
            except OSError as error:
                message = f"{self._root} cannot be watched ({error}); polling every {self._poll_seconds:g} s"
                self._failures.failed(f"watching {self._root}", message, logging.WARNING)
            await asyncio.sleep(self._poll_seconds)

    async def _follow(self) -> None:
        while True:
            self._woken.clear()
            if self._root is not None:
                for view in await self._look_patiently(self._root):
                    self._news.add(view)
                    if view not in self._catching_up:
                        self._catching_up.add(view)
                        self._start(self._catch_up(self._root, view))
            try:
                await asyncio.wait_for(self._woken.wait(), self._poll_seconds)
            except TimeoutError:
                continue

    async def _look_patiently(self, root: ExportRoot) -> list[str]:
        """Return the views that `_look` finds. Log an error if `_look` hangs: a network mount may block `_look` for
        ever if the server of the mount is gone."""
        look = asyncio.ensure_future(asyncio.to_thread(self._look, root))
        done, _ = await asyncio.wait({look}, timeout=_SILENT_SECONDS)
        self._note_try()
        if not done:
            self._root_answers.clear()
            error = RootSilent(
                f"{root} has not answered for {_SILENT_SECONDS:g} s; check its mount. Meanwhile the store's data is "
                f"served, and pushes are accepted"
            )
            self._failures.failed(str(root), str(error))
            if self._standing is not None:
                self._standing.unreadable(str(error))
            for view in self._writer.version().views:
                # Write the note without a thread, because all threads may be blocked. If the disk has no room for the
                # note, only the log has the error.
                with suppress(StoreFull, StoreMoved):
                    self._writer.note_trouble(view, error)
        while not look.done():
            await asyncio.wait({look}, timeout=_SILENT_SECONDS)
            self._note_try()
        views = await look
        self._root_answers.set()
        return views

    def _look(self, root: ExportRoot) -> list[str]:
        """Apply the root's feature services, and return the views that may have new entries.

        If the root cannot be read, return all views in the store, so that each of them records the error.
        """
        try:
            root.check_exists()
            self._follow_drops(root)
            views = root.views()
            if not views:
                raise NotPublished(f"{root} has no views yet; `shoal export --to {root}` publishes some")
        except (OSError, ShoalError) as error:
            # A server may start before the first export.
            level = logging.WARNING if isinstance(error, NotPublished) else logging.ERROR
            self._failures.failed(str(root), f"{type(error).__name__}: {error}", level)
            if self._standing is not None:
                self._standing.unreadable(str(error))
            # Keep the feature services: if a mount is lost, the root looks like an empty directory.
            return list(self._writer.version().views)
        self._failures.succeeded(str(root))
        try:
            self._writer.commit_root(str(root), root.services())
            self._failures.succeeded(SERVICES)
        except (OSError, ShoalError) as error:
            self._failures.failed(SERVICES, f"{root}: the feature services stay as they are: {error}")
        if self._standing is not None:
            self._standing.looked(views, [*self._catching_up])
        return views

    def _follow_drops(self, root: ExportRoot) -> None:
        try:
            for view, seq in follow_drops(self._writer, root).items():
                log.warning("%s: removed, as the root dropped it at seq %d", view, seq)
        except (ManifestInvalid, StoreFull, StoreMoved) as error:
            log.error("%s: %s", root, error)

    def _note_try(self) -> None:
        if self._standing is not None:
            self._standing.tried()

    async def _catch_up(self, root: ExportRoot, view: str) -> None:
        # The search for the last entry may miss an entry that is published meanwhile, so search again afterwards.
        while view in self._news:
            self._news.discard(view)
            try:
                async with self._lock(view):
                    applied = await asyncio.to_thread(catch_up, self._writer, root, view, self._observer)
                    self._failures.succeeded(view)
                    if self._standing is not None:
                        await asyncio.to_thread(self._standing.settled, view)
                    if any(step.kind == "snapshot" for step in applied):
                        await asyncio.to_thread(_return_memory)
                    self._fold_if_due(view)
            except ShoalError:
                pass  # The error is noted in the store and in the log; the next poll tries again.
            except Exception:
                log.exception("%s: applying failed with an unexpected error; the last version stays in use", view)
        self._catching_up.discard(view)

    def _fold_if_due(self, view: str) -> None:
        record = self._writer.record(view)
        if record is not None and should_fold(record) and view not in self._folding:
            self._folding.add(view)
            self._start(self._fold(view))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fold(self, view: str) -> None:
        try:
            if await asyncio.to_thread(fold, self._writer, view):
                log.info("%s: folded its overlays into a new base", view)
                await asyncio.to_thread(_return_memory)
        except ShoalError as error:
            log.error("%s: folding failed: %s", view, error)
        except Exception:
            log.exception("%s: folding failed with an unexpected error; the last version stays in use", view)
        finally:
            self._folding.discard(view)

    def _lock(self, view: str) -> asyncio.Lock:
        return self._locks.setdefault(view, asyncio.Lock())

    # --- orders ----------------------------------------------------------------------------------------------

    def _control(self) -> web.Application:
        app = web.Application(middlewares=[_errors_as_json, self._check_in_place], client_max_size=_LARGEST_ORDER)
        app.router.add_post("/reload", self._reload)
        app.router.add_post("/push", self._push)
        app.router.add_put("/views", self._define_view)
        app.router.add_delete("/views/{view}", self._drop_view)
        app.router.add_get("/status", self._status)
        return app

    @web.middleware
    async def _check_in_place(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Answer a request with an error if the store was moved, because the next process would not find the effect of
        the request.

        This applies even to a request that changed nothing.
        """
        response: web.StreamResponse = await handler(request)
        if request.method != "GET":
            self._writer.check_in_place()
        return response

    async def _reload(self, request: web.Request) -> web.Response:
        try:
            order = ReloadOrder.model_validate_json(await request.read())
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise LookupInvalid(f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}") from None
        answers = []
        for view in await asyncio.to_thread(views_to_reload, self._writer, self._root, order):
            async with self._lock(view):
                answers.append(
                    await asyncio.to_thread(reload_or_tell, self._writer, self._root, view, order, self._observer)
                )
                self._fold_if_due(view)
        return web.json_response({"views": answers})

    async def _push(self, request: web.Request) -> web.Response:
        view = request.query.get("view")
        if view is None:
            raise PushInvalid("the request does not name the view of its rows; add ?view=NAME")
        try:
            content = bytes.fromhex(request.headers.get(CONTENT_HEADER, ""))
        except ValueError:
            raise PushInvalid(f"{CONTENT_HEADER} must be a digest in hexadecimal digits, from a worker") from None
        order = Push(deserialize_rows(await request.read()), request.headers.get(REQUEST_ID_HEADER), content)
        pushed = await self._pushes.submit(view, order)
        reached("push.answering")
        return web.json_response(
            {"rows": pushed.applied.rows, "superseded": pushed.applied.superseded, "version": pushed.version}
        )

    async def _define_view(self, request: web.Request) -> web.Response:
        try:
            schema = ViewSchema.model_validate_json(await request.read())
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise DefinitionError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        await asyncio.to_thread(define_view, self._writer, schema)
        return web.json_response({})

    async def _drop_view(self, request: web.Request) -> web.Response:
        await asyncio.to_thread(drop_view, self._writer, request.match_info["view"])
        return web.json_response({})

    async def _status(self, request: web.Request) -> web.Response:
        try:
            self._writer.check_in_place()
            trouble = None
        except ShoalError as error:
            trouble = error_document(error)["error"]
        return web.json_response(
            {
                "pid": os.getpid(),
                "trouble": trouble,
                "root": str(self._root) if self._root else None,
                "catching_up": sorted(self._catching_up),
                "folding": sorted(self._folding),
            }
        )


def run_writer(
    store: Path, root: ExportRoot | None, *, poll_seconds: float, scrub_hours: float, shard: Shard | None = None
) -> None:
    """Run the writer process; the process ends after a signal to stop.

    Args:
        scrub_hours: the time in which the whole store is read again and verified, in hours; 0 for never.

    Raises:
        StoreLocked: the store already has a writer.
        StoreIsOtherShard: the store holds another shard than `shard`, or all rows.
    """
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    leave_room_for_lookups()
    limit_malloc_arenas()
    store_writer = StoreWriter(store, shard=shard, gather_seconds=_GATHER_SECONDS)
    asyncio.run(_run(store_writer, root, poll_seconds, 3600 * scrub_hours))


def check_shard(store: Path, shard: Shard) -> None:
    """Raise StoreIsOtherShard if an existing store holds another shard than `shard`. Its writer would fail at once.

    A new store may become any shard. If the store cannot be read, raise nothing: the error is reported when the store
    is served.
    """
    with suppress(StoreNotFound, StoreDamaged, StoreUnreadable):
        version = read_version(store, open_live(store), None)
        if version.shard != shard and (version.shard is not None or version.names):
            raise StoreIsOtherShard.of(store, version.shard, shard)


async def _run(writer: StoreWriter, root: ExportRoot | None, poll_seconds: float, scrub_seconds: float) -> None:
    code = 1
    try:
        await WriterProcess(writer, root, poll_seconds, scrub_seconds).run()
        code = 0
    except Exception:
        log.exception("the writer cannot go on")
    # Do not wait for the threads: a running load would delay the exit until the load is complete. The next writer
    # resumes the load.
    logging.shutdown()
    os._exit(code)


def _return_memory() -> None:
    """Return the memory of a finished build to the operating system: the next build may be hours away."""
    pa.default_memory_pool().release_unused()
    return_freed_memory()


def _may_be_publication(root: Path, change: Change, name: str) -> bool:
    """Return whether a changed path may be a new publication.

    A manifest may appear in a new directory before the directory is watched. In that case, only the creation of the
    directory of an entry, a log or a view is reported.
    """
    path = Path(name)
    has_news = path.name in (MANIFEST, SERVICES, LOG) or path.parent.name == LOG or path.parent == root
    return has_news and change is not Change.deleted


@web.middleware
async def _errors_as_json(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except ShoalError as error:
        return web.json_response(error_document(error), status=error.http_status)
    except web.HTTPException as error:
        document = {"code": type(error).__name__, "message": f"{request.method} {request.path}: {error.reason}"}
        return web.json_response({"error": document}, status=error.status)
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        document = {"code": "InternalError", "message": "unexpected error in the writer; its log has the details"}
        return web.json_response({"error": document}, status=500)
    return response
