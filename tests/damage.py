"""Kinds of damage to the data of a view. `harm` applies them from another process, as a failing disk or a person would.

python -m tests.damage STORE VIEW HOW
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest

from shoal.engine.feature_store import FeatureStore
from shoal.engine.format.layout import ChunkHeader
from shoal.engine.format.paths import generation_path, live_path

BASE = ("base missing", "base empty", "base cut", "base headless")
OVERLAYS = ("overlay missing", "overlay headless")
BIT = "bit turned in base"
"""Damage that only a checksum reveals."""
RECORD = ("record unreadable",)

every_harm = pytest.mark.parametrize("how", [*BASE, *OVERLAYS, *RECORD])


def harm(store: Path, view: str, how: str) -> None:
    """Damage a view of a store. The view must have an overlay over its base."""
    subprocess.run([sys.executable, "-m", "tests.damage", str(store), view, how], check=True)


def base_path(store: Path, view: str) -> Path:
    """Return the path of a view's base."""
    record = FeatureStore.open(store).version().view(view).record
    return generation_path(store, view, record.base.id) / "data.mdb"


def main() -> None:
    store = Path(sys.argv[1])
    view = sys.argv[2]
    how = sys.argv[3]
    record = FeatureStore.open(store).version().view(view).record
    base = generation_path(store, view, record.base.id) / "data.mdb"
    if how == "base missing":
        shutil.rmtree(base.parent)
    elif how in ("base empty", "base cut"):
        os.truncate(base, base.stat().st_size // 2 if how == "base cut" else 0)
    elif how == "base headless":
        with base.open("r+b") as file:
            file.seek(record.base.offsets[-1])
            file.write(b"x")
    elif how == BIT:
        with base.open("r+b") as file:
            # The last byte of the last key.
            at = record.base.offsets[0] + ChunkHeader.stated_size(base.read_bytes()[record.base.offsets[0] :], how) - 1
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1]))
    else:
        env = lmdb.open(str(live_path(store)), max_dbs=2)
        with env.begin(write=True) as transaction:
            chunk = f"{record.overlays[0].id}/000000".encode()
            if how == "record unreadable":
                transaction.put(f"view:{view}".encode(), b"{}", db=env.open_db(b"catalog", transaction))
            elif how == "overlay missing":
                transaction.delete(chunk, db=env.open_db(b"segments", transaction))
            else:
                transaction.put(chunk, b"x" * 5000, db=env.open_db(b"segments", transaction))


if __name__ == "__main__":
    main()
