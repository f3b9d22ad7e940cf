"""Building a chunk: its directory, and memory that is reused from another chunk."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.format.layout import RowLayout, most_buckets
from shoal.engine.store.segment import Chunk
from shoal.loaders.segments.arrow_rows import encode
from shoal.loaders.segments.segment_writer import ChunkBuilder, ChunkMemory
from tests import stores
from tests.engine.segments import Identity, batch

VIEW = stores.schema("doc", key="string", a="int64", text="string", flag="bool")
HASHES = st.integers(-(2**63), 2**63 - 1)


def filled(rows: dict[Identity, stores.Row | None], memory: ChunkMemory | None = None) -> ChunkBuilder:
    builder = ChunkBuilder(RowLayout(VIEW), len(rows), with_origins=False, memory=memory)
    encode(builder, 0, batch(VIEW, rows))
    return builder


@given(st.sets(HASHES, min_size=1, max_size=50) | st.integers(1, 2**57).map(lambda step: {step * n for n in range(64)}))
def test_a_directory_has_more_than_half_of_the_buckets_that_it_may_have(hashes: set[int]) -> None:
    chunk = Chunk(filled({(first, 1): {"doc_id": "a"} for first in hashes}).finish().data, "it")
    chunk.verify()
    most = most_buckets(len(hashes))
    assert chunk.header.buckets <= most
    assert chunk.header.shift == 0 or chunk.header.buckets > most // 2


def test_nothing_of_a_chunk_is_left_in_memory_that_serves_the_next_one() -> None:
    memory = ChunkMemory()
    texts = ["", "x" * 3, "y" * 5000]
    for count in (300, 7, 1, 40, 500):
        rows: dict[Identity, stores.Row | None] = {
            (first, count): {"doc_id": f"{count}/{first}", "a": first, "text": texts[first % 3]} if first % 5 else None
            for first in range(count)
        }
        assert np.array_equal(filled(rows, memory).finish(), filled(rows).finish())
