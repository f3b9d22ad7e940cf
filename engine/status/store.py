"""The content and the freshness of a store's version, as plain documents: for /v1/views, /v1/status and the CLI."""

from datetime import UTC, datetime
from typing import Any

from shoal.engine.format.catalog import SegmentRecord, ViewRecord
from shoal.engine.format.schema import ViewSchema
from shoal.engine.root.manifest import FORMATS
from shoal.engine.status.replication import ReplicationStatus, lag_of
from shoal.engine.store.version import StoreVersion


def describe_views(version: StoreVersion) -> dict[str, Any]:
    """Return the schemas of all views, and the feature services."""
    schemas = [version.views[name].record.view_schema for name in sorted(version.views)]
    return {
        "version": version.id,
        "shard": version.store.shard,
        "views": [
            {
                "name": schema.name,
                "timestamp_field": schema.timestamp_field,
                "join_keys": [key.model_dump() for key in schema.join_keys],
                "features": [feature.model_dump() for feature in schema.features],
                "ttl_seconds": schema.ttl.total_seconds() if schema.ttl else None,
                "tier": schema.tier,
                "table": _table(schema),
            }
            for schema in schemas
        ],
        "services": [service.model_dump() for _, service in sorted(version.services.items())],
    }


def describe_version(version: StoreVersion, standing: ReplicationStatus | None = None) -> dict[str, Any]:
    """Return the state of each view, with its lag behind the export root if a server knows the lag. For a view that was
    never loaded, or that cannot be read, the state has only the trouble and the damage.

    `rows` and `bytes` count stored rows: a key has one stored row in the base, and one in each overlay that changed the
    key. `lag_entries` and `lag_seconds` equal the metrics of the same names; they are None if no server follows a root.
    `in_root` is False if the root had the view and no longer has it. `held_by` is the error of an entry that no replica
    can apply. `apply_seconds` is the time in seconds from the newest entry's publication until it was applied.
    """
    names = sorted({*version.names, *(standing.views if standing is not None else ())})
    return {
        "version": version.id,
        "root": version.store.root,
        "root_formats": list(FORMATS),
        "shard": version.store.shard,
        "views": [_describe_view(name, version) | _lag(name, version, standing) for name in names],
    }


def freshness_seconds(watermark: datetime | None) -> float | None:
    """Return the age in seconds of the newest event that a view has seen; 0 if that event is in the future."""
    return max(0.0, (datetime.now(UTC) - watermark).total_seconds()) if watermark else None


def _describe_view(name: str, version: StoreVersion) -> dict[str, Any]:
    view = version.views.get(name)
    damage = version.damaged.get(name)
    trouble = version.troubles.get(name)
    document: dict[str, Any] = {
        "name": name,
        "trouble": trouble.model_dump(mode="json") if trouble else None,
        "damage": damage.message if damage else None,
        "damaged_kept": [note.model_dump(mode="json", exclude={"created_at"}) for note in version.damaged_kept(name)],
    }
    if view is None:
        return document
    record = view.record
    segments = (record.base, *record.overlays)
    return document | {
        "tier": record.view_schema.tier,
        "table": _table(record.view_schema),
        "base": _describe_segment(record.base),
        "overlays": [_describe_segment(overlay) for overlay in record.overlays],
        "kept": [kept.id for kept in record.kept],
        "rows": sum(segment.rows for segment in segments),
        "bytes": sum(segment.bytes for segment in segments),
        "applied_seq": record.applied_seq,
        "watermark": _instant(record.watermark),
        "low_watermark": describe_low_watermark(record),
        "freshness_seconds": freshness_seconds(record.watermark),
        "apply_seconds": (record.applied_at - record.published_at).total_seconds(),
        "published_at": _instant(record.published_at),
        "applied_at": _instant(record.applied_at),
        "pinned": record.pinned,
    }


def describe_low_watermark(record: ViewRecord) -> dict[str, Any] | None:
    """Return the low watermark of a view and the log entry that set it; None if the view has no low watermark."""
    found = record.low_watermark
    return {"at": _instant(found.at), "set_by": found.set_by.model_dump()} if found is not None else None


def _lag(name: str, version: StoreVersion, standing: ReplicationStatus | None) -> dict[str, Any]:
    """Return a view's lag behind the export root, as members of its status document."""
    view = standing.views.get(name) if standing is not None else None
    if view is None:
        in_root = None if standing is None or standing.seen_at is None or not version.applied_seq(name) else False
        return {"lag_entries": None, "lag_seconds": None, "held_by": None, "in_root": in_root}
    lag = lag_of(view, version.applied_seq(name), datetime.now(UTC))
    return {"lag_entries": lag.entries, "lag_seconds": lag.seconds, "held_by": view.held_by, "in_root": True}


def _table(schema: ViewSchema) -> str | None:
    return schema.table_name if schema.is_remote else None


def _describe_segment(segment: SegmentRecord) -> dict[str, Any]:
    return {
        "id": segment.id,
        "first_seq": segment.first_seq,
        "last_seq": segment.last_seq,
        "rows": segment.rows,
        "tombstones": segment.tombstones,
        "bytes": segment.bytes,
        "created_at": _instant(segment.created_at),
    }


def _instant(moment: datetime | None) -> str | None:
    return moment.isoformat().replace("+00:00", "Z") if moment else None
