"""The export root: exporters publish to it and loaders read it. This module is the contract between exporters and
loaders.

An export root is in a directory or in S3; `shoal.engine.root.storage` is the interface for both.

    <root>/services.json                            all feature services
    <root>/.dropped/<view>.json                     a dropped view, and the last seq of its log
    <root>/dropped.json                             all dropped views, for readers
    <root>/<view>/deltas/<seq, 12 digits>/          the view's log, one directory per published entry
        manifest.json                               written last, exclusively: its creator owns the seq
        part-*.parquet                              a delta's rows (a snapshot's rows are in the snapshot's directory)
    <root>/<view>/snapshots/<seq>-<id>/
        manifest.json, part-*.parquet               a full snapshot; the log's entry of that seq is the same document
    <root>/<view>/state/…                           private to the exporter

Readers ignore a directory without a manifest. An exporter creates the manifest in the log first. This makes the
exporter the owner of the seq. So a snapshot never gets a manifest if its exporter lost the race for the seq. Readers
read only plain files inside the root, so that a publisher cannot use a path or a link to make a node read other files
of the machine.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import BinaryIO

import xxhash

from shoal.engine.base.errors import (
    FileDamaged,
    LogTaken,
    ManifestInvalid,
    NotPublished,
    PublicationLost,
    RootNotWritable,
    ShoalError,
)
from shoal.engine.base.failpoints import reached
from shoal.engine.format.schema import FeatureService, is_name
from shoal.engine.root.directory_storage import DirectoryStorage
from shoal.engine.root.manifest import (
    NEWEST_FORMAT,
    DroppedView,
    DroppedViews,
    FeatureServices,
    FormatVersion,
    Manifest,
    PublishedFile,
    seal,
    unseal,
)
from shoal.engine.root.open_storage import storage_at

LOG = "deltas"
"""The directory of a view's log. It contains one directory per entry."""
MANIFEST = "manifest.json"
SERVICES = "services.json"
DROPPED = "dropped.json"
_DROPS = ".dropped"
"""The directory with one document per dropped view. DROPPED contains all of these documents, so that readers need not
list the directory."""
_DROPPED_ENTRIES = 100
_READ_BLOCK = 8 << 20
_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP}
"""The error numbers that mean that one file is unreadable, although its directory is readable."""


class ExportRoot:
    """One export root, by its address: a directory, or `s3://BUCKET/PREFIX`.

    Args:
        write_format: the format of the documents that this object publishes. The object reads documents of every
            format.

    If the storage fails, every method that reads raises RootUnreadable, or an OSError with the name of the file.
    """

    def __init__(self, address: str | os.PathLike[str], *, write_format: FormatVersion = NEWEST_FORMAT) -> None:
        self.storage = storage_at(address)
        self.write_format = write_format
        self._listed: dict[str, tuple[int, float]] = {}

    def __str__(self) -> str:
        return str(self.storage)

    @property
    def is_directory(self) -> bool:
        """Whether the root is a directory. Only a directory can be watched for changes."""
        return isinstance(self.storage, DirectoryStorage)

    @property
    def path(self) -> Path:
        """The path of the root's directory. Only for a root in a directory."""
        assert isinstance(self.storage, DirectoryStorage), f"{self} is no directory"
        return self.storage.path

    # --- reading ---------------------------------------------------------------------------------------------

    def check_exists(self) -> None:
        """Raise NotPublished if the root does not exist, and PathsSwapped if it is a store."""
        self.storage.check_exists()

    def check_may_be_root(self) -> None:
        """Raise PathsSwapped if the path is a store. Nobody may publish to a store."""
        self.storage.check_may_be_root()

    def views(self) -> list[str]:
        """Return the names of the views that have a log. The log of a dropped view may still exist; such a log does not
        count."""
        named = [name for name in self.storage.directories() if is_name(name)]
        views = [name for name in sorted(named) if self.storage.has_directory(f"{name}/{LOG}")]
        dropped: dict[str, int] = {}
        # If the list of dropped views is damaged, the existing views are still updated.
        with suppress(ManifestInvalid):
            dropped = self.dropped()
        return [name for name in views if name not in dropped or self._ends_behind(name, dropped[name])]

    def _ends_behind(self, view: str, seq: int) -> bool:
        return bool(self.storage.published(f"{view}/{LOG}", MANIFEST, since=f"{seq + 1:012d}"))

    def dropped(self) -> dict[str, int]:
        """Return the last seq of each dropped view, by name; raise ManifestInvalid if the list is damaged."""
        return {view.name: view.seq for view in self.dropped_views()}

    def first_seq(self, view: str) -> int:
        """Return the first seq for a view without a log: the next seq after a dropped view of the same name, or 1 if
        there is none."""
        return self.dropped().get(view, 0) + 1

    def check_not_dropped(self, view: str, seq: int) -> None:
        """Raise LogTaken if the entry `seq` of a view belongs to a dropped log whose files are not all removed yet."""
        if seq <= self.dropped().get(view, 0):
            raise LogTaken(
                f"view {view!r}: its log was dropped, and the drop was interrupted; complete it before you publish the "
                f"view again: `shoal drop-view {view} --root {self}`"
            )

    def dropped_views(self) -> tuple[DroppedView, ...]:
        """Return the dropped views; raise ManifestInvalid if the list is damaged."""
        where = self.storage.where(DROPPED)
        try:
            return unseal(self.storage.read(DROPPED), DroppedViews, where).views
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError as error:
            raise ManifestInvalid(f"{where} cannot be read: {error}") from error

    def sequence_numbers(self, view: str, *, since: int = 0) -> list[int]:
        """Return the published seqs of a view's log, from `since` on, in ascending order."""
        names = self.storage.published(f"{view}/{LOG}", MANIFEST, since=f"{since:012d}")
        numbers = sorted(int(name) for name in names if _is_seq(name))
        self._listed[view] = (numbers[-1] if numbers else 0, monotonic())
        return numbers

    def ended_lately(self, view: str, seq: int) -> bool:
        """Return whether the log was listed a short time ago and ended at `seq` then. Listing the log again is then not
        worth the cost."""
        end, when = self._listed.get(view, (0, 0.0))
        return end == seq and monotonic() - when < self.storage.listed_every_seconds

    def has_entry(self, view: str, seq: int) -> bool:
        """Return whether the log has an entry `seq`. This is cheaper than listing all entries."""
        return self.storage.holds(f"{log_directory(view, seq)}/{MANIFEST}")

    def snapshot_ids(self, view: str) -> list[str]:
        """Return the ids of a view's snapshots, oldest first; an id starts with the seq."""
        return self.storage.published(f"{view}/snapshots", MANIFEST)

    def entry(self, view: str, seq: int) -> Manifest:
        """Read the log's entry `seq`.

        Raises:
            NotPublished: the entry does not exist.
            ManifestInvalid: the entry's manifest is invalid.
        """
        manifest = self._manifest(view, log_directory(view, seq))
        if manifest.seq != seq:
            where = self.storage.where(f"{log_directory(view, seq)}/{MANIFEST}")
            raise ManifestInvalid(f"{where} says seq {manifest.seq}, expected {seq}")
        return manifest

    def snapshot(self, view: str, snapshot_id: str) -> Manifest:
        """Read the manifest of a snapshot; raise as `entry` does."""
        manifest = self._manifest(view, f"{view}/snapshots/{snapshot_id}")
        if manifest.kind != "snapshot" or manifest.snapshot_id != snapshot_id:
            raise ManifestInvalid(f"view {view!r}: snapshots/{snapshot_id} contains the manifest of another entry")
        return manifest

    def newest_snapshot(self, view: str) -> Manifest | None:
        """Return the manifest of a view's newest snapshot; None if the view has no snapshot. If an exporter died before
        it listed its snapshot under `snapshots`, the snapshot is only in the log."""
        snapshot_ids = self.snapshot_ids(view)
        if snapshot_ids:
            return self.snapshot(view, snapshot_ids[-1])
        for seq in reversed(self.sequence_numbers(view)):
            manifest = self.entry(view, seq)
            if manifest.kind == "snapshot":
                return manifest
        return None

    def services(self) -> tuple[FeatureService, ...]:
        """Return the feature services; an empty tuple if none were published."""
        where = self.storage.where(SERVICES)
        try:
            data = self.storage.read(SERVICES)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ManifestInvalid(f"{where} cannot be read: {error}") from error
        return unseal(data, FeatureServices, where).services

    def directory(self, manifest: Manifest) -> Path:
        """Return the directory of an entry's Parquet files. Only for a root in a directory."""
        return self.path / entry_directory(manifest)

    def where(self, manifest: Manifest, file: PublishedFile | None = None) -> str:
        """Return the address of one file of an entry, or of the entry's directory, for messages."""
        return self.storage.where(f"{entry_directory(manifest)}/{file.path}" if file else entry_directory(manifest))

    def open_file(self, manifest: Manifest, file: PublishedFile) -> BinaryIO:
        """Open one file of an entry to read it in parts. Do not verify its size and checksum.

        Raises:
            FileDamaged: the file is missing, cannot be read, or is not a plain file inside the root.
        """
        with self._reading(manifest, file):
            return self.storage.open(f"{entry_directory(manifest)}/{file.path}")

    def checked_file(self, manifest: Manifest, file: PublishedFile) -> BinaryIO:
        """Open a local copy of one file of an entry, after verifying its size and checksum.

        Raises:
            FileDamaged: the file is missing, cannot be read, is not a plain file inside the root, or does not match the
                manifest.
        """
        name = f"{entry_directory(manifest)}/{file.path}"
        where = self.where(manifest, file)
        with self._reading(manifest, file):
            size = self.storage.size(name)
            if size != file.bytes:
                raise FileDamaged(f"{where} has {size} bytes, its manifest says {file.bytes}")
            stream = self.storage.fetch(name, size)
            try:
                found = checksum(stream)
            except OSError:
                stream.close()
                raise
        if found != file.checksum:
            stream.close()
            raise FileDamaged(f"{where} has the checksum {found}, its manifest says {file.checksum}")
        return stream

    # --- publishing ------------------------------------------------------------------------------------------

    def publish(self, manifest: Manifest) -> None:
        """Publish an entry. Its files must already be in `entry_directory(manifest)` and must be durable.

        Raises:
            PublicationLost: the log already has an entry with that seq.
        """
        view = manifest.view.name
        try:
            self.storage.create(f"{log_directory(view, manifest.seq)}/{MANIFEST}", seal(manifest))
        except FileExistsError:
            raise PublicationLost(
                f"view {view!r}: seq {manifest.seq} was published meanwhile by {self.entry(view, manifest.seq).job}; "
                f"this run published nothing, run the export again"
            ) from None
        reached("export.log-linked")
        self.finish(manifest)

    def finish(self, manifest: Manifest) -> None:
        """Complete the publication of an entry in the log, because its exporter may have died right after it created
        the entry. Add a snapshot to `snapshots`, unless its rows were removed meanwhile. Remove the files that no
        manifest lists."""
        own = entry_directory(manifest)
        listed = {f"{own}/{file.path}" for file in manifest.files}
        directories = {own, log_directory(manifest.view.name, manifest.seq)}
        present = {file.name for directory in directories for file in self.storage.files(directory)}
        if f"{own}/{MANIFEST}" not in present and listed <= present:
            with suppress(FileExistsError):
                self.storage.create(f"{own}/{MANIFEST}", seal(manifest))
        self.storage.remove(name for name in present - listed if _is_leftover(name.rpartition("/")[2]))

    def publish_services(self, services: tuple[FeatureService, ...]) -> None:
        """Replace the list of feature services."""
        self.storage.replace(SERVICES, seal(FeatureServices(format_version=self.write_format, services=services)))

    def drop_view(self, view: str) -> int:
        """Remove a view, so that nodes remove it too. A second call completes a drop that was interrupted.

        Returns:
            The last seq of the view.

        Raises:
            NotPublished: the root has no view and no dropped view of that name.
            RootNotWritable: the files cannot be written or removed.
        """
        if not is_name(view):
            raise NotPublished(f"{self} has no view {view!r}; it has {', '.join(self.views()) or 'none'}")
        while True:
            seqs = self.sequence_numbers(view)
            known = self._recorded_drops().get(view)
            if not seqs and known is None:
                raise NotPublished(f"{self} has no view {view!r}; it has {', '.join(self.views()) or 'none'}")
            if seqs and (known is None or seqs[-1] > known.seq):
                known = self._drop_of(view, seqs[-_DROPPED_ENTRIES:])
                self.storage.replace(f"{_DROPS}/{view}.json", seal(known))
                # An exporter may have published another entry meanwhile, so the log is read again.
                continue
            self._list_drops()
            reached("root.view-dropped")
            assert known is not None
            self.storage.remove_directory(view)
            left = max(self.sequence_numbers(view), default=0)
            if not left:
                return known.seq
            if left <= known.seq:
                raise RootNotWritable(f"{self.storage.where(view)} cannot be removed; check its permissions")

    def _drop_of(self, view: str, seqs: list[int]) -> DroppedView:
        entries = []
        for seq in reversed(seqs):
            try:
                entries.append(self.entry(view, seq).id)
            except ShoalError:
                # The entry is damaged. A node at this entry or an earlier entry cannot use the ids. Such a node removes
                # its view only if the node follows this root.
                break
        return DroppedView(
            format_version=self.write_format,
            name=view,
            seq=seqs[-1],
            oldest_seq=seqs[-1] - len(entries) + 1,
            entries=tuple(reversed(entries)),
            dropped_at=datetime.now(UTC),
        )

    def _recorded_drops(self) -> dict[str, DroppedView]:
        documents = [file.name for file in self.storage.files(_DROPS) if file.name.endswith(".json")]
        drops = [unseal(self.storage.read(name), DroppedView, self.storage.where(name)) for name in documents]
        return {drop.name: drop for drop in drops}

    def _list_drops(self) -> None:
        """Write the list of dropped views. If another drop was recorded meanwhile, write the list again, because this
        call may have overwritten the other drop's list."""
        listed: dict[str, DroppedView] | None = None
        while (recorded := self._recorded_drops()) != listed:
            content = DroppedViews(format_version=self.write_format, views=tuple(recorded.values()))
            self.storage.replace(DROPPED, seal(content))
            listed = recorded

    def _manifest(self, view: str, directory: str) -> Manifest:
        name = f"{directory}/{MANIFEST}"
        where = self.storage.where(name)
        try:
            data = self.storage.read(name)
        except (FileNotFoundError, NotADirectoryError):
            place = self.storage.where(directory)
            raise NotPublished(f"view {view!r}: {place} is not published (it has no {MANIFEST})") from None
        except OSError as error:
            raise ManifestInvalid(f"{where} cannot be read: {error}") from error
        manifest = unseal(data, Manifest, where)
        if manifest.view.name != view:
            raise ManifestInvalid(f"{where} belongs to view {manifest.view.name!r}, expected {view!r}")
        return manifest

    @contextmanager
    def _reading(self, manifest: Manifest, file: PublishedFile) -> Iterator[None]:
        """Raise FileDamaged for an error that concerns only this file, not the whole root."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            where = self.where(manifest, file)
            raise FileDamaged(f"{where} is missing; its manifest lists {file.rows} rows in it") from None
        except OSError as error:
            if error.errno not in _OF_ONE_FILE:
                raise
            raise FileDamaged(
                f"{self.where(manifest, file)} cannot be read: {error.strerror}; check its permissions and its disk, "
                f"or publish the view again with `shoal export --full`"
            ) from error


def entry_directory(manifest: Manifest) -> str:
    """Return the directory of an entry's Parquet files, relative to the root."""
    if manifest.kind == "snapshot":
        return f"{manifest.view.name}/snapshots/{manifest.snapshot_id}"
    return log_directory(manifest.view.name, manifest.seq)


def file_checksum(path: Path) -> str:
    """Return the XXH3 (64 bits, hex) of a file's bytes."""
    with path.open("rb") as stream:
        return checksum(stream)


def checksum(stream: BinaryIO) -> str:
    """Return the XXH3 (64 bits, hex) of all bytes of an open file. The file's position is 0 afterwards."""
    digest = xxhash.xxh3_64()
    stream.seek(0)
    while block := stream.read(_READ_BLOCK):
        digest.update(block)
    stream.seek(0)
    return digest.hexdigest()


def log_directory(view: str, seq: int) -> str:
    """Return the directory of an entry of a view's log, relative to the root."""
    return f"{view}/{LOG}/{seq:012d}"


def _is_seq(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _is_leftover(name: str) -> bool:
    """Return whether a file next to a manifest may be removed if the manifest does not list it."""
    return (name.startswith("part-") and name.endswith(".parquet")) or name.startswith(f".{MANIFEST}.")
