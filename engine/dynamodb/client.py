"""Talk to DynamoDB: one operation is one signed request, whose answer is parsed once.

Endpoint, region and credentials are those of boto3's environment and profiles, and its library signs. It does not make
the requests: it would block, and takes milliseconds to make objects of the attributes of a hundred items.
"""

import asyncio
import binascii
import time
import zlib
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from engine.errors import TableClientMissing, TableFailed, TableMissing

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
    """A client in one event loop. `connect` it before use, and close it at the end."""

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
        """Find out whom to ask, and as whom.

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
        """What the server answers to an operation within so many seconds.

        Raises:
            TableMissing: there is no such table.
            TableFailed: anything else, and whether it may pass.
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
                f"{self.endpoint} cannot be asked: {error or type(error).__name__}; see to its address and the network",
                "Broken",
                is_transient=True,
            ) from error
        stated = response.headers.get("x-amz-crc32")
        if stated is not None and stated != str(zlib.crc32(content)):
            raise TableFailed(f"{self.endpoint}: an answer came damaged", "Damaged", is_transient=True)
        if response.status != 200:
            raise self._failure(operation, document, response.status, content)
        try:
            answer: dict[str, Any] = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise TableFailed(
                f"{self.endpoint} answers {operation} with what is no JSON: {error}", "Damaged", is_transient=True
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
        """Take the credentials that hold now: those that expire are fetched anew, which may take its time."""
        self._frozen = await asyncio.to_thread(self._credentials.get_frozen_credentials)
        self._frozen_until = time.monotonic() + _CREDENTIALS_SECONDS

    def _failure(self, operation: str, document: dict[str, Any], status: int, content: bytes) -> TableFailed:
        try:
            told = orjson.loads(content)
            code, message = str(told["__type"]).rpartition("#")[2], told.get("message") or told.get("Message") or ""
        except (orjson.JSONDecodeError, KeyError, TypeError):
            code, message = f"HTTP {status}", content[:200].decode(errors="replace")
        table = document.get("TableName") or ", ".join(document.get("RequestItems", {}))
        if code == "ResourceNotFoundException":
            return TableMissing(
                f"{self.endpoint} has no table {table!r}; `shoal sync-dynamodb --create-tables` makes it", code
            )
        mend = "set the clock right" if code in _CLOCK_OFF else "see to the credentials, and what they may do there"
        message = f"table {table!r} at {self.endpoint}: {operation} is answered {status} {code}: {message or 'no more'}"
        is_transient = code in _TRANSIENT or status >= 500
        return TableFailed(
            message if is_transient or status == 404 else f"{message}; {mend}", code, is_transient=is_transient
        )


def _environment() -> tuple[str, str, Any]:
    """The endpoint, the region and the credentials that boto3 would take."""
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
        raise TableFailed(f"DynamoDB cannot be asked: {error}; set AWS_DEFAULT_REGION, or a profile") from error
    if credentials is None:
        raise TableFailed("DynamoDB cannot be asked without credentials; give some in the ways that boto3 knows")
    return str(client.meta.endpoint_url), str(client.meta.region_name), credentials


def binary(value: bytes) -> dict[str, str]:
    """Bytes as an attribute."""
    return {"B": binascii.b2a_base64(value, newline=False).decode()}


def number(value: int) -> dict[str, str]:
    """An integer as an attribute."""
    return {"N": str(value)}


def binary_of(attribute: dict[str, str]) -> bytes:
    """The bytes of an attribute."""
    return binascii.a2b_base64(attribute["B"])
