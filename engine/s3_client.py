"""Talk to an S3: the client, ranged reads that go on where a connection broke, and what its errors mean.

Everything standard about it is boto3's: credentials, profiles, regions, and `AWS_ENDPOINT_URL` for any other server
than Amazon's. A request is tried up to five times, with jitter between the tries.
"""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.parsers import ResponseParserError

from engine.errors import RootUnreadable, SettingsInvalid, ShoalError

ATTEMPTS = 5
CONNECTIONS = 16
_CONNECT_SECONDS = 5.0
_READ_SECONDS = 20.0
_BACKOFF_SECONDS = 0.2
_BLOCK = 1 << 20
_ABSENT = {"NoSuchKey", "NotFound", "404"}
_UNCHANGED = {"304", "NotModified"}
_BROKEN_OFF = (HTTPClientError, IncompleteReadError, FlexibleChecksumError)
"""What boto3 raises if a body ends early, stalls or is damaged: its own retries cover only the response's headers."""
_ENDPOINT = "AWS_ENDPOINT_URL (or endpoint_url in the profile)"
_MAY_PASS = {401, 404, 408, 429}
"""Statuses below 500 that are not about the requested object."""


def s3_client(endpoint: str | None = None, region: str | None = None) -> Any:
    """A client as the environment and the profile say; it may be used by many threads. `endpoint` and `region` are
    those of another process, which hands its own on."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name=region,
        config=Config(
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            max_pool_connections=CONNECTIONS,
            user_agent_extra="shoal",
        ),
    )


def check_settings() -> None:
    """Raise SettingsInvalid if no client can be made from the environment and the profile. The client made here is
    discarded, because a server forks before it makes requests."""
    try:
        s3_client()
    except ValueError as error:
        raise SettingsInvalid(f"S3: {error}; set {_ENDPOINT} to a URL, as https://HOST:PORT") from error
    except BotoCoreError as error:
        raise SettingsInvalid(f"S3: {error}; check the AWS_ variables and the profile") from error


class SharedClient:
    """One client a process, made when it is first needed: a server forks before."""

    def __init__(self, endpoint: str | None = None, region: str | None = None) -> None:
        self._endpoint, self._region = endpoint, region
        self._lock = threading.Lock()
        self._client: Any = None

    def get(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = s3_client(self._endpoint, self._region)
        return self._client


@contextmanager
def failures(address: str, kind: type[ShoalError] = RootUnreadable, *, of_object: bool = False) -> Iterator[None]:
    """Raise errors of S3, or of the connection to it, as errors of Shoal.

    Args:
        of_object: the requests read one object; if it does not exist, FileNotFoundError is raised.
    """
    try:
        yield
    except ClientError as error:
        if of_object and error_code(error) in _ABSENT:
            raise FileNotFoundError(f"{address} is missing") from None
        raise kind(f"{address}: {said(error)}; {_mend(error_status(error), error_code(error))}") from error
    except ResponseParserError as error:
        raise kind(f"{address}: the server that answers is not S3 ({error}); check {_ENDPOINT}") from error
    except (BotoCoreError, ValueError) as error:
        raise kind(
            f"{address}: S3 cannot be asked: {error}; check its address, the network and the credentials"
        ) from error


def error_code(error: ClientError) -> str:
    """What S3 calls an error."""
    return str(error.response.get("Error", {}).get("Code", ""))


def error_status(error: ClientError) -> int:
    """The HTTP status of an error; 0 if it has none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def said(error: ClientError) -> str:
    """Describe an error that S3 returned."""
    told = error.response.get("Error", {}).get("Message") or "no message"
    name = "" if error_code(error).isdecimal() else f" {error_code(error)}"
    return f"S3 answers {error_status(error)}{name}: {told}"


def fault_of_object(error: BaseException | None) -> str | None:
    """Return why S3 does not return an object that it has, and the fix; None if the error does not say so."""
    if isinstance(error, FlexibleChecksumError):
        return f"its bytes are not those that were written ({error}); publish it again, or a snapshot with --full"
    if isinstance(error, ClientError) and error_code(error) == "InvalidObjectState":
        return f"{said(error)}; restore it from the archive, and correct the bucket's lifecycle rules"
    return None


def may_be_of_object(error: BaseException | None) -> bool:
    """Whether an error may concern only this object: its owner, KMS key or policy."""
    return isinstance(error, ClientError) and 400 <= error_status(error) < 500 and error_status(error) not in _MAY_PASS


def read_range(client: Any, bucket: str, key: str, start: int, length: int) -> Iterator[bytes]:
    """Bytes of an object, block by block. A body that breaks off, or stalls, is asked for again from there on.

    Raises:
        BotoCoreError, ClientError: as boto3 does, after the last try.
    """
    end, failed = start + length, 0
    while start < end:
        try:
            body = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")["Body"]
            with body:
                for block in body.iter_chunks(_BLOCK):
                    start += len(block)
                    yield block
            if start < end:
                raise IncompleteReadError(actual_bytes=length - (end - start), expected_bytes=length)
        except _BROKEN_OFF:
            failed += 1
            if failed == ATTEMPTS:
                raise
            pause(failed)


def read_whole(client: Any, bucket: str, key: str, etag: str | None) -> tuple[str, bytes] | None:
    """The ETag and all bytes of a small object; None if its ETag is still `etag`. Raises as `read_range` does."""
    condition = {"IfNoneMatch": etag} if etag else {}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            answer = client.get_object(Bucket=bucket, Key=key, **condition)
            with (body := answer["Body"]):
                return answer["ETag"], body.read()
        except ClientError as error:
            if etag and error_code(error) in _UNCHANGED:
                return None
            raise
        except _BROKEN_OFF:
            if attempt == ATTEMPTS:
                raise
            pause(attempt)
    raise AssertionError("the last attempt returns or raises")


def pause(attempt: int) -> None:
    """Wait before another attempt: longer each time, and by chance, so that many do not come back at once."""
    time.sleep(random.uniform(0, _BACKOFF_SECONDS * 2**attempt))


def _mend(status: int, code: str) -> str:
    if status in {401, 403}:
        return "check the credentials, and their permissions there"
    if code == "NoSuchBucket":
        return "make the bucket, or name another"
    if code.isdecimal():
        # S3's error codes are words, never numbers.
        return f"if the server is not S3, correct {_ENDPOINT}; otherwise check the server, and try again"
    return "check the server, and try again"
