"""Key identity: Spark, the reference in Python and the kernels give the same hashes, for every length and type of key.

Spark 4.3 computed the numbers in VECTORS as `xxhash64(key…)` and `xxhash64('shoal', key…)`. They must never change:
with another number, every row that was ever published would become unreachable.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.format.keys import SECOND_SEED, key_identity
from shoal.engine.kernels.hashing import SEPARATOR, chain_joined, key_hashes, seeds

Key = tuple[str | int, ...]


def _text(length: int) -> str:
    """Return a text of `length` bytes in which no stretch of 8, 16 or 32 bytes repeats soon."""
    return ("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" * 17)[:length]


VECTORS: list[tuple[Key, int, int]] = [
    (("",), -7444071767201028348, -1667657306243806539),
    (("a",), -8582455328737087284, -4343536327010202671),
    (("é",), 2065146811275570100, -8121245889896872623),
    (("日本語",), -619341062884681239, 2924305015443895365),
    (("🦪",), -1844924123164469282, 4793897101364299746),
    (("naïve café",), 6059402778485971606, -1017552853820828998),
    (("a\0b",), -7028150433230623758, 5664956905271814166),
    ((_text(3),), -5988825953713525160, -2792903343704343052),
    ((_text(4),), 6520638020402076947, -1719877010273001470),
    ((_text(5),), 8621742533893966988, -2671198965474211638),
    ((_text(7),), -4651291295350382586, 8764500822206330987),
    ((_text(8),), 7248535833922443885, -5826996894909347260),
    ((_text(9),), 7214220360965324318, 5051235488640445343),
    ((_text(11),), 3430305387127271546, -3474104230421961745),
    ((_text(12),), 1501189992857548848, 5990407396159203990),
    ((_text(15),), 3834095035553170875, 3899124791798748978),
    ((_text(16),), 152989496093262263, 565786616144560180),
    ((_text(17),), 5427362515603069047, 744608807275088221),
    ((_text(24),), -4970167797021804048, -5226887278367520583),
    ((_text(31),), 928681653134301561, -4390929973159280938),
    ((_text(32),), 2469568146597744572, -3840162521433178869),
    ((_text(33),), 8209968029742723126, 610644954295174722),
    ((_text(63),), 707631624457076340, 2478649627881942170),
    ((_text(64),), -2677348291009823854, -3773577075038673226),
    ((_text(65),), 8885173296144280222, 413120291622107277),
    ((_text(1000),), -6300147150043529017, 980787551386529734),
    (("é" * 16,), 3208249818090782171, -3815174719284032752),
    (("日" * 21,), 205454796795737383, -3409478990381564949),
    ((0,), -5252525462095825812, -7652782529515236377),
    ((1,), -7001672635703045582, 5952871949322745615),
    ((-1,), 3858142552250413010, -4396873257458955650),
    ((42,), -6876166290308861218, -5272359302013053504),
    ((-42,), -6086559926526557199, -3436032697387009334),
    ((255,), -1851501055165582022, -6067202062990124560),
    ((256,), -4829978431745776261, 7693287077103279026),
    ((2**31 - 1,), 3305624883719161019, -2495729123957174164),
    ((-(2**31),), -432314631229701436, -3500337775347833206),
    ((2**31,), -8411286333845881801, -5573477637452266203),
    ((2**53 + 1,), 2178404700979030276, -933993719014145275),
    ((2**63 - 1,), -3246596055638297850, 561280399510654934),
    ((-(2**63),), -8619748838626508300, -4705727558933511619),
    ((-(2**63) + 1,), -3362613479881488794, 5108643446688586375),
    (("user-1", 7), -197435456206388044, 6752558609358341001),
    (("", 0), 1172808402238552441, -4877904836171356105),
    (("é", -1), -7559265566414352866, -4438913060908363792),
    ((_text(40), 2**63 - 1), -1458210380355073347, 8784279878565904830),
    ((7, "user-1"), -1541673183579962482, 4598336116631386367),
    ((0, ""), -5904888402568203703, 7118370666584189845),
    ((-(2**63), _text(33)), 5604564554721247441, 4255718326836589064),
    (("ab", "c"), -1301481789560085859, -4568451577669729137),
    (("a", "bc"), 714843003905237701, -6317356362646931469),
    (("", "abc"), 1978376667482948929, -7932048794455200665),
    (("", ""), 6372822119346140258, 1452030276246534094),
    ((1, 2, 3), 4904562767517797033, -8073723478610079279),
    ((-1, 0, -(2**63)), -210369883253648603, 6624854211791594551),
]
SECOND_SEED_IN_SPARK = -6301808324249740913
"""`xxhash64('shoal')`: the start of the chain of the second hash."""

STRINGS = st.text(st.characters(exclude_categories=["Cs"]))
INTEGERS = st.integers(-(2**63), 2**63 - 1)
KEYS = st.sampled_from([(STRINGS,), (INTEGERS,), (STRINGS, INTEGERS), (INTEGERS, STRINGS, STRINGS)]).flatmap(
    lambda columns: st.lists(st.tuples(*columns), min_size=1, max_size=20)
)


def test_the_second_hash_starts_from_the_hash_of_its_prefix() -> None:
    assert SECOND_SEED == SECOND_SEED_IN_SPARK % 2**64


@pytest.mark.parametrize(("key", "first", "second"), VECTORS, ids=lambda value: repr(value)[:24])
def test_the_reference_has_the_hashes_that_spark_has(key: Key, first: int, second: int) -> None:
    assert key_identity(key) == (first, second)


def test_the_kernels_have_the_hashes_that_spark_has() -> None:
    by_types = defaultdict(list)
    for vector in VECTORS:
        by_types[tuple(type(part) for part in vector[0])].append(vector)
    assert len(by_types) == 6
    for vectors in by_types.values():
        assert _kernel_hashes([key for key, _, _ in vectors]) == [(first, second) for _, first, second in vectors]


@given(KEYS)
def test_the_kernels_have_the_hashes_that_the_reference_has(keys: list[Key]) -> None:
    assert _kernel_hashes(keys) == [key_identity(key) for key in keys]


@settings(max_examples=200)
@given(KEYS, st.data())
def test_a_slice_of_a_column_hashes_like_its_values(keys: list[Key], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(keys)))
    length = data.draw(st.integers(0, len(keys) - start))
    first, second = key_hashes([column.slice(start, length) for column in _columns(keys)])
    expected = [key_identity(key) for key in keys[start : start + length]]
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == expected


@given(st.lists(STRINGS, min_size=1), st.lists(STRINGS, min_size=1))
def test_strings_as_one_text_hash_as_they_do_apart(values: list[str], others: list[str]) -> None:
    keys: list[Key] = [*zip(values, others, strict=False)]
    hashes = seeds(len(keys))
    for column in zip(*keys, strict=True):
        before = hashes.copy()
        text = chr(SEPARATOR).join(map(str, column)).encode()
        if any(chr(SEPARATOR) in str(value) for value in column):
            assert not chain_joined(np.frombuffer(text, np.uint8), *hashes)
            assert np.array_equal(hashes, before)
            return
        assert chain_joined(np.frombuffer(text, np.uint8), *hashes)
    first, second = hashes.view(np.int64).tolist()
    assert list(zip(first, second, strict=True)) == [key_identity(key) for key in keys]


@pytest.mark.parametrize("length", range(72))
def test_every_tail_of_a_string_is_hashed(length: int) -> None:
    keys: list[Key] = [(_text(length),), ("é" + _text(length),), (_text(length) + "x" * 64,)]
    assert _kernel_hashes(keys) == [key_identity(key) for key in keys]


def test_no_keys_have_no_hashes() -> None:
    for column in (pa.array([], pa.string()), pa.array([], pa.int64())):
        first, second = key_hashes([column])
        assert first.size == second.size == 0
        assert first.dtype == second.dtype == np.int64


def test_where_one_part_of_a_key_ends_matters() -> None:
    keys: list[Key] = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc")]
    assert len({key_identity(key) for key in keys}) == len(keys)


def _columns(keys: Sequence[Key]) -> list[pa.Array]:
    return [
        pa.array(column, pa.string() if isinstance(column[0], str) else pa.int64())
        for column in zip(*keys, strict=True)
    ]


def _kernel_hashes(keys: Sequence[Key]) -> list[tuple[int, int]]:
    first, second = key_hashes(_columns(keys))
    return list(zip(first.tolist(), second.tolist(), strict=True))
