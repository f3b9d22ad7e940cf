"""All errors that Shoal raises to its callers, grouped by when they can happen.

The docstring of each class names the cause in one sentence. A message names the thing, the value found, the value
expected and the fix. `exit_code` is the exit code of the command line, `http_status` the HTTP status of the server's
response.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self


class ShoalError(Exception):
    """Base of all errors that Shoal raises on purpose."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    retry_after: ClassVar[int | None] = None
    """The number of seconds to wait before a retry."""


# --- while definitions are read -------------------------------------------------------------------------------


class DefinitionError(ShoalError):
    """views.yaml, a schema or a feature service is wrong; the message names the file and the line."""

    exit_code = 2
    http_status = 400


# --- while Shoal works with Feast ---------------------------------------------------------------------------------


class FeastFailed(ShoalError):
    """Feast is not installed, cannot open the repository, or does not answer."""

    exit_code = 2


class ServerFailed(ShoalError):
    """The server to which a command sent its request does not respond, or rejects the request."""

    exit_code = 2


class Unmappable(DefinitionError):
    """A Feast repository uses features that views.yaml cannot express; the message lists them, with a fix for each."""


class FeastVersionInactive(DefinitionError):
    """A caller wrote or read an inactive version of a Feast feature view."""


# --- while an export is published ------------------------------------------------------------------------------


class SourceError(ShoalError):
    """A view's source lacks a column, holds a null key or has a type that does not fit its definition."""


class PublicationLost(ShoalError):
    """Another exporter published the same sequence number first."""

    exit_code = 3


class RemovalRefused(ShoalError):
    """An export would remove a larger share of a view's rows, or of a feature's values, than the view allows."""


class LogTaken(ShoalError):
    """This export or stream did not write the last entry of the view's log. An export or a stream continues only its
    own log."""


class StreamFailed(ShoalError):
    """A stream cannot continue: Spark stopped it, or the server rejects its pushes."""


class RootNotWritable(ShoalError):
    """The export root's file system rejects a write of an exporter."""


class SparkFailed(ShoalError):
    """Spark or Java is not installed, Spark did not start, or Spark gave up on a job."""


# --- while an export root is read ------------------------------------------------------------------------------


class ManifestInvalid(ShoalError):
    """A manifest is not JSON, fails its own checksum, or breaks the contract of the export root."""


class FormatNotUnderstood(ManifestInvalid):
    """A document of the export root has a newer format, or contains a member that needs a newer version of Shoal."""


class FileDamaged(ShoalError):
    """A published file is missing, has the wrong size or checksum, or its rows do not match its manifest."""


class NotPublished(ShoalError):
    """The requested export root, view or snapshot does not exist."""

    http_status = 404


class RootUnreadable(ShoalError):
    """The file system of the export root fails."""


class RootSilent(ShoalError):
    """The file system of the export root does not respond, for example because its file server is down."""


class LineageError(ShoalError):
    """A published entry does not follow the log entries that are in the store."""

    http_status = 409


class DeltaGap(LineageError):
    """The next delta of a view is missing, but later deltas exist."""


class ForeignDelta(LineageError):
    """The parent of a delta is not the last entry that the store applied."""


class SchemaChangeRefused(ShoalError):
    """A published schema changes a feature or a join key, and stored rows cannot be read under the new schema."""

    http_status = 409


# --- while a store is opened or written ------------------------------------------------------------------------


class StoreNotFound(ShoalError):
    """The directory is not a Shoal store, or it has never been loaded."""

    http_status = 503


class ViewInUse(ShoalError):
    """A view cannot be dropped, because a feature service uses it, or because the store would load it again."""

    exit_code = 2


class StoreClosed(ShoalError):
    """The store was closed in this process, so lookups are not possible."""


LOAD_AGAIN = "`shoal load` loads the view again, and a server that follows an export root does so by itself"
"""The fix for a view with damaged data."""

START_ANEW = (
    "restore a backup (`shoal restore`), or run `shoal store accept-loss`: it moves the files to `lost/`. Then rows "
    "from the export root are loaded again, and rows that were only pushed are lost"
)
"""The fix for a store with a damaged catalog. Only the owner of the store can decide to accept the loss of data."""


class NotCaughtUp(ShoalError):
    """The store is too far behind its export root, or the export root has not been read yet."""

    http_status = 503


class StoreDamaged(ShoalError):
    """The store's own data fails its checks."""

    http_status = 503


class ViewDamaged(StoreDamaged):
    """The data of one view cannot be read. The store's other views can be read."""


class StoreMoved(ShoalError):
    """The files that this process has open are no longer the files at the store's path. The server acknowledges no
    writes then, because the next process to open the store would not find the data."""

    http_status = 503


class NothingLost(ShoalError):
    """The owner wants to accept a loss, but the store has all its recorded data."""

    exit_code = 2


class PathTaken(ShoalError):
    """The target path of a backup or a restored store already exists."""

    exit_code = 2


class BackupInvalid(ShoalError):
    """The directory is not a backup, or its files changed after the backup."""


class StoreUnreadable(ShoalError):
    """The operating system currently refuses to read the store's files: too many files are open, or access is
    denied."""

    http_status = 503


class StoreNotWritable(ShoalError):
    """A store or a backup cannot be created or written at this path."""

    exit_code = 2


class PathsSwapped(ShoalError):
    """A path leads to the wrong kind of directory. The three kinds are store, export root and backup."""

    exit_code = 2


class ProcessIdTaken(StoreUnreadable):
    """A process in another PID namespace reads the store and has the same process id as this process."""


class StoreIsOtherShard(ShoalError):
    """The requested shard differs from the shard that the store holds."""

    exit_code = 2

    @classmethod
    def of(cls, store: object, found: object | None, wanted: object) -> Self:
        """Return the error for a store that holds the shard `found` (all rows if None), not the shard `wanted`."""
        holds = f"shard {found}" if found is not None else "all rows"
        return cls(
            f"{store} holds {holds}, and cannot become shard {wanted}: load that shard into another directory, or "
            f"omit --shard"
        )


class StoreLocked(ShoalError):
    """Another process is the writer of this store."""


class RunDirectoryPrivate(ShoalError):
    """Another user serves the store or writes to it."""


class StoreFull(ShoalError):
    """The disk, or the store's map, has no room for a write."""

    http_status = 507


class GenerationNotKept(ShoalError):
    """The requested generation of a rollback is not on this node."""

    http_status = 404


class WriterUnavailable(ShoalError):
    """No writer process answers on the store's control socket."""

    http_status = 503
    retry_after = 1


# --- while rows are read from, or written to, a table --------------------------------------------------------------


class TableFailed(ShoalError):
    """A table, or the connection to the table, fails. `code` is the error code of the table's server. `is_transient` is
    true if a retry may succeed."""

    http_status = 503
    retry_after = 1

    def __init__(self, message: str, code: str = "", *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_transient = is_transient


class TableMissing(TableFailed):
    """The table does not exist, or no data of the view was written to the table yet."""


class TableInvalid(ShoalError):
    """A table contains data that Shoal did not write."""


class RowTooLarge(ShoalError):
    """A row is larger than the maximum size of an item in a table."""


class TableTaken(ShoalError):
    """Another process writes to the table, or the lease on the table could not be renewed."""


class TableClientMissing(ShoalError):
    """A view's rows are in a table, and the packages for table access are not installed."""

    http_status = 503


class RowsUnavailable(ShoalError):
    """Remote rows did not arrive in time, and the caller does not accept partial results."""

    http_status = 503
    retry_after = 1


# --- while the server starts -----------------------------------------------------------------------------------


class OutputUnwritable(ShoalError):
    """The standard output of a command is closed, or its disk is full."""


class SystemUnsupported(ShoalError):
    """The operating system lacks a feature that the command needs."""


class SettingsInvalid(ShoalError):
    """A setting of the server has an invalid value."""

    exit_code = 2


class AddressUnusable(ShoalError):
    """The server cannot listen on its address: the address is already in use, or does not belong to this machine."""


class GrpcMissing(ShoalError):
    """The settings enable gRPC, and the packages for gRPC are not installed."""


class ServerRunning(ShoalError):
    """Another supervisor already serves this store."""


class ReplacementFailed(ShoalError):
    """A new server cannot replace the running server. The running server continues."""


# --- while a request is authorized -----------------------------------------------------------------------------


class TokenInvalid(ShoalError):
    """A request needs a token, and its token is missing or unknown to the server."""

    exit_code = 2
    http_status = 401
    challenge: ClassVar[str] = 'Bearer realm="shoal"'


class RoleMissing(ShoalError):
    """The token of a request lacks the role that the request needs."""

    exit_code = 2
    http_status = 403
    challenge: ClassVar[str] = 'Bearer realm="shoal", error="insufficient_scope"'


# --- while a lookup is answered --------------------------------------------------------------------------------


class LookupInvalid(ShoalError):
    """The request itself is wrong: its shape, a type, or a length."""

    exit_code = 2
    http_status = 400


class UnknownFeature(LookupInvalid):
    """The request names an unknown view, feature or feature service. `name` is the unknown name, `what` is the kind of
    the object."""

    http_status = 404

    def __init__(
        self, message: str, what: Literal["view", "feature", "service", "object"] = "object", name: str = ""
    ) -> None:
        super().__init__(message)
        self.what = what
        self.name = name


class PushInvalid(LookupInvalid):
    """Pushed rows do not fit their view: a column is unknown or missing, or has the wrong type or length."""


class PushElsewhere(PushInvalid):
    """Rows were pushed to a view whose rows are not on this node."""

    http_status = 409


class PushSourceUnknown(PushInvalid):
    """No view has the push source that the request names."""

    http_status = 422


class IdempotencyKeyReused(PushInvalid):
    """A push has the same Idempotency-Key as an earlier push to its view, but different content."""

    http_status = 422


class PushesFull(ShoalError):
    """The server's queue of pushed rows is full."""

    http_status = 429
    retry_after = 1


class FeastBodyInvalid(LookupInvalid):
    """The body of a request to Feast's endpoint is not in Feast's format. `details` lists the errors in the same format
    as Feast's own server."""

    http_status = 422

    def __init__(self, message: str, details: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.details = details


class MaterializeElsewhere(ShoalError):
    """The request asks the server to materialize. The server does not support materialization."""

    http_status = 501


class AmbiguousFeature(LookupInvalid):
    """Two features in a response would have the same name."""


class KeyOutsideShard(ShoalError):
    """A lookup or a push contains keys that do not belong to the store's shard."""

    exit_code = 2
    http_status = 421


class RequestTooLarge(LookupInvalid):
    """The request's body, its number of keys, or the size of its response exceeds the server's limit."""

    http_status = 413


class EncodingUnsupported(LookupInvalid):
    """The server does not support the Content-Encoding of the request's body."""

    http_status = 415


class NotAcceptable(LookupInvalid):
    """The client accepts none of the server's response formats."""

    http_status = 406


class DeadlineInvalid(LookupInvalid):
    """The header with the client's deadline does not contain a valid time."""


class Overloaded(ShoalError):
    """The server is overloaded; `reason` names the exceeded limit in one word."""

    http_status = 503
    retry_after = 1

    def __init__(self, message: str, reason: Literal["waited", "connections", "bodies", "unsent"] = "waited") -> None:
        super().__init__(message)
        self.reason = reason


class DeadlinePassed(ShoalError):
    """The client's deadline passed before the server could respond."""

    http_status = 504


class BodyTooSlow(LookupInvalid):
    """The body of a request did not arrive within the server's timeout."""

    http_status = 408


class PandasMissing(ShoalError):
    """The caller requested a DataFrame, and pandas is not installed."""


class StaleFeatures(ShoalError):
    """A row is older than the caller's max_age, and the caller asked for an error in that case."""

    http_status = 409
