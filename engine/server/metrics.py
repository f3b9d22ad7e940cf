"""What the server tells Prometheus.

Counters and histograms of all workers add up, in files that they share (prometheus_client's multiprocess mode), so that
any worker answers for all. What concerns the store is read from its newest version when asked. The directory of those
files must be in the environment as PROMETHEUS_MULTIPROC_DIR before this module is first imported.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from engine.catalog import ViewRecord
from engine.kernels.gathering import Status
from engine.live_status import describe_live
from engine.manifest import NEWEST_FORMAT
from engine.result import LookupResult, MatrixResult
from engine.scrubbed import describe_scrub
from engine.server.metrics_files import MetricsFiles
from engine.standing import Standing, lag_of, read_standing
from engine.status import freshness_seconds
from engine.version import StoreVersion

if TYPE_CHECKING:
    from engine.dynamodb.tier import FetchCounts

_BUCKETS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 4.0, 16.0)

_VIEW_GAUGES: tuple[tuple[str, str, Callable[[ViewRecord], float | None]], ...] = (
    ("shoal_view_applied_seq", "Last entry of the view's log that is applied", lambda view: view.applied_seq),
    ("shoal_view_freshness_seconds", "Age of the newest event applied", lambda view: freshness_seconds(view.watermark)),
    (
        "shoal_view_apply_age_seconds",
        "Time since an entry was applied",
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
    ("shoal_view_pinned", "1 if the view was told to stay at its base", lambda view: view.pinned),
)


class Metrics:
    """The counters of this worker, and the exposition of all."""

    def __init__(self, store: Path, files: MetricsFiles) -> None:
        self._store = store
        self._files = files
        self._requests = Histogram(
            "shoal_request_duration_seconds",
            "Time from a request's head, or a gRPC request's message, to its answer, without sending that",
            ["endpoint", "status"],
            buckets=_BUCKETS,
            registry=None,
        )
        self._keys = Counter("shoal_lookup_keys", "Keys looked up", registry=None)
        self._values = Counter("shoal_lookup_values", "Values answered", ["view", "status"], registry=None)
        self._version = Gauge(
            "shoal_worker_version",
            "Store version that a worker would answer from",
            multiprocess_mode="liveall",
            registry=None,
        )
        self._pushes = Counter(
            "shoal_pushed_rows",
            "Rows pushed and written, or superseded by a newer row of the store",
            ["view", "outcome"],
            registry=None,
        )
        self._shed = Counter(
            "shoal_requests_shed",
            "Requests refused, and connections ended, because there was too much to do or the client too slow",
            ["reason"],
            registry=None,
        )
        self._lag = Gauge(
            "shoal_worker_lag_seconds",
            "How late a worker's event loop came to what was due, looked at once a second",
            multiprocess_mode="liveall",
            registry=None,
        )
        self._connections = Gauge(
            "shoal_worker_connections", "HTTP connections of a worker", multiprocess_mode="liveall", registry=None
        )
        self._fetched = Counter(
            "shoal_remote_keys",
            "Distinct keys of views that are kept in tables, by where their rows came from, if they came in time",
            ["view", "outcome"],
            registry=None,
        )
        self._fetch_requests = Counter(
            "shoal_remote_requests",
            "Requests to tables, and those sent once more as a hedge",
            ["view", "kind"],
            registry=None,
        )
        self._fetch_seconds = Histogram(
            "shoal_remote_duration_seconds",
            "Time that a request waited for rows from tables",
            ["view"],
            buckets=_BUCKETS,
            registry=None,
        )
        self._partial = Counter(
            "shoal_partial_answers",
            "Answers that lack rows of a view which did not come in time",
            ["view"],
            registry=None,
        )
        self._pushed = cache(self._pushes.labels)
        self._answered = cache(self._requests.labels)
        self._valued = cache(self._values.labels)
        # Opens the file of the histograms now: it is not to be missing when an answer is counted.
        self._answered("/health", 200)

    def count_request(self, endpoint: str, status: int | str, seconds: float) -> None:
        """One request was answered."""
        self._answered(endpoint, status).observe(seconds)

    def count_lookup(self, result: LookupResult | MatrixResult) -> None:
        """One lookup was answered."""
        self._keys.inc(result.keys)
        for view, by_status in result.value_counts.items():
            counts = by_status.tolist()
            for status in Status:
                if counts[status]:
                    self._valued(view, status.name).inc(counts[status])

    def count_fetch(self, counts: "FetchCounts") -> None:
        """Rows of a view were fetched for a request."""
        for outcome in ("cached", "fetched", "absent", "unavailable"):
            if number := getattr(counts, outcome):
                self._fetched.labels(counts.view, outcome).inc(number)
        self._fetch_requests.labels(counts.view, "first").inc(counts.requests - counts.hedges)
        if counts.hedges:
            self._fetch_requests.labels(counts.view, "hedge").inc(counts.hedges)
        self._fetch_seconds.labels(counts.view).observe(counts.seconds)

    def count_partial(self, views: Sequence[str]) -> None:
        """An answer lacks rows of some views."""
        for view in views:
            self._partial.labels(view).inc()

    def count_push(self, view: str, rows: int, superseded: int) -> None:
        """One push was answered."""
        self._pushed(view, "superseded").inc(superseded)
        self._pushed(view, "written").inc(rows - superseded)

    def count_shed(self, reason: str, count: int = 1) -> None:
        """Requests were refused, or connections ended."""
        self._shed.labels(reason).inc(count)

    def set_load(self, lag: float, connections: int) -> None:
        """How this worker fares."""
        self._lag.set(lag)
        self._connections.set(connections)

    def set_version(self, version: StoreVersion | None) -> None:
        """This worker is at a version."""
        self._version.set(version.id if version else 0)

    def mend_files(self) -> None:
        """Create the files of counters again if they were removed."""
        self._files.mend()

    def exposition(self, version: StoreVersion | None, accept: str) -> tuple[bytes, str]:
        """All workers' metrics in the format that an Accept header prefers, and its content type."""
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
        yield GaugeMetricFamily("shoal_root_format_readable", "Newest format of an export root it reads", NEWEST_FORMAT)
        yield GaugeMetricFamily("shoal_store_version", "Newest store version", version.id if version else 0)
        if version is None:
            return
        if version.shard is not None:
            shard = GaugeMetricFamily("shoal_shard_info", "Which shard the store holds", labels=["shard", "shards"])
            shard.add_metric([str(version.shard.number), str(version.shard.count)], 1)
            yield shard
        live = describe_live(self._store)
        behind = live["oldest_reader"]["versions_behind"] if live["oldest_reader"] else 0
        yield GaugeMetricFamily("shoal_live_bytes", "Size of the live environment's file", live["bytes"])
        free = live["disk_free_bytes"]
        yield GaugeMetricFamily("shoal_disk_free_bytes", "What is free of the disk that the store is on", free)
        yield GaugeMetricFamily("shoal_oldest_reader_versions", "How far behind the oldest reader is", behind)
        for name, documentation, measure in _VIEW_GAUGES:
            family = GaugeMetricFamily(name, documentation, labels=["view"])
            for view, content in version.views.items():
                value = measure(content.record)
                if value is not None:
                    family.add_metric([view], value)
            yield family
        trouble = GaugeMetricFamily("shoal_view_trouble", "1 if the view does not move on", labels=["view"])
        damaged = GaugeMetricFamily("shoal_view_damaged", "1 if the view's data cannot be read", labels=["view"])
        for view in version.names:
            trouble.add_metric([view], view in version.troubles)
            damaged.add_metric([view], version.is_damaged(view))
        kept = GaugeMetricFamily(
            "shoal_view_kept_damaged", "Kept generations that are damaged, to which nobody can go back", labels=["view"]
        )
        for view in version.views:
            kept.add_metric([view], len(version.damaged_kept(view)))
        yield from (trouble, damaged, kept)
        scrub = describe_scrub(self._store)
        if scrub is not None:
            yield from _scrub_metrics(scrub)
        standing = read_standing(self._store)
        if standing is not None:
            yield from _standing_gauges(standing, version)


def _scrub_metrics(scrub: dict[str, Any]) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    """How far the writer has come with verifying checksums."""
    if scrub["age_seconds"] is not None:
        yield GaugeMetricFamily(
            "shoal_scrub_age_seconds",
            "Since the checksum was verified of the chunk that waits for it longest",
            scrub["age_seconds"],
        )
    period = "Within how long each checksum is to be verified again"
    suspect = "Chunks that were not verified yet since an unclean shutdown"
    yield GaugeMetricFamily("shoal_scrub_period_seconds", period, scrub["period_seconds"])
    yield GaugeMetricFamily("shoal_scrub_suspect_chunks", suspect, scrub["suspect_chunks"])
    yield CounterMetricFamily("shoal_scrub_bytes", "Bytes whose checksums were verified", scrub["bytes_verified"])
    yield CounterMetricFamily("shoal_scrub_damaged_chunks", "Chunks found damaged", scrub["damaged_chunks"])


def _standing_gauges(standing: Standing, version: StoreVersion) -> Iterator[GaugeMetricFamily]:
    """How far behind its root the store is, as its writer saw that last."""
    now = datetime.now(UTC)
    if standing.seen_at is not None:
        unseen = (now - standing.seen_at).total_seconds()
        yield GaugeMetricFamily("shoal_root_unseen_seconds", "Since the export root was last read", unseen)
    entries = GaugeMetricFamily("shoal_view_lag_entries", "Entries of the root that are not applied", labels=["view"])
    seconds = GaugeMetricFamily(
        "shoal_view_lag_seconds", "Since the oldest entry was published that is not applied", labels=["view"]
    )
    held = GaugeMetricFamily("shoal_view_held", "1 if no replica can apply the view's next entry", labels=["view"])
    for name, view in standing.views.items():
        lag = lag_of(view, version.applied_seq(name), now)
        entries.add_metric([name], lag.entries)
        seconds.add_metric([name], lag.seconds)
        held.add_metric([name], view.held_by is not None)
    yield from (entries, seconds, held)
