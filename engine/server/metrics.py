"""The server's metrics for Prometheus.

The workers share files with their counters and histograms (prometheus_client's multiprocess mode), so any worker can
answer with the sums for all workers. Metrics of the store are read from its newest version at each request. The
directory of the shared files must be in the environment variable PROMETHEUS_MULTIPROC_DIR before this module is first
imported.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from shoal.engine.format.catalog import ViewRecord
from shoal.engine.kernels.gathering import Status
from shoal.engine.lookup.result import LookupResult, MatrixResult
from shoal.engine.root.manifest import NEWEST_FORMAT
from shoal.engine.server.metrics_files import MetricsFiles
from shoal.engine.status.live import describe_live
from shoal.engine.status.replication import ReplicationStatus, lag_of, read_replication
from shoal.engine.status.scrubbed import describe_scrub
from shoal.engine.status.store import freshness_seconds
from shoal.engine.store.version import StoreVersion

if TYPE_CHECKING:
    from shoal.engine.dynamodb.tier import FetchCounts

_BUCKETS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 4.0, 16.0)

_VIEW_GAUGES: tuple[tuple[str, str, Callable[[ViewRecord], float | None]], ...] = (
    ("shoal_view_applied_seq", "Last applied entry of the view's log", lambda view: view.applied_seq),
    ("shoal_view_freshness_seconds", "Age of the newest applied event", lambda view: freshness_seconds(view.watermark)),
    (
        "shoal_view_apply_age_seconds",
        "Seconds since an entry was last applied",
        lambda view: (datetime.now(UTC) - view.applied_at).total_seconds(),
    ),
    (
        "shoal_view_rows",
        "Rows stored, in the base and in overlays",
        lambda view: sum(segment.rows for segment in (view.base, *view.overlays)),
    ),
    (
        "shoal_view_bytes",
        "Bytes stored, in the base and in overlays",
        lambda view: sum(segment.bytes for segment in (view.base, *view.overlays)),
    ),
    ("shoal_view_overlays", "Overlays over the base", lambda view: len(view.overlays)),
    ("shoal_view_pinned", "1 if the view is pinned to its base", lambda view: view.pinned),
)


def _counter(name: str, documentation: str, *labels: str) -> Counter:
    return Counter(name, documentation, labels, registry=None)


def _gauge(name: str, documentation: str) -> Gauge:
    return Gauge(name, documentation, multiprocess_mode="liveall", registry=None)


def _histogram(name: str, documentation: str, *labels: str) -> Histogram:
    return Histogram(name, documentation, labels, buckets=_BUCKETS, registry=None)


class Metrics:
    """The counters of this worker, and the exposition of all metrics."""

    def __init__(self, store: Path, files: MetricsFiles) -> None:
        self._store = store
        self._files = files
        duration = "Seconds from a request's head, or a gRPC request's message, until its answer is ready to send"
        self._requests = _histogram("shoal_request_duration_seconds", duration, "endpoint", "status")
        self._keys = _counter("shoal_lookup_keys", "Keys looked up")
        self._values = _counter("shoal_lookup_values", "Values in answers", "view", "status")
        self._version = _gauge("shoal_worker_version", "Store version that a worker answers from")
        pushed = "Rows pushed and written, or superseded by a newer row of the store"
        self._pushes = _counter("shoal_pushed_rows", pushed, "view", "outcome")
        shed = "Requests rejected, and connections closed, because of overload or a slow client"
        self._shed = _counter("shoal_requests_shed", shed, "reason")
        late = "Seconds by which a worker's event loop was late, measured once a second"
        self._lag = _gauge("shoal_worker_lag_seconds", late)
        self._connections = _gauge("shoal_worker_connections", "HTTP connections of a worker")
        fetched = (
            "Distinct keys of views in tables, by the source of their rows; unavailable if they did not come in time"
        )
        self._fetched = _counter("shoal_remote_keys", fetched, "view", "outcome")
        requests = "Requests to tables: first requests, and hedges sent because the first was slow"
        self._fetch_requests = _counter("shoal_remote_requests", requests, "view", "kind")
        waited = "Seconds that a request waited for rows from tables"
        self._fetch_seconds = _histogram("shoal_remote_duration_seconds", waited, "view")
        partial = "Answers without some rows of a view, because they did not arrive in time"
        self._partial = _counter("shoal_partial_answers", partial, "view")
        self._pushed = cache(self._pushes.labels)
        self._answered = cache(self._requests.labels)
        self._valued = cache(self._values.labels)
        # Open the histograms' file now, so that it exists when the first answer is counted.
        self._answered("/health", 200)

    def count_request(self, endpoint: str, status: int | str, seconds: float) -> None:
        """Count one answered request, and its duration."""
        self._answered(endpoint, status).observe(seconds)

    def count_lookup(self, result: LookupResult | MatrixResult) -> None:
        """Count one answered lookup: its keys, and its values by view and status."""
        self._keys.inc(result.keys)
        for view, by_status in result.value_counts.items():
            counts = by_status.tolist()
            for status in Status:
                if counts[status]:
                    self._valued(view, status.name).inc(counts[status])

    def count_fetch(self, counts: "FetchCounts") -> None:
        """Count one fetch of a view's rows from its table."""
        for outcome in ("cached", "fetched", "absent", "unavailable"):
            if number := getattr(counts, outcome):
                self._fetched.labels(counts.view, outcome).inc(number)
        self._fetch_requests.labels(counts.view, "first").inc(counts.requests - counts.hedges)
        if counts.hedges:
            self._fetch_requests.labels(counts.view, "hedge").inc(counts.hedges)
        self._fetch_seconds.labels(counts.view).observe(counts.seconds)

    def count_partial(self, views: Sequence[str]) -> None:
        """Count one answer without some rows of these views."""
        for view in views:
            self._partial.labels(view).inc()

    def count_push(self, view: str, rows: int, superseded: int) -> None:
        """Count the rows of one answered push."""
        self._pushed(view, "superseded").inc(superseded)
        self._pushed(view, "written").inc(rows - superseded)

    def count_shed(self, reason: str, count: int = 1) -> None:
        """Count rejected requests, or closed connections."""
        self._shed.labels(reason).inc(count)

    def set_load(self, lag: float, connections: int) -> None:
        """Set this worker's event loop lag in seconds, and its number of connections."""
        self._lag.set(lag)
        self._connections.set(connections)

    def set_version(self, version: StoreVersion | None) -> None:
        """Set the store version that this worker answers from."""
        self._version.set(version.id if version else 0)

    def mend_files(self) -> None:
        """Create the files of counters again if they were removed."""
        self._files.mend()

    def exposition(self, version: StoreVersion | None, accept: str) -> tuple[bytes, str]:
        """Return all workers' metrics in the format that an Accept header prefers, and the content type of this
        format."""
        registry = CollectorRegistry()
        if self._files.directory.is_dir():
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        registry.register(_StoreCollector(self._store, version))
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type


class _StoreCollector:
    """The gauges of one version of the store."""

    def __init__(self, store: Path, version: StoreVersion | None) -> None:
        self._store = store
        self._version = version

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        version = self._version
        yield GaugeMetricFamily("shoal_root_format_readable", "Newest export root format that it reads", NEWEST_FORMAT)
        yield GaugeMetricFamily("shoal_store_version", "Newest store version", version.id if version else 0)
        if version is None:
            return
        if version.shard is not None:
            shard = GaugeMetricFamily("shoal_shard_info", "The store's shard, as labels", labels=["shard", "shards"])
            shard.add_metric([str(version.shard.number), str(version.shard.count)], 1)
            yield shard
        live = describe_live(self._store)
        behind = live["oldest_reader"]["versions_behind"] if live["oldest_reader"] else 0
        yield GaugeMetricFamily("shoal_live_bytes", "Size of the live environment's file", live["bytes"])
        free = live["disk_free_bytes"]
        yield GaugeMetricFamily("shoal_disk_free_bytes", "Free bytes on the store's disk", free)
        yield GaugeMetricFamily("shoal_oldest_reader_versions", "Versions that the oldest reader is behind", behind)
        for name, documentation, measure in _VIEW_GAUGES:
            family = GaugeMetricFamily(name, documentation, labels=["view"])
            for view, content in version.views.items():
                value = measure(content.record)
                if value is not None:
                    family.add_metric([view], value)
            yield family
        trouble = GaugeMetricFamily("shoal_view_trouble", "1 if an error stops the view's updates", labels=["view"])
        damaged = GaugeMetricFamily("shoal_view_damaged", "1 if the view's data cannot be read", labels=["view"])
        for view in version.names:
            trouble.add_metric([view], view in version.troubles)
            damaged.add_metric([view], version.is_damaged(view))
        kept = GaugeMetricFamily(
            "shoal_view_kept_damaged", "Damaged kept generations, to which no rollback is possible", labels=["view"]
        )
        for view in version.views:
            kept.add_metric([view], len(version.damaged_kept(view)))
        yield from (trouble, damaged, kept)
        scrub = describe_scrub(self._store)
        if scrub is not None:
            yield from _scrub_metrics(scrub)
        standing = read_replication(self._store)
        if standing is not None:
            yield from _standing_gauges(standing, version)


def _scrub_metrics(scrub: dict[str, Any]) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    """Yield the metrics of the writer's scrub."""
    if scrub["age_seconds"] is not None:
        yield GaugeMetricFamily(
            "shoal_scrub_age_seconds",
            "Seconds since the least recently verified chunk was verified",
            scrub["age_seconds"],
        )
    period = "Seconds within which each checksum is verified again"
    suspect = "Chunks not verified yet since an unclean shutdown"
    yield GaugeMetricFamily("shoal_scrub_period_seconds", period, scrub["period_seconds"])
    yield GaugeMetricFamily("shoal_scrub_suspect_chunks", suspect, scrub["suspect_chunks"])
    yield CounterMetricFamily("shoal_scrub_bytes", "Bytes whose checksums were verified", scrub["bytes_verified"])
    yield CounterMetricFamily("shoal_scrub_damaged_chunks", "Chunks found damaged", scrub["damaged_chunks"])


def _standing_gauges(standing: ReplicationStatus, version: StoreVersion) -> Iterator[GaugeMetricFamily]:
    """Yield the replication lag behind the export root, as the writer last saw it."""
    now = datetime.now(UTC)
    if standing.seen_at is not None:
        unseen = (now - standing.seen_at).total_seconds()
        yield GaugeMetricFamily("shoal_root_unseen_seconds", "Seconds since the export root was last read", unseen)
    entries = GaugeMetricFamily("shoal_view_lag_entries", "Entries of the root that are not applied", labels=["view"])
    seconds = GaugeMetricFamily(
        "shoal_view_lag_seconds", "Seconds since the oldest entry that is not applied was published", labels=["view"]
    )
    held = GaugeMetricFamily("shoal_view_held", "1 if no replica can apply the view's next entry", labels=["view"])
    for name, view in standing.views.items():
        lag = lag_of(view, version.applied_seq(name), now)
        entries.add_metric([name], lag.entries)
        seconds.add_metric([name], lag.seconds)
        held.add_metric([name], view.held_by is not None)
    yield from (entries, seconds, held)
