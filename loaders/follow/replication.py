"""Record each view's replication status against its export root for the workers: see `shoal.engine.status.replication`.

To send few requests to the root, this module looks for the newest entry only if the next entry exists.
"""

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from shoal.engine.base.errors import (
    FileDamaged,
    LineageError,
    ManifestInvalid,
    NotPublished,
    RootUnreadable,
    SchemaChangeRefused,
    ShoalError,
)
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.status.replication import (
    FollowState,
    ReplicationStatus,
    read_replication,
    touch_replication,
    write_replication,
)
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.plan import ApplyDelta, LoadSnapshot

log = logging.getLogger("shoal.writer")

_SAME_FOR_ALL = (FileDamaged, LineageError, ManifestInvalid, SchemaChangeRefused)
"""Errors that every replica gets at the same entry."""


class ReplicationKeeper:
    """Records which entries of a root the store lacks. Its methods may be called from several threads."""

    def __init__(self, writer: StoreWriter, root: ExportRoot) -> None:
        self._writer = writer
        self._root = root
        self._lock = threading.Lock()
        self._is_closed = False
        self._begun_at: dict[str, datetime] = {}
        known = read_replication(writer.store)
        # A writer continues with the status that the previous writer recorded.
        self._standing = known if known is not None and known.root == str(root) else ReplicationStatus(root=str(root))
        with self._lock:
            self._write()

    def looked(self, views: Sequence[str], busy: Sequence[str]) -> None:
        """Record that the root was read, and record its views.

        Args:
            busy: the views with a load in progress. Since a load may take long, the newest entry of these views is
                looked for here.
        """
        ends = {view: self._newest(view, self._view(view).newest_seq) for view in busy if view in views}
        with self._lock:
            kept = {view: self._view(view) for view in views}
            seen = {"seen_at": datetime.now(UTC), "unreadable": None, "unreadable_since": None}
            self._standing = self._standing.model_copy(update=seen | {"views": kept})
            for view, newest in ends.items():
                self._change(view, newest_seq=max(newest, kept[view].newest_seq))
            self._write()

    def unreadable(self, why: str) -> None:
        """Record that the root cannot be read, or that it is still empty."""
        with self._lock:
            since = self._standing.unreadable_since or datetime.now(UTC)
            self._standing = self._standing.model_copy(update={"unreadable": why, "unreadable_since": since})
            self._write()

    def tried(self) -> None:
        """Record that the root was polled, with or without success."""
        try:
            touch_replication(self._writer.store)
        except FileNotFoundError:
            with self._lock:
                self._write()
        except OSError as error:
            log.error("cannot record that the export root was polled: %s", error)

    def started(self, step: LoadSnapshot | ApplyDelta) -> None:
        """Record that a view's next entry was found."""
        manifest = step.manifest
        is_loading = isinstance(step, LoadSnapshot)
        name = manifest.view.name
        self._begun_at[name] = datetime.now(UTC)
        known = self._view(name).newest_seq
        newest = known if known > manifest.seq else self._newest(name, manifest.seq)
        self._note(name, newest_seq=newest, pending_since=manifest.published_at, is_loading=is_loading)

    def finished(self, view: str, kind: str) -> None:
        """Record that an entry was applied."""
        excuse = {"is_loading": False, "excused_until": datetime.now(UTC)} if kind == "snapshot" else {}
        self._note(view, held_by=None, unreadable_since=None, **excuse)

    def settled(self, view: str) -> None:
        """Record that a view reached the end of its log."""
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
        """Record that a view's next entry could not be applied."""
        known = self._view(view)
        now = datetime.now(UTC)
        since = None
        if isinstance(error, RootUnreadable):
            # The failed attempts to read the root may have taken minutes.
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
        """Stop recording before the process ends, and wait until no record is half written."""
        with self._lock:
            self._is_closed = True

    def _newest(self, view: str, seq: int, *, certain: bool = False) -> int:
        """Return the seq of the newest entry from `seq` on. In the usual case that `seq` is the newest, this takes only
        one request to the root.

        Args:
            certain: list the log without first checking that a next entry exists.
        """
        with suppress(ShoalError, OSError):
            if certain or self._root.has_entry(view, seq + 1):
                return max(self._root.sequence_numbers(view, since=seq + 1), default=seq)
        return seq

    def _view(self, view: str) -> FollowState:
        return self._standing.views.get(view, FollowState())

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
            write_replication(self._writer.store, self._standing)
        except OSError as error:
            log.error("the replication status against %s cannot be written: %s", self._root, error)
