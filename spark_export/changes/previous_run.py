"""Find the previous run of a view: its newest entry, and the state to compare with or the reason for a snapshot."""

from dataclasses import dataclass

import pyarrow.parquet as pq

from shoal.engine.base.errors import LogTaken
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest
from shoal.spark_export.publication.staging import ledger_parts, state_directories, state_directory
from shoal.spark_export.views.definition import ViewDefinition


@dataclass(frozen=True)
class PreviousRun:
    """The previous run of a view: `previous` is the view's newest entry, None in a new view.

    Either there is a `state` to compare with, or a `reason` to publish a snapshot. `superseded` lists the states that
    become obsolete when this run publishes the entry `next_seq`.
    """

    previous: Manifest | None
    state: str | None
    reason: str | None
    superseded: tuple[str, ...]
    next_seq: int


def find_previous_run(root: ExportRoot, view: ViewDefinition, *, full: bool) -> PreviousRun:
    """Find the previous run of a view.

    Raises:
        SchemaChangeRefused: the schema of the view changed, and stored rows cannot be read with the new schema.
        LogTaken: a stream published the newest entry, and `full` is false.
        ManifestInvalid: the newest entry breaks the contract of the export root.
    """
    # List the states before the log is read. Every listed state except the newest entry's own is then obsolete. A state
    # that appears later is not listed, because it may belong to an exporter with a newer entry.
    states = state_directories(root, view.name)
    published = root.sequence_numbers(view.name)
    if not published:
        return PreviousRun(None, None, "first export", tuple(states), root.first_seq(view.name))
    root.check_not_dropped(view.name, published[-1])
    previous = root.entry(view.name, published[-1])
    view.schema.check_succeeds(previous.view)
    if previous.stream is not None and not full:
        raise LogTaken(
            f"view {view.name!r}: its newest entry, {previous.seq}, is of the stream {previous.stream.query}, and an "
            f"export would lose the stream's rows; use two different views, or replace the stream's rows with an "
            f"export with --full"
        )
    state = state_directory(previous)
    reason = _reason_for_snapshot(root, view, previous, state, full=full)
    superseded = tuple(path for path in states if path != state)
    return PreviousRun(previous, None if reason else state, reason, superseded, previous.seq + 1)


def _reason_for_snapshot(
    root: ExportRoot, view: ViewDefinition, previous: Manifest, state: str | None, *, full: bool
) -> str | None:
    if full:
        return "requested"
    if previous.view.features != view.schema.features:
        return "the features changed"
    if previous.format_version > root.write_format:
        return f"the format went back from {previous.format_version} to {root.write_format}"
    if (previous.view.tier, previous.view.table) != (view.tier, view.table):
        return "the tier changed"
    parts = ledger_parts(root.storage, state) if state else []
    if not parts:
        return f"the state of seq {previous.seq} is missing"
    with root.storage.open(parts[0]) as stream:
        columns = pq.read_schema(stream).names
    compared = {feature.name for feature in view.features} & set(columns)
    if compared != {feature.name for feature in view.tolerant_features}:
        return "the tolerances changed"
    return None
