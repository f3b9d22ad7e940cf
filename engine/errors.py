"""Every error a caller of Shoal can meet, grouped by when it can happen.

Each class says in one sentence what caused it. A message names the thing, the value found, what was expected
and the mend. `exit_code` is what the command line ends with, `http_status` what the server answers.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self


class ShoalError(Exception):
    """Base of all errors that Shoal raises on purpose."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    retry_after: ClassVar[int | None] = None
    """After how many seconds trying again makes sense."""


# --- while definitions are read -------------------------------------------------------------------------------


class DefinitionError(ShoalError):
    """views.yaml, a schema or a feature service is wrong; the message names the file and the line."""

    exit_code = 2
    http_status = 400


# --- while Shoal is set against Feast -----------------------------------------------------------------------------


class FeastFailed(ShoalError):
    """Feast is not installed, cannot open the repository, or does not answer."""

    exit_code = 2


class ServerFailed(ShoalError):
    """The server that was asked in Shoal's place does not answer, or refuses."""

    exit_code = 2


class Unmappable(DefinitionError):
    """A Feast repository holds what views.yaml cannot say; the message lists it, with what to do about each."""


class FeastVersionInactive(DefinitionError):
    """A caller wrote or read a version of a Feast feature view other than the active one."""


# --- while an export is published ------------------------------------------------------------------------------


class SourceError(ShoalError):
    """A view's source lacks a column, holds a null key or has a type that does not fit its definition."""


class PublicationLost(ShoalError):
    """Another exporter published the same sequence number first."""

    exit_code = 3


class RemovalRefused(ShoalError):
    """An export would remove a larger share of a view's rows, or of a feature's values, than the view allows."""


class LogTaken(ShoalError):
    """A view's log was last written by another: an export or a stream goes on only with what is its own."""


class StreamFailed(ShoalError):
    """A stream cannot go on: Spark gave up on it, or the server refuses what it pushes."""


class RootNotWritable(ShoalError):
    """The export root's file system refuses what an exporter has to write."""


class SparkFailed(ShoalError):
    """Spark or Java is not installed, Spark did not start, or it gave up on a job."""


# --- while an export root is read ------------------------------------------------------------------------------


class ManifestInvalid(ShoalError):
    """A manifest is not JSON, fails its own checksum, or breaks the contract of the export root."""


class FormatNotUnderstood(ManifestInvalid):
    """A document of the export root has a newer format, or a member that only a newer version of Shoal understands."""


class FileDamaged(ShoalError):
    """A published file is missing, has the wrong size or checksum, or holds other rows than its manifest says."""


class NotPublished(ShoalError):
    """The export root, view or snapshot that was asked for does not exist."""

    http_status = 404


class RootUnreadable(ShoalError):
    """The file system of the export root fails."""


class RootSilent(ShoalError):
    """The file system of the export root does not answer, as one does not whose server is gone."""


class LineageError(ShoalError):
    """A published entry does not continue what the store holds."""

    http_status = 409


class DeltaGap(LineageError):
    """The next delta of a view is missing while later ones exist."""


class ForeignDelta(LineageError):
    """A delta's parent is not the entry that the store applied last."""


class SchemaChangeRefused(ShoalError):
    """A published schema changes a feature or a join key in a way that stored rows cannot follow."""

    http_status = 409


# --- while a store is opened or written ------------------------------------------------------------------------


class StoreNotFound(ShoalError):
    """The directory is not a Shoal store, or nothing was ever loaded into it."""

    http_status = 503


class ViewInUse(ShoalError):
    """A view cannot be dropped: a feature service names it, or the store would load it again."""

    exit_code = 2


class StoreClosed(ShoalError):
    """The store was closed in this process, so it cannot be looked up in."""


LOAD_AGAIN = "`shoal load` loads the view again, and a server that follows an export root does so by itself"
"""The mend of a view whose data is damaged."""

START_ANEW = (
    "restore a backup (`shoal restore`), or run `shoal store accept-loss`: it moves the files to `lost/`. Then rows "
    "from the export root are loaded again, and rows that were only pushed are lost"
)
"""How to mend a store whose catalog is damaged. Only its owner can say whether that is a loss."""


class NotCaughtUp(ShoalError):
    """The store does not stand where its export root does yet, or does no longer."""

    http_status = 503


class StoreDamaged(ShoalError):
    """The store's own data fails its checks."""

    http_status = 503


class ViewDamaged(StoreDamaged):
    """The data of one view cannot be read; the store's other views can."""


class StoreMoved(ShoalError):
    """The files that this process has open are not those at the store's path any more, so that nothing is acknowledged:
    the next process to open the store would not find the data."""

    http_status = 503


class NothingLost(ShoalError):
    """A loss was to be accepted, and the store has all that it recorded."""

    exit_code = 2


class PathTaken(ShoalError):
    """A backup or a store was to be written to a path where something lies already."""

    exit_code = 2


class BackupInvalid(ShoalError):
    """The directory is not a backup, or its files are not those that were backed up."""


class StoreUnreadable(ShoalError):
    """The system does not let the store's files be read now: too many are open, or access is denied."""

    http_status = 503


class StoreNotWritable(ShoalError):
    """A store or a backup cannot be created or written at this path."""

    exit_code = 2


class PathsSwapped(ShoalError):
    """A directory is of another kind than expected: a store, an export root or a backup."""

    exit_code = 2


class ProcessIdTaken(StoreUnreadable):
    """A process of another PID namespace reads the store, and has the same process id as this one."""


class StoreIsOtherShard(ShoalError):
    """The store holds another shard than the one that it was to be opened as."""

    exit_code = 2

    @classmethod
    def of(cls, store: object, found: object | None, wanted: object) -> Self:
        """That a store which holds a shard, or all rows, cannot become another."""
        holds = f"shard {found}" if found is not None else "all rows"
        return cls(
            f"{store} holds {holds}, and cannot become shard {wanted}: load that into another directory, or leave "
            f"--shard out"
        )


class StoreLocked(ShoalError):
    """Another process is the writer of this store."""


class RunDirectoryPrivate(ShoalError):
    """The store is served, or written to, by another user."""


class StoreFull(ShoalError):
    """The disk, or the store's map, has no room for what had to be written."""

    http_status = 507


class GenerationNotKept(ShoalError):
    """A rollback names a generation that is not on this node."""

    http_status = 404


class WriterUnavailable(ShoalError):
    """No writer process answers on the store's control socket."""

    http_status = 503
    retry_after = 1


# --- while rows are read from, or written to, a table --------------------------------------------------------------


class TableFailed(ShoalError):
    """A table, or the way to it, fails: `code` is what its server says, and `is_transient` whether that may pass."""

    http_status = 503
    retry_after = 1

    def __init__(self, message: str, code: str = "", *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_transient = is_transient


class TableMissing(TableFailed):
    """There is no such table, or nothing of a view was written to it yet."""


class TableInvalid(ShoalError):
    """A table holds what Shoal does not write."""


class RowTooLarge(ShoalError):
    """A row takes more bytes than an item of a table can have."""


class TableTaken(ShoalError):
    """Another process writes to the table, or has taken it over."""


class TableClientMissing(ShoalError):
    """A view is kept in a table, and the packages for that are not installed."""

    http_status = 503


class RowsUnavailable(ShoalError):
    """Rows that are kept elsewhere did not come in time, and the caller wants all of them or none."""

    http_status = 503
    retry_after = 1


# --- while the server starts -----------------------------------------------------------------------------------


class OutputUnwritable(ShoalError):
    """The standard output of a command is closed, or its disk is full."""


class SettingsInvalid(ShoalError):
    """A setting of the server has a value that it cannot have."""

    exit_code = 2


class AddressUnusable(ShoalError):
    """The address that the server was told to listen on is taken, or is not this machine's to take."""


class GrpcMissing(ShoalError):
    """The server was told to answer gRPC, and the packages for that are not installed."""


class ServerRunning(ShoalError):
    """Another supervisor serves this store."""


class ReplacementFailed(ShoalError):
    """A server was to take the place of the one that runs, and cannot: that one goes on."""


# --- while a request is let in ---------------------------------------------------------------------------------


class TokenInvalid(ShoalError):
    """A request that needs a token has none, or one that the server does not know."""

    exit_code = 2
    http_status = 401
    challenge: ClassVar[str] = 'Bearer realm="shoal"'


class RoleMissing(ShoalError):
    """The token of a request has not the role that the request needs."""

    exit_code = 2
    http_status = 403
    challenge: ClassVar[str] = 'Bearer realm="shoal", error="insufficient_scope"'


# --- while a lookup is answered --------------------------------------------------------------------------------


class LookupInvalid(ShoalError):
    """The request itself is wrong: its shape, a type, or a length."""

    exit_code = 2
    http_status = 400


class UnknownFeature(LookupInvalid):
    """The request names a view, feature or feature service that the store does not have: `name`, of the kind `what`."""

    http_status = 404

    def __init__(
        self, message: str, what: Literal["view", "feature", "service", "object"] = "object", name: str = ""
    ) -> None:
        super().__init__(message)
        self.what = what
        self.name = name


class PushInvalid(LookupInvalid):
    """Rows that were pushed do not fit their view: a column is unknown, missing, or of another type or length."""


class PushElsewhere(PushInvalid):
    """Rows were pushed to a view that is not kept on this node."""

    http_status = 409


class PushSourceUnknown(PushInvalid):
    """No view has the push source that rows were pushed to."""

    http_status = 422


class IdempotencyKeyReused(PushInvalid):
    """A push has the Idempotency-Key of an earlier one to its view, and other content."""

    http_status = 422


class PushesFull(ShoalError):
    """More pushed rows wait to be written than the server holds."""

    http_status = 429
    retry_after = 1


class FeastBodyInvalid(LookupInvalid):
    """The body of a request to Feast's endpoint does not have Feast's shape; `details` say so as Feast's
    server does."""

    http_status = 422

    def __init__(self, message: str, details: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.details = details


class MaterializeElsewhere(ShoalError):
    """The server was asked to materialize, which it does not do."""

    http_status = 501


class AmbiguousFeature(LookupInvalid):
    """Two of the names in an answer would be the same."""


class KeyOutsideShard(ShoalError):
    """Keys that were looked up or pushed belong to another shard than the one that this store holds."""

    exit_code = 2
    http_status = 421


class RequestTooLarge(LookupInvalid):
    """The request's body, its number of keys, or the size of its answer is over the server's limit."""

    http_status = 413


class EncodingUnsupported(LookupInvalid):
    """The server does not support the Content-Encoding of the request's body."""

    http_status = 415


class NotAcceptable(LookupInvalid):
    """The client accepts none of the formats that answers come in."""

    http_status = 406


class DeadlineInvalid(LookupInvalid):
    """The header in which the client says how long it waits holds no such time."""


class Overloaded(ShoalError):
    """The server has more to do than it can do in time; `reason` is what there is too much of, in a word."""

    http_status = 503
    retry_after = 1

    def __init__(self, message: str, reason: Literal["waited", "connections", "bodies", "unsent"] = "waited") -> None:
        super().__init__(message)
        self.reason = reason


class DeadlinePassed(ShoalError):
    """The time that the client waits for an answer was over before the request could be answered."""

    http_status = 504


class BodyTooSlow(LookupInvalid):
    """The body of a request took longer to arrive than the server waits."""

    http_status = 408


class PandasMissing(ShoalError):
    """A DataFrame was asked for, and pandas is not installed."""


class StaleFeatures(ShoalError):
    """The caller asked to fail rather than be served rows older than its max_age."""

    http_status = 409
