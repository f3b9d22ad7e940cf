"""Check a history against the promises of the store.

Every key is a register in which the write with the largest stamp wins. A read has one version. The version must contain
every write that was acknowledged before the read began. If the read shows a write, the version must also contain
everything that was acknowledged before that write began.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from tests.consistency.history import Events, Read, Write, Wrong
from tests.consistency.registers import Shown


@dataclass
class _Register:
    """The writes to one key of one view."""

    by_stamp: dict[int, Write] = field(default_factory=dict)
    deletions: list[tuple[int, int]] = field(default_factory=list)
    """The stamp of each deletion, and the time when the deletion began."""
    acknowledged: list[tuple[int, int]] = field(default_factory=list)
    """Acknowledgement times, each with the largest stamp that was acknowledged by then."""
    whole: list[tuple[int, int]] = field(default_factory=list)
    """The same as `acknowledged`, but only for writes of all features that are not late."""

    def seal(self) -> None:
        self.deletions.sort()
        self.acknowledged = _rising(self.acknowledged)
        self.whole = _rising(self.whole)

    def deletion(self, least: int, before: int) -> int | None:
        """Return the stamp of the first deletion that has at least the stamp `least` and began before a time."""
        start = bisect_left(self.deletions, (least, 0))
        return next((stamp for stamp, begun in self.deletions[start:] if begun < before), None)


def check(events: Events) -> list[Wrong]:
    """Return all violations in a history."""
    registers = _registers(events.writes)
    found = [*events.wrongs, *_against_time(events)]
    for read in events.reads:
        found += _check_read(read, registers)
    for (view, key), of_versions in _by_register(events.reads).items():
        found += _check_order(f"{view} {key}", of_versions, registers[view, key])
    return found


def check_end(read: Read, writes: list[Write]) -> list[Wrong]:
    """Return the violations in a read of all keys after everything was applied: each key must show its last write."""
    registers = _registers(writes)
    found = []
    for view, rows in read.rows.items():
        for key, row in rows.items():
            last = registers[view, key].by_stamp[max(registers[view, key].by_stamp)]
            expected = None if key in last.gone else last.stamp
            if (row.stamp if row else None) != expected:
                found.append(Wrong("end", f"{read.client}: {view} {key} is {row} in the end, not {expected}"))
    return found


def _registers(writes: list[Write]) -> defaultdict[tuple[str, int], _Register]:
    registers: defaultdict[tuple[str, int], _Register] = defaultdict(_Register)
    for write in writes:
        for key in (*write.keys, *write.gone):
            register = registers[write.view, key]
            register.by_stamp[write.stamp] = write
            if key in write.gone:
                register.deletions.append((write.stamp, write.begun))
            if write.acknowledged is not None:
                register.acknowledged.append((write.acknowledged, write.stamp))
                if write.whole and not write.late and key in write.keys:
                    register.whole.append((write.acknowledged, write.stamp))
    for register in registers.values():
        register.seal()
    return registers


def _rising(moments: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the pairs sorted by time, each with the largest number up to that time."""
    moments = sorted(moments)
    return list(zip([at for at, _ in moments], accumulate((number for _, number in moments), max), strict=True))


def _latest(rising: list[tuple[int, int]], before: int) -> int:
    """Return the largest number before a time, or 0 if there is none."""
    place = bisect_left(rising, (before, 0))
    return rising[place - 1][1] if place else 0


def _against_time(events: Events) -> Iterator[Wrong]:
    """Yield a violation for each read with an older version than an earlier answer on any connection."""
    last_of: dict[str, int] = {}
    answered = [(read.ended, read.version) for read in events.reads]
    answered += [(write.acknowledged, write.version) for write in events.writes if write.acknowledged and write.version]
    versions = _rising(answered)
    for read in sorted(events.reads, key=lambda read: read.begun):
        if read.version < last_of.get(read.client, 0):
            yield Wrong("backwards", f"{read.client} saw {last_of[read.client]}, then {read.version}")
        last_of[read.client] = read.version
        if read.version < (least := _latest(versions, read.begun)):
            yield Wrong("stale", f"{read.client} saw version {read.version} after {least} had been answered")


def _check_read(read: Read, registers: dict[tuple[str, int], _Register]) -> Iterator[Wrong]:
    known = []
    for view, rows in read.rows.items():
        for key, row in rows.items():
            if row is None:
                continue
            write = registers[view, key].by_stamp.get(row.stamp)
            if write is None or key in write.gone or write.begun > read.ended:
                yield Wrong("unwritten", f"{_place(read, view, key)} shows {row}, which nobody had written")
            else:
                known.append(write)
                yield from _check_kept(_place(read, view, key), key, row, write, registers[view, key], read.ended)
    as_of = max([read.begun, *(write.begun for write in known)])
    for view, rows in read.rows.items():
        for key, row in rows.items():
            together = [
                write.stamp for write in known if write.view == view and (key in write.keys or key in write.gone)
            ]
            register = registers[view, key]
            yield from _check_least(_place(read, view, key), row, register, _latest(register.acknowledged, as_of), read)
            yield from _check_least(_place(read, view, key), row, register, max(together, default=0), read, "torn push")


def _check_least(
    place: str, row: Shown | None, register: _Register, least: int, read: Read, kind: str = "lost"
) -> Iterator[Wrong]:
    """Yield a violation if a key shows neither the write with the stamp `least` nor a later one."""
    if row is None and register.deletion(least, read.ended) is None:
        yield Wrong(kind, f"{place} is gone, though {least} was written and no deletion after it")
    if row is not None and row.stamp < least:
        twins = kind == "lost" and row.stamp >> 1 == least >> 1
        yield Wrong("applied twice" if twins else kind, f"{place} shows {row.stamp}, though {least} was written")


def _check_kept(place: str, key: int, row: Shown, write: Write, register: _Register, ended: int) -> Iterator[Wrong]:
    """Yield a violation if the features that a partial write did not set are wrong. They must come from the last write
    of all features, or be null after a deletion."""
    if write.whole:
        if row.kept != row.stamp:
            yield Wrong("torn row", f"{place} shows {row} of a write of all features")
        return
    kept = register.by_stamp.get(row.kept) if row.kept is not None else None
    if row.kept is not None and (kept is None or not kept.whole or key in kept.gone or kept.stamp > row.stamp):
        yield Wrong("unwritten", f"{place} shows {row}; nobody wrote what it keeps")
    least = _latest(register.whole, write.begun)
    deletion = register.deletion(least, ended)
    if (row.kept or 0) < least and (deletion is None or deletion > row.stamp):
        yield Wrong("lost", f"{place} shows {row}, though all its features were written as of {least}")


def _by_register(reads: list[Read]) -> dict[tuple[str, int], list[tuple[int, int, Shown | None]]]:
    """Return what each key showed, ordered by version: the version, the time when the read ended, and the row."""
    found: defaultdict[tuple[str, int], list[tuple[int, int, Shown | None]]] = defaultdict(list)
    for read in sorted(reads, key=lambda read: read.version):
        for view, rows in read.rows.items():
            for key, row in rows.items():
                found[view, key].append((read.version, read.ended, row))
    return found


def _check_order(name: str, of_versions: list[tuple[int, int, Shown | None]], register: _Register) -> Iterator[Wrong]:
    """Yield a violation if a version shows two rows of a key, or if a later version shows an older row."""
    least, last, shown = 0, -1, None
    for version, ended, row in of_versions:
        if version == last and row != shown:
            yield Wrong("two answers", f"version {version} shows {shown} and {row} of {name}")
        last = version
        shown = row
        stamp = row.stamp if row else register.deletion(least, ended)
        if stamp is None or stamp < least:
            yield Wrong("older again", f"{name} shows {row} in version {version}, after {least} in an earlier one")
        else:
            least = stamp


def _place(read: Read, view: str, key: int) -> str:
    return f"{read.client}, version {read.version}: {view} {key}"
