"""Open the storage at the address of an export root."""

import os
from pathlib import Path

from shoal.engine.base.errors import SettingsInvalid
from shoal.engine.root.directory_storage import DirectoryStorage
from shoal.engine.root.storage import S3_SCHEME, Storage, is_address


def storage_at(address: str | os.PathLike[str]) -> Storage:
    """Return the storage at an address: `s3://BUCKET/PREFIX`, or the path of a directory.

    Raises:
        SettingsInvalid: the address has another scheme, an S3 address names no bucket, or boto3 is not installed.
    """
    if isinstance(address, str) and address.startswith(S3_SCHEME):
        # Importing boto3 takes half a second. A directory does not need boto3.
        from shoal.engine.root.s3_storage import S3Storage

        return S3Storage(address)
    if isinstance(address, str) and is_address(address):
        raise SettingsInvalid(
            f"{address!r} is not an export root: give a directory, or s3://BUCKET/PREFIX in just this spelling; write "
            f"./{address} if it is the path of a directory"
        )
    return DirectoryStorage(Path(address))
