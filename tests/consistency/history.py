"""A history: what clients did and saw, and when. Clients write one line per event as it happens, and the checker reads
the lines.

Times are nanoseconds of the monotonic clock, which all processes of a machine share.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from tests.consistency.registers import Shown


def now() -> int:
    return time.monotonic_ns()


@dataclass(frozen=True)
class Write:
    """A push, or the publication of a delta or snapshot. `keys` get rows with this stamp, and `gone` are deleted by it.

    `acknowledged` is None if no client was told that the write was applied, and `version` is the version that came with
    the acknowledgement. A write that is `late` has an event time before earlier writes of its client.
    """

    client: str
    view: str
    stamp: int
    keys: list[int]
    gone: list[int]
    begun: int
    acknowledged: int | None = None
    version: int | None = None
    whole: bool = True
    late: bool = False


@dataclass(frozen=True)
class Read:
    """An answer of one version. `client` is a connection, or a thread of a process that reads the store directly."""

    client: str
    begun: int
    ended: int
    version: int
    rows: dict[str, dict[int, Shown | None]]


@dataclass(frozen=True)
class Wrong:
    """A violation that a client noticed by itself."""

    kind: str
    what: str


@dataclass
class Events:
    """The events of a history, in the form that the checker reads."""

    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    wrongs: list[Wrong] = field(default_factory=list)


class History:
    """A file to which any thread of one process can append events."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, event: Write | Read | Wrong) -> None:
        line = orjson.dumps([type(event).__name__, event], option=orjson.OPT_NON_STR_KEYS)
        with self._lock:
            self._file.write(line + b"\n")


def read_events(paths: Iterable[Path]) -> Events:
    """Return the events in the files of some processes."""
    events = Events()
    for path in paths:
        for line in path.read_bytes().splitlines():
            kind, content = orjson.loads(line)
            if kind == "Write":
                events.writes.append(Write(**content))
            elif kind == "Wrong":
                events.wrongs.append(Wrong(**content))
            else:
                events.reads.append(Read(**content | {"rows": _rows(content["rows"])}))
    return events


def _rows(content: dict[str, dict[str, Any]]) -> dict[str, dict[int, Shown | None]]:
    return {
        view: {int(key): Shown(**row) if row else None for key, row in rows.items()} for view, rows in content.items()
    }
