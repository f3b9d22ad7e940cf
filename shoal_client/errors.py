"""Every error that a caller of the client can meet, grouped by where it comes from.

The server's own errors have here the names that it answers with as `code`, and the same parents.
"""

from collections.abc import Mapping
from typing import Any


class ShoalError(Exception):
    """Base of all errors that the client raises on purpose. One that a push ended with names in `idempotency_key` what
    to push it again under."""

    idempotency_key: str | None = None


# --- in the client itself ----------------------------------------------------------------------------------------


class AddressInvalid(ShoalError, ValueError):
    """An address of a server is none, or the same stands twice."""


class RequestInvalid(ShoalError, ValueError):
    """A request was rejected before it was sent, or a setting when the client was made: an argument has a wrong type or
    value, or columns do not match each other."""


class FormMissing(ShoalError, TypeError):
    """An answer came in a format that has not the form which was asked of it."""


class ClientClosed(ShoalError):
    """The client was closed; make a new one."""


class ClientElsewhere(ShoalError, RuntimeError):
    """An asynchronous client was used in another event loop before; make one for each event loop."""


class ClientForked(ClientElsewhere):
    """An asynchronous client was made in another process than this; make one here."""


class NoAnswer(ShoalError, ConnectionError):
    """No server answered: connections were refused, or ended."""


class DeadlineExceeded(ShoalError, TimeoutError):
    """The caller's time was over before there was an answer."""


class AnswerInvalid(ShoalError):
    """What came is not what a Shoal server sends."""


class ShardMisplaced(ShoalError):
    """A server holds another shard than the one that the client was told."""


class ShardsDisagree(ShoalError):
    """Shards stand at different places in a view's log, and did not come to agree in time.

    `positions` has, for each view, the place of each shard, by its number from 1.
    """

    def __init__(self, message: str, positions: Mapping[str, Mapping[int, Any]]) -> None:
        super().__init__(message)
        self.positions = positions


class PushIncomplete(ShoalError):
    """Some of the stores that a push goes to have it, others may not: `done` and `failed` name them by address.

    Pushing it again under `idempotency_key` is safe.
    """

    def __init__(self, message: str, done: tuple[str, ...], failed: Mapping[str, ShoalError]) -> None:
        super().__init__(message)
        self.done = done
        self.failed = failed


# --- from the server ---------------------------------------------------------------------------------------------


class ServerError(ShoalError):
    """A server answered with an error: its `code`, HTTP `status`, `retry_after` in seconds if it said so, `address`."""

    def __init__(
        self, message: str, *, code: str = "", status: int = 0, retry_after: float | None = None, address: str = ""
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.retry_after = retry_after
        self.address = address


class TokenInvalid(ServerError):
    """The request needs a token, and has none that the server knows."""


class RoleMissing(ServerError):
    """The request's token has not the role that the request needs."""


class LookupInvalid(ServerError):
    """The request itself is wrong: its shape, a type, or a length."""


class UnknownFeature(LookupInvalid):
    """The store has no such view, feature or feature service."""


class PushInvalid(LookupInvalid):
    """Rows that were pushed do not fit their view."""


class PushElsewhere(PushInvalid):
    """Rows were pushed to a view that is kept in a table."""


class IdempotencyKeyReused(PushInvalid):
    """The server knows another push to the view by this idempotency key; nothing of this one was applied."""


class RequestTooLarge(LookupInvalid):
    """The request is over one of the server's limits."""


class EncodingUnsupported(LookupInvalid):
    """The request's body is packed in a way that the server cannot unpack."""


class NotAcceptable(LookupInvalid):
    """The server offers none of the formats that the client accepts."""


class DeadlineInvalid(LookupInvalid):
    """The server does not take the time that the client waits for one."""


class BodyTooSlow(LookupInvalid):
    """The request's body took longer to arrive than the server waits."""


class KeyOutsideShard(ServerError):
    """Keys belong to another shard than the one that the server holds."""


class StaleFeatures(ServerError):
    """Rows are older than accepted, and the lookup was to fail then."""


class RowsUnavailable(ServerError):
    """Rows that are kept in a table did not come in time, and the lookup was to fail then."""


class TableFailed(ServerError):
    """A table that rows are kept in, or the way to it, fails."""


class TableMissing(TableFailed):
    """There is no such table, or nothing of a view was written to it yet."""


class TableClientMissing(ServerError):
    """The server lacks the packages by which tables are asked."""


class PushesFull(ServerError):
    """Too many pushed rows wait to be written."""


class StoreFull(ServerError):
    """The server's disk has no room for what was pushed."""


class WriterUnavailable(ServerError):
    """The server has no writer that takes pushes now."""


class StoreNotFound(ServerError):
    """Nothing is loaded into the server's store yet."""


class StoreUnreadable(ServerError):
    """The server's system does not let it read its store now."""


class StoreMoved(ServerError):
    """The server's store was moved, deleted or replaced under it, so that it acknowledges nothing."""


class StoreDamaged(ServerError):
    """The server's store fails its checks."""


class ViewDamaged(StoreDamaged):
    """The data of one view cannot be read; the store's other views can."""


class Overloaded(ServerError):
    """The server has more to do than it can do in time."""


class DeadlinePassed(ServerError):
    """The server was told how long the client waits, and that was over."""


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
"""The class of each `code` that a server answers with; others are plain `ServerError`."""
