"""The kernels and the protobuf library read the same keys from a request, whatever its bytes are."""

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.base.errors import LookupInvalid

pytest.importorskip("google.protobuf", reason="protobuf is not installed: pip install 'shoal[grpc]'")

from shoal.engine.server import grpc_messages
from shoal.engine.server.grpc_messages import parse_grpc_request, parse_keys
from tests.server.feast_messages import encode

EXAMPLES = int(os.environ.get("SHOAL_FUZZ_EXAMPLES", "200"))
REQUESTS = [
    encode(
        "GetOnlineFeaturesRequest",
        {"features": {"val": ["docs:a", "users:*"]}, "entities": [{"key": "k", "value": {"val": values}}]},
    )
    for values in ([{"string_val": "a"}, {"string_val": "é"}], [{"int64_val": -1}], [{"int32_val": 5}, {}], [])
]
INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
KEYS = st.one_of(
    st.lists(st.builds(lambda value: {"string_val": value}, st.text(max_size=200))),
    st.lists(st.builds(lambda value: {"int64_val": value}, INT64)),
    st.lists(st.builds(lambda value: {"int32_val": value}, INT32)),
)


def outcome(read: Any, data: bytes) -> Any:
    try:
        keys = read("k", data)
    except LookupInvalid as error:
        return str(error)
    return keys.tolist() if hasattr(keys, "tolist") else keys


@given(KEYS)
def test_keys_as_clients_write_them(keys: list[dict[str, Any]]) -> None:
    data = encode("RepeatedValue", {"val": keys})
    assert outcome(parse_keys, data) == [value for key in keys for value in key.values()]


@given(KEYS, st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=3), st.integers(0, 3)), max_size=4))
def test_bytes_that_nobody_would_write(keys: list[dict[str, Any]], edits: list[tuple[int, bytes, int]]) -> None:
    data = encode("RepeatedValue", {"val": keys})
    for place, inserted, removed in edits:
        at = place % (len(data) + 1)
        data = data[:at] + inserted + data[at + removed :]
    assert outcome(parse_keys, data) == outcome(grpc_messages._parse_any_keys, data)


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"", []),
        (b"\x0a\x06\x18\xff\xff\xff\xff\x0f", [-1]),  # An int32 that was not extended to 64 bits.
        (b"\x0a\x03\x12\x02a", None),  # The message ends early.
        (b"\x0a\x06\x12\x01a\x12\x01b", ["b"]),  # The last member of a oneof wins.
        (b"\x0a\x83\x00\x12\x01a", ["a"]),  # A length with more bytes than it needs.
    ],
)
def test_unusual_encodings(data: bytes, keys: list[Any] | None) -> None:
    seen = outcome(parse_keys, data)
    assert seen == outcome(grpc_messages._parse_any_keys, data)
    assert keys is None or seen == keys


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_requests_that_nobody_would_send(data: st.DataObject) -> None:
    """The requests are either read, or rejected as the client's error."""
    request = bytearray(data.draw(st.sampled_from(REQUESTS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(request)))
        request[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        asked = parse_grpc_request(bytes(request))
        for name, keys in asked.entities.items():
            parse_keys(name, keys)
    except LookupInvalid as error:
        str(error).encode()
