"""The export root: where exporters publish and loaders read. This module is the contract between the two.

    <root>/services.json                            all feature services
    <root>/<view>/deltas/<seq, 12 digits>/          the view's log, one directory per published entry
        manifest.json                               written last, exclusively: who creates it owns the seq
        part-*.parquet                              a delta's rows (a snapshot's lie in its own directory)
    <root>/<view>/snapshots/<seq>-<id>/
        manifest.json, part-*.parquet               a full snapshot; the log's entry of that seq is the same document
    <root>/<view>/state/…                           the exporter's own

A directory without a manifest does not exist. The log's manifest is created first: it decides who owns a seq, so a
snapshot that lost a race never gets a manifest. Whatever is read is a plain file inside the root: who may publish there
can name no other file of the machine, neither by its path nor by a link.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import xxhash

from engine.errors import FileDamaged, ManifestInvalid, NotPublished, PublicationLost, ShoalError
from engine.failpoints import reached
from engine.manifest import FeatureServices, Manifest, PublishedFile, seal, unseal
from engine.schema import FeatureService, is_name

MANIFEST = "manifest.json"
SERVICES = "services.json"
PARTS = "part-*.parquet"
_READ_BLOCK = 8 << 20


class ExportRoot:
    """One export root on a file system that all parties mount."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()

    def __str__(self) -> str:
        return str(self.path)

    # --- reading ---------------------------------------------------------------------------------------------

    def check_exists(self) -> None:
        """Raises NotPublished if there is no such directory."""
        if not self.path.is_dir():
            raise NotPublished(f"export root {self.path} does not exist; `shoal export --to {self.path}` makes it")

    def views(self) -> list[str]:
        """The views that have a log, by name."""
        if not self.path.is_dir():
            return []
        named = (entry for entry in self.path.iterdir() if is_name(entry.name))
        return sorted(entry.name for entry in named if (entry / "deltas").is_dir())

    def sequence_numbers(self, view: str) -> list[int]:
        """The seqs of a view's log that are published, ascending."""
        return sorted(int(entry.name) for entry in self._published(view, "deltas") if _is_seq(entry.name))

    def has_entry(self, view: str, seq: int) -> bool:
        """Whether the log has an entry `seq`; cheaper than listing them all."""
        return self._is_published(self._log_directory(view, seq))

    def snapshot_ids(self, view: str) -> list[str]:
        """The ids of a view's snapshots, oldest first; they start with the seq."""
        return sorted(entry.name for entry in self._published(view, "snapshots"))

    def entry(self, view: str, seq: int) -> Manifest:
        """The log's entry `seq`.

        Raises:
            NotPublished: there is none.
            ManifestInvalid: it breaks the contract.
        """
        manifest = self._manifest(view, self._log_directory(view, seq))
        if manifest.seq != seq:
            raise ManifestInvalid(
                f"{self._log_directory(view, seq) / MANIFEST} says seq {manifest.seq}, expected {seq}"
            )
        return manifest

    def snapshot(self, view: str, snapshot_id: str) -> Manifest:
        """The manifest of one snapshot, by its id; raises as `entry` does."""
        manifest = self._manifest(view, self.path / view / "snapshots" / snapshot_id)
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
        try:
            data = self._contained(self.path / SERVICES).read_bytes()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ManifestInvalid(f"{self.path / SERVICES} cannot be read: {error}") from error
        return unseal(data, FeatureServices, str(self.path / SERVICES)).services

    def directory(self, manifest: Manifest) -> Path:
        """Where an entry's Parquet files lie."""
        if manifest.kind == "snapshot":
            return self.path / manifest.view.name / "snapshots" / manifest.snapshot_id
        return self._log_directory(manifest.view.name, manifest.seq)

    def file_path(self, manifest: Manifest, file: PublishedFile) -> Path:
        """The path of one file of an entry, which may be missing.

        Raises:
            FileDamaged: what is there is no plain file inside the root.
        """
        return self._contained(self.directory(manifest) / file.path, FileDamaged)

    def check_file(self, manifest: Manifest, file: PublishedFile) -> Path:
        """The path of one file of an entry, after its size and checksum were found right.

        Raises:
            FileDamaged: it is missing, no plain file inside the root, or differs from what the manifest says.
        """
        path = self.file_path(manifest, file)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise FileDamaged(f"{path} is missing; its manifest lists {file.rows} rows in it") from None
        if size != file.bytes:
            raise FileDamaged(f"{path} has {size} bytes, its manifest says {file.bytes}")
        found = file_checksum(path)
        if found != file.checksum:
            raise FileDamaged(f"{path} has the checksum {found}, its manifest says {file.checksum}")
        return path

    # --- publishing ------------------------------------------------------------------------------------------

    def publish(self, manifest: Manifest) -> None:
        """Make an entry exist, its files being in `directory(manifest)` and on disk already.

        Raises:
            PublicationLost: the log has an entry of that seq.
        """
        view, data = manifest.view.name, seal(manifest)
        log_directory = self._log_directory(view, manifest.seq)
        try:
            _create_exclusively(log_directory / MANIFEST, data)
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
        directories = {self.directory(manifest), self._log_directory(manifest.view.name, manifest.seq)}
        listed = {self.directory(manifest) / file.path for file in manifest.files}
        own = self.directory(manifest) / MANIFEST
        if own.parent.is_dir() and not own.is_file() and all(path.is_file() for path in listed):
            with suppress(FileExistsError):
                _create_exclusively(own, seal(manifest))
        for directory in directories:
            for path in (*directory.glob(PARTS), *directory.glob(f".{MANIFEST}.*")):
                if path not in listed:
                    path.unlink(missing_ok=True)

    def publish_services(self, services: tuple[FeatureService, ...]) -> None:
        """Replace the list of feature services."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = _write_aside(self.path / SERVICES, seal(FeatureServices(services=services)))
        os.replace(temporary, self.path / SERVICES)
        sync_directory(self.path)

    # --- layout ----------------------------------------------------------------------------------------------

    def _log_directory(self, view: str, seq: int) -> Path:
        return self.path / view / "deltas" / f"{seq:012d}"

    def _published(self, view: str, part: str) -> Iterator[Path]:
        directory = self.path / view / part
        if directory.is_dir():
            yield from (entry for entry in directory.iterdir() if self._is_published(entry))

    def _is_published(self, directory: Path) -> bool:
        return (directory / MANIFEST).is_file()

    def _contained(self, path: Path, refusal: type[ShoalError] = ManifestInvalid) -> Path:
        """A path that leads to a plain file inside the root, or to nothing."""
        leads_to = path.resolve()
        if not leads_to.is_relative_to(self.path.resolve()):
            raise refusal(f"{path} leads to {leads_to}, out of the export root; publish the file itself")
        if path.exists() and not path.is_file():
            # To read a pipe is to wait for whoever writes to it.
            raise refusal(f"{path} cannot be read: it is no plain file; publish it again")
        return path

    def _manifest(self, view: str, directory: Path) -> Manifest:
        path = directory / MANIFEST
        try:
            data = self._contained(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise NotPublished(f"view {view!r}: {directory} is not published (it has no {MANIFEST})") from None
        except OSError as error:
            raise ManifestInvalid(f"{path} cannot be read: {error}") from error
        manifest = unseal(data, Manifest, str(path))
        if manifest.view.name != view:
            raise ManifestInvalid(f"{path} is of view {manifest.view.name!r}, expected {view!r}")
        return manifest


def _is_seq(name: str) -> bool:
    return name.isascii() and name.isdigit()


def file_checksum(path: Path) -> str:
    """XXH3 (64 bits, hex) of a file's bytes."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make names that were created in or moved into a directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_aside(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with temporary.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return temporary


def _create_exclusively(path: Path, data: bytes) -> None:
    """Create a file whole or not at all; FileExistsError if it exists. A hard link is both atomic and exclusive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _write_aside(path, data)
    reached("export.manifest-aside")
    try:
        os.link(temporary, path)
    except FileNotFoundError:
        # Whoever published it meanwhile removes what nobody lists.
        if path.exists():
            raise FileExistsError(path) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
    sync_directory(path.parent.parent)
