"""The documents of an export root: manifests, the list of feature services and the list of dropped views. Each document
is sealed with its own checksum.

A sealed document is JSON. Its last member, `checksum`, is the XXH3 (64 bits, hex) of the same JSON without that member,
with sorted keys. `shoal.engine.root.export_root` describes where the documents are and how they are created.

A reader rejects unknown members in format 1. From format 2 on, a reader ignores unknown members at any depth. The
exceptions are the members whose paths are in `must_understand`, such as `view.tier` or `files.path`. If a reader does
not know such a member, the reader rejects the document.
"""

import itertools
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import orjson
import xxhash
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoal.engine.base.errors import FormatNotUnderstood, ManifestInvalid
from shoal.engine.format.schema import FeatureService, Name, ViewSchema

FormatVersion = Literal[1, 2]
FORMATS: tuple[FormatVersion, ...] = get_args(FormatVersion)
"""The formats of an export root that this version of Shoal reads and writes, oldest first."""
NEWEST_FORMAT: FormatVersion = FORMATS[-1]

EVENT_TIMESTAMP = "__event_timestamp"
"""The column with the event time in published files: timestamp[us, UTC], never null."""
TOMBSTONE = "__tombstone"
"""The column that marks tombstones in delta files: true if the key was removed. The join keys and features of a
tombstone are null."""


def _plain_file_name(value: str) -> str:
    if not value.isprintable() or not value or "/" in value or "\\" in value or value.startswith("."):
        raise ValueError(f"{value!r} is not a plain file name")
    return value


PlainFileName = Annotated[str, AfterValidator(_plain_file_name)]
"""A file name without a path. Such a name cannot lead out of a directory."""


class PublishedFile(BaseModel):
    """One Parquet file. The first hashes of its rows are in [min_key_hash, max_key_hash], in ascending order."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: PlainFileName
    rows: int = Field(gt=0)
    bytes: int = Field(gt=0)
    checksum: str = Field(pattern=r"^[0-9a-f]{16}$")
    min_key_hash: int = Field(ge=-(2**63), lt=2**63)
    max_key_hash: int = Field(ge=-(2**63), lt=2**63)


class StreamBatch(BaseModel):
    """The micro-batch of a stream that an entry contains: the batch's number, and the id of the stream's query. The id
    comes from the query's checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    query: str = Field(pattern=r"^[0-9a-f-]{36}$")
    batch: int = Field(ge=0)


class Manifest(BaseModel):
    """One entry of a view's log: a full snapshot as of `seq`, or the delta from `seq - 1` to `seq`.

    `files` are ordered by key hash, and their hash ranges do not overlap. `watermark` is the greatest event time in
    this entry and its predecessors. `state` is private to the exporter: the change detection of the next export starts
    from it. An entry of a stream has no `state`; it names the stream's batch in `stream`.

    `live_rows` is the number of rows of the view as of `seq`. `values` is, for each feature, the number of these rows
    in which the feature is not null. The next export compares its own numbers with these numbers. `live_rows` and
    `values` are None if the publisher did not count.

    `low_watermark` is an event time. When the entry was published, the sources of all rows of the view had reached this
    event time, except the sources of rows with an age of their own. All rows of a stream have an age of their own. So
    do the rows of an export's entry whose event time is earlier than the entry's low watermark. The low watermark never
    decreases along a log. `recent_runs` are the times of the last exports, oldest first. The last time is the time of
    this export.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: FormatVersion = 1
    must_understand: tuple[str, ...] = ()
    kind: Literal["snapshot", "delta"]
    id: str = Field(pattern=r"^[0-9a-f]{32}$")
    seq: int = Field(ge=1, lt=10**12)
    parent: str | None = Field(pattern=r"^[0-9a-f]{32}$")
    view: ViewSchema
    rows: int = Field(ge=0)
    tombstones: int = Field(ge=0)
    files: tuple[PublishedFile, ...]
    watermark: AwareDatetime | None
    published_at: AwareDatetime
    job: str
    inputs: tuple[str, ...]
    state: PlainFileName | None = None
    stream: StreamBatch | None = None
    live_rows: int | None = Field(default=None, ge=0)
    values: dict[str, Annotated[int, Field(ge=0)]] | None = None
    low_watermark: AwareDatetime | None = None
    recent_runs: tuple[AwareDatetime, ...] = Field(default=(), max_length=16)

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        total = sum(file.rows for file in self.files)
        if total != self.rows + self.tombstones:
            raise ValueError(f"its files hold {total} rows, but it claims {self.rows} and {self.tombstones} tombstones")
        for left, right in itertools.pairwise(self.files):
            if left.max_key_hash >= right.min_key_hash:
                raise ValueError(f"{left.path} and {right.path} overlap in key hash, or are out of order")
        if self.kind == "snapshot" and self.tombstones:
            raise ValueError("a snapshot has no tombstones")
        return self

    @property
    def snapshot_id(self) -> str:
        """The name of the directory with a snapshot's files, under `snapshots/`."""
        return f"{self.seq:012d}-{self.id[:8]}"


class FeatureServices(BaseModel):
    """All feature services of an export root."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: FormatVersion = 1
    must_understand: tuple[str, ...] = ()
    services: tuple[FeatureService, ...]


class DroppedView(BaseModel):
    """A dropped view. Its entries up to `seq` are removed, and a new view of the same name begins after `seq`. A node
    can therefore tell whether its own copy of the view was dropped. `entries` are the ids of the last entries of the
    log, from `oldest_seq` on. With these ids a node can distinguish the view from a view of the same name in another
    root."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: FormatVersion = 1
    must_understand: tuple[str, ...] = ()
    name: Name
    seq: int = Field(ge=1, lt=10**12)
    oldest_seq: int = Field(ge=1, lt=10**12)
    entries: tuple[str, ...]
    dropped_at: AwareDatetime


class DroppedViews(BaseModel):
    """All views of an export root that were dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: FormatVersion = 1
    must_understand: tuple[str, ...] = ()
    views: tuple[DroppedView, ...]


_SINCE_FORMAT_2: Any = {
    "must_understand": True,
    "live_rows": True,
    "values": True,
    "low_watermark": True,
    "recent_runs": True,
    "view": {"future": True, "features": {"__all__": {"feast_member"}}},
}
Document = TypeVar("Document", Manifest, FeatureServices, DroppedView, DroppedViews)


def seal(document: Manifest | FeatureServices | DroppedView | DroppedViews) -> bytes:
    """Return the published form of a document: JSON with its checksum. Leave out members that the document's format
    does not have, and members with default values."""
    since_format_2 = _SINCE_FORMAT_2 if document.format_version == 1 else None
    content = document.model_dump(mode="json", exclude_defaults=True, exclude=since_format_2)
    content = {"format_version": document.format_version} | content
    content["checksum"] = document_checksum(content)
    return orjson.dumps(content, option=orjson.OPT_INDENT_2)


def unseal(data: bytes, model: type[Document], origin: str) -> Document:
    """Decode and check the document in `data`. `origin` is the name of the document in errors.

    Raises:
        ManifestInvalid: the data is not JSON, has a wrong checksum, or violates the schema of the document.
        FormatNotUnderstood: the document needs a newer version of Shoal.
    """
    try:
        content: Any = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ManifestInvalid(f"{origin} is not JSON: {error}; publish it again") from error
    if not isinstance(content, dict):
        raise ManifestInvalid(f"{origin} is not a JSON object; publish it again")
    stated = content.pop("checksum", None)
    try:
        found = document_checksum(content)
    except TypeError as error:
        raise ManifestInvalid(f"{origin} contains an invalid value: {error}; publish it again") from None
    if stated != found:
        raise ManifestInvalid(
            f"{origin} was changed after it was published: its checksum is {found}, but it states {stated}"
        )
    try:
        return _validated(content, model, origin)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "it"
        raise ManifestInvalid(f"{origin}: {place}: {first['msg']}") from error


def _validated(content: dict[str, Any], model: type[Document], origin: str) -> Document:
    """Validate a document's content. Remove the unknown members that a reader may ignore in the document's format."""
    version = content.get("format_version", 1)
    if isinstance(version, int) and version > NEWEST_FORMAT:
        raise FormatNotUnderstood(
            f"{origin} has format {version}, but this version of Shoal reads formats {FORMATS[0]} to {NEWEST_FORMAT}; "
            f"upgrade this node, or publish with --format {NEWEST_FORMAT}"
        )
    try:
        return model.model_validate(content)
    except ValidationError as error:
        unknown = [details["loc"] for details in error.errors() if details["type"] == "extra_forbidden"]
        if version == 1 or not unknown:
            raise
    needed = content.get("must_understand", [])
    for place in unknown:
        name = ".".join(step for step in place if isinstance(step, str))
        if not isinstance(needed, list) or any(path == name or str(path).startswith(f"{name}.") for path in needed):
            raise FormatNotUnderstood(
                f"{origin} has the member {name!r} and lists it in must_understand, but this version of Shoal does not "
                f"understand it; upgrade this node"
            )
        _remove(content, place)
    # The siblings of an unknown member are validated only now. They may contain unknown members too.
    return _validated(content, model, origin)


def _remove(content: Any, place: tuple[int | str, ...]) -> None:
    for step in place[:-1]:
        content = content[step]
    del content[place[-1]]


def document_checksum(content: dict[str, Any]) -> str:
    """Return the XXH3 (64 bits, hex) of JSON content with sorted keys."""
    return xxhash.xxh3_64_hexdigest(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))
