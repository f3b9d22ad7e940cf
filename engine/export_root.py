"""The export root: where exporters publish and loaders read. This module is the contract between the two.

It lies in a directory or in S3: `engine.storage` is what both can do.

    <root>/services.json                            all feature services
    <root>/.dropped/<view>.json                     a view that was dropped, and where its log ended
    <root>/dropped.json                             all of those, for readers
    <root>/<view>/deltas/<seq, 12 digits>/          the view's log, one directory per published entry
        manifest.json                               written last, exclusively: who creates it owns the seq
        part-*.parquet                              a delta's rows (a snapshot's lie in its own directory)
    <root>/<view>/snapshots/<seq>-<id>/
        manifest.json, part-*.parquet               a full snapshot; the log's entry of that seq is the same document
    <root>/<view>/state/…                           the exporter's own

A directory without a manifest does not exist. The log's manifest is created first: it decides who owns a seq, so a
snapshot that lost a race never gets a manifest. Only plain files inside the root are read, so that a publisher cannot
make a node read other files of the machine, by a path or a link.
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

from engine.directory_storage import DirectoryStorage
from engine.errors import (
    FileDamaged,
    LogTaken,
    ManifestInvalid,
    NotPublished,
    PublicationLost,
    RootNotWritable,
    ShoalError,
)
from engine.failpoints import reached
from engine.manifest import (
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
from engine.schema import FeatureService, is_name
from engine.storage import storage_at

LOG = "deltas"
"""The directory of a view's log, which has one directory per entry."""
MANIFEST = "manifest.json"
SERVICES = "services.json"
DROPPED = "dropped.json"
_DROPS = ".dropped"
"""The directory with one document per dropped view. DROPPED is made of them, so that readers need not list them."""
_DROPPED_ENTRIES = 100
_READ_BLOCK = 8 << 20
_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP}
"""Errors of one unreadable file in a readable directory."""


class ExportRoot:
    """One export root, by its address: a directory, or `s3://BUCKET/PREFIX`.

    Args:
        write_format: the format of what is published through this object. Documents of every format can be read.

    Whatever reads raises RootUnreadable, or an OSError that names the file, where the place itself fails.
    """

    def __init__(self, address: str | os.PathLike[str], *, write_format: FormatVersion = NEWEST_FORMAT) -> None:
        self.storage = storage_at(address)
        self.write_format = write_format
        self._listed: dict[str, tuple[int, float]] = {}

    def __str__(self) -> str:
        return str(self.storage)

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory, which can be watched."""
        return isinstance(self.storage, DirectoryStorage)

    @property
    def path(self) -> Path:
        """The directory of a root that is one."""
        assert isinstance(self.storage, DirectoryStorage), f"{self} is no directory"
        return self.storage.path

    # --- reading ---------------------------------------------------------------------------------------------

    def check_exists(self) -> None:
        """Raise NotPublished if the root does not exist, and PathsSwapped if it is a store."""
        self.storage.check_exists()

    def check_may_be_root(self) -> None:
        """Raise PathsSwapped if the path is a store, which must not be published to."""
        self.storage.check_may_be_root()

    def views(self) -> list[str]:
        """Return the names of the views that have a log. A dropped view's log may still exist; it does not count."""
        named = [name for name in self.storage.directories() if is_name(name)]
        views = [name for name in sorted(named) if self.storage.has_directory(f"{name}/{LOG}")]
        dropped: dict[str, int] = {}
        # If the list is damaged, the existing views are still updated.
        with suppress(ManifestInvalid):
            dropped = self.dropped()
        return [name for name in views if name not in dropped or self._ends_behind(name, dropped[name])]

    def _ends_behind(self, view: str, seq: int) -> bool:
        return bool(self.storage.published(f"{view}/{LOG}", MANIFEST, since=f"{seq + 1:012d}"))

    def dropped(self) -> dict[str, int]:
        """Return the dropped views, and the last seq of each; raise ManifestInvalid if the list is damaged."""
        return {view.name: view.seq for view in self.dropped_views()}

    def first_seq(self, view: str) -> int:
        """Return the first seq of a view that has no log yet: the next after a dropped view of the same name."""
        return self.dropped().get(view, 0) + 1

    def check_not_dropped(self, view: str, seq: int) -> None:
        """Raise LogTaken if the entry `seq` of a view is of a dropped log, whose files are still being removed."""
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
        """The seqs of a view's log that are published, from `since` on, ascending."""
        names = self.storage.published(f"{view}/{LOG}", MANIFEST, since=f"{since:012d}")
        numbers = sorted(int(name) for name in names if _is_seq(name))
        self._listed[view] = (numbers[-1] if numbers else 0, monotonic())
        return numbers

    def ended_lately(self, view: str, seq: int) -> bool:
        """Whether the log ended at `seq` when it was last listed, so lately that to list it again is too dear."""
        end, when = self._listed.get(view, (0, 0.0))
        return end == seq and monotonic() - when < self.storage.listed_every_seconds

    def has_entry(self, view: str, seq: int) -> bool:
        """Whether the log has an entry `seq`; cheaper than listing them all."""
        return self.storage.holds(f"{log_directory(view, seq)}/{MANIFEST}")

    def snapshot_ids(self, view: str) -> list[str]:
        """The ids of a view's snapshots, oldest first; they start with the seq."""
        return self.storage.published(f"{view}/snapshots", MANIFEST)

    def entry(self, view: str, seq: int) -> Manifest:
        """The log's entry `seq`.

        Raises:
            NotPublished: there is none.
            ManifestInvalid: it breaks the contract.
        """
        manifest = self._manifest(view, log_directory(view, seq))
        if manifest.seq != seq:
            where = self.storage.where(f"{log_directory(view, seq)}/{MANIFEST}")
            raise ManifestInvalid(f"{where} says seq {manifest.seq}, expected {seq}")
        return manifest

    def snapshot(self, view: str, snapshot_id: str) -> Manifest:
        """The manifest of one snapshot, by its id; raises as `entry` does."""
        manifest = self._manifest(view, f"{view}/snapshots/{snapshot_id}")
        if manifest.kind != "snapshot" or manifest.snapshot_id != snapshot_id:
            raise ManifestInvalid(f"view {view!r}: snapshots/{snapshot_id} holds the manifest of another entry")
        return manifest

    def newest_snapshot(self, view: str) -> Manifest | None:
        """The newest snapshot of a view; None if it has none. One whose exporter then died is in the log."""
        snapshot_ids = self.snapshot_ids(view)
        if snapshot_ids:
            return self.snapshot(view, snapshot_ids[-1])
        for seq in reversed(self.sequence_numbers(view)):
            manifest = self.entry(view, seq)
            if manifest.kind == "snapshot":
                return manifest
        return None

    def services(self) -> tuple[FeatureService, ...]:
        """The feature services; none if none were published."""
        where = self.storage.where(SERVICES)
        try:
            data = self.storage.read(SERVICES)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ManifestInvalid(f"{where} cannot be read: {error}") from error
        return unseal(data, FeatureServices, where).services

    def directory(self, manifest: Manifest) -> Path:
        """Where an entry's Parquet files lie, in a root that is a directory."""
        return self.path / entry_directory(manifest)

    def where(self, manifest: Manifest, file: PublishedFile | None = None) -> str:
        """The address of one file of an entry, or of its files, for messages."""
        return self.storage.where(f"{entry_directory(manifest)}/{file.path}" if file else entry_directory(manifest))

    def open_file(self, manifest: Manifest, file: PublishedFile) -> BinaryIO:
        """Open one file of an entry, unchecked, to read it in parts.

        Raises:
            FileDamaged: it is missing, cannot be read, or is not a plain file inside the root.
        """
        with self._reading(manifest, file):
            return self.storage.open(f"{entry_directory(manifest)}/{file.path}")

    def checked_file(self, manifest: Manifest, file: PublishedFile) -> BinaryIO:
        """Open one file of an entry on this machine, after verifying its size and checksum.

        Raises:
            FileDamaged: it is missing, cannot be read, is not a plain file inside the root, or does not match the
                manifest.
        """
        name, where = f"{entry_directory(manifest)}/{file.path}", self.where(manifest, file)
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
        """Make an entry exist, its files being in `directory(manifest)` and on disk already.

        Raises:
            PublicationLost: the log has an entry of that seq.
        """
        view = manifest.view.name
        try:
            self.storage.create(f"{log_directory(view, manifest.seq)}/{MANIFEST}", seal(manifest))
        except FileExistsError:
            raise PublicationLost(
                f"view {view!r}: seq {manifest.seq} was published meanwhile by {self.entry(view, manifest.seq).job}; "
                f"nothing of this run is visible, run the export again"
            ) from None
        reached("export.log-linked")
        self.finish(manifest)

    def finish(self, manifest: Manifest) -> None:
        """Do for an entry that is in the log whatever an exporter that died at once did not come to: list a snapshot
        among the snapshots, unless its rows were removed since, and remove the files that no manifest lists."""
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
            The last seq that the view had.

        Raises:
            NotPublished: the root has neither such a view, nor files of a dropped view of that name.
            RootNotWritable: the files cannot be written or removed.
        """
        if not is_name(view):
            raise NotPublished(f"{self} has no view {view!r}; it has {', '.join(self.views()) or 'none'}")
        while True:
            seqs, known = self.sequence_numbers(view), self._recorded_drops().get(view)
            if not seqs and known is None:
                raise NotPublished(f"{self} has no view {view!r}; it has {', '.join(self.views()) or 'none'}")
            if seqs and (known is None or seqs[-1] > known.seq):
                known = self._drop_of(view, seqs[-_DROPPED_ENTRIES:])
                self.storage.replace(f"{_DROPS}/{view}.json", seal(known))
                # An exporter may have published an entry meanwhile.
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
                break  # It is damaged. A node that stands before it is told by the root that it follows.
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
        """Write the list of drops; again, if another drop was recorded meanwhile, whose list this may have replaced."""
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
            raise ManifestInvalid(f"{where} is of view {manifest.view.name!r}, expected {view!r}")
        return manifest

    @contextmanager
    def _reading(self, manifest: Manifest, file: PublishedFile) -> Iterator[None]:
        """Raise FileDamaged for an error of one file that is not an error of the whole root."""
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
    """Where an entry's Parquet files lie, relative to the root."""
    if manifest.kind == "snapshot":
        return f"{manifest.view.name}/snapshots/{manifest.snapshot_id}"
    return log_directory(manifest.view.name, manifest.seq)


def file_checksum(path: Path) -> str:
    """XXH3 (64 bits, hex) of a file's bytes."""
    with path.open("rb") as stream:
        return checksum(stream)


def checksum(stream: BinaryIO) -> str:
    """XXH3 (64 bits, hex) of a file's bytes, from its beginning; it stands there again afterwards."""
    digest = xxhash.xxh3_64()
    stream.seek(0)
    while block := stream.read(_READ_BLOCK):
        digest.update(block)
    stream.seek(0)
    return digest.hexdigest()


def log_directory(view: str, seq: int) -> str:
    """Where an entry of a view's log lies in its root."""
    return f"{view}/{LOG}/{seq:012d}"


def _is_seq(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _is_leftover(name: str) -> bool:
    """Whether a file next to a manifest is nobody's if the manifest does not list it."""
    return (name.startswith("part-") and name.endswith(".parquet")) or name.startswith(f".{MANIFEST}.")
