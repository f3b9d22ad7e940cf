"""Write to the live environment, and replace it by a copy when a reader of an old version makes it grow.

LMDB never reuses a page that a reader might still see. So the file grows with each commit while a reader stays at an
old version. A reader stays there if its process is stopped, or if its code keeps the version. A copy of the environment
has no such reader.

The writer replaces the environment in these steps:

1. Write the copy to a hidden directory, sync it, and give it the store's next number. From then on, new readers open
   the copy.
2. Commit a last time to the old environment, to mark it as replaced. Its readers switch to the copy. Nothing is
   committed to the copy before this step.
3. Remove the old environment when nobody reads it. A reader that still holds the old version holds the old file, but
   that file no longer grows.

The time for a copy is proportional to its size, and nothing is committed meanwhile. The writer makes a copy only when
there are more held pages than pages in use. So it never copies more bytes than were written.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb

from shoal.engine.base.errors import ShoalError, StoreDamaged, StoreFull, StoreMoved
from shoal.engine.base.failpoints import reached
from shoal.engine.base.system import reserve
from shoal.engine.format.paths import DATA, live_paths
from shoal.engine.format.progress import Begun
from shoal.engine.format.seal import begin_sealing, seal_commit
from shoal.engine.root.directory_storage import sync_directory
from shoal.engine.store.disk import make_directory, make_file, store_full_named
from shoal.engine.store.environment import LiveEnvironment, allocate_lock, name_live, open_live, open_live_at
from shoal.engine.store.lmdb_file import number_copy
from shoal.loaders.commit.progress_file import BegunFile

log = logging.getLogger("shoal.writer")

LEAST_HELD_BYTES = 256 << 20
HELD_SECONDS = 15.0
"""How long a reader may hold one version before it counts as stopped. Idle readers switch to the newest version every
five seconds."""
_MARK_BYTES = 1 << 20
"""The space reserved for the last commit of a replaced environment, in bytes. This commit takes less space."""


class HeldPages:
    """Detects unused pages in a live environment that a stopped reader holds."""

    def __init__(self) -> None:
        self._oldest: tuple[int, float] | None = None

    def are_too_many(self, live: LiveEnvironment) -> bool:
        """Return whether to replace the environment.

        The oldest reader counts as stopped if calls more than HELD_SECONDS apart find it at the same version.
        """
        used, unused = live.page_bytes()
        reader = live.oldest_reader() if unused > max(LEAST_HELD_BYTES, used) else None
        if reader is None or reader[0] >= live.last_transaction():
            self._oldest = None
            return False
        if self._oldest is None or self._oldest[0] != reader[0]:
            self._oldest = (reader[0], time.monotonic())
        return time.monotonic() - self._oldest[1] > HELD_SECONDS


class WritableLive:
    """The live environment of a store for its only writer. The writer must commit from one thread at a time.

    Raises:
        StoreLocked, StoreDamaged, StoreUnreadable: the environment cannot be opened.
        StoreFull: there is no room to create the environment.
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
        """Start the record of the store's progress, and seal the catalog if another release wrote it last."""
        progress = self.live.progress()
        if progress is None or progress.commit != self.live.last_transaction():
            with suppress(StoreFull), self.transaction():
                pass  # If there is no room for this commit, the next commit seals the catalog.
            progress = self.live.progress()
        self._begun.start(progress)

    @contextmanager
    def transaction(self) -> Iterator[lmdb.Transaction]:
        """Run a write transaction. At the end of the `with` block, the transaction is on the disk, at the store's path.

        Raises:
            StoreFull: there is no room for the transaction.
            StoreMoved: the store's path leads to other files. The next process to open the store does not find the
                commit.
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
        """Raise StoreMoved if the store's path no longer leads to the environment that this writer writes to."""
        while True:
            live = self.live
            try:
                return live.check_in_place(self._store)
            except StoreMoved:
                # The environment may have been replaced and removed during the check.
                if self.live is live:
                    raise

    def sync(self) -> None:
        """Sync the record of the store's progress to the disk."""
        self._begun.sync()

    def close(self) -> None:
        """Sync the record of the store's progress for the last time. Commit nothing afterwards."""
        self._begun.close()

    def committed(self) -> None:
        """Maintain the environment after a commit: clear dead readers, and replace the environment if necessary."""
        self.live.env.reader_check()
        try:
            if self._successor is None and self._held.are_too_many(self.live):
                self._successor = copy_live(self.live)
                reached("live.named")
                self._go_over(self._successor)
            self._remove_unread()
        except (ShoalError, OSError, lmdb.Error) as error:
            self._held = HeldPages()
            log.error("cannot replace the live environment, which grows because of a stopped reader: %s", error)

    def _go_over(self, successor: LiveEnvironment) -> None:
        retire_live(self.live)
        reached("live.replaced")
        log.info("replaced %s by its copy %s: a stopped reader had made it grow", self.live.path, successor.path)
        self._replaced.append(self.live)
        self.live = successor
        self._successor = None
        if (progress := successor.progress()) is not None:
            self._begun.note(progress)
            self._begun.sync()

    def _remove_unread(self) -> None:
        self._replaced = [replaced for replaced in self._replaced if not remove_unless_read(replaced)]


def copy_live(live: LiveEnvironment) -> LiveEnvironment:
    """Make a copy of a live environment; from then on, new processes open the copy.

    The caller must prevent all commits until `retire_live` returns.

    Raises:
        StoreFull, StoreUnreadable: there is no room for the copy, or no file descriptor. Nothing has changed.
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
            # Reserve space, so that the last commit of the old environment does not fail on a full disk.
            with (live.path / DATA).open("r+b") as file:
                reserve(file.fileno(), os.fstat(file.fileno()).st_size, _MARK_BYTES)
            reached("live.copied")
            return name_live(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def retire_live(live: LiveEnvironment) -> None:
    """Make the readers of a live environment switch to its copy.

    Raises:
        StoreFull: there is no room to mark the environment as replaced, although space was reserved.
    """
    sync_directory(live.path.parent)
    live.note_replaced()


def finish_replacements(store: Path, live: LiveEnvironment) -> list[LiveEnvironment]:
    """Finish the replacements that a dead writer left unfinished; return the replaced environments that still exist.

    Raises:
        StoreFull: there is no room to mark an environment as replaced.
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
    """Remove a replaced environment if nobody reads it; return whether it was removed.

    A process may have the environment open without reading it. The process can still read the mark that the environment
    was replaced, although its files no longer have a name.
    """
    replaced.env.reader_check()
    if replaced.oldest_reader() is not None:
        return False
    _remove(replaced.path)
    return True


def _remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.gone")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
