"""Clients that write and read, each in its own thread, and record what they did and saw."""

import http.client
import random
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.engine.process.run_directory import read_server_record
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.consistency import registers
from tests.consistency.history import History, Read, Write, Wrong, now
from tests.consistency.registers import GROUPS, KEYS, PUBLISHED_ONLY, SCHEMAS, VIEWS, Counts, Stamps
from tests.server.serving import Answer, Connection

_PAUSE_SECONDS = 0.03
_AGAIN = (429, 503)
_PATIENCE_SECONDS = 120


class Client(threading.Thread):
    """A thread that repeats an action until it is told to stop. An exception in it counts as a violation."""

    def __init__(self, name: str, history: History, counts: Counts, stop: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self.history = history
        self.counts = counts
        self.stop = stop
        self.source = random.Random()

    def act(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                self.act()
                self.stop.wait(self.source.uniform(0, 2 * _PAUSE_SECONDS))
        except BaseException:
            self.history.add(Wrong("client", f"{self.name} cannot go on: {traceback.format_exc()}"))


class Http:
    """One keep-alive connection at a time to the current server of a store."""

    def __init__(self, name: str, store: Path, counts: Counts) -> None:
        self._name = name
        self._store = store
        self._counts = counts
        self._connection: Connection | None = None
        self._number = 0

    @property
    def name(self) -> str:
        """The name of the client, with the number of its connection."""
        return f"{self._name}.{self._number}"

    def ask(self, path: str, body: Any, **headers: str) -> Answer | None:
        """Send a request, and return the answer. Return None if the server or the worker is gone or not ready."""
        try:
            if self._connection is None:
                record = read_server_record(self._store)
                if record is None:
                    return None
                self._number += 1
                self._connection = Connection(record.address)
            answer = self._connection.ask("POST", path, body, **headers)
        except (OSError, http.client.HTTPException):
            self._counts.add("connections lost")
            self.close()
            return None
        if answer.status in _AGAIN:
            self._counts.add(f"answers {answer.status}")
            return None
        return answer

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Reader(Client):
    """A client that reads over one connection at a time."""

    def __init__(self, name: str, store: Path, history: History, counts: Counts, stop: threading.Event) -> None:
        super().__init__(name, history, counts, stop)
        self._http = Http(name, store, counts)

    def act(self) -> None:
        self.read(registers.some_keys(self.source))

    def read(self, keys: list[int]) -> Read | None:
        """Read some keys of both views. Record and return what the answer shows, or return None without an answer."""
        begun = now()
        body = {"features": registers.FEATURES, "entities": {f"{view}_id": keys for view in VIEWS}}
        answer = self._http.ask("/v1/lookup", body)
        if answer is None:
            return None
        if answer.status != 200:
            self.history.add(Wrong("refused", f"{self.name} was answered {answer.status}: {answer.body!r}"))
            return None
        return note_read(
            self.history, self.counts, self._http.name, begun, answer.version, keys, answer.json["features"]
        )


def note_read(
    history: History, counts: Counts, client: str, begun: int, version: int, keys: list[int], columns: dict[str, Any]
) -> Read | None:
    """Record and return what an answer shows, or return None if a row is torn."""
    ended = now()
    counts.add("reads")
    try:
        read = Read(client, begun, ended, version, registers.rows_shown(keys, columns))
    except registers.Torn as error:
        history.add(Wrong("torn row", f"{client}, version {version}: {error}"))
        return None
    history.add(read)
    return read


class Pusher(Client):
    """A client that pushes to its own keys, one view after the other, and repeats a push that got no answer."""

    def __init__(self, number: int, store: Path, history: History, counts: Counts, stop: threading.Event) -> None:
        super().__init__(f"pusher {number}", history, counts, stop)
        self._keys = GROUPS[number]
        self._stamps = Stamps(number)
        self._http = Http(self.name, store, counts)

    def act(self) -> None:
        for view in VIEWS:
            late = self.source.random() < 0.15
            stamp = self._stamps.new(self.source.uniform(0.1, 2) if late else 0)
            body, write = self._push(view, stamp, late=late)
            request_id = uuid.uuid4().hex if self.source.random() < 0.6 else None
            self._send(body, write, request_id)
            if request_id and not late and self.source.random() < 0.3:
                # A second application of the first push would replace the second push, which has the same event time.
                self._send(*self._push(view, registers.twin(stamp), late=False), uuid.uuid4().hex)
                if self._answered(body, request_id) is not None:
                    self.counts.add("pushes repeated after their answer")

    def _push(self, view: str, stamp: int, *, late: bool) -> tuple[dict[str, Any], Callable[[int], Write]]:
        gone = [key for key in self._keys if self.source.random() < 0.15]
        keys = [key for key in self._keys if key not in gone and self.source.random() < 0.9]
        whole = self.source.random() < 0.6
        time_of_rows = registers.event_time(stamp).isoformat()
        rows = [registers.row(view, key, stamp, whole=whole) for key in keys]
        body: dict[str, Any] = {"view": view}
        if rows:
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            body["rows"] = {f"{view}_id": keys, "event_timestamp": [time_of_rows] * len(keys)} | columns
        if gone or not rows:
            body["deletes"] = {f"{view}_id": gone, "event_timestamp": [time_of_rows] * len(gone)}
        return body, lambda begun: Write(self.name, view, stamp, keys, gone, begun, whole=whole, late=late)

    def _send(self, body: dict[str, Any], write: Callable[[int], Write], request_id: str | None) -> None:
        begun = now()
        answer = self._answered(body, request_id)
        sent = vars(write(begun))
        if answer is None:
            self.history.add(Write(**sent))
        else:
            self.counts.add("pushes acknowledged")
            self.history.add(Write(**sent | {"acknowledged": now(), "version": answer.version}))

    def _answered(self, body: dict[str, Any], request_id: str | None) -> Answer | None:
        """Push until there is an answer, also after the end of the run, because the check expects every push that was
        begun. Return None if the push is refused, or if nobody answers for a long time."""
        headers = {"Idempotency-Key": request_id} if request_id else {}
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            answer = self._http.ask("/v1/push", body, **headers)
            if answer is not None and answer.status == 200:
                return answer
            if answer is not None:
                self.history.add(Wrong("refused", f"{self.name} was answered {answer.status}: {answer.body!r}"))
                return None
            self.counts.add("pushes sent again")
            time.sleep(0.05)
        self.history.add(Wrong("unanswered", f"{self.name} was not answered for {_PATIENCE_SECONDS} s"))
        return None


class Publisher(Client):
    """A client that publishes deltas and snapshots of both views. They contain rows of all keys, and some of the rows
    are older than what is pushed."""

    def __init__(self, root: ExportRoot, history: History, counts: Counts, stop: threading.Event) -> None:
        super().__init__("publisher", history, counts, stop)
        self._root = root
        self._stamps = Stamps(len(GROUPS))
        self._last = 0
        self._rows: dict[str, dict[int, int]] = {view: {} for view in VIEWS}
        """The rows of the source by view: the stamp of each key's row, without keys that are gone."""

    def publish_all(self) -> None:
        """Publish a first snapshot of each view."""
        for view in VIEWS:
            self._publish(view, self._new_stamp(0), KEYS, [], snapshot=True)

    def act(self) -> None:
        for view in VIEWS:
            # The stamp may be older than pushed rows, but never older than what this client published before.
            stamp = self._new_stamp(self.source.choice([0, self.source.uniform(0, 1.5)]))
            gone = [key for key in PUBLISHED_ONLY if self.source.random() < 0.1]
            pushed = [key for group in GROUPS[:-2] for key in group if self.source.random() < 0.2]
            keys = [*pushed, *(key for key in PUBLISHED_ONLY if key not in gone)]
            self._publish(view, stamp, keys, gone, snapshot=self.source.random() < 0.12)
        self.stop.wait(0.25)

    def _new_stamp(self, late_seconds: float) -> int:
        stamp = self._stamps.new(late_seconds)
        while stamp <= self._last:
            stamp = self._stamps.new()
        self._last = stamp
        return stamp

    def _publish(self, view: str, stamp: int, keys: list[int], gone: list[int], *, snapshot: bool) -> None:
        begun = now()
        # Record the write first, because a reader may see it before this process continues.
        acknowledged = begun if stamp and not self._rows[view] else None
        self.history.add(Write(self.name, view, stamp, keys, gone, begun, acknowledged))
        rows = self._rows[view]
        rows |= dict.fromkeys(keys, stamp)
        for key in gone:
            rows.pop(key, None)
        if snapshot:
            everything = [self._row(view, key, of) for key, of in rows.items()]
            stores.publish_snapshot(self._root, SCHEMAS[view], everything)
        else:
            tombstones = [{f"{view}_id": key, stores.TIMESTAMP: registers.event_time(stamp)} for key in gone]
            changed = [self._row(view, key, stamp) for key in keys]
            stores.publish_delta(self._root, SCHEMAS[view], changed, tombstones)
        self.counts.add("snapshots" if snapshot else "deltas")

    @staticmethod
    def _row(view: str, key: int, stamp: int) -> stores.Row:
        named = {f"{view}_id": key, stores.TIMESTAMP: registers.event_time(stamp)}
        return named | registers.row(view, key, stamp)
