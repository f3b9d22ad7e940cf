"""Compile the kernels that a writer runs for pushes and merges, before anybody waits for one."""

import logging
import tempfile
from pathlib import Path

from engine.errors import ShoalError
from engine.schema import Feature, JoinKey, ViewSchema
from loaders.compaction import fold
from loaders.definition import define_view
from loaders.push import push_rows
from loaders.store_writer import StoreWriter

log = logging.getLogger("shoal.writer")

_SCHEMA = ViewSchema(
    name="v",
    join_keys=(JoinKey(name="k", type="string"),),
    features=(
        Feature(name="number", type="float32"),
        Feature(name="text", type="string"),
        Feature(name="vector", type="float32[2]"),
        Feature(name="numbers", type="list<float32>"),
        Feature(name="texts", type="list<string>"),
    ),
)


def warm() -> None:
    """Push rows to a small store in a temporary directory and fold them, so that every kernel of that is compiled, or
    read from the cache.

    A server does this before its writer starts. A writer that compiles while pushes wait is slow to answer them, and
    loses a kernel that is not finished if it is killed.
    """
    try:
        with (
            tempfile.TemporaryDirectory(prefix="shoal-warm-") as directory,
            StoreWriter(Path(directory) / "store") as writer,
        ):
            _push_and_fold(writer)
    except (OSError, ShoalError) as error:
        log.warning("the kernels of the writer are compiled when they are first needed: %s", error)


def _push_and_fold(writer: StoreWriter) -> None:
    define_view(writer, _SCHEMA)
    row = {"k": ["a"], "number": [1.0], "text": ["t"], "vector": [[1.0, 2.0]], "numbers": [[1.0]], "texts": [["t"]]}
    push_rows(writer, "v", row)
    push_rows(writer, "v", {"k": ["a"], "number": [2.0]})
    push_rows(writer, "v", {"k": ["b"], "text": ["t"]}, deletes={"k": ["a"]})
    fold(writer, "v")
