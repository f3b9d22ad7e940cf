"""The documents of an export root: manifests and the list of feature services, sealed with their own checksum.

A sealed document is JSON whose last member, `checksum`, is the XXH3 (64 bits, hex) of the same JSON without it, keys
sorted. `engine.export_root` says where documents lie and how they come to be.

Format 1 allows no other members than its own. From format 2 on, a reader ignores the members that it does not know, at
any depth, except those that `must_understand` lists by their path, such as `view.tier` or `files.path`.
"""

import itertools
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import orjson
import xxhash
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import FormatNotUnderstood, ManifestInvalid
from engine.schema import FeatureService, Name, ViewSchema

FormatVersion = Literal[1, 2]
FORMATS: tuple[FormatVersion, ...] = get_args(FormatVersion)
"""The formats of an export root that this version reads and writes, oldest first."""
NEWEST_FORMAT: FormatVersion = FORMATS[-1]

EVENT_TIMESTAMP = "__event_timestamp"
"""Column of published files: event time, timestamp[us, UTC], never null."""
TOMBSTONE = "__tombstone"
"""Column of delta files: true where the key vanished; its join keys and features are then null."""


def _plain_file_name(value: str) -> str:
    if not value.isprintable() or not value or "/" in value or "\\" in value or value.startswith("."):
        raise ValueError(f"{value!r} is not a plain file name")
    return value


PlainFileName = Annotated[str, AfterValidator(_plain_file_name)]
"""A name that stays in the directory that it is looked for in."""


class PublishedFile(BaseModel):
    """One Parquet file: all its rows' first hashes lie in [min_key_hash, max_key_hash], in ascending order."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: PlainFileName
    rows: int = Field(gt=0)
    bytes: int = Field(gt=0)
    checksum: str = Field(pattern=r"^[0-9a-f]{16}$")
    min_key_hash: int = Field(ge=-(2**63), lt=2**63)
    max_key_hash: int = Field(ge=-(2**63), lt=2**63)


class StreamBatch(BaseModel):
    """The micro-batch of a stream that an entry holds: its number, and the query's id, which its checkpoint keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    query: str = Field(pattern=r"^[0-9a-f-]{36}$")
    batch: int = Field(ge=0)


class Manifest(BaseModel):
    """One entry of a view's log: a full snapshot as of `seq`, or the delta that leads from `seq - 1` to `seq`.

    `files` are ordered by key hash and their ranges do not touch. `watermark` is the greatest event time that the
    entry, or what it continues, has seen. `state` is the exporter's own: where its change detection goes on from; what
    a stream published names the `stream`'s batch instead.

    `live_rows` is how many rows the view has as of `seq`, and `values` how many of them have a value, by feature: the
    next export compares its own numbers with these. They are None if the publisher did not count.

    `low_watermark` is an event time that the source of every row of the view had reached when the entry was published,
    except of rows with an age of their own: those in an export's entry with an earlier event time than its low
    watermark, and all rows of a stream. It never decreases along a log. `recent_runs` are when the last exports ran,
    this one last.
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
        """The name of the directory under `snapshots/` that holds a snapshot's files."""
        return f"{self.seq:012d}-{self.id[:8]}"


class FeatureServices(BaseModel):
    """All feature services of an export root."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: FormatVersion = 1
    must_understand: tuple[str, ...] = ()
    services: tuple[FeatureService, ...]


class DroppedView(BaseModel):
    """A dropped view: its entries up to `seq` are removed, and a new view of the same name begins after it. So a node
    can tell whether the view that it holds was dropped. `entries` are the ids of the last entries of its log, from
    `oldest_seq` on. By them a node can tell the view from a view of the same name in another root."""

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
    """The document as it is published: JSON with its checksum. Members that its format does not have are left out, as
    are those that have their default."""
    since_format_2 = _SINCE_FORMAT_2 if document.format_version == 1 else None
    content = document.model_dump(mode="json", exclude_defaults=True, exclude=since_format_2)
    content = {"format_version": document.format_version} | content
    content["checksum"] = document_checksum(content)
    return orjson.dumps(content, option=orjson.OPT_INDENT_2)


def unseal(data: bytes, model: type[Document], origin: str) -> Document:
    """The document in `data`, checked; `origin` names it in errors.

    Raises:
        ManifestInvalid: not JSON, a wrong checksum, or a content that breaks the contract.
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
        raise ManifestInvalid(f"{origin} holds what no manifest does: {error}; publish it again") from None
    if stated != found:
        raise ManifestInvalid(
            f"{origin} was changed after it was published: its checksum is {found}, it states {stated}"
        )
    try:
        return _validated(content, model, origin)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "it"
        raise ManifestInvalid(f"{origin}: {place}: {first['msg']}") from error


def _validated(content: dict[str, Any], model: type[Document], origin: str) -> Document:
    """The model of a document's content, without the members that a reader of its format ignores."""
    version = content.get("format_version", 1)
    if isinstance(version, int) and version > NEWEST_FORMAT:
        raise FormatNotUnderstood(
            f"{origin} has format {version}, this version of Shoal reads formats {FORMATS[0]} to {NEWEST_FORMAT}; "
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
                f"{origin} has the member {name!r}, which it says a reader must understand, and this version of Shoal "
                f"does not; upgrade this node"
            )
        _remove(content, place)
    # A member beside an unknown one is validated only now, and may itself contain unknown ones.
    return _validated(content, model, origin)


def _remove(content: Any, place: tuple[int | str, ...]) -> None:
    for step in place[:-1]:
        content = content[step]
    del content[place[-1]]


def document_checksum(content: dict[str, Any]) -> str:
    """XXH3 (64 bits, hex) of JSON content, keys sorted."""
    return xxhash.xxh3_64_hexdigest(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))
