"""The hash ranges of shards cover all hashes without gap or overlap, and a shard can be read from its text."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.base.errors import SettingsInvalid
from shoal.engine.base.shards import MOST_SHARDS, Shard

COUNTS = st.integers(1, MOST_SHARDS)
HASHES = st.integers(-(2**63), 2**63 - 1)


@given(COUNTS, HASHES)
def test_every_hash_belongs_to_one_shard(count: int, first_hash: int) -> None:
    shard = Shard(1, count).of_hash(first_hash)
    assert 1 <= shard.number <= count
    assert shard.first <= first_hash <= shard.last
    assert shard.touches(first_hash, first_hash)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 4096, 65_535])
def test_shards_are_all_alike_and_leave_no_gap(count: int) -> None:
    shards = [Shard(number, count) for number in range(1, count + 1)]
    assert (shards[0].first, shards[-1].last) == (-(2**63), 2**63 - 1)
    assert all(left.last + 1 == right.first for left, right in itertools.pairwise(shards))
    sizes = {shard.last - shard.first for shard in shards}
    assert max(sizes) - min(sizes) <= 1
    assert all(shard.of_hash(end) == shard for shard in shards for end in (shard.first, shard.last))


def test_a_shard_is_written_as_which_of_how_many() -> None:
    assert Shard.parse("2/4") == Shard(2, 4)
    assert str(Shard(2, 4)) == "2/4"
    for wrong in ("", "2", "0/4", "5/4", "-1/4", "2/", "2/4/8", "a/b", "1/65537", " 1/2", "01/2", "1/999999999"):
        with pytest.raises(SettingsInvalid, match="such as 2/4"):
            Shard.parse(wrong)
