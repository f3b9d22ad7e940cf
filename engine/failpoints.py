"""Failpoints: named states in which a test can have this process end as by `kill -9`.

SHOAL_FAILPOINT=base.renamed ends the process when it comes to that point, SHOAL_FAILPOINT=base.chunk-written:3 when it
comes there for the third time. A child that was forked counts for itself. Points stand where something has just become
durable, visible or gone, never on the way of a lookup, and cost a comparison.
"""

import os
import signal
from typing import Literal, get_args

from engine.errors import SettingsInvalid

VARIABLE = "SHOAL_FAILPOINT"

Failpoint = Literal[
    # A base generation in the making.
    "base.begun",
    "base.chunk-written",
    "base.finished",
    "base.renamed",
    # A commit to `live`, and what it makes superfluous.
    "commit.written",
    "commit.durable",
    "commit.done",
    "commit.base-removed",
    # The making of the record of how far a store got.
    "begun.aside",
    # A copy of a store, and a loss that its owner accepts.
    "backup.aside",
    "backup.published",
    "restore.aside",
    "restore.published",
    "loss.moved",
    # The replacement of `live`.
    "live.copied",
    "live.named",
    "live.replaced",
    # A push, beside its commit.
    "push.laid",
    "push.answering",
    # The repair of a damaged view.
    "repair.base-removed",
    # What the scrub found is noted, and not repaired yet.
    "scrub.damage-noted",
    # A publication to an export root.
    "export.parts-moved",
    "export.state-moved",
    "export.manifest-aside",
    "export.log-linked",
    "export.published",
    "root.view-dropped",
    # A micro-batch of a stream, which Spark notes as done behind the last of these.
    "stream.part-pushed",
    "stream.pushed",
    "stream.published",
    "stream.consolidated",
    # The writing of a table.
    "sync.leased",
    "sync.rows-written",
    "sync.progress-noted",
    # The start of each process of a server.
    "writer.locked",
    "writer.listening",
    "worker.begun",
    "worker.opened",
    "worker.accepting",
    "server.locked",
    "server.bound",
    "server.forked",
    "server.record-aside",
    "server.recorded",
]
FAILPOINTS: tuple[Failpoint, ...] = get_args(Failpoint)

_armed: str | None = None
_left = 0


def arm(setting: str | None) -> None:
    """Have the process end at a point, as the variable says it; None: at none.

    Raises:
        SettingsInvalid: there is no such point.
    """
    global _armed, _left
    name, _, times = (setting or "").partition(":")
    if name and (name not in FAILPOINTS or not (times or "1").isdigit()):
        raise SettingsInvalid(f"{VARIABLE} is {setting!r}; give NAME or NAME:TIMES of {', '.join(FAILPOINTS)}")
    _armed, _left = name or None, int(times or 1)


def reached(point: Failpoint) -> None:
    """The process is at a point; it ends here if it was told to."""
    global _left
    if point == _armed:
        _left -= 1
        if _left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get(VARIABLE))
