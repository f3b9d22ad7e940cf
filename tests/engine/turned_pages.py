"""Turn bytes of the pages of a live environment, one at a time, and hold what readers and writers make of it against
what was there: the same data, or an error that names the damage. Never less data, a new store, or a dead process.

    python -m tests.engine.turned_pages STORE PART PARTS

It prints the case before it begins with it, so that whoever started it knows the one over which it died.
"""

import gc
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine import FeatureStore
from engine.environment import DATA, live_path
from engine.errors import StoreDamaged, ViewDamaged
from engine.lmdb_file import HEADER, META
from loaders.push import push_rows
from loaders.store_writer import StoreWriter

PAGE = 4096
NO_NODES = 16
"""Where the list of a page's nodes ends if there are none: LMDB takes such a page for one without entries."""
VIEWS = ("doc", "other")
KEYS: dict[str, list[int]] = {f"{view}_id": list(range(50)) for view in VIEWS}


def content(reader: FeatureStore) -> dict[str, Any]:
    """All that a store shows: of a view that is damaged, that it is."""
    shown: dict[str, Any] = {"services": sorted(reader.version().services)}
    for view in VIEWS:
        try:
            shown[view] = reader.lookup([f"{view}:*"], KEYS).to_pydict()
        except ViewDamaged:
            shown[view] = ViewDamaged
    return shown


def read(store: Path) -> dict[str, Any] | None:
    """What a new reader of a store sees; None if it says that the store is damaged."""
    with suppress(StoreDamaged):
        return content(FeatureStore.open(store))
    return None


def write(store: Path) -> dict[str, Any] | None:
    """What there is once a writer has opened a store and committed to it; None if it says that the store is damaged."""
    with suppress(StoreDamaged), StoreWriter(store) as writer:
        for value in (1, 2):
            with suppress(ViewDamaged):
                push_rows(writer, "other", {"other_id": [value], "a": [7]})
        return content(FeatureStore.open(store))
    return None


def cases(content: bytes) -> Iterator[tuple[int, int, bool]]:
    """Places of bytes, what they become, and whether to write then."""
    for page in range(len(content) // PAGE):
        # The first two pages are the commits' own, which have more in their heads.
        for place in range(PAGE * page, PAGE * page + HEADER + (META.size if page < 2 else 4)):
            old = content[place]
            for value in {old ^ 0x01, old ^ 0xFF, NO_NODES} - {old}:
                yield place, value, False
            yield place, old ^ 0x02, True


def check(before: dict[str, Any], after: dict[str, Any] | None, also: dict[str, Any]) -> str:
    """How a case ended; raises AssertionError if it is not among what is promised."""
    if after is None:
        return "damaged"
    assert after["services"] == before["services"], after
    for view in VIEWS:
        assert after[view] in (before[view], also[view], ViewDamaged), (view, after[view])
    return "same" if ViewDamaged not in after.values() else "view damaged"


def main() -> None:
    store, part, parts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    copy = store.with_name(f"copy-{part}")
    shutil.copytree(store, copy)
    before, written = read(copy), write(copy)
    assert before is not None
    assert written is not None
    whole = (live_path(store) / DATA).read_bytes()
    shutil.rmtree(copy)
    shutil.copytree(store, copy, ignore=shutil.ignore_patterns("lock.mdb"))
    record, data = (store / "begun").read_bytes(), live_path(copy) / DATA
    for number, (place, value, writes) in enumerate(cases(whole)):
        if number % parts != part:
            continue
        print(f"byte {place % PAGE} of page {place // PAGE}, made {value}, {'written' if writes else 'read'}", end=": ")
        sys.stdout.flush()
        # Files of their own: what an earlier case has mapped stays as it is.
        data.unlink()
        turned = bytearray(whole)
        turned[place] = value
        data.write_bytes(turned)
        (copy / "begun").write_bytes(record)
        print(check(before, (write if writes else read)(copy), written if writes else before))
        gc.collect(0)


if __name__ == "__main__":
    main()
