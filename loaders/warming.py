"""Compile the kernels that a writer runs for pushes and merges, before a push has to wait for them.

`python -m shoal.loaders.warming` compiles these kernels and those of lookups, for an image or a checkout.
"""

import logging
import tempfile
from pathlib import Path

from shoal.engine.base.errors import ShoalError
from shoal.engine.base.failpoints import disarmed
from shoal.engine.format.schema import Feature, JoinKey, ViewSchema
from shoal.engine.kernels import warm as warm_lookups
from shoal.loaders.apply.compaction import fold
from shoal.loaders.apply.definition import define_view
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import push_rows

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
    """Compile every kernel for pushes and folds, or read it from the cache.

    To do so, push rows to a small store in a temporary directory, and fold them. A server calls this before its writer
    starts. Otherwise the writer would compile while pushes wait for their answers. If the writer was killed meanwhile,
    the unfinished kernel would be lost.
    """
    try:
        with (
            disarmed(),
            tempfile.TemporaryDirectory(prefix="shoal-warm-") as directory,
            StoreWriter(Path(directory) / "store") as writer,
        ):
            _push_and_fold(writer)
    except (OSError, ShoalError) as error:
        log.warning("cannot compile the writer's kernels in advance; they are compiled when first used: %s", error)


def _push_and_fold(writer: StoreWriter) -> None:
    define_view(writer, _SCHEMA)
    row = {"k": ["a"], "number": [1.0], "text": ["t"], "vector": [[1.0, 2.0]], "numbers": [[1.0]], "texts": [["t"]]}
    push_rows(writer, "v", row)
    push_rows(writer, "v", {"k": ["a"], "number": [2.0]})
    push_rows(writer, "v", {"k": ["b"], "text": ["t"]}, deletes={"k": ["a"]})
    fold(writer, "v")


if __name__ == "__main__":
    warm_lookups()
    warm()
