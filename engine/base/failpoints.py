"""Failpoints: named points in the code at which a test can kill this process, as `kill -9` does.

With SHOAL_FAILPOINT=base.renamed, the process is killed when it reaches the point `base.renamed`. With
SHOAL_FAILPOINT=base.chunk-written:3, the process is killed when it reaches the point `base.chunk-written` for the third
time. A forked child counts separately. A point is placed where something has just become durable, visible or removed.
No point is on the path of a lookup. Each point costs one comparison.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from shoal.engine.base.errors import SettingsInvalid

VARIABLE = "SHOAL_FAILPOINT"

Failpoint = Literal[
    # The construction of a base generation.
    "base.begun",
    "base.chunk-written",
    "base.finished",
    "base.renamed",
    # A commit to `live`, and the removal of the bases that the commit makes obsolete.
    "commit.written",
    "commit.durable",
    "commit.done",
    "commit.base-removed",
    # The creation of a store's progress record (`begun`).
    "begun.aside",
    # The backup and the restore of a store, and the acceptance of a loss by its owner.
    "backup.aside",
    "backup.published",
    "restore.aside",
    "restore.published",
    "loss.moved",
    # The replacement of `live`.
    "live.copied",
    "live.named",
    "live.replaced",
    # The steps of a push around its commit.
    "push.laid",
    "push.answering",
    # The repair of a damaged view.
    "repair.base-removed",
    # The scrub has noted the damage, but has not repaired it yet.
    "scrub.damage-noted",
    # A publication to an export root.
    "export.parts-moved",
    "export.state-moved",
    "export.manifest-aside",
    "export.log-linked",
    "export.published",
    "root.view-dropped",
    # A micro-batch of a stream. Spark records it as done after the last of these points.
    "stream.part-pushed",
    "stream.pushed",
    "stream.published",
    "stream.consolidated",
    # The synchronization of rows to a table.
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
    """Arm the point in `setting`, which has the format of SHOAL_FAILPOINT; None disarms the armed point.

    Raises:
        SettingsInvalid: the setting does not name a known point, or its number is not a whole number.
    """
    global _armed, _left
    name, _, times = (setting or "").partition(":")
    if name and (name not in FAILPOINTS or not (times or "1").isdigit()):
        raise SettingsInvalid(f"{VARIABLE} is {setting!r}; give NAME or NAME:TIMES; NAMEs: {', '.join(FAILPOINTS)}")
    _armed = name or None
    _left = int(times or 1)


@contextmanager
def disarmed() -> Iterator[None]:
    """Disarm the armed point for the duration of the context. Use this for work that only prepares the process."""
    global _armed
    armed = _armed
    _armed = None
    try:
        yield
    finally:
        _armed = armed


def reached(point: Failpoint) -> None:
    """Kill this process if `point` is armed and was reached as many times as the setting says."""
    global _left
    if point == _armed:
        _left -= 1
        if _left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get(VARIABLE))
