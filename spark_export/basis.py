"""What a run continues: the view's newest entry, and the state to compare with, or the reason for a full snapshot."""

from dataclasses import dataclass

import pyarrow.parquet as pq

from engine.errors import LogTaken
from engine.export_root import ExportRoot
from engine.manifest import Manifest
from spark_export.publication import ledger_parts, state_directories, state_directory
from spark_export.views import ViewDefinition


@dataclass(frozen=True)
class Basis:
    """What a run continues.

    Either there is a `state` to compare with, or a `reason` to publish a snapshot. `superseded` are the states that are
    obsolete once this run has published `next_seq`.
    """

    previous: Manifest | None
    state: str | None
    reason: str | None
    superseded: tuple[str, ...]
    next_seq: int


def find_basis(root: ExportRoot, view: ViewDefinition, *, full: bool) -> Basis:
    """Find what a run of a view continues.

    Raises:
        SchemaChangeRefused: the view changed in a way that stored rows cannot follow.
        LogTaken: a stream published last, and this is no full snapshot that is to replace what it published.
        ManifestInvalid: the newest entry breaks the contract of the export root.
    """
    # Before the log is read: a state that is older than the newest entry, and not that entry's, is no longer needed,
    # while one that appears from now on may be of an exporter that continues this one.
    states = state_directories(root, view.name)
    published = root.sequence_numbers(view.name)
    if not published:
        return Basis(None, None, "first export", tuple(states), root.first_seq(view.name))
    root.check_not_dropped(view.name, published[-1])
    previous = root.entry(view.name, published[-1])
    view.schema.check_succeeds(previous.view)
    if previous.stream is not None and not full:
        raise LogTaken(
            f"view {view.name!r}: its newest entry, {previous.seq}, is of the stream {previous.stream.query}, whose "
            f"rows an export does not have; give one of the two a view of its own, or, to replace what the stream "
            f"published, export it with --full"
        )
    state = state_directory(previous)
    reason = _reason_for_snapshot(root, view, previous, state, full=full)
    superseded = tuple(path for path in states if path != state)
    return Basis(previous, None if reason else state, reason, superseded, previous.seq + 1)


def _reason_for_snapshot(
    root: ExportRoot, view: ViewDefinition, previous: Manifest, state: str | None, *, full: bool
) -> str | None:
    if full:
        return "asked for"
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
