"""A client of DynamoDB: one operation is one signed request, and its response is parsed once.

Endpoint, region and credentials come from boto3's environment and profiles, and botocore signs the requests. boto3 does
not send the requests: boto3 would block, and it needs milliseconds to turn the attributes of a hundred items into
objects.
"""

import asyncio
import binascii
import time
import zlib
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from shoal.engine.base.errors import TableClientMissing, TableFailed, TableMissing

_VERSION = "DynamoDB_20120810"
_MEDIA_TYPE = "application/x-amz-json-1.0"
_CREDENTIALS_SECONDS = 60.0
_TRANSIENT = {
    "InternalServerError",
    "ItemCollectionSizeLimitExceededException",
    "LimitExceededException",
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "ServiceUnavailable",
    "ThrottlingException",
    "TransactionInProgressException",
}
CONDITION_FAILED = "ConditionalCheckFailedException"
IN_USE = "ResourceInUseException"
_CLOCK_OFF = {"InvalidSignatureException", "RequestExpired"}


class DynamoClient:
    """A client in one event loop. Call `connect` before use, and `close` at the end."""

    def __init__(self, *, connections: int = 64) -> None:
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None
        self._credentials: Any = None
        self._frozen: Any = None
        self._frozen_until = 0.0
        self._refreshing: asyncio.Task[None] | None = None
        self.endpoint = ""
        self.region = ""

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> None:
        """Resolve the endpoint and the credentials, and open a session.

        Raises:
            TableClientMissing: boto3 is not installed.
            TableFailed: the environment names no region or no credentials.
        """
        self.endpoint, self.region, self._credentials = await asyncio.to_thread(_environment)
        await self._refresh()
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._connections, ttl_dns_cache=60, keepalive_timeout=60)
            self._session = aiohttp.ClientSession(
                connector=connector,
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
                timeout=aiohttp.ClientTimeout(total=None),
            )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(self, operation: str, document: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return the server's response to an operation, waiting at most `seconds`.

        Raises:
            TableMissing: the server has no such table.
            TableFailed: any other failure; `is_transient` says whether a retry may succeed.
        """
        assert self._session is not None, "the client is not connected"
        body = orjson.dumps(document)
        try:
            async with asyncio.timeout(seconds):
                headers = self._signed(operation, body)
                async with self._session.post(self.endpoint, data=body, headers=headers) as response:
                    content = await response.read()
        except TimeoutError:
            raise TableFailed(
                f"{self.endpoint} has not answered {operation} for {seconds:.3g} s", "Timeout", is_transient=True
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise TableFailed(
                f"{self.endpoint} cannot be reached: {error or type(error).__name__}; check its address and network",
                "Broken",
                is_transient=True,
            ) from error
        stated = response.headers.get("x-amz-crc32")
        if stated is not None and stated != str(zlib.crc32(content)):
            raise TableFailed(f"{self.endpoint}: a response has a wrong checksum", "Damaged", is_transient=True)
        if response.status != 200:
            raise self._failure(operation, document, response.status, content)
        try:
            answer: dict[str, Any] = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise TableFailed(
                f"{self.endpoint} answers {operation} with invalid JSON: {error}", "Damaged", is_transient=True
            ) from None
        return answer

    def _signed(self, operation: str, body: bytes) -> dict[str, str]:
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest

        if time.monotonic() > self._frozen_until and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self._refresh())
        headers = {"Content-Type": _MEDIA_TYPE, "X-Amz-Target": f"{_VERSION}.{operation}"}
        request = AWSRequest("POST", self.endpoint, headers=headers, data=body)
        SigV4Auth(self._frozen, "dynamodb", self.region).add_auth(request)
        return dict(request.headers.items())

    async def _refresh(self) -> None:
        """Take the current credentials. Expired credentials are fetched again, which may take a while."""
        self._frozen = await asyncio.to_thread(self._credentials.get_frozen_credentials)
        self._frozen_until = time.monotonic() + _CREDENTIALS_SECONDS

    def _failure(self, operation: str, document: dict[str, Any], status: int, content: bytes) -> TableFailed:
        try:
            reply = orjson.loads(content)
            code = str(reply["__type"]).rpartition("#")[2]
            message = reply.get("message") or reply.get("Message") or ""
        except (orjson.JSONDecodeError, KeyError, TypeError):
            code = f"HTTP {status}"
            message = content[:200].decode(errors="replace")
        table = document.get("TableName") or ", ".join(document.get("RequestItems", {}))
        if code == "ResourceNotFoundException":
            return TableMissing(
                f"{self.endpoint} has no table {table!r}; `shoal sync-dynamodb --create-tables` creates it", code
            )
        mend = "set this machine's clock" if code in _CLOCK_OFF else "check the credentials and their permissions"
        message = (
            f"table {table!r} at {self.endpoint}: {operation} failed with {status} {code}: {message or 'no message'}"
        )
        is_transient = code in _TRANSIENT or status >= 500
        return TableFailed(
            message if is_transient or status == 404 else f"{message}; {mend}", code, is_transient=is_transient
        )


def _environment() -> tuple[str, str, Any]:
    """Return the endpoint, the region and the credentials that boto3 would use."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise TableClientMissing("tables need boto3: pip install 'shoal[dynamodb]'") from None
    try:
        session = boto3.session.Session()
        client = session.client("dynamodb")
        credentials = session.get_credentials()
    except (BotoCoreError, ValueError) as error:
        raise TableFailed(
            f"boto3 cannot make a client of DynamoDB: {error}; set AWS_DEFAULT_REGION, or a profile"
        ) from error
    if credentials is None:
        raise TableFailed(
            "boto3 finds no credentials for DynamoDB; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        )
    return str(client.meta.endpoint_url), str(client.meta.region_name), credentials


def binary(value: bytes) -> dict[str, str]:
    """Return bytes as an attribute."""
    return {"B": binascii.b2a_base64(value, newline=False).decode()}


def number(value: int) -> dict[str, str]:
    """Return an integer as an attribute."""
    return {"N": str(value)}


def binary_of(attribute: dict[str, str]) -> bytes:
    """Return the bytes of an attribute."""
    return binascii.a2b_base64(attribute["B"])
