"""What both clients do, without doing it: which calls a lookup or a push makes, and what their outcomes mean.

Each operation is a generator that yields calls to be carried out side by side, is sent their outcomes, and returns the
result. A client has only to carry calls out.
"""

import random
import uuid
from collections.abc import Generator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from shoal_client.addresses import parse_address
from shoal_client.answers import Answer, Pushed, read_answer, read_pushed
from shoal_client.calls import Call, Policy
from shoal_client.errors import (
    AnswerInvalid,
    DeadlineExceeded,
    DeadlinePassed,
    KeyOutsideShard,
    LookupInvalid,
    Overloaded,
    PushIncomplete,
    RequestInvalid,
    ShardMisplaced,
    ShoalError,
)
from shoal_client.hashing import first_hashes, shard_starts, shards_of
from shoal_client.replicas import Replica, ReplicaSet
from shoal_client.schema import Schema, as_list, count_rows
from shoal_client.settings import LONGEST_SECONDS, Options, check_header
from shoal_client.sharded import Part, behind, disagreement, divide, join
from shoal_client.wire import (
    EVENT_TIME,
    Columns,
    Format,
    Partial,
    Request,
    Response,
    Stale,
    get_request,
    lookup_request,
    push_request,
)

Outcome = Response | ShoalError
Result = TypeVar("Result")
Steps = Generator[list[Call], list[Outcome], Result]
"""An operation: yields calls, is sent their outcomes in the same order, returns the result."""

_SCHEMA_SECONDS = 30.0
_FIRST_WAIT_SECONDS = 0.005


class Core:
    """The operations of a client."""

    def __init__(self, given: Options) -> None:
        self.options = given
        self.sets = [ReplicaSet([parse_address(text) for text in texts], given.limits) for texts in given.shards]
        self._policy = Policy(given.max_tries, given.hedge)
        self._headers = {"Authorization": f"Bearer {given.token}"} if given.token else {}
        self._starts = shard_starts(len(self.sets))
        self._schema: Schema | None = None

    @property
    def replicas(self) -> list[Replica]:
        """All servers."""
        return [replica for replicas in self.sets for replica in replicas.replicas]

    def lookup(
        self,
        features: str | Sequence[str],
        entities: Columns,
        *,
        max_age: str | timedelta | None,
        stale: Stale,
        partial: Partial,
        timeout: float | None,
        form: Format,
    ) -> Steps[Answer]:
        """A lookup: see `shoal_client.client.Client.lookup`."""
        deadline = self._deadline(timeout)
        how: dict[str, Any] = {"max_age": max_age, "stale": stale, "partial": partial, "form": form}
        how["headers"] = self._headers
        if not self.options.is_sharded:
            request = lookup_request(features, entities, **how)
            (outcome,) = yield [self._call(request, self.sets[0], deadline)]
            return read_answer(_checked(outcome), form)
        schema = yield from self._known_schema(deadline)
        try:
            return (yield from self._ask_shards(schema, features, entities, how, form, deadline))
        except (LookupInvalid, RequestInvalid, KeyOutsideShard):
            # A view or service may be new, or the join keys of one other than they were.
            if monotonic() - schema.learned < self.options.timeout:
                raise
        schema = yield from self._learn(deadline)
        return (yield from self._ask_shards(schema, features, entities, how, form, deadline))

    def _ask_shards(
        self,
        schema: Schema,
        features: str | Sequence[str],
        entities: Columns,
        how: Mapping[str, Any],
        form: Format,
        deadline: float,
    ) -> Steps[Answer]:
        references = schema.references(features)
        count, parts = divide(schema, references, entities, self._starts)
        requests = {part: lookup_request(part.references, part.entities, **how) for part in parts}
        asked, begin, wait = parts, 0.0, _FIRST_WAIT_SECONDS
        answered_by: dict[Part, Replica | None] = {}
        while asked:
            calls = []
            for part in asked:
                call = self._call(requests[part], self.sets[part.shard], deadline)
                call.avoid, call.not_before = answered_by.get(part), begin
                calls.append(call)
            outcomes = yield calls
            for part, call, outcome in zip(asked, calls, outcomes, strict=True):
                if isinstance(outcome, DeadlineExceeded | Overloaded | DeadlinePassed) and part.answer is not None:
                    raise disagreement(parts, "the shards did not come to agree in time") from outcome
                part.answer = read_answer(_checked(outcome), form)
                answered_by[part] = call.answered_by
            asked = behind(parts, self.options.max_skew)
            now = monotonic()
            # Twice as long each time, so that a shard which lags for long is not asked much more often for it.
            begin = now + min(wait, 0.5 * (deadline - now)) * random.uniform(0.5, 1.0)
            wait *= 2
            if asked and deadline - now < _FIRST_WAIT_SECONDS:
                raise disagreement(parts, "the shards did not come to agree in time")
            if not all(self.sets[part.shard].retries.take() for part in asked):
                raise disagreement(parts, "the shards do not agree, and have been asked again often enough lately")
        return join(schema, references, count, parts, form)

    # --- pushes ------------------------------------------------------------------------------------------------

    def push(
        self,
        view: str,
        rows: Columns | pa.RecordBatch | pa.Table | None,
        deletes: Columns | None,
        idempotency_key: str | None,
        timeout: float | None,
    ) -> Steps[Pushed]:
        """A push: see `shoal_client.client.Client.push`."""
        key, deadline = idempotency_key or uuid.uuid4().hex, self._deadline(timeout)
        check_header("idempotency key", key)
        try:
            return (yield from self._push(view, rows, deletes, key, deadline))
        except ShoalError as error:
            error.idempotency_key = key
            raise

    def _push(
        self,
        view: str,
        rows: Columns | pa.RecordBatch | pa.Table | None,
        deletes: Columns | None,
        key: str,
        deadline: float,
    ) -> Steps[Pushed]:
        if isinstance(rows, pa.Table):
            rows = _one_batch(rows)
        if isinstance(rows, pa.RecordBatch) and deletes is not None:
            raise RequestInvalid("rows in Arrow go without deletes; push those by themselves, or give rows as columns")
        schema = yield from self._known_schema(deadline)
        if view not in schema.views:
            schema = yield from self._learn(deadline)
        known = schema.view(view)
        # The stores of all replicas are to have the same event time, and so are repetitions.
        now = datetime.now(UTC)
        timed = _timed(rows, known.timestamp_field, now)
        timed_deletes = _timed(deletes, known.timestamp_field, now)
        stamped = [
            member
            for member, after, before in (("rows", timed, rows), ("deletes", timed_deletes, deletes))
            if after is not before
        ]
        shares = self._shares(known.join_keys, timed, timed_deletes)
        targets = [(shard, replica) for shard in shares for replica in self.sets[shard].replicas]
        requests = {shard: push_request(view, *share, key, self._headers, stamped) for shard, share in shares.items()}
        calls = [self._call(requests[shard], self.sets[shard], deadline, replica) for shard, replica in targets]
        outcomes = yield calls
        failed = {
            replica.address.text: outcome
            for (_, replica), outcome in zip(targets, outcomes, strict=True)
            if isinstance(outcome, ShoalError)
        }
        if failed:
            raise _push_failure(targets, failed)
        versions, of_shard = {}, {}
        for (shard, replica), outcome in zip(targets, outcomes, strict=True):
            count, superseded, versions[replica.address.text] = read_pushed(_checked(outcome))
            of_shard[shard] = (count, superseded)
        return Pushed(
            sum(count for count, _ in of_shard.values()), sum(late for _, late in of_shard.values()), versions
        )

    def _shares(
        self, join_keys: Sequence[tuple[str, str]], rows: Columns | pa.RecordBatch | None, deletes: Columns | None
    ) -> dict[int, tuple[Any, Columns | None]]:
        """Shard → its rows and deletions."""
        if not self.options.is_sharded:
            return {0: (rows, deletes)}
        shares: dict[int, tuple[Any, Columns | None]] = {}
        for shard, share in self._divided(join_keys, rows).items():
            shares[shard] = (share, None)
        for shard, share in self._divided(join_keys, deletes).items():
            shares[shard] = (shares.get(shard, (None, None))[0], share)
        return shares

    def _divided(
        self, join_keys: Sequence[tuple[str, str]], columns: Columns | pa.RecordBatch | None
    ) -> dict[int, Any]:
        if columns is None:
            return {}
        names = columns.schema.names if isinstance(columns, pa.RecordBatch) else columns.keys()
        missing = [name for name, _ in join_keys if name not in names]
        if missing:
            raise RequestInvalid(f"the push lacks the join key {missing[0]!r}")
        keys = [
            (name, kind, as_list(columns.column(name) if isinstance(columns, pa.RecordBatch) else columns[name]))
            for name, kind in join_keys
        ]
        if not isinstance(columns, pa.RecordBatch):
            count_rows(columns)
        of_row = shards_of(first_hashes(keys), self._starts)
        shares: dict[int, Any] = {}
        for shard in np.unique(of_row).tolist():
            rows = np.flatnonzero(of_row == shard)
            if isinstance(columns, pa.RecordBatch):
                shares[shard] = columns.take(pa.array(rows))
            else:
                shares[shard] = {name: _taken(values, rows.tolist()) for name, values in columns.items()}
        return shares

    # --- what there is to know ---------------------------------------------------------------------------------

    def views(self, timeout: float | None) -> Steps[dict[str, Any]]:
        """The document of /v1/views, of one server."""
        deadline = self._deadline(timeout)
        (outcome,) = yield [self._call(get_request("/v1/views", self._headers), self.sets[0], deadline)]
        return _document(_checked(outcome))

    def status(self, timeout: float | None) -> Steps[dict[str, dict[str, Any] | ShoalError]]:
        """The document of /v1/status, or why there is none, of each server by its address."""
        outcomes = yield from self._ask_all("/v1/status", timeout)
        return {
            address: outcome if isinstance(outcome, ShoalError) else _document(outcome)
            for address, outcome in outcomes.items()
        }

    def ready(self, timeout: float | None) -> Steps[bool]:
        """Whether a server of each shard is ready."""
        outcomes = yield from self._ask_all("/ready", timeout)
        return all(
            any(isinstance(outcomes[replica.address.text], Response) for replica in replicas.replicas)
            for replicas in self.sets
        )

    def _ask_all(self, path: str, timeout: float | None) -> Steps[dict[str, Outcome]]:
        deadline, request = self._deadline(timeout), get_request(path, self._headers, may_retry=False)
        calls = [
            self._call(request, replicas, deadline, replica) for replicas in self.sets for replica in replicas.replicas
        ]
        outcomes = yield calls
        return {replica.address.text: outcome for replica, outcome in zip(self.replicas, outcomes, strict=True)}

    def _known_schema(self, deadline: float) -> Steps[Schema]:
        schema = self._schema
        if schema is None or monotonic() - schema.learned > _SCHEMA_SECONDS:
            schema = yield from self._learn(deadline)
        return schema

    def _learn(self, deadline: float) -> Steps[Schema]:
        """Ask a server of each shard what there is, and whether it is the shard that the client takes it for."""
        request = get_request("/v1/views", self._headers)
        outcomes = yield [self._call(request, replicas, deadline) for replicas in self.sets]
        documents = [_document(_checked(outcome)) for outcome in outcomes]
        for number, (document, outcome) in enumerate(zip(documents, outcomes, strict=True), 1):
            expected = f"{number}/{len(self.sets)}" if self.options.is_sharded else None
            found = document.get("shard")
            if found != expected:
                address = outcome.address if isinstance(outcome, Response) else ""
                raise ShardMisplaced(
                    f"{address} holds {f'shard {found}' if found else 'all rows'}, the client takes it for "
                    f"{f'shard {expected}' if expected else 'a server of all rows'}; mend the client's shards"
                )
        self._schema = Schema.read(documents[0], monotonic())
        return self._schema

    def _deadline(self, timeout: float | None) -> float:
        seconds = self.options.timeout if timeout is None else timeout
        if not 0 < seconds <= LONGEST_SECONDS:
            raise RequestInvalid(f"timeout is {seconds}; give seconds, more than none")
        return monotonic() + seconds

    def _call(self, request: Request, replicas: ReplicaSet, deadline: float, target: Replica | None = None) -> Call:
        return Call(request, replicas, self._policy, deadline, target)


def _checked(outcome: Outcome) -> Response:
    if isinstance(outcome, ShoalError):
        raise outcome
    return outcome


def _document(response: Response) -> dict[str, Any]:
    try:
        document = response.document
    except ValueError as error:
        raise AnswerInvalid(f"{response.address} sent what is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise AnswerInvalid(f"{response.address} sent {response.body[:100]!r}, which is no document")
    return document


def _push_failure(targets: Sequence[tuple[int, Replica]], failed: Mapping[str, ShoalError]) -> ShoalError:
    if len(targets) == 1:
        return next(iter(failed.values()))
    done = tuple(replica.address.text for _, replica in targets if replica.address.text not in failed)
    why = "; ".join(f"{address}: {error}" for address, error in failed.items())
    return PushIncomplete(
        f"{len(failed)} of {len(targets)} stores did not confirm the push ({why}); push it again under the same "
        f"idempotency key until all have it",
        done,
        failed,
    )


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def _timed(columns: Any, timestamp_field: str | None, now: datetime) -> Any:
    """Rows with an event time: that of now, if they came without."""
    if columns is None:
        return None
    if isinstance(columns, pa.RecordBatch):
        if {EVENT_TIME, timestamp_field} & set(columns.schema.names):
            return columns
        times = pa.array([now] * columns.num_rows, pa.timestamp("us", tz="UTC"))
        return columns.append_column(EVENT_TIME, times)
    if {EVENT_TIME, timestamp_field} & columns.keys() or not columns:
        return columns
    return {**columns, EVENT_TIME: [now] * count_rows(columns)}


def _taken(values: Any, rows: list[int]) -> list[Any]:
    listed = as_list(values)
    return [listed[row] for row in rows]
