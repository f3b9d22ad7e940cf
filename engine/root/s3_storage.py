"""An export root under a prefix of a bucket in S3, or in any server with S3's protocol.

S3 has no rename, and this module does not need a rename: an object appears whole, and a manifest is created with a PUT
that fails if the object exists (`If-None-Match: *`). A server that ignores this header would let two exporters publish
the same entry. This module detects such a server before it writes a manifest.
"""

import io
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from shoal.engine.base.errors import (
    FileDamaged,
    ManifestInvalid,
    NotPublished,
    RootNotWritable,
    RootUnreadable,
    SettingsInvalid,
    ShoalError,
)
from shoal.engine.root.storage import S3_SCHEME, StoredFile

try:
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import BotoCoreError, ClientError

    from shoal.engine.root.s3_client import (
        ATTEMPTS,
        SharedClient,
        check_settings,
        error_code,
        failures,
        fault_of_object,
        may_be_of_object,
        pause,
        read_range,
        read_whole,
    )
except ImportError as error:
    raise SettingsInvalid(f"an export root in S3 needs boto3 ({error}); pip install 'shoal[s3]'") from error

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PART_BYTES = 8 << 20
_PARALLEL = 8
_FOOTER_BYTES = 64 << 10
_DELETED_AT_ONCE = 1000
_DOCUMENTS = 256
_WITNESSES = 3
_TAKEN = {"PreconditionFailed", "412"}
_RACED = "ConditionalRequestConflict"
_TRANSFER = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=4)
_PROBE = ".exclusive"


class S3Storage:
    """The `Storage` of a prefix: it does not read, list or write anything outside the prefix. Threads may share this
    object."""

    listed_every_seconds = 60.0

    def __init__(self, address: str, *, endpoint: str | None = None, region: str | None = None) -> None:
        bucket, _, prefix = address.removeprefix(S3_SCHEME).partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise SettingsInvalid(f"{address!r} names no bucket of S3; write s3://BUCKET/PREFIX")
        if endpoint is None:
            check_settings()
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self._shared = SharedClient(endpoint, region)
        self._documents: dict[str, tuple[str, bytes]] = {}
        self._seen: set[str] = set()
        self._keeping = threading.Lock()
        self._is_exclusive = False

    def __str__(self) -> str:
        return f"{S3_SCHEME}{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def client(self) -> Any:
        """The client of this process."""
        with failures(str(self)):
            return self._shared.get()

    @property
    def endpoint(self) -> str | None:
        """The URL of the server; None for a server of Amazon."""
        url: str = self.client.meta.endpoint_url
        return None if re.search(r"\.amazonaws\.com(\.cn)?$", url) else url

    @property
    def region(self) -> str | None:
        """The region in the signatures of requests."""
        region: str | None = self.client.meta.region_name
        return region

    def key(self, name: str) -> str:
        """Return the key of a file's object."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def where(self, name: str) -> str:
        return f"{S3_SCHEME}{self.bucket}/{self.key(name)}"

    def check_exists(self) -> None:
        if not self._has(""):
            raise NotPublished(f"export root {self} is empty; `shoal export --to {self}` publishes to it")

    def check_may_be_root(self) -> None:
        """Do nothing: a store is never in S3."""

    def directories(self, directory: str = "") -> list[str]:
        below = f"{directory}/" if directory else ""
        pages = self._pages(below, Delimiter="/")
        prefixes = (found["Prefix"] for page in pages for found in page.get("CommonPrefixes", ()))
        return [prefix.removeprefix(self.key(below)).rstrip("/") for prefix in prefixes]

    def has_directory(self, directory: str) -> bool:
        return self._has(f"{directory}/")

    def published(self, directory: str, document: str, *, since: str = "") -> list[str]:
        below = f"{directory}/"
        # The list begins after the key StartAfter. This key sorts before the keys of all files in the directories from
        # `since` on.
        after = {"StartAfter": self.key(below + since)} if since else {}
        found = (file.name.removeprefix(below).split("/") for file in self._files(below, **after))
        return sorted(path[0] for path in found if path[1:] == [document])

    def files(self, directory: str) -> Iterator[StoredFile]:
        return self._files(f"{directory}/")

    def holds(self, name: str) -> bool:
        try:
            self._size(name, ManifestInvalid)
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        return self._size(name, FileDamaged)

    def _size(self, name: str, refusal: type[ShoalError]) -> int:
        with self.reading(name, refusal):
            return int(self.client.head_object(Bucket=self.bucket, Key=self.key(name))["ContentLength"])

    def read(self, name: str) -> bytes:
        """As `Storage.read`. A recently read document is transferred again only if its ETag changed."""
        known = self._documents.get(name)
        try:
            with self.reading(name, ManifestInvalid):
                read = read_whole(self.client, self.bucket, self.key(name), known[0] if known else None)
        except FileNotFoundError:
            self._documents.pop(name, None)
            raise
        if read is None:
            assert known is not None
            return known[1]
        with self._keeping:
            self._documents[name] = read
            if len(self._documents) > _DOCUMENTS:
                del self._documents[next(iter(self._documents))]
        return read[1]

    def open(self, name: str) -> BinaryIO:
        return cast("BinaryIO", io.BufferedReader(_RangedObject(self, name), _FOOTER_BYTES))

    def fetch(self, name: str, size: int) -> BinaryIO:
        """As `Storage.fetch`: return an unnamed temporary file (in TMPDIR), filled by parallel reads."""
        stream = tempfile.TemporaryFile(prefix="shoal-")  # noqa: SIM115
        try:
            with ThreadPoolExecutor(_PARALLEL) as threads:
                starts = range(0, size, _PART_BYTES)
                fill = (threads.submit(self._fill, stream.fileno(), name, at, size) for at in starts)
                for done in list(fill):
                    done.result()
        except BaseException:
            stream.close()
            raise
        return cast("BinaryIO", stream)

    def create(self, name: str, data: bytes) -> None:
        self._check_exclusive()
        # If the response to a PUT was lost, the second attempt finds the object of the first attempt.
        if not self._put_new(name, data) and self.read(name) != data:
            raise FileExistsError(f"{self.where(name)} exists already")

    def replace(self, name: str, data: bytes) -> None:
        with failures(self.where(name), RootNotWritable):
            self.client.put_object(Bucket=self.bucket, Key=self.key(name), Body=data)

    def remove_directory(self, directory: str) -> None:
        self.remove([file.name for file in self.files(directory)])

    def upload(self, name: str, stream: BinaryIO) -> None:
        """Create or replace a file of any size. Several parts of a large file are sent at the same time. The upload may
        close the stream."""
        stream.seek(0)
        with failures(self.where(name), RootNotWritable):
            self.client.upload_fileobj(stream, self.bucket, self.key(name), Config=_TRANSFER)

    def copy(self, name: str, target: str) -> None:
        """Copy a file of any size inside the root, without a download of its bytes."""
        source = {"Bucket": self.bucket, "Key": self.key(name)}
        with failures(self.where(name), RootNotWritable):
            self.client.copy(source, self.bucket, self.key(target), Config=_TRANSFER)

    def remove(self, names: Iterable[str]) -> None:
        keys = [{"Key": self.key(name)} for name in names]
        with failures(str(self), RootNotWritable):
            for start in range(0, len(keys), _DELETED_AT_ONCE):
                order = {"Objects": keys[start : start + _DELETED_AT_ONCE], "Quiet": True}
                answer = self.client.delete_objects(Bucket=self.bucket, Delete=order)
                for error in answer.get("Errors", ()):
                    raise RootNotWritable(
                        f"{S3_SCHEME}{self.bucket}/{error['Key']} cannot be removed: {error.get('Message')}"
                    )

    @contextmanager
    def reading(self, name: str, refusal: type[ShoalError]) -> Iterator[None]:
        """Translate the errors of a read of one object. Raise `refusal` if only this object cannot be read; the read
        then fails on every node. Otherwise raise an error of the root."""
        where = self.where(name)
        try:
            with failures(where, of_object=True):
                yield
        except RootUnreadable as error:
            if (fault := fault_of_object(error.__cause__)) is not None:
                raise refusal(f"{where} cannot be read: {fault}") from error
            if may_be_of_object(error.__cause__) and self._gives_another(name):
                raise refusal(f"{error}; other objects of {self} can be read") from error
            raise

    def _gives_another(self, name: str) -> bool:
        """Return whether another, previously read object can still be read. If so, the credentials and the network
        still work."""
        others = [other for other in reversed(list(self._documents)) if other != name]
        for other in others[:_WITNESSES]:
            try:
                self.client.head_object(Bucket=self.bucket, Key=self.key(other))
                return True
            except (ClientError, BotoCoreError):
                continue
        return False

    def _fill(self, descriptor: int, name: str, start: int, size: int) -> None:
        with self.reading(name, FileDamaged):
            length = min(_PART_BYTES, size - start)
            for block in read_range(self.client, self.bucket, self.key(name), start, length):
                os.pwrite(descriptor, block, start)
                start += len(block)

    def _check_exclusive(self) -> None:
        """Raise RootNotWritable if a PUT with `If-None-Match: *` would replace an existing object."""
        if not self._is_exclusive and self._put_new(_PROBE, b"") and self._put_new(_PROBE, b""):
            raise RootNotWritable(
                f"{self}: this S3 ignores If-None-Match, so two exporters could publish the same entry; use a server "
                f"that supports If-None-Match, or a newer version of this server"
            )
        self._is_exclusive = True

    def _put_new(self, name: str, data: bytes) -> bool:
        """Create an object; return False if the object already exists."""
        with failures(self.where(name), RootNotWritable):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    self.client.put_object(Bucket=self.bucket, Key=self.key(name), Body=data, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    if error_code(error) in _TAKEN:
                        return False
                    if error_code(error) != _RACED or attempt == ATTEMPTS:
                        raise
                    pause(attempt)
        raise AssertionError("the last attempt returns or raises")

    def _has(self, below: str) -> bool:
        # Readers that wait for new entries call this again and again, and a list request costs as much as ten reads.
        if below not in self._seen and any(self._files(below, PaginationConfig={"MaxItems": 1})):
            self._seen.add(below)
        return below in self._seen

    def _files(self, below: str, **more: Any) -> Iterator[StoredFile]:
        for page in self._pages(below, **more):
            for found in page.get("Contents", ()):
                name = found["Key"].removeprefix(self.key(""))
                yield StoredFile(name, found["Size"], found["LastModified"].timestamp())

    def _pages(self, below: str, **more: Any) -> Iterator[dict[str, Any]]:
        """Yield the pages of the list of the objects below a name. The name ends with a slash or is empty."""
        with failures(str(self)):
            pages = self.client.get_paginator("list_objects_v2")
            yield from pages.paginate(Bucket=self.bucket, Prefix=self.key(below), **more)


class _RangedObject(io.RawIOBase):
    """An object as a read-only file. Each read requests one range of the object."""

    def __init__(self, storage: S3Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._at = 0
        self._size = storage.size(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        storage = self._storage
        length = max(0, min(len(buffer), self._size - self._at))
        with storage.reading(self._name, FileDamaged):
            data = b"".join(read_range(storage.client, storage.bucket, storage.key(self._name), self._at, length))
        buffer[:length] = data
        self._at += length
        return length
