"""An export root under a prefix of a bucket in S3, or in any server that speaks its protocol.

There is no rename in S3, and none is needed: an object appears whole, and a manifest is created by a PUT that succeeds
only where there is none (`If-None-Match: *`). A server that ignores this would let two exporters both win; it is found
out before a manifest is written.
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

from engine.errors import (
    FileDamaged,
    ManifestInvalid,
    NotPublished,
    RootNotWritable,
    RootUnreadable,
    SettingsInvalid,
    ShoalError,
)
from engine.storage import S3_SCHEME, StoredFile

try:
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import BotoCoreError, ClientError

    from engine.s3_client import (
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
    """The `Storage` of a prefix: nothing outside it is read, listed or written. Threads may share one."""

    listed_every_seconds = 60.0

    def __init__(self, address: str, *, endpoint: str | None = None, region: str | None = None) -> None:
        bucket, _, prefix = address.removeprefix(S3_SCHEME).partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise SettingsInvalid(f"{address!r} names no bucket of S3; an export root there is s3://BUCKET/PREFIX")
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
        """The URL of a server other than Amazon's; None for theirs."""
        url: str = self.client.meta.endpoint_url
        return None if re.search(r"\.amazonaws\.com(\.cn)?$", url) else url

    @property
    def region(self) -> str | None:
        """The region that requests are signed for."""
        region: str | None = self.client.meta.region_name
        return region

    def key(self, name: str) -> str:
        """The key of a file's object."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def where(self, name: str) -> str:
        return f"{S3_SCHEME}{self.bucket}/{self.key(name)}"

    def check_exists(self) -> None:
        if not self._has(""):
            raise NotPublished(f"export root {self} has nothing in it; `shoal export --to {self}` publishes there")

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
        # Listing begins behind a key, and this one is before all that begin with `since`.
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
        """As `Storage.read`. A document that was read lately comes again only if its ETag is another."""
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
        """As `Storage.fetch`: a file without a name in the directory for such (TMPDIR), filled by parallel reads."""
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
        # Of a PUT whose answer was lost, the second try finds the object of the first.
        if not self._put_new(name, data) and self.read(name) != data:
            raise FileExistsError(f"{self.where(name)} is there already")

    def replace(self, name: str, data: bytes) -> None:
        with failures(self.where(name), RootNotWritable):
            self.client.put_object(Bucket=self.bucket, Key=self.key(name), Body=data)

    def remove_directory(self, directory: str) -> None:
        self.remove([file.name for file in self.files(directory)])

    def upload(self, name: str, stream: BinaryIO) -> None:
        """Create or replace a file of any size: a large one in parts, several at a time. May close the stream."""
        stream.seek(0)
        with failures(self.where(name), RootNotWritable):
            self.client.upload_fileobj(stream, self.bucket, self.key(name), Config=_TRANSFER)

    def copy(self, name: str, target: str) -> None:
        """Copy a file of any size inside the root; its bytes stay in S3."""
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
                    raise RootNotWritable(f"{S3_SCHEME}{self.bucket}/{error['Key']} stays: {error.get('Message')}")

    @contextmanager
    def reading(self, name: str, refusal: type[ShoalError]) -> Iterator[None]:
        """Raise errors of reading one object: as `refusal` if only this object fails, which every node then meets, and
        otherwise as errors of the root."""
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
        """Whether an object that was read before can still be read: if so, the credentials and the network still
        work."""
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
        """Raises RootNotWritable where a PUT that is to create would replace."""
        if not self._is_exclusive and self._put_new(_PROBE, b"") and self._put_new(_PROBE, b""):
            raise RootNotWritable(
                f"{self}: this S3 ignores If-None-Match, so that of two exporters both could publish one entry; "
                f"use a server that creates exclusively, or a newer version of it"
            )
        self._is_exclusive = True

    def _put_new(self, name: str, data: bytes) -> bool:
        """Whether an object was created; False if there is one."""
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
        # Whoever waits for news asks again and again, and a request that lists costs as much as ten others.
        if below not in self._seen and any(self._files(below, PaginationConfig={"MaxItems": 1})):
            self._seen.add(below)
        return below in self._seen

    def _files(self, below: str, **more: Any) -> Iterator[StoredFile]:
        for page in self._pages(below, **more):
            for found in page.get("Contents", ()):
                name = found["Key"].removeprefix(self.key(""))
                yield StoredFile(name, found["Size"], found["LastModified"].timestamp())

    def _pages(self, below: str, **more: Any) -> Iterator[dict[str, Any]]:
        """The pages of a list of what is below a name, which ends with a slash or is empty."""
        with failures(str(self)):
            pages = self.client.get_paginator("list_objects_v2")
            yield from pages.paginate(Bucket=self.bucket, Prefix=self.key(below), **more)


class _RangedObject(io.RawIOBase):
    """An object as a file that is read in ranges."""

    def __init__(self, storage: S3Storage, name: str) -> None:
        self._storage, self._name, self._at = storage, name, 0
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
        storage, length = self._storage, max(0, min(len(buffer), self._size - self._at))
        with storage.reading(self._name, FileDamaged):
            data = b"".join(read_range(storage.client, storage.bucket, storage.key(self._name), self._at, length))
        buffer[:length] = data
        self._at += length
        return length
