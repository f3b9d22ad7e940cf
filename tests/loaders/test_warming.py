"""The kernels that a server compiles before its writer starts are all that pushes need."""

import json
import subprocess
import sys
from pathlib import Path

PUSHES = """
import json
import sys
from datetime import datetime, timedelta, UTC
from pathlib import Path

from shoal import FeatureStore
from shoal.engine.kernels import compiling
from shoal.engine.kernels import warm as warm_lookups
from shoal.engine.format.schema import JoinKey
from shoal.loaders.apply.compaction import fold
from shoal.loaders.apply.definition import define_view
from shoal.loaders.push.push import push_rows
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.warming import warm as warm_writer
from tests import stores

warm_lookups()
if sys.argv[2] == "warm":
    warm_writer()
late = []
before = compiling._KernelCache.load_overload

def noted(cache, sig, target_context):
    late.append(f"{cache._dispatcher.py_func.__qualname__}{sig}")
    return before(cache, sig, target_context)

compiling._KernelCache.load_overload = noted
ALL = {
    "flag": "bool", "small": "int32", "large": "int64", "half": "float32", "whole": "float64", "text": "string",
    "raw": "bytes", "when": "timestamp", "vector": "float32[3]", "texts": "list<string>", "numbers": "list<float32>",
    "ids": "list<int64>",
}
VALUES = {
    "flag": True, "small": 1, "large": 2, "half": 0.5, "whole": 0.25, "text": "é", "raw": b"0",
    "when": datetime.now(UTC), "vector": [1.0, 2.0, 3.0], "texts": ["a", "b"], "numbers": [1.5], "ids": [1, 2, 3],
}
now = datetime.now(UTC)
with StoreWriter(Path(sys.argv[1])) as writer:
    for view in (
        stores.schema("strings", **ALL),
        stores.schema("numbers", key="int64", ttl=timedelta(days=1), **ALL),
        stores.schema("pairs", **ALL).model_copy(
            update={"join_keys": (JoinKey(name="a", type="string"), JoinKey(name="b", type="int64"))}
        ),
    ):
        define_view(writer, view)
        def keys(first, last):
            made = {"string": [f"k{n}" for n in range(first, last)], "int64": list(range(first, last))}
            return {key.name: made[key.type] for key in view.join_keys}
        for round in range(12):
            count = 1 + 50 * (round % 3)
            columns = {name: [value] * count for name, value in VALUES.items() if round % 4 or name in ("flag", "text")}
            times = {"event_timestamp": [now - timedelta(seconds=round % 2)] * count} if round % 2 else {}
            deletes = keys(200, 201 + round) if round % 3 == 0 else None
            request_id = str(round) if round % 2 else None
            push_rows(writer, view.name, keys(0, count) | columns | times, deletes=deletes, request_id=request_id)
        fold(writer, view.name)
        push_rows(writer, view.name, deletes=keys(3, 9))
print(json.dumps(late))
"""


def compiled_late(store: Path, how: str) -> list[str]:
    """Return the kernels that pushes of every type compile or read from the cache, in a process of its own."""
    ran = subprocess.run([sys.executable, "-c", PUSHES, str(store), how], capture_output=True, text=True, check=True)
    late: list[str] = json.loads(ran.stdout.splitlines()[-1])
    return late


def test_pushes_of_every_type_compile_nothing_after_the_warm_up(tmp_path: Path) -> None:
    assert compiled_late(tmp_path / "warm", "warm") == []
    assert any(kernel.startswith("encode_rows") for kernel in compiled_late(tmp_path / "cold", "cold"))
