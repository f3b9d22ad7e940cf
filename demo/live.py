"""Watch an export arrive: for each view, poll a value that the export changes until the server returns the new one."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa

from demo.client import Client, body
from demo.errors import DemoFailed
from shoal.spark_export.views.definition import ViewDefinition

_POLL_SECONDS = 0.005
_PATIENCE_SECONDS = 60
_WHOLE = ("int32", "int64")


@dataclass(frozen=True)
class Probe:
    """A feature value that an export changes."""

    view: str
    reference: str
    key: Mapping[str, Any]
    before: int
    after: int


def find_probe(view: ViewDefinition, before: pa.Table, after: pa.Table) -> Probe:
    """Return an integer feature value that differs between two feature tables of a view. Raise DemoFailed if no value
    differs."""
    keys = [key.name for key in view.join_keys]
    old = {tuple(row[name] for name in keys): row for row in before.to_pylist()}
    for feature in view.features:
        if feature.type not in _WHOLE or feature.tolerance:
            continue
        for row in after.to_pylist():
            key = tuple(row[name] for name in keys)
            value = row[feature.name]
            previous = old.get(key, {}).get(feature.name)
            if None not in (value, previous) and value != previous:
                named = dict(zip(keys, key, strict=True))
                return Probe(view.name, f"{view.name}:{feature.name}", named, previous, value)
    raise DemoFailed(f"no whole number of view {view.name!r} differs between the two days")


class Watch:
    """Requests the probes' values in a thread during a `with` block, and records when each new value was served."""

    def __init__(self, port: int, probes: Sequence[Probe]) -> None:
        self._port = port
        self._probes = probes
        self._stop = threading.Event()
        self._arrived = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: Exception | None = None
        self.served_at: dict[str, float] = {}
        """View → the time when its new value was served, in seconds since 1970."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait(self) -> None:
        """Return once all new values are served. Raise DemoFailed after an error or a timeout."""
        self._arrived.wait(_PATIENCE_SECONDS)
        if self._error:
            raise DemoFailed(f"the watch on the new values failed: {self._error}") from self._error
        late = ", ".join(probe.reference for probe in self._probes if probe.view not in self.served_at)
        if late:
            raise DemoFailed(f"published, but not served after {_PATIENCE_SECONDS} s: {late}")

    def _run(self) -> None:
        try:
            self._ask_until_all_arrived()
        except Exception as error:  # `wait` raises it in the main thread.
            self._error = error
        self._arrived.set()

    def _ask_until_all_arrived(self) -> None:
        keys = {name: value for probe in self._probes for name, value in probe.key.items()}
        request = body(keys, features=[probe.reference for probe in self._probes])
        with Client(self._port) as client:
            while len(self.served_at) < len(self._probes) and not self._stop.wait(_POLL_SECONDS):
                found = client.lookup(request).json()["features"]
                now = time.time()
                for probe in self._probes:
                    if found[probe.reference] == [probe.after]:
                        self.served_at.setdefault(probe.view, now)
