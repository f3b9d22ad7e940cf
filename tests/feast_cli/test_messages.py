"""Values that Shoal stores as Feast's own message: invalid ones are rejected, and read as null if already stored."""

import base64
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.base.errors import PushInvalid, SchemaChangeRefused
from shoal.engine.format.feast_values import MEMBERS, is_value_of
from shoal.engine.format.schema import Feature
from shoal.loaders.apply.definition import define_view
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import push_rows
from tests.server.serving import Server, eventually

NOW = datetime.now(UTC).replace(microsecond=0)
EXAMPLES = 3_000
GARBAGE = [b"", b"\xb6\xbb\x9e", b"\xd7\x6d\xf8", b"\xff" * 12, b"\x08", b"x", bytes(8), b"\x0a\xff\x01"]
"""Bytes that are not a valid Feast message. Among them are the decoded base64 texts "true" and "1234"."""


@pytest.fixture(scope="module")
def examples(feast: Any) -> dict[str, Any]:
    """One example value for each member of `Value`."""
    from feast.protos.feast.types import Value_pb2 as pb

    text = pb.Value(string_val="é")
    nested = pb.RepeatedValue(val=[pb.Value(int64_list_val=pb.Int64List(val=[1]))])
    of_map = pb.Map(val={"a": text, "b": pb.Value(map_val=pb.Map(val={"c": pb.Value(double_val=0.5)}))})
    scalar_map = pb.ScalarMap(val=[pb.ScalarMapEntry(key=pb.MapKey(int64_key=-1), value=text)])
    made: dict[str, Any] = {}
    for field in pb.Value.DESCRIPTOR.fields:
        of = field.message_type.name if field.message_type else None
        if of is None:
            value: Any = {9: "é", 12: b"\xff", 8: True, 1: 0.5, 2: 0.5, 14: 0}.get(field.type, -(2**31))
        elif of in ("Map", "MapList", "RepeatedValue", "ScalarMap", "ZonedTimestamp"):
            zoned = pb.ZonedTimestamp(unix_timestamp=-5, zone="Europe/Berlin") if of == "ZonedTimestamp" else None
            value = {"Map": of_map, "MapList": pb.MapList(val=[of_map, pb.Map()]), "RepeatedValue": nested}.get(
                of, zoned or scalar_map
            )
        else:
            (item,) = field.message_type.fields
            items = {9: ["", "é"], 12: [b"", b"\xff"], 8: [True, False]}.get(item.type, [0, 127, 2**31 - 1])
            value = getattr(pb, of)(val=items)
        made[field.name] = pb.Value(**{field.name: value})
    return made


def test_every_member_is_known_and_no_other_is_taken_for_it(examples: dict[str, Any]) -> None:
    assert set(examples) == MEMBERS
    for member, value in examples.items():
        data = value.SerializeToString()
        assert [other for other in MEMBERS if is_value_of(data, other)] == [member]
        assert not is_value_of(data + data, member)
        assert not is_value_of(data[:-1], member)
        for garbage in GARBAGE:
            assert not is_value_of(garbage, member)


def test_what_is_taken_can_be_read_by_feast(examples: dict[str, Any]) -> None:
    from feast.protos.feast.types import Value_pb2 as pb

    source = random.Random(1)
    taken = 0
    for _ in range(EXAMPLES):
        member, value = source.choice(list(examples.items()))
        data = bytearray(value.SerializeToString())
        for _ in range(source.choice([1, 1, 2, 4])):
            data[source.randrange(len(data))] = source.randrange(256)
        if is_value_of(bytes(data), member):
            taken += 1
            assert pb.Value.FromString(bytes(data)).WhichOneof("val") == member
    assert taken > EXAMPLES // 20


def test_values_within_values_without_end_are_refused(feast: Any) -> None:
    from feast.protos.feast.types import Value_pb2 as pb

    data = pb.Value(int32_val=1).SerializeToString()
    deepest = 0
    for depth in range(200):
        for key in (b"\x0a", b"\xd2\x02"):  # A value in a list, and the list in a value.
            size = len(data)
            length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
            data = key + length + data
        if is_value_of(data, "list_val"):
            deepest = depth
            pb.Value.FromString(data)
    assert 40 < deepest < 50


# --- a view with such features, written in every way -----------------------------------------------------------


CONFIGURATION = """
project: messages
provider: local
registry: data/registry.db
online_store: {type: shoal.feast.ShoalOnlineStore, store: data/store}
entity_key_serialization_version: 3
"""


@pytest.fixture(scope="module")
def repository(feast: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A repository with a view of these types, and a server on its store."""
    from feast.types import Array, Int32, Int64, Json, Map, Set, String, UnixTimestamp, Uuid

    directory = tmp_path_factory.mktemp("messages")
    (directory / "data").mkdir()
    (directory / "root").mkdir()
    (directory / "feature_store.yaml").write_text(CONFIGURATION)
    user = feast.Entity(name="user", join_keys=["user_id"], value_type=feast.ValueType.INT64)
    types = {"document": Json, "mapping": Map, "counts": Array(Int32), "labels": Set(String), "uuid": Uuid}
    types |= {"seen": UnixTimestamp, "numbers": Array(Int64)}
    view = feast.FeatureView(
        name="users",
        entities=[user],
        schema=[feast.Field(name="user_id", dtype=Int64), *(feast.Field(name=n, dtype=of) for n, of in types.items())],
        source=feast.PushSource(
            name="users_push", batch_source=feast.FileSource(path=str(directory / "no.parquet"), timestamp_field="at")
        ),
        ttl=timedelta(0),
    )
    store = feast.FeatureStore(repo_path=str(directory))
    store.apply([user, view])
    with Server(directory / "data/store", {"root": str(directory / "root")}, workers=1) as server:
        eventually(lambda: (directory / "data/store/run/writer.sock").exists(), "the writer")
        store.server = server
        yield store


def write(store: Any, key: int, at: datetime = NOW, **values: Any) -> None:
    from feast.protos.feast.types import EntityKey_pb2
    from feast.protos.feast.types import Value_pb2 as pb

    entity = EntityKey_pb2.EntityKey(join_keys=["user_id"], entity_values=[pb.Value(int64_val=key)])
    view = store.get_feature_view("users")
    store.provider.online_write_batch(store.config, view, [(entity, values, at, None)], None)


NAMES = ["document", "mapping", "counts", "labels", "uuid", "seen", "numbers"]


def read(store: Any, key: int) -> dict[str, Any]:
    asked = [f"users:{name}" for name in NAMES]
    found: dict[str, list[Any]] = store.get_online_features(features=asked, entity_rows=[{"user_id": key}]).to_dict()
    return {name: found[name][0] for name in NAMES}


def good_values() -> dict[str, Any]:
    from feast.protos.feast.types import Value_pb2 as pb

    return {
        "document": pb.Value(json_val='{"a": 1}'),
        "mapping": pb.Value(map_val=pb.Map(val={"a": pb.Value(string_val="b")})),
        "counts": pb.Value(int32_list_val=pb.Int32List(val=[1, -2])),
        "labels": pb.Value(string_set_val=pb.StringSet(val=["x"])),
        "uuid": pb.Value(uuid_val="6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
        "seen": pb.Value(unix_timestamp_val=1_700_000_000),
        "numbers": pb.Value(int64_list_val=pb.Int64List(val=[1])),
    }


@pytest.mark.parametrize("name", ["document", "mapping", "counts", "labels", "uuid"])
@pytest.mark.parametrize("text", ["true", "1234", "", "eA=="])
def test_texts_that_are_base64_by_chance_are_refused(repository: Any, name: str, text: str) -> None:
    write(repository, 1, **good_values())
    before = read(repository, 1)
    at = (NOW + timedelta(seconds=5)).isoformat()
    message = f"column '{name}' holds {base64.b64decode(text)!r} in row 0, which is not Feast's message Value with "
    pushed = {"view": "users", "rows": {"user_id": [1], "event_timestamp": [at], name: [text]}}
    answer = repository.server.ask("POST", "/v1/push", pushed)
    assert (answer.status, message in answer.error[1]) == (400, True)
    frame = {"user_id": [1], "event_timestamp": [at]} | {other: [None] for other in NAMES} | {name: [text]}
    for path, named in (("/push", "push_source_name"), ("/write-to-online-store", "feature_view_name")):
        body = {named: "users_push" if path == "/push" else "users", "df": frame}
        answer = repository.server.ask("POST", path, body, **{"Content-Type": "application/json"})
        assert (answer.status, message in json.loads(answer.json)["message"]) == (400, True)
    assert read(repository, 1) == before


def test_the_message_itself_can_be_pushed(repository: Any) -> None:
    values = {name: value for name, value in good_values().items() if name not in ("seen", "numbers")}
    rows = {name: [base64.b64encode(value.SerializeToString()).decode()] for name, value in values.items()}
    assert repository.server.ask("POST", "/v1/push", {"view": "users", "rows": {"user_id": [2]} | rows}).status == 200
    write(repository, 3, **values)
    assert read(repository, 2) == read(repository, 3)
    assert read(repository, 2)["counts"] == [1, -2]
    (view,) = repository.server.ask("GET", "/v1/views").json["views"]
    assert [feature.get("feast_member") for feature in view["features"]] == [
        "json_val",
        "map_val",
        "int32_list_val",
        "string_set_val",
        "uuid_val",
        None,
        None,
    ]


def test_a_value_of_another_type_than_declared_is_refused(repository: Any) -> None:
    from feast.protos.feast.types import Value_pb2 as pb

    for name in NAMES:
        with pytest.raises(PushInvalid, match=f"feature '{name}' is .*, but the row of user_id 4 has double_val"):
            write(repository, 4, **{name: pb.Value(double_val=0.5)})
    assert set(read(repository, 4).values()) == {None}


def test_times_that_no_row_can_have_are_refused(repository: Any) -> None:
    from feast.protos.feast.types import Value_pb2 as pb

    for seconds in (10**15, -(10**15), 2**63 - 1, 253_402_300_800, -62_135_596_801):
        with pytest.raises(PushInvalid, match=f"'seen' holds {seconds} seconds since 1970 in the row of user_id 5"):
            write(repository, 5, seen=pb.Value(unix_timestamp_val=seconds))
    early = datetime.fromisoformat("0001-01-01T00:00:00+14:00")
    for at in (early, datetime(9999, 12, 31), datetime.now(UTC) + timedelta(days=2)):
        with pytest.raises(PushInvalid, match=r"the row of user_id 5 has the event time .*day in the future"):
            write(repository, 5, at, seen=pb.Value(unix_timestamp_val=1))
    write(repository, 5, seen=pb.Value(unix_timestamp_val=-(2**63)), counts=good_values()["counts"])
    assert (read(repository, 5)["seen"], read(repository, 5)["counts"]) == (None, [1, -2])


def test_what_an_older_version_stored_is_read_as_null(feast: Any, tmp_path: Path, repository: Any) -> None:
    """The older version did not know `feast_member` and accepted any bytes."""
    from shoal.loaders.feast.rows import schema_of

    store = repository.get_feature_view("users")
    schema = schema_of(store)
    features = tuple(Feature(name=feature.name, type=feature.type) for feature in schema.features)
    with StoreWriter(tmp_path / "store") as writer:
        define_view(writer, schema.model_copy(update={"features": features}))
        good = good_values()["counts"].SerializeToString()
        for key, bad in enumerate(GARBAGE):
            push_rows(writer, "users", {"user_id": [key], "document": [bad], "counts": [good], "mapping": [good]})
        define_view(writer, schema)
        others = (schema.features[0].model_copy(update={"feast_member": "map_val"}), *schema.features[1:])
        changed = schema.model_copy(update={"features": others})
        with pytest.raises(SchemaChangeRefused, match="'document' changed from Feast's json_val to map_val"):
            define_view(writer, changed)
    old = feast.FeatureStore(repo_path=str(repository.repo_path))
    old.config.online_store.store = str(tmp_path / "store")
    for key in range(len(GARBAGE)):
        found = read(old, key)
        assert (found["document"], found["mapping"], found["counts"]) == (None, None, [1, -2])
