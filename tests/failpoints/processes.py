"""Real writers, servers and exporters for tests. Each may be set to die at a failpoint.

They are forked from a process that has imported and compiled everything they need, so that they start fast.
"""

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import shoal.engine.server.run
import shoal.spark_export.publication.staging
from shoal.engine.base import failpoints
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.server.settings import server_settings
from shoal.loaders.apply import compaction
from shoal.loaders.commit import live_replacement
from shoal.loaders.segments import generation
from shoal.loaders.writer import run_writer

CHUNK_BYTES = 512
_POLL_SECONDS = 0.1

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(["__main__", __name__, "tests.failpoints.warmed"])


@contextmanager
def running(main: Callable[..., None], *arguments: Any, die_at: str | None, log: Path) -> Iterator[ForkServerProcess]:
    """Run a function in a process until it ends, until it dies at the failpoint `die_at`, or until the block ends."""
    process = _forking.Process(target=_run, args=(main, arguments, die_at, str(log)))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run(main: Callable[..., None], arguments: tuple[Any, ...], die_at: str | None, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, sys.stderr.fileno())
    failpoints.arm(die_at)
    main(*arguments)


def write(store: Path, root: Path) -> None:
    """Run a writer that makes small chunks and folds small views."""
    _follow(store, root, scrub_hours=0)


def _follow(store: Path, root: Path, *, scrub_hours: float) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    generation.CHUNK_BYTES = CHUNK_BYTES
    compaction.CHUNK_BYTES = CHUNK_BYTES  # type: ignore[attr-defined]
    compaction.FOLD_LEAST_ROWS = 0
    run_writer(store, ExportRoot(root), poll_seconds=_POLL_SECONDS, scrub_hours=scrub_hours)


def write_and_scrub(store: Path, root: Path) -> None:
    """Run a writer that verifies its store again and again."""
    _follow(store, root, scrub_hours=0.1 / 3600)


def write_without_patience(store: Path, root: Path) -> None:
    """Run a writer that replaces the live environment as soon as a process holds an old version."""
    live_replacement.LEAST_HELD_BYTES = 0
    live_replacement.HELD_SECONDS = -1
    write(store, root)


def serve(store: Path, root: Path) -> None:
    """Run a server with a writer and two workers."""
    shoal.engine.server.run.run(
        server_settings(store=store, port=0, workers=2, drain_seconds=5.0),
        lambda: run_writer(store, ExportRoot(root), poll_seconds=_POLL_SECONDS, scrub_hours=0),
    )
