"""Every error that a caller of the client can get, grouped by origin.

The classes for the server's errors have the names of the server's `code` values, and the same base classes as in the
server.
"""

from collections.abc import Mapping
from typing import Any


class ShoalError(Exception):
    """The base of all errors that the client raises on purpose. After a failed push, `idempotency_key` is the key with
    which to push the rows again."""

    idempotency_key: str | None = None


# --- in the client itself ----------------------------------------------------------------------------------------


class AddressInvalid(ShoalError, ValueError):
    """The address of a server is invalid, or occurs twice."""


class RequestInvalid(ShoalError, ValueError):
    """The client rejected a request before it was sent, or a setting when the client was made. An argument has a wrong
    type or value, or columns do not match each other."""


class FormMissing(ShoalError, TypeError):
    """The format of an answer does not support the requested form."""


class ClientClosed(ShoalError):
    """The client was closed; make a new one."""


class ClientElsewhere(ShoalError, RuntimeError):
    """An asynchronous client was used in another event loop before; make one for each event loop."""


class ClientForked(ClientElsewhere):
    """An asynchronous client was made in another process; make a new one in this process."""


class NoAnswer(ShoalError, ConnectionError):
    """No server answered: connections were refused, or ended."""


class DeadlineExceeded(ShoalError, TimeoutError):
    """The deadline passed before there was an answer."""


class AnswerInvalid(ShoalError):
    """The response is not one that a Shoal server sends, or does not match the request."""


class ShardMisplaced(ShoalError):
    """A server holds another shard than the client's settings say."""


class ShardsDisagree(ShoalError):
    """Shards are at different positions in a view's log, and did not agree in time.

    `positions` has, for each view, the position of each shard, by its number from 1.
    """

    def __init__(self, message: str, positions: Mapping[str, Mapping[int, Any]]) -> None:
        super().__init__(message)
        self.positions = positions


class PushIncomplete(ShoalError):
    """Not every server confirmed a push. `done` has the addresses of the servers that have the push, and `failed` the
    errors of the others by address; those servers may have the push or not.

    It is safe to push the same rows again under `idempotency_key`.
    """

    def __init__(self, message: str, done: tuple[str, ...], failed: Mapping[str, ShoalError]) -> None:
        super().__init__(message)
        self.done = done
        self.failed = failed


# --- from the server ---------------------------------------------------------------------------------------------


class ServerError(ShoalError):
    """A server answered with an error: its `code`, HTTP `status`, `retry_after` in seconds if given, and `address`."""

    def __init__(
        self, message: str, *, code: str = "", status: int = 0, retry_after: float | None = None, address: str = ""
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.retry_after = retry_after
        self.address = address


class TokenInvalid(ServerError):
    """The request needs a token, but has no token that the server knows."""


class RoleMissing(ServerError):
    """The request's token lacks the required role."""


class LookupInvalid(ServerError):
    """The request itself is wrong: its shape, a type, or a length."""


class UnknownFeature(LookupInvalid):
    """The store has no such view, feature or feature service."""


class PushInvalid(LookupInvalid):
    """Pushed rows do not fit their view."""


class PushElsewhere(PushInvalid):
    """Rows were pushed to a view that is kept in a table."""


class IdempotencyKeyReused(PushInvalid):
    """The server knows a different push to the view under this idempotency key. The server applied nothing of the new
    push."""


class RequestTooLarge(LookupInvalid):
    """The request exceeds one of the server's limits."""


class EncodingUnsupported(LookupInvalid):
    """The server does not support the Content-Encoding of the request's body."""


class NotAcceptable(LookupInvalid):
    """The server offers none of the formats that the client accepts."""


class DeadlineInvalid(LookupInvalid):
    """The header with the client's timeout does not contain a valid time."""


class BodyTooSlow(LookupInvalid):
    """The request's body took longer to arrive than the server waits."""


class KeyOutsideShard(ServerError):
    """Keys belong to another shard than the one that the server holds."""


class StaleFeatures(ServerError):
    """Rows are older than accepted, and the lookup has stale="fail"."""


class RowsUnavailable(ServerError):
    """Rows did not arrive from their table in time, and the lookup has partial="fail"."""


class TableFailed(ServerError):
    """A table that contains rows of a view fails, or the connection to this table fails."""


class TableMissing(TableFailed):
    """A table does not exist, or no rows of the view were written to it yet."""


class TableClientMissing(ServerError):
    """The server lacks the packages for access to tables."""


class PushesFull(ServerError):
    """Too many pushed rows wait for the writer."""


class StoreFull(ServerError):
    """The server's disk has no room for the pushed rows."""


class WriterUnavailable(ServerError):
    """The server has no writer that accepts pushes now."""


class StoreNotFound(ServerError):
    """Nothing is loaded into the server's store yet."""


class StoreUnreadable(ServerError):
    """The server's operating system does not let it read its store now."""


class StoreMoved(ServerError):
    """The server's store was moved, deleted or replaced while the server ran, so the server acknowledges nothing."""


class StoreDamaged(ServerError):
    """The server's store fails its checks."""


class ViewDamaged(StoreDamaged):
    """The data of one view cannot be read; the store's other views can."""


class Overloaded(ServerError):
    """The server has more requests than it can answer in time."""


class DeadlinePassed(ServerError):
    """The timeout that the client sent was over before the server could answer."""


BY_CODE: Mapping[str, type[ServerError]] = {
    kind.__name__: kind
    for kind in (
        TokenInvalid,
        RoleMissing,
        LookupInvalid,
        UnknownFeature,
        PushInvalid,
        PushElsewhere,
        IdempotencyKeyReused,
        RequestTooLarge,
        EncodingUnsupported,
        NotAcceptable,
        DeadlineInvalid,
        BodyTooSlow,
        KeyOutsideShard,
        StaleFeatures,
        RowsUnavailable,
        TableFailed,
        TableMissing,
        TableClientMissing,
        PushesFull,
        StoreFull,
        WriterUnavailable,
        StoreNotFound,
        StoreUnreadable,
        StoreMoved,
        StoreDamaged,
        ViewDamaged,
        Overloaded,
        DeadlinePassed,
    )
}
"""The class for each `code` of a server's error; any other code is a plain `ServerError`."""
