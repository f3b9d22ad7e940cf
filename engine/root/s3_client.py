"""Access S3: create the client, resume reads after a lost connection, and translate S3's errors.

boto3 handles credentials, profiles and regions. It also reads `AWS_ENDPOINT_URL`, the address of a server other than
Amazon's. A request is tried up to five times, with jitter between the attempts.
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

from shoal.engine.base.errors import RootUnreadable, SettingsInvalid, ShoalError

ATTEMPTS = 5
CONNECTIONS = 16
_CONNECT_SECONDS = 5.0
_READ_SECONDS = 20.0
_BACKOFF_SECONDS = 0.2
_BLOCK = 1 << 20
_ABSENT = {"NoSuchKey", "NotFound", "404"}
_UNCHANGED = {"304", "NotModified"}
_BROKEN_OFF = (HTTPClientError, IncompleteReadError, FlexibleChecksumError)
"""The errors that boto3 raises if a body ends early, stalls or is damaged. boto3's own retries cover only the headers
of a response."""
_ENDPOINT = "AWS_ENDPOINT_URL (or endpoint_url in the profile)"
_MAY_PASS = {401, 404, 408, 429}
"""HTTP statuses below 500 that do not concern the requested object."""


def s3_client(endpoint: str | None = None, region: str | None = None) -> Any:
    """Return a client that many threads may share. The client's settings come from the environment and the profile.
    `endpoint` and `region` override these settings. They are for a process that gets both values from another
    process."""
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
    """Raise SettingsInvalid if no client can be created with the settings from the environment and the profile. Discard
    the client of this check, because a server forks before it makes requests."""
    try:
        s3_client()
    except ValueError as error:
        raise SettingsInvalid(f"S3: {error}; set {_ENDPOINT} to a URL, such as https://HOST:PORT") from error
    except BotoCoreError as error:
        raise SettingsInvalid(f"S3: {error}; check the AWS_ variables and the profile") from error


class SharedClient:
    """One client per process. The client is created at its first use, because a server forks before it makes
    requests."""

    def __init__(self, endpoint: str | None = None, region: str | None = None) -> None:
        self._endpoint = endpoint
        self._region = region
        self._lock = threading.Lock()
        self._client: Any = None

    def get(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = s3_client(self._endpoint, self._region)
        return self._client


@contextmanager
def failures(address: str, kind: type[ShoalError] = RootUnreadable, *, of_object: bool = False) -> Iterator[None]:
    """Translate errors of S3, or of the connection to S3, into errors of Shoal.

    Args:
        address: the address that messages name.
        kind: the class of the translated errors.
        of_object: whether the requests read one object; if that object does not exist, FileNotFoundError is raised.
    """
    try:
        yield
    except ClientError as error:
        if of_object and error_code(error) in _ABSENT:
            raise FileNotFoundError(f"{address} is missing") from None
        raise kind(f"{address}: {said(error)}; {_mend(error_status(error), error_code(error))}") from error
    except ResponseParserError as error:
        raise kind(f"{address}: the server at the endpoint is not S3 ({error}); check {_ENDPOINT}") from error
    except (BotoCoreError, ValueError) as error:
        raise kind(
            f"{address}: the request to S3 failed: {error}; check the address of S3, the network and the credentials"
        ) from error


def error_code(error: ClientError) -> str:
    """Return S3's code for an error, such as NoSuchKey."""
    return str(error.response.get("Error", {}).get("Code", ""))


def error_status(error: ClientError) -> int:
    """Return the HTTP status of an error; 0 if the error has no status."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def said(error: ClientError) -> str:
    """Describe an error that S3 returned."""
    message = error.response.get("Error", {}).get("Message") or "no message"
    name = "" if error_code(error).isdecimal() else f" {error_code(error)}"
    return f"S3 answers {error_status(error)}{name}: {message}"


def fault_of_object(error: BaseException | None) -> str | None:
    """Return the reason why S3 cannot return an existing object, and the fix; None for any other error."""
    if isinstance(error, FlexibleChecksumError):
        return f"its bytes changed after they were written ({error}); publish it again, or a snapshot with --full"
    if isinstance(error, ClientError) and error_code(error) == "InvalidObjectState":
        return f"{said(error)}; restore it from the archive, and correct the bucket's lifecycle rules"
    return None


def may_be_of_object(error: BaseException | None) -> bool:
    """Return whether an error may concern only this object, because of the object's owner, KMS key or policy."""
    return isinstance(error, ClientError) and 400 <= error_status(error) < 500 and error_status(error) not in _MAY_PASS


def read_range(client: Any, bucket: str, key: str, start: int, length: int) -> Iterator[bytes]:
    """Yield bytes of an object, block by block. If a body ends early or stalls, the rest is requested again.

    Raises:
        BotoCoreError, ClientError: the last attempt failed.
    """
    end = start + length
    failed = 0
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
    """Return the ETag and all bytes of a small object; None if its ETag is still `etag`. Raise as `read_range` does."""
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
    """Wait before another attempt: exponential backoff with jitter, so that many clients do not retry at once."""
    time.sleep(random.uniform(0, _BACKOFF_SECONDS * 2**attempt))


def _mend(status: int, code: str) -> str:
    if status in {401, 403}:
        return "check the credentials, and their permissions there"
    if code == "NoSuchBucket":
        return "create the bucket, or give another one"
    if code.isdecimal():
        # S3's error codes are words, never numbers.
        return f"if the server is not S3, correct {_ENDPOINT}; otherwise check the server, and try again"
    return "check the server, and try again"
