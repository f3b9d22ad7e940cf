"""The live environment as its writer has it, who replaces it when it has grown because somebody holds an old version.

LMDB uses no page again that a reader might still see, so that a process that is stopped, or whose code keeps a version,
makes the file grow with each commit. A copy has no such reader. It is written aside, synced, and given the store's next
number: who opens the store from then on opens it. Then the last commit of the one before says so, and who has that one
open goes over. Nothing is committed to the copy earlier. Whoever holds the old version holds the old file, which grows
no more; it is removed once nobody reads it.

A copy takes as long as it has bytes, during which nothing is committed. It is made once the pages that are held are
more than those in use, so that no more is copied than was written.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb

from engine.begun import Begun
from engine.directory_storage import sync_directory
from engine.environment import (
    DATA,
    LiveEnvironment,
    allocate_lock,
    live_paths,
    make_directory,
    make_file,
    name_live,
    open_live,
    open_live_at,
    store_full_named,
)
from engine.errors import ShoalError, StoreDamaged, StoreFull, StoreMoved
from engine.failpoints import reached
from engine.lmdb_file import number_copy
from engine.seal import begin_sealing, seal_commit
from loaders.begun_file import BegunFile

log = logging.getLogger("shoal.writer")

LEAST_HELD_BYTES = 256 << 20
HELD_SECONDS = 15.0
"""Idle readers go on every five seconds."""
_MARK_BYTES = 1 << 20
"""More than the last commit of a replaced environment takes."""


class HeldPages:
    """Tells when pages of a live environment that are not in use are held by somebody who does not go on."""

    def __init__(self) -> None:
        self._oldest: tuple[int, float] | None = None

    def are_too_many(self, live: LiveEnvironment) -> bool:
        """Whether it is to be replaced; a reader is known to stand still once it did so in two calls."""
        used, unused = live.page_bytes()
        reader = live.oldest_reader() if unused > max(LEAST_HELD_BYTES, used) else None
        if reader is None or reader[0] >= live.last_transaction():
            self._oldest = None
            return False
        if self._oldest is None or self._oldest[0] != reader[0]:
            self._oldest = (reader[0], time.monotonic())
        return time.monotonic() - self._oldest[1] > HELD_SECONDS


class WritableLive:
    """The live environment of a store for its one writer, whom it relies on not to be called twice at a time.

    Raises:
        StoreLocked, StoreDamaged, StoreUnreadable: it cannot be opened.
        StoreFull: there is no room to begin it.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self.live = open_live(store, writable=True)
        self.live.env.reader_check()
        self._successor: LiveEnvironment | None = None
        self._held = HeldPages()
        self._begun = BegunFile(store, self.check_in_place)
        self._replaced = finish_replacements(store, self.live)
        self._begin()
        self._remove_unread()

    def _begin(self) -> None:
        """Begin the record of how far the store got, and seal the catalog if another release has written it last."""
        progress = self.live.progress()
        if progress is None or progress.commit != self.live.last_transaction():
            with suppress(StoreFull), self.transaction():
                pass  # Where there is no room for it, the next commit does it.
            progress = self.live.progress()
        self._begun.start(progress)

    @contextmanager
    def transaction(self) -> Iterator[lmdb.Transaction]:
        """A write transaction, which is on the disk and in its place when this ends.

        Raises:
            StoreFull: there is no room for it.
            StoreMoved: the store's path leads to other files. The next process to open it does not find the commit.
        """
        if self._successor is not None:
            self._go_over(self._successor)
        self.check_in_place()
        live = self.live
        with store_full_named(live.path), live.env.begin(write=True) as transaction:
            store_id = begin_sealing(transaction, live.catalog)
            yield transaction
            seal_commit(transaction, live.catalog)
            commit = transaction.id()
        reached("commit.durable")
        self._begun.note(Begun(store_id, live.number, commit))
        self.check_in_place()

    def check_in_place(self) -> None:
        """Check that the store's path leads to the environment that is written to; raises StoreMoved."""
        while True:
            live = self.live
            try:
                return live.check_in_place(self._store)
            except StoreMoved:
                # It may have been replaced, and removed, while it was looked at.
                if self.live is live:
                    raise

    def sync(self) -> None:
        """Have the record of how far the store got on the disk."""
        self._begun.sync()

    def close(self) -> None:
        """Sync that record for the last time; nothing is to be committed afterwards."""
        self._begun.close()

    def committed(self) -> None:
        """Look after the environment behind a commit: forget readers that died, and replace it if that is due."""
        self.live.env.reader_check()
        try:
            if self._successor is None and self._held.are_too_many(self.live):
                self._successor = copy_live(self.live)
                reached("live.named")
                self._go_over(self._successor)
            self._remove_unread()
        except (ShoalError, OSError, lmdb.Error) as error:
            self._held = HeldPages()
            log.error("the live environment, which grows for a reader that stands still, is not replaced: %s", error)

    def _go_over(self, successor: LiveEnvironment) -> None:
        retire_live(self.live)
        reached("live.replaced")
        log.info("%s goes on in %s: a reader that stands still had made it grow", self.live.path, successor.path)
        self._replaced.append(self.live)
        self.live, self._successor = successor, None
        if (progress := successor.progress()) is not None:
            self._begun.note(progress)
            self._begun.sync()

    def _remove_unread(self) -> None:
        self._replaced = [replaced for replaced in self._replaced if not remove_unless_read(replaced)]


def copy_live(live: LiveEnvironment) -> LiveEnvironment:
    """Make a copy of a live environment that new processes open instead. The caller, who keeps all others from
    committing, commits nothing before `retire_live` has come to its end.

    Raises:
        StoreFull, StoreUnreadable: there is no room for it, or no descriptor. Nothing has changed.
    """
    path = live.path.with_name(str(int(live.path.name) + 1))
    aside = path.with_name(f".{path.name}")
    try:
        with store_full_named(aside):
            make_directory(aside)
            allocate_lock(aside)
            make_file(aside / DATA)
            with (aside / DATA).open("r+b", buffering=0) as file:
                live.env.copyfd(file.fileno(), compact=True)
                number_copy(file, live.last_transaction() + 1)
                os.fsync(file.fileno())
            sync_directory(aside)
            # The old one's last commit is not to fail for want of room.
            with (live.path / DATA).open("r+b") as file:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, _MARK_BYTES)
            reached("live.copied")
            return name_live(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def retire_live(live: LiveEnvironment) -> None:
    """Have who reads a live environment go over to the copy that was made of it.

    Raises:
        StoreFull: there is no room to note it, though some was kept.
    """
    sync_directory(live.path.parent)
    live.note_replaced()


def finish_replacements(store: Path, live: LiveEnvironment) -> list[LiveEnvironment]:
    """Do what a writer that died left to be done; the environments that are replaced, and are there still.

    Raises:
        StoreFull: there is no room to note that an environment was replaced.
    """
    for entry in live.path.parent.glob(".*"):
        shutil.rmtree(entry, ignore_errors=True)
    replaced = []
    for path in live_paths(store)[1:]:
        try:
            old = open_live_at(path, store, writable=True)
            if not _is_replaced(old):
                retire_live(old)
            replaced.append(old)
        except StoreDamaged as error:
            log.error("%s", error)
            _remove(path)
    return replaced


def _is_replaced(live: LiveEnvironment) -> bool:
    with live.env.begin() as transaction:
        return live.is_replaced(transaction)


def remove_unless_read(replaced: LiveEnvironment) -> bool:
    """Remove a replaced environment if nobody reads it; whether it was. Who has it open without reading it finds in it
    that it was replaced, though its files have no name any more."""
    replaced.env.reader_check()
    if replaced.oldest_reader() is not None:
        return False
    _remove(replaced.path)
    return True


def _remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.gone")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
