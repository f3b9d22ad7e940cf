"""Notes where each view stands against its export root, for the workers to read: see `engine.standing`.

What it costs a root: the newest entry is looked for only where there is a next one, which the writer has met already.
"""

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from engine.errors import (
    FileDamaged,
    LineageError,
    ManifestInvalid,
    NotPublished,
    RootUnreadable,
    SchemaChangeRefused,
    ShoalError,
)
from engine.export_root import ExportRoot
from engine.standing import Standing, ViewStanding, read_standing, touch_standing, write_standing
from loaders.follow import ApplyDelta, LoadSnapshot
from loaders.store_writer import StoreWriter

log = logging.getLogger("shoal.writer")

_SAME_FOR_ALL = (FileDamaged, LineageError, ManifestInvalid, SchemaChangeRefused)
"""What every replica meets that comes to the same entry."""


class StandingKeeper:
    """Knows what a root has beyond the store. Its methods may be called from several threads."""

    def __init__(self, writer: StoreWriter, root: ExportRoot) -> None:
        self._writer = writer
        self._root = root
        self._lock = threading.Lock()
        self._is_closed = False
        self._begun_at: dict[str, datetime] = {}
        known = read_standing(writer.store)
        # A writer that follows one that died goes on where that was.
        self._standing = known if known is not None and known.root == str(root) else Standing(root=str(root))
        with self._lock:
            self._write()

    def looked(self, views: Sequence[str], busy: Sequence[str]) -> None:
        """The root was read, and has these views; those that are busy may be kept so by one entry for long."""
        ends = {view: self._newest(view, self._view(view).newest_seq) for view in busy if view in views}
        with self._lock:
            kept = {view: self._view(view) for view in views}
            seen = {"seen_at": datetime.now(UTC), "unreadable": None, "unreadable_since": None}
            self._standing = self._standing.model_copy(update=seen | {"views": kept})
            for view, newest in ends.items():
                self._change(view, newest_seq=max(newest, kept[view].newest_seq))
            self._write()

    def unreadable(self, why: str) -> None:
        """Note that the root cannot be read, or has nothing to read yet."""
        with self._lock:
            since = self._standing.unreadable_since or datetime.now(UTC)
            self._standing = self._standing.model_copy(update={"unreadable": why, "unreadable_since": since})
            self._write()

    def tried(self) -> None:
        """The root was looked at, with or without success."""
        try:
            touch_standing(self._writer.store)
        except FileNotFoundError:
            with self._lock:
                self._write()
        except OSError as error:
            log.error("cannot record that the export root was read: %s", error)

    def started(self, step: LoadSnapshot | ApplyDelta) -> None:
        """A view's next entry was found."""
        manifest, is_loading = step.manifest, isinstance(step, LoadSnapshot)
        name = manifest.view.name
        self._begun_at[name] = datetime.now(UTC)
        known = self._view(name).newest_seq
        newest = known if known > manifest.seq else self._newest(name, manifest.seq)
        self._note(name, newest_seq=newest, pending_since=manifest.published_at, is_loading=is_loading)

    def finished(self, view: str, kind: str) -> None:
        """An entry was applied."""
        excuse = {"is_loading": False, "excused_until": datetime.now(UTC)} if kind == "snapshot" else {}
        self._note(view, held_by=None, unreadable_since=None, **excuse)

    def settled(self, view: str) -> None:
        """A view stands at the end of its log."""
        applied = self._writer.version().applied_seq(view)
        self._note(
            view,
            newest_seq=max(applied, self._view(view).newest_seq),
            pending_since=None,
            caught_up=True,
            held_by=None,
            is_loading=False,
            unreadable_since=None,
        )

    def failed(self, view: str, error: ShoalError) -> None:
        """A view cannot go on."""
        known, now = self._view(view), datetime.now(UTC)
        since = None
        if isinstance(error, RootUnreadable):
            # The failed tries to read it may have taken minutes.
            since = known.unreadable_since or self._begun_at.get(view, now)
        changes: dict[str, Any] = {"is_loading": False, "unreadable_since": since}
        if known.is_loading:
            changes["excused_until"] = now
        applied = self._writer.version().applied_seq(view)
        is_empty = isinstance(error, NotPublished) and not applied
        if isinstance(error, _SAME_FOR_ALL) or is_empty:
            newest = max(known.newest_seq, self._newest(view, applied, certain=not is_empty))
            changes |= {"newest_seq": newest, "caught_up": True, "held_by": type(error).__name__}
            changes["pending_since"] = known.pending_since or now
        self._note(view, **changes)

    def close(self) -> None:
        """Note nothing more, and leave no note half written: the process ends."""
        with self._lock:
            self._is_closed = True

    def _newest(self, view: str, seq: int, *, certain: bool = False) -> int:
        """The newest entry from `seq` on: one question where that is the last, as it mostly is."""
        with suppress(ShoalError, OSError):
            if certain or self._root.has_entry(view, seq + 1):
                return max(self._root.sequence_numbers(view, since=seq + 1), default=seq)
        return seq

    def _view(self, view: str) -> ViewStanding:
        return self._standing.views.get(view, ViewStanding())

    def _note(self, view: str, **changes: Any) -> None:
        with self._lock:
            before = self._standing
            self._change(view, **changes)
            if self._standing != before:
                self._write()

    def _change(self, view: str, **changes: Any) -> None:
        changed = self._view(view).model_copy(update=changes)
        self._standing = self._standing.model_copy(update={"views": self._standing.views | {view: changed}})

    def _write(self) -> None:
        if self._is_closed:
            return
        try:
            write_standing(self._writer.store, self._standing)
        except OSError as error:
            log.error("where the store stands against %s cannot be noted: %s", self._root, error)
