"""What a store holds and who serves it, as plain data: for `GET /v1/status`, `shoal status` and the metrics."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import psutil

from engine.catalog import SegmentRecord, ViewRecord
from engine.version import StoreVersion

SERVER_FILE = "server.json"


def store_status(version: StoreVersion, now: datetime) -> dict[str, Any]:
    """The views of a version: what they are made of, where they stand and how fresh they are."""
    return {
        "version": version.id,
        "root": version.store.root,
        "views": {name: _view_status(view.record, now) for name, view in sorted(version.views.items())},
        "services": sorted(version.services),
        "troubles": {
            view: {"code": trouble.code, "message": trouble.message, "since": _iso(trouble.since)}
            for view, trouble in sorted(version.troubles.items())
        },
    }


def _view_status(record: ViewRecord, now: datetime) -> dict[str, Any]:
    segments = (record.base, *record.overlays)
    return {
        "applied_seq": record.applied_seq,
        "pinned": record.pinned,
        "published_at": _iso(record.published_at),
        "applied_at": _iso(record.applied_at),
        "watermark": _iso(record.watermark),
        "freshness_seconds": _seconds(now, record.watermark),
        "lag_seconds": _seconds(record.applied_at, record.published_at),
        "rows": record.base.rows,
        "overlay_rows": sum(overlay.rows + overlay.tombstones for overlay in record.overlays),
        "bytes": sum(segment.bytes for segment in segments),
        "base": _segment_status(record.base),
        "overlays": [_segment_status(overlay) for overlay in record.overlays],
        "kept": [_segment_status(base) for base in record.kept],
    }


def _segment_status(record: SegmentRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "first_seq": record.first_seq,
        "last_seq": record.last_seq,
        "rows": record.rows,
        "tombstones": record.tombstones,
        "bytes": record.bytes,
    }


def server_status(store: Path) -> dict[str, Any] | None:
    """The processes that serve a store on this machine, with their memory in bytes; None if none do.

    PSS, the proportional set size, counts a page that n processes share as 1/n: the sum over workers is what they take.
    """
    try:
        document = orjson.loads((store / "run" / SERVER_FILE).read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None
    supervisor = _process("supervisor", document["pid"])
    if supervisor is None:
        return None
    children = [("writer", document.get("writer")), *(("worker", pid) for pid in document.get("workers", ()))]
    processes = [supervisor, *(_process(role, pid) for role, pid in children if pid)]
    return {"address": document.get("address"), "processes": [process for process in processes if process]}


def _process(role: str, pid: int) -> dict[str, Any] | None:
    try:
        process = psutil.Process(pid)
        memory = process.memory_full_info()
        uptime = (datetime.now(UTC) - datetime.fromtimestamp(process.create_time(), UTC)).total_seconds()
    except psutil.Error:
        return None
    return {"role": role, "pid": pid, "rss": memory.rss, "pss": memory.pss, "uptime_seconds": round(uptime, 1)}


def _iso(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z") if moment else None


def _seconds(later: datetime, earlier: datetime | None) -> float | None:
    return round((later - earlier) / timedelta(seconds=1), 3) if earlier else None
