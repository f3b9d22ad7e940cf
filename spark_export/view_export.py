"""One export of one view: read the source, compare its rows with the previous run, and publish the changes."""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal

from pyspark.sql import DataFrame, SparkSession

from shoal.engine.base.errors import SourceError
from shoal.engine.base.times import to_datetime, to_micros
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest, PublishedFile
from shoal.spark_export.changes import entry_rows
from shoal.spark_export.changes.guard import Comparison, Numbers, compare, published_numbers
from shoal.spark_export.changes.ledger import (
    Tally,
    Verdict,
    goes_back,
    ledger_columns,
    shipped_before,
    tally,
    verdicts,
    with_hashes,
)
from shoal.spark_export.changes.low_watermark import Ages, ages, recent_runs
from shoal.spark_export.changes.previous_run import PreviousRun, find_previous_run
from shoal.spark_export.publication.opening import read_state, staging
from shoal.spark_export.publication.staging import Staging, job_name, remove_states, write_errors_named
from shoal.spark_export.report import Report
from shoal.spark_export.source.checks import checks, first_problem, source_error
from shoal.spark_export.source.rows import conform, lineage, open_source
from shoal.spark_export.views.definition import ViewDefinition

_IN_SOURCE = (Verdict.NEW, Verdict.CHANGED, Verdict.REFRESHED, Verdict.UNCHANGED, Verdict.LATE, Verdict.DUPLICATE)


def export_view(
    view: ViewDefinition, root: ExportRoot, spark: SparkSession, *, full: bool, allow_removals: bool
) -> Report:
    """Publish the changes in the source of a view, which must have a source.

    If the export would remove more rows or values than the view's limit allows, publish nothing and list the losses in
    the report.

    Raises:
        The same errors as `shoal.spark_export.exporter.export`.
    """
    started = time.monotonic()
    assert view.source is not None
    basis = find_previous_run(root, view, full=full)
    if basis.previous is not None:
        with write_errors_named(root):
            root.finish(basis.previous)
    source = open_source(view, spark)
    run_time = _run_time(view, basis)
    # The result of a query is kept, because a query may be costly or return other rows when it runs again. Files and
    # tables are read twice.
    with (
        _kept(conform(view, source, run_time, view.source), keep=view.source.sql is not None) as fitted,
        staging(root, view.name, uuid.uuid4().hex, basis.next_seq) as stage,
    ):
        earlier = read_state(root, spark, basis.state, ledger_columns(view)) if basis.state is not None else None
        aged = ages(
            view,
            fitted,
            basis.previous,
            run_time,
            has_low_watermark=root.write_format > 1,
            stands_still=earlier is not None and view.timestamp_field is not None and goes_back(earlier),
        )
        rows = with_hashes(view, fitted)
        ledger, found = _judge(view, rows, earlier, run_time, aged, stage)
        watermark = _watermark(basis, found)
        kind, reason = _what_to_publish(view, basis, found, watermark, aged)
        compared = Comparison() if allow_removals else _compare(root, view, spark, basis, found)
        if compared.losses:
            kind = None
        files: tuple[PublishedFile, ...] = ()
        if kind is not None:
            files = _write_parts(view, rows, ledger, found, kind, run_time, stage)
            stage.publish(
                Manifest(
                    format_version=root.write_format,
                    kind=kind,
                    id=stage.run,
                    seq=basis.next_seq,
                    parent=basis.previous.id if basis.previous else None,
                    view=view.schema,
                    rows=found.shipped,
                    tombstones=found.counts[Verdict.REMOVED],
                    files=files,
                    watermark=watermark,
                    published_at=datetime.now(UTC),
                    job=job_name(spark),
                    inputs=lineage(view, source),
                    state=stage.state,
                    low_watermark=aged.low_watermark,
                    recent_runs=recent_runs(basis.previous, to_datetime(run_time)),
                    live_rows=found.live_rows,
                    values=found.values,
                )
            )
            remove_states(root, basis.superseded)
    new = found.counts[Verdict.NEW]
    removed = found.counts[Verdict.REMOVED]
    if compared.losses and compared.growth is not None and basis.state is None:
        # Without a state, each row counts as new. The count would then contradict the refusal, which is about removed
        # rows.
        new = max(0, compared.growth)
        removed = max(0, -compared.growth)
    return Report(
        view=view.name,
        seq=basis.next_seq if kind else basis.next_seq - 1,
        kind=kind,
        reason=reason,
        rows_read=sum(found.counts[verdict] for verdict in _IN_SOURCE),
        duplicates=found.counts[Verdict.DUPLICATE],
        new=new,
        changed=found.counts[Verdict.CHANGED],
        refreshed=found.counts[Verdict.REFRESHED],
        removed=removed,
        late=found.counts[Verdict.LATE],
        unchanged=found.counts[Verdict.UNCHANGED],
        bytes=sum(file.bytes for file in files),
        seconds=round(time.monotonic() - started, 3),
        refused=compared.losses,
        not_compared=compared.not_compared if kind else (),
    )


def _judge(
    view: ViewDefinition, rows: DataFrame, earlier: DataFrame | None, run_time: int, aged: Ages, stage: Staging
) -> tuple[DataFrame, Tally]:
    """Write the ledger of this run. Return it and its tally.

    Raises:
        SourceError: the source contains a row that cannot be published.
    """
    demands = checks(view, run_time)
    state = shipped_before(view, earlier, run_time, aged) if earlier is not None else None
    stage.write_ledger(verdicts(view, rows, first_problem(demands), state, aged))
    ledger = stage.read_ledger(rows.sparkSession, ledger_columns(view))
    found = tally(view, ledger)
    if found.flaws:
        broken, count = min(found.flaws.items())
        raise source_error(view, rows, demands, broken, count)
    return ledger, found


def _what_to_publish(
    view: ViewDefinition, basis: PreviousRun, found: Tally, watermark: datetime | None, aged: Ages
) -> tuple[Literal["snapshot", "delta"] | None, str | None]:
    """Return the kind of entry to publish, or None to publish nothing, and the reason if the rows do not explain it."""
    if basis.state is None or basis.previous is None:
        return "snapshot", basis.reason
    if found.shipped or found.counts[Verdict.REMOVED]:
        return "delta", None
    for member in ("ttl", "timestamp_field", "push_source", "future"):
        if getattr(view.schema, member) != getattr(basis.previous.view, member):
            return "delta", f"the {member} changed"
    if aged.now is not None and (aged.now != aged.before or watermark != basis.previous.watermark):
        return "delta", "no row changed, the source is newer"
    return None, None


def _compare(
    root: ExportRoot, view: ViewDefinition, spark: SparkSession, basis: PreviousRun, found: Tally
) -> Comparison:
    """Compare the rows and values of the view before and after this export. A new view cannot lose anything."""
    if basis.previous is None:
        return Comparison()
    after = Numbers(found.live_rows, found.values)
    if basis.state is None:
        return compare(published_numbers(root, basis.previous), after, None, view.max_removed)
    values = basis.previous.values
    if values is None:
        # An entry in format 1 has no counts, so count the values in the ledger (`state`) that the previous run left.
        values = tally(view, read_state(root, spark, basis.state, ledger_columns(view))).values
    before = Numbers(found.live_before, values)
    removed = Numbers(found.counts[Verdict.REMOVED], found.removed_values)
    return compare(before, after, removed, view.max_removed)


def _write_parts(
    view: ViewDefinition,
    rows: DataFrame,
    ledger: DataFrame,
    found: Tally,
    kind: Literal["snapshot", "delta"],
    run_time: int,
    stage: Staging,
) -> tuple[PublishedFile, ...]:
    expected = found.shipped + found.counts[Verdict.REMOVED]
    if not expected:
        return ()
    if kind == "snapshot":
        to_ship = entry_rows.snapshot_rows(view, rows, run_time)
    else:
        to_ship = entry_rows.delta_rows(view, rows, ledger, found, run_time)
    has_duplicates = found.counts[Verdict.DUPLICATE] > 0
    files = stage.write_parts(kind, entry_rows.in_files(view, to_ship, duplicates=has_duplicates))
    written = sum(file.rows for file in files)
    if written != expected:
        raise SourceError(
            f"view {view.name!r}: its source ({view.source}) changed during the export: the first read found "
            f"{expected} rows to publish, the second read found {written}; nothing was published; run the export again"
        )
    return files


def _run_time(view: ViewDefinition, basis: PreviousRun) -> int:
    """Return the time of this run in microseconds since the epoch.

    In a view without a timestamp_field, this time is the event time of the rows. It is then never before the watermark
    of the previous run. Otherwise the rows would be late if the clock was set back.
    """
    now = datetime.now(UTC)
    if view.timestamp_field is None and basis.previous and basis.previous.watermark:
        now = max(now, basis.previous.watermark)
    return to_micros(now)


def _watermark(basis: PreviousRun, found: Tally) -> datetime | None:
    seen = (found.watermark, basis.previous.watermark if basis.previous else None)
    return max((moment for moment in seen if moment), default=None)


@contextmanager
def _kept(rows: DataFrame, *, keep: bool) -> Iterator[DataFrame]:
    """Yield the rows. If `keep` is true, Spark computes them once and stores them in memory and on disk until the end
    of the context."""
    if not keep:
        yield rows
        return
    rows.persist()
    try:
        yield rows
    finally:
        rows.unpersist()
