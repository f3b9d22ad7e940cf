"""The valid schemas of a view, and the schema changes that stored rows can follow."""

from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from shoal.engine.base.durations import parse_duration
from shoal.engine.base.errors import SchemaChangeRefused
from shoal.engine.format.schema import (
    SCALAR_TYPES,
    WIDENINGS,
    Feature,
    FeatureService,
    ViewSchema,
    arrow_type,
    embedding_size,
)
from tests.stores import schema


def view(**changes: Any) -> ViewSchema:
    content: dict[str, Any] = {
        "name": "doc",
        "join_keys": [{"name": "id", "type": "string"}],
        "features": [{"name": "a", "type": "int32"}],
    }
    return ViewSchema.model_validate(content | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name"),
        ({"name": "1st"}, "name"),
        ({"name": "a-b"}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": ".."}, "name"),
        ({"name": "a" * 129}, "name"),
        ({"join_keys": []}, "join_keys"),
        ({"join_keys": [{"name": "id", "type": "int32"}]}, "join_keys"),
        ({"features": []}, "features"),
        ({"features": [{"name": "a", "type": "decimal"}]}, "unknown type 'decimal'"),
        ({"features": [{"name": "a", "type": "float32[0]"}]}, "unknown type"),
        ({"features": [{"name": "a", "type": "float32[-1]"}]}, "unknown type"),
        ({"features": [{"name": "a", "type": "float64[3]"}]}, "unknown type"),
        ({"features": [{"name": "id", "type": "int32"}]}, "'id' is named twice"),
        ({"features": [{"name": "a", "type": "int32"}] * 2}, "'a' is named twice"),
        ({"join_keys": [{"name": "id", "type": "string"}] * 2}, "'id' is named twice"),
        ({"ttl": 0}, "ttl"),
        ({"ttl": -1}, "ttl"),
        ({"owner": "me"}, "owner"),
    ],
)
def test_what_no_view_can_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        view(**changes)


def test_every_type_has_its_arrow_type() -> None:
    assert arrow_type("float32[64]") == pa.list_(pa.float32(), 64)
    assert embedding_size("float32[64]") == 64
    assert all(embedding_size(of) is None and arrow_type(of) == arrow for of, arrow in SCALAR_TYPES.items())


@pytest.mark.parametrize("features", [[], ["doc"], ["doc:"], [":a"], ["doc:a:b"], ["doc:a b"], ["*:a"]])
def test_a_feature_service_names_features_of_views(features: list[str]) -> None:
    with pytest.raises(ValidationError):
        FeatureService.model_validate({"name": "service", "features": features})
    assert FeatureService.model_validate({"name": "service", "features": ["doc:a", "doc:*"]}).features


@pytest.mark.parametrize("old", SCALAR_TYPES | {"float32[2]": None, "float32[3]": None})
@pytest.mark.parametrize("new", SCALAR_TYPES | {"float32[2]": None, "float32[3]": None})
def test_a_feature_may_only_be_widened(old: str, new: str) -> None:
    before = view(features=[{"name": "a", "type": old}])
    after = view(features=[{"name": "a", "type": new}])
    if old == new or (old, new) in WIDENINGS:
        after.check_succeeds(before)
    else:
        with pytest.raises(SchemaChangeRefused, match="feature 'a' changed from"):
            after.check_succeeds(before)


def test_only_what_keeps_every_value_is_a_widening() -> None:
    assert {("int32", "int64"), ("int32", "float64"), ("float32", "float64")} == WIDENINGS


def test_features_may_come_go_and_change_places() -> None:
    before = schema("doc", a="int32", b="string", c="bool")
    schema("doc", c="bool", d="int64", a="int64").check_succeeds(before)


@pytest.mark.parametrize(
    "keys",
    [
        [{"name": "id", "type": "int64"}],
        [{"name": "other", "type": "string"}],
        [{"name": "id", "type": "string"}, {"name": "second", "type": "string"}],
    ],
)
def test_join_keys_never_change(keys: list[dict[str, str]]) -> None:
    with pytest.raises(SchemaChangeRefused, match="join keys changed from id string to"):
        view(join_keys=keys).check_succeeds(view())


def test_the_ttl_may_change() -> None:
    view(ttl=60).check_succeeds(view())
    view().check_succeeds(view(ttl=60))


@pytest.mark.parametrize(
    ("text", "seconds"), [("1s", 1), ("90s", 90), ("15m", 900), ("12h", 43200), ("7d", 604800), ("2w", 1209600)]
)
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "1", "h", "0h", "-1h", "1.5h", "1 h", "1H", "1y", "12345678s", "1h30m", "١h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration; give a whole number and one of s, m, h, d, w"):
        parse_duration(text)


def test_the_longest_duration_is_a_duration() -> None:
    assert parse_duration("9999999w") > timedelta(days=365 * 100_000)


def test_a_member_of_feasts_message_is_in_a_document_only_where_it_is_set() -> None:
    """Versions of Shoal that do not know the member can read the documents of views that do not set it."""
    plain = Feature(name="a", type="bytes")
    message = Feature(name="b", type="bytes", feast_member="json_val")
    assert plain.model_dump() == {"name": "a", "type": "bytes"}
    assert Feature.model_validate_json(message.model_dump_json()) == message
    for wrong in ({"type": "string", "feast_member": "json_val"}, {"type": "bytes", "feast_member": "nothing"}):
        with pytest.raises(ValidationError, match="has the feast_member"):
            Feature.model_validate({"name": "c"} | wrong)
