"""What clients did and saw, and when: written down as it happens, a line each, and read again by the checker.

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
    """A push, or the publication of a delta or snapshot: `keys` have rows with this stamp, `gone` are deleted by it.

    `acknowledged` is None where nobody was told that it was applied; `version` is what was told with it. One that is
    `late` has an event time before that of writes that its client made earlier.
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
    """An answer of one version. `client` is one connection, or one thread of a process that reads the store itself."""

    client: str
    begun: int
    ended: int
    version: int
    rows: dict[str, dict[int, Shown | None]]


@dataclass(frozen=True)
class Wrong:
    """What a client saw to be wrong by itself."""

    kind: str
    what: str


@dataclass
class Events:
    """A history as it is checked."""

    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    wrongs: list[Wrong] = field(default_factory=list)


class History:
    """A file that events are appended to, by any thread of one process."""

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
    """What was written to the files of some processes."""
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
