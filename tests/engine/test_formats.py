"""The formats of an export root: what a reader ignores, what it must not ignore, and what an older reader gets."""

from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from shoal.engine.base.errors import FormatNotUnderstood, ManifestInvalid
from shoal.engine.format.schema import Feature, FeatureService, JoinKey, ViewSchema
from shoal.engine.root.manifest import (
    FORMATS,
    NEWEST_FORMAT,
    FeatureServices,
    Manifest,
    seal,
    unseal,
)
from tests import stores

VIEW = stores.schema("doc", a="int64").model_copy(update={"future": "allow"})
FILE = {"path": "a", "rows": 3, "bytes": 9, "checksum": "0" * 16, "min_key_hash": 1, "max_key_hash": 2}
SERVICES = FeatureServices(format_version=2, services=(FeatureService(name="s", features=("doc:a",)),))
MEMBERS_OF_FORMAT_1 = {
    Manifest: {
        *("format_version", "kind", "id", "seq", "parent", "view", "rows", "tombstones", "files", "watermark"),
        *("published_at", "job", "inputs", "state", "stream"),
    },
    ViewSchema: {"name", "join_keys", "features", "ttl", "timestamp_field", "push_source", "tier", "table"},
    Feature: {"name", "type"},
    JoinKey: {"name", "type"},
}
PLACES = [(), ("view",), ("view", "join_keys", 0), ("view", "features", 0), ("files", 0), ("stream",)]


def manifest(version: int) -> Manifest:
    return Manifest.model_validate(
        {
            "format_version": version,
            "kind": "delta",
            "id": "a" * 32,
            "seq": 2,
            "parent": "b" * 32,
            "view": VIEW.model_dump(),
            "rows": 3,
            "tombstones": 0,
            "files": [FILE],
            "watermark": None,
            "published_at": datetime(2026, 1, 1, tzinfo=UTC),
            "job": "tests",
            "inputs": [],
            "stream": {"query": "0" * 36, "batch": 1},
            "live_rows": 7,
            "values": {"a": 7},
        }
    )


def with_member(document: Manifest | FeatureServices, place: tuple[str | int, ...], **more: Any) -> bytes:
    """Return the sealed document with an unknown member `later` in one place, and more members at the top level."""
    content = orjson.loads(seal(document))
    del content["checksum"]
    inner = content
    for step in place:
        inner = inner[step]
    inner["later"] = {"any": ["thing"]}
    return stores.sealed(content | more)


@pytest.mark.parametrize("place", PLACES)
def test_unknown_members_are_ignored_unless_they_must_be_understood(place: tuple[str | int, ...]) -> None:
    document = manifest(2)
    assert unseal(with_member(document, place), Manifest, "it") == document
    name = ".".join(step for step in (*place, "later") if isinstance(step, str))
    others = document.model_copy(update={"must_understand": ("another",)})
    assert unseal(with_member(others, place), Manifest, "it") == others
    with pytest.raises(FormatNotUnderstood, match=f"the member '{name}'.*upgrade this node"):
        unseal(with_member(document, place, must_understand=[name]), Manifest, "it")


@pytest.mark.parametrize("place", PLACES)
def test_a_member_inside_an_unknown_one_may_have_to_be_understood(place: tuple[str | int, ...]) -> None:
    name = ".".join(step for step in (*place, "later", "any") if isinstance(step, str))
    with pytest.raises(FormatNotUnderstood, match="lists it in must_understand"):
        unseal(with_member(manifest(2), place, must_understand=[name]), Manifest, "it")
    beside = name.replace("later.any", "later_any")
    assert unseal(with_member(manifest(2), place, must_understand=[beside]), Manifest, "it").seq == 2


def test_unknown_members_of_feature_services_are_ignored_unless_they_must_be_understood() -> None:
    for place, name in (((), "later"), (("services", 0), "services.later")):
        assert unseal(with_member(SERVICES, place), FeatureServices, "it") == SERVICES
        with pytest.raises(FormatNotUnderstood, match=name):
            unseal(with_member(SERVICES, place, must_understand=[name]), FeatureServices, "it")


@pytest.mark.parametrize("place", PLACES)
def test_format_1_allows_no_unknown_members(place: tuple[str | int, ...]) -> None:
    with pytest.raises(ManifestInvalid, match="later: Extra inputs"):
        unseal(with_member(manifest(1), place), Manifest, "it")


def test_a_known_member_is_still_checked_beside_an_unknown_one() -> None:
    with pytest.raises(ManifestInvalid, match="seq"):
        unseal(with_member(manifest(2), (), seq=0), Manifest, "it")
    with pytest.raises(ManifestInvalid, match="its files hold 3 rows, but it claims 4"):
        unseal(with_member(manifest(2), (), rows=4), Manifest, "it")


@pytest.mark.parametrize("needed", ["later", 5, None, {"later": 1}])
def test_a_list_of_what_must_be_understood_that_is_no_list_is_refused(needed: Any) -> None:
    with pytest.raises(ManifestInvalid):
        unseal(with_member(manifest(2), (), must_understand=needed), Manifest, "it")


@pytest.mark.parametrize("version", [NEWEST_FORMAT + 1, 99, 2**63])
def test_a_newer_format_is_refused_with_what_to_do(version: int) -> None:
    told = f"has format {version}.*reads formats 1 to 2; upgrade this node"
    with pytest.raises(FormatNotUnderstood, match=told):
        unseal(with_member(manifest(2), (), format_version=version), Manifest, "it")
    with pytest.raises(FormatNotUnderstood, match=told):
        unseal(with_member(SERVICES, (), format_version=version), FeatureServices, "it")


def test_a_document_of_format_1_has_only_members_of_format_1() -> None:
    content = orjson.loads(seal(manifest(1)))
    assert content.keys() - {"checksum"} <= MEMBERS_OF_FORMAT_1[Manifest]
    assert content["view"].keys() <= MEMBERS_OF_FORMAT_1[ViewSchema]
    assert content["view"]["features"][0].keys() <= MEMBERS_OF_FORMAT_1[Feature]
    assert content["view"]["join_keys"][0].keys() <= MEMBERS_OF_FORMAT_1[JoinKey]
    read = unseal(seal(manifest(1)), Manifest, "it")
    assert (read.live_rows, read.values, read.view.future) == (None, None, "refuse")


@pytest.mark.parametrize("version", FORMATS)
def test_a_document_survives_sealing_in_its_format(version: int) -> None:
    document = unseal(seal(manifest(version)), Manifest, "it")
    assert document.format_version == version
    assert unseal(seal(document), Manifest, "it") == document
    assert (document.live_rows == 7) == (version == 2)
