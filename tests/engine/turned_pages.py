"""Change bytes in the pages of a live environment, one at a time, and check what readers and writers see. They must see
the original data, or an error that names the damage. They must never see less data or a new store, or die.

    python -m tests.engine.turned_pages STORE PART PARTS

It prints each case before the case begins, so that the output shows which case ended the process.
"""

import gc
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal import FeatureStore
from shoal.engine.base.errors import StoreDamaged, ViewDamaged
from shoal.engine.format.paths import DATA, live_path
from shoal.engine.store.lmdb_file import HEADER, META
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import push_rows

PAGE = 4096
NO_NODES = 16
"""The end of the list of nodes in a page without nodes. LMDB reads such a page as one without entries."""
VIEWS = ("doc", "other")
KEYS: dict[str, list[int]] = {f"{view}_id": list(range(50)) for view in VIEWS}


def content(reader: FeatureStore) -> dict[str, Any]:
    """Return everything that a store shows. A damaged view appears as `ViewDamaged`."""
    shown: dict[str, Any] = {"services": sorted(reader.version().services)}
    for view in VIEWS:
        try:
            shown[view] = reader.lookup([f"{view}:*"], KEYS).to_pydict()
        except ViewDamaged:
            shown[view] = ViewDamaged
    return shown


def read(store: Path) -> dict[str, Any] | None:
    """Return what a new reader of a store sees, or None if it finds the store damaged."""
    with suppress(StoreDamaged):
        return content(FeatureStore.open(store))
    return None


def write(store: Path) -> dict[str, Any] | None:
    """Return the content of a store after a writer has committed to it, or None if the store is found damaged."""
    with suppress(StoreDamaged), StoreWriter(store) as writer:
        for value in (1, 2):
            with suppress(ViewDamaged):
                push_rows(writer, "other", {"other_id": [value], "a": [7]})
        return content(FeatureStore.open(store))
    return None


def cases(content: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yield the place of a byte, its new value, and whether the case also writes."""
    for page in range(len(content) // PAGE):
        # The first two pages are the meta pages of the commits, which have longer headers.
        for place in range(PAGE * page, PAGE * page + HEADER + (META.size if page < 2 else 4)):
            old = content[place]
            for value in {old ^ 0x01, old ^ 0xFF, NO_NODES} - {old}:
                yield place, value, False
            yield place, old ^ 0x02, True


def check(before: dict[str, Any], after: dict[str, Any] | None, also: dict[str, Any]) -> str:
    """Return how a case ended. Raise AssertionError if the store shows anything that is not allowed."""
    if after is None:
        return "damaged"
    assert after["services"] == before["services"], after
    for view in VIEWS:
        assert after[view] in (before[view], also[view], ViewDamaged), (view, after[view])
    return "same" if ViewDamaged not in after.values() else "view damaged"


def main() -> None:
    store = Path(sys.argv[1])
    part = int(sys.argv[2])
    parts = int(sys.argv[3])
    copy = store.with_name(f"copy-{part}")
    shutil.copytree(store, copy)
    before = read(copy)
    written = write(copy)
    assert before is not None
    assert written is not None
    whole = (live_path(store) / DATA).read_bytes()
    shutil.rmtree(copy)
    shutil.copytree(store, copy, ignore=shutil.ignore_patterns("lock.mdb"))
    record = (store / "begun").read_bytes()
    data = live_path(copy) / DATA
    for number, (place, value, writes) in enumerate(cases(whole)):
        if number % parts != part:
            continue
        print(f"byte {place % PAGE} of page {place // PAGE}, made {value}, {'written' if writes else 'read'}", end=": ")
        sys.stdout.flush()
        # A new file, because an earlier case may still map the old one.
        data.unlink()
        turned = bytearray(whole)
        turned[place] = value
        data.write_bytes(turned)
        (copy / "begun").write_bytes(record)
        print(check(before, (write if writes else read)(copy), written if writes else before))
        gc.collect(0)


if __name__ == "__main__":
    main()
