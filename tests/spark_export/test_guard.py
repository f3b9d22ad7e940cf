"""The removal limits, and the row and value counts that a log gives, without Spark."""

import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest

from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import FormatVersion, Manifest, PublishedFile
from shoal.spark_export.changes.guard import Comparison, Numbers, compare, published_numbers
from tests import stores

VIEW = stores.schema("doc", key="int64", a="int64", b="float64")


def lost(
    had: int, left: int, removed: int | None, limit: float | None = None
) -> list[tuple[str | None, int, int, float | None]]:
    """Return the losses of a view without feature values."""
    gone = None if removed is None else Numbers(removed, {})
    return told(compare(Numbers(had, {}), Numbers(left, {}), gone, limit))


def told(comparison: Comparison) -> list[tuple[str | None, int, int, float | None]]:
    assert all(loss.share == loss.lost / loss.had for loss in comparison.losses)
    return [(loss.feature, loss.had, loss.lost, loss.limit) for loss in comparison.losses]


@pytest.mark.parametrize(
    ("had", "left", "removed", "limit", "is_refused"),
    [
        (1000, 800, 200, None, False),
        (1000, 799, 201, None, True),
        (1000, 800, None, None, False),
        (1000, 799, None, None, True),
        (10**9, 8 * 10**8 - 1, 2 * 10**8 + 1, None, True),
        # New rows do not compensate for removed rows if the number of removed rows is known.
        (1000, 1000, 1000, None, True),
        (1000, 1000, None, None, False),
        (999, 1, 998, None, False),
        (999, 0, 999, None, True),
        (999, 999, 999, None, True),
        (999, 0, None, None, True),
        (1, 0, 1, None, True),
        (0, 0, 0, None, False),
        (0, 5, None, None, False),
        (5, 50, None, None, False),
        (4, 2, 2, 0.5, False),
        (4, 1, 3, 0.5, True),
        (4, 3, 1, 0.0, True),
        (4, 4, 0, 0.0, False),
        (5000, 0, 5000, 1.0, False),
        (5000, 3999, 1001, 0.3, False),
        # 0.29 * 100 is less than 29 in doubles, but a loss equal to the limit is allowed.
        (100, 71, 29, 0.29, False),
        (100, 70, 30, 0.29, True),
    ],
)
def test_rows(had: int, left: int, removed: int | None, limit: float | None, is_refused: bool) -> None:
    share = limit if limit is not None else 0.2 if had >= 1000 else None
    gone = removed if removed is not None else max(0, had - left)
    assert lost(had, left, removed, limit) == ([(None, had, gone, share)] if is_refused else [])


@pytest.mark.parametrize(
    ("had", "left", "explained", "limit", "lost"),
    [
        (2000, 0, 0, None, 2000),
        (2000, 1600, 0, None, None),
        (2000, 1599, 0, None, 401),
        # The values of removed rows do not count as lost.
        (2000, 1200, 400, None, None),
        (2000, 1199, 400, None, 401),
        (2000, 0, 2000, None, None),
        (999, 1, 0, None, None),
        (999, 0, 0, None, 999),
        (999, 0, 998, None, 1),
        (999, 0, 999, None, None),
        (0, 0, 0, None, None),
        (0, 7, 0, None, None),
        (10, 8, 0, 0.1, 2),
        (10, 9, 0, 0.1, None),
        (10, 0, 0, 1.0, None),
    ],
)
def test_values_of_a_feature(had: int, left: int, explained: int, limit: float | None, lost: int | None) -> None:
    rows = 9 * had
    before = Numbers(rows, {"a": had, "b": 50})
    after = Numbers(rows, {"a": left, "b": 50})
    share = limit if limit is not None else 0.2 if had >= 1000 else None
    expected = [("a", had, lost, share)] if lost is not None else []
    assert told(compare(before, after, Numbers(0, {"a": explained, "b": 0}), limit)) == expected


@pytest.mark.parametrize(("had", "is_refused"), [(99, False), (100, True), (3, False)])
@pytest.mark.parametrize("limit", [None, 0.2])
def test_a_feature_that_few_rows_have_may_come_and_go(had: int, is_refused: bool, limit: float | None) -> None:
    before = Numbers(1000, {"a": had})
    after = Numbers(1000, {"a": 0})
    expected = [("a", had, had, limit)] if is_refused else []
    assert told(compare(before, after, Numbers(0, {"a": 0}), limit)) == expected


def test_a_feature_that_many_rows_have_is_compared_though_they_are_a_small_share() -> None:
    before = Numbers(10**6, {"a": 1000})
    after = Numbers(10**6, {"a": 0})
    assert told(compare(before, after, None, None)) == [("a", 1000, 1000, 0.2)]


def test_without_a_state_removed_rows_are_taken_to_have_had_values_like_others() -> None:
    before = Numbers(2000, {"a": 2000, "b": 1000})
    assert told(compare(before, Numbers(1700, {"a": 1700, "b": 850}), None, None)) == []
    assert told(compare(before, Numbers(1700, {"a": 1300, "b": 649}), None, None)) == [("b", 1000, 201, 0.2)]
    assert told(compare(before, Numbers(1700, {"a": 0, "b": 850}), None, None)) == [("a", 2000, 1700, 0.2)]
    # If all rows are gone, losses of features are not reported.
    assert told(compare(before, Numbers(0, {"a": 0, "b": 0}), None, None)) == [(None, 2000, 2000, 0.2)]


def test_only_features_that_the_view_had_and_still_has_are_compared() -> None:
    before = Numbers(5, {"a": 5, "removed": 5})
    after = Numbers(5, {"a": 5, "added": 0})
    assert compare(before, after, None, None) == Comparison()


def test_losses_are_told_worst_first_and_rows_before_features() -> None:
    before = Numbers(2000, {"a": 2000, "b": 2000, "c": 2000})
    found = compare(before, Numbers(1500, {"a": 1000, "b": 0, "c": 1500}), None, None)
    assert [str(loss) for loss in found.losses] == [
        "500 of 2,000 rows would be removed (25%; limit: 20%)",
        "1,500 of 2,000 values of feature 'b' would be lost (75%; limit: 20%)",
        "500 of 2,000 values of feature 'a' would be lost (25%; limit: 20%)",
    ]
    (small,) = compare(Numbers(3, {}), Numbers(0, {}), None, None).losses
    assert str(small) == "3 of 3 rows would be removed (100%; limit: below 100%)"


def test_what_nobody_counted_is_not_compared_and_told() -> None:
    after = Numbers(0, {"a": 0})
    assert compare(None, after, None, None) == Comparison((), ("rows", "values"))
    only_rows = compare(Numbers(2000, None), after, None, None)
    assert (told(only_rows), only_rows.not_compared) == ([(None, 2000, 2000, 0.2)], ("values",))


def publish(
    root: ExportRoot, kind: Literal["snapshot", "delta"], rows: int, tombstones: int = 0, **numbers: Any
) -> Manifest:
    """Publish an entry as the newest one. Its data file does not exist, because nothing reads it."""
    seqs = root.sequence_numbers(VIEW.name)
    file: dict[str, Any] = {"path": "part-0.parquet", "rows": rows + tombstones, "bytes": 1, "checksum": "0" * 16}
    manifest = Manifest(
        format_version=root.write_format,
        kind=kind,
        id=uuid.uuid4().hex,
        seq=len(seqs) + 1,
        parent=root.entry(VIEW.name, seqs[-1]).id if seqs else None,
        view=VIEW,
        rows=rows,
        tombstones=tombstones,
        files=(PublishedFile(min_key_hash=0, max_key_hash=0, **file),),
        watermark=None,
        published_at=datetime.now(UTC),
        job="tests",
        inputs=(),
        **numbers,
    )
    root.publish(manifest)
    return root.entry(VIEW.name, manifest.seq)


@pytest.mark.parametrize("write_format", [1, 2])
def test_a_log_tells_at_least_how_many_rows_a_view_has(tmp_path: Path, write_format: FormatVersion) -> None:
    root = ExportRoot(tmp_path, write_format=write_format)
    newest = publish(root, "snapshot", 100, live_rows=100, values={"a": 90, "b": 3})
    values = {"a": 90, "b": 3} if write_format == 2 else None
    assert published_numbers(root, newest) == Numbers(100, values)
    # A row of a delta may be new or not, and may have a value or not.
    newest = publish(root, "delta", 7, 2)
    assert published_numbers(root, newest) == Numbers(98, {"a": 81, "b": 0} if values else None)
    newest = publish(root, "delta", 5)
    assert published_numbers(root, newest) == Numbers(98, {"a": 76, "b": 0} if values else None)
    newest = publish(root, "delta", 0, 30, live_rows=70, values={"a": 60, "b": 1})
    expected = Numbers(70, {"a": 60, "b": 1}) if values else Numbers(68, None)
    assert published_numbers(root, newest) == expected
    newest = publish(root, "snapshot", 20)
    assert published_numbers(root, newest) == Numbers(20, None)


def test_a_log_whose_beginning_is_gone_or_damaged_tells_nothing(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path)
    publish(root, "snapshot", 100)
    newest = publish(root, "delta", 7)
    manifest = tmp_path / VIEW.name / "deltas" / f"{1:012d}" / "manifest.json"
    manifest.write_text("{}")
    assert published_numbers(root, newest) is None
    manifest.unlink()
    assert published_numbers(root, newest) is None
