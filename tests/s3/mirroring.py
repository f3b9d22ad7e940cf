"""Publish entries in S3 as an exporter does: they are made in a directory and then copied."""

from shoal.engine.root.export_root import MANIFEST, ExportRoot, entry_directory
from shoal.engine.root.manifest import Manifest


def mirror(local: ExportRoot, remote: ExportRoot) -> None:
    """Publish in `remote` all entries and services of `local` that are missing there."""
    if services := local.services():
        remote.publish_services(services)
    for view in local.views():
        there = remote.sequence_numbers(view)
        for seq in local.sequence_numbers(view):
            if seq not in there:
                bring(local, remote, local.entry(view, seq))


def bring(local: ExportRoot, remote: ExportRoot, manifest: Manifest) -> None:
    """Publish one entry with its files."""
    upload_files(local, remote, manifest)
    remote.publish(manifest)


def upload_files(local: ExportRoot, remote: ExportRoot, manifest: Manifest) -> None:
    for file in manifest.files:
        name = f"{entry_directory(manifest)}/{file.path}"
        assert file.path != MANIFEST
        remote.storage.replace(name, (local.path / name).read_bytes())
