"""Real writers, servers and exporters for tests, forked from a process that has imported and compiled all they need, so
that one starts in a moment: each is to die at a failpoint, or none.
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

import engine.server
import spark_export.publication  # noqa: F401
from engine import failpoints
from engine.export_root import ExportRoot
from engine.settings import server_settings
from loaders import compaction, generation, live_replacement
from loaders.writer import run_writer

CHUNK_BYTES = 512
_POLL_SECONDS = 0.1

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(["__main__", __name__, "tests.failpoints.warmed"])


@contextmanager
def running(main: Callable[..., None], *arguments: Any, die_at: str | None, log: Path) -> Iterator[ForkServerProcess]:
    """A process that runs a function until it ends, dies where `failpoints.arm` has it die, or is killed here."""
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
    """A writer that makes small chunks, and folds small views."""
    _follow(store, root, scrub_hours=0)


def _follow(store: Path, root: Path, *, scrub_hours: float) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    generation.CHUNK_BYTES = CHUNK_BYTES
    compaction.CHUNK_BYTES = CHUNK_BYTES  # type: ignore[attr-defined]
    compaction.FOLD_LEAST_ROWS = 0
    run_writer(store, ExportRoot(root), poll_seconds=_POLL_SECONDS, scrub_hours=scrub_hours)


def write_and_scrub(store: Path, root: Path) -> None:
    """A writer that verifies what it has again and again."""
    _follow(store, root, scrub_hours=0.1 / 3600)


def write_without_patience(store: Path, root: Path) -> None:
    """A writer that replaces the live environment for whoever holds an old version."""
    live_replacement.LEAST_HELD_BYTES = 0
    live_replacement.HELD_SECONDS = -1
    write(store, root)


def serve(store: Path, root: Path) -> None:
    """A server with a writer and two workers."""
    engine.server.run(
        server_settings(store=store, port=0, workers=2, drain_seconds=5.0),
        lambda: run_writer(store, ExportRoot(root), poll_seconds=_POLL_SECONDS, scrub_hours=0),
    )
