"""What both clients do, without doing it: which calls a lookup or a push makes, and what their outcomes mean.

Each operation is a generator that yields calls to be carried out side by side, is sent their outcomes, and returns the
result. A client has only to carry calls out.
"""

import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa

from shoal_client.addresses import parse_address
from shoal_client.answers import Answer, Pushed
from shoal_client.arguments import check_header, check_how, check_seconds, read_features, read_max_age
from shoal_client.calls import Call, Policy, Steps, checked
from shoal_client.columns import as_list, check_columns, count_rows
from shoal_client.errors import (
    DeadlineExceeded,
    DeadlinePassed,
    KeyOutsideShard,
    LookupInvalid,
    Overloaded,
    PushIncomplete,
    RequestInvalid,
    ShoalError,
)
from shoal_client.hashing import first_hashes, shard_starts, shards_of
from shoal_client.learning import Learning, expected_shards
from shoal_client.reading import read_answer, read_document, read_pushed
from shoal_client.replicas import Replica, ReplicaSet
from shoal_client.schema import Schema
from shoal_client.settings import Options
from shoal_client.sharded import Part, behind, disagreement, divide, join
from shoal_client.showing import shown
from shoal_client.wire import (
    EVENT_TIME,
    Columns,
    Format,
    Partial,
    Request,
    Stale,
    get_request,
    lookup_request,
    push_request,
)

_FIRST_WAIT_SECONDS = 0.005


class Core:
    """The operations of a client.

    Args:
        run_beside: runs an operation that no caller waits for.
    """

    def __init__(self, given: Options, run_beside: Callable[[Steps[None]], None]) -> None:
        self.options = given
        self.sets = [ReplicaSet([parse_address(text) for text in texts], given.limits) for texts in given.shards]
        # All servers know the schema, whichever shard they hold.
        every = [replica.address for replicas in self.sets for replica in replicas.replicas]
        everyone = ReplicaSet(every, given.limits) if given.is_sharded else self.sets[0]
        self._policy = Policy(given.max_tries, given.hedge)
        self._headers = {"Authorization": f"Bearer {given.token}"} if given.token else {}
        self._starts = shard_starts(len(self.sets))
        self._learning = Learning(
            get_request("/v1/views", self._headers, may_hedge=True),
            everyone,
            expected_shards(self.sets, given.is_sharded),
            given.max_tries,
            given.timeout,
            run_beside,
        )

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
        check_how(stale, partial, form)
        age = read_max_age(max_age)
        features = read_features(features)
        check_columns("entities", entities, scalars=True)
        how: dict[str, Any] = {"max_age": age, "stale": stale, "partial": partial, "form": form}
        how["headers"] = self._headers
        if not self.options.is_sharded:
            request = lookup_request(features, entities, **how)
            (outcome,) = yield [self._call(request, self.sets[0], deadline)]
            return read_answer(checked(outcome), form, count_rows(entities), _plain(features))
        schema = yield from self._learning.known(deadline)
        try:
            return (yield from self._ask_shards(schema, features, entities, how, form, deadline))
        except (LookupInvalid, RequestInvalid, KeyOutsideShard) as error:
            # A view or service may be new, its join keys may have changed, or a server may hold another shard.
            schema = yield from self._learning.again(schema, error, deadline)
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
        answered_by: dict[Part, tuple[Replica, ...]] = {}
        while asked:
            calls = []
            for part in asked:
                call = self._call(requests[part], self.sets[part.shard], deadline)
                call.avoid, call.not_before = answered_by.get(part, ()), begin
                calls.append(call)
            outcomes = yield calls
            for part, call, outcome in zip(asked, calls, outcomes, strict=True):
                if isinstance(outcome, DeadlineExceeded | Overloaded | DeadlinePassed) and part.answer is not None:
                    raise disagreement(parts, "the shards did not come to agree in time") from outcome
                part.answer = read_answer(checked(outcome), form, part.keys, part.references)
                answered_by[part] = (call.answered_by,) if call.answered_by is not None else ()
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
        key, deadline = uuid.uuid4().hex if idempotency_key is None else idempotency_key, self._deadline(timeout)
        check_header("idempotency key", key)
        _check_push(view, rows, deletes)
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
        schema = yield from self._learning.known(deadline)
        if view not in schema.views:
            schema = yield from self._learning.now(deadline)
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
        versions: dict[str, int] = {}
        of_shard: dict[int, tuple[int, int]] = {}
        failed: dict[str, ShoalError] = {}
        for (shard, replica), outcome in zip(targets, outcomes, strict=True):
            try:
                count, superseded, version = read_pushed(checked(outcome), sum(map(_length, shares[shard])))
            except ShoalError as error:
                failed[replica.address.text] = error
            else:
                versions[replica.address.text], of_shard[shard] = version, (count, superseded)
        if failed:
            raise _push_failure(targets, failed)
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
        (outcome,) = yield [self._learning.call(self._deadline(timeout))]
        return read_document(checked(outcome), ("views", "services"))

    def status(self, timeout: float | None) -> Steps[dict[str, dict[str, Any] | ShoalError]]:
        """The document of /v1/status, or why there is none, of each server by its address."""
        return (yield from self._ask_all("/v1/status", ("server", "views"), timeout))

    def ready(self, timeout: float | None) -> Steps[bool]:
        """Whether a server of each shard is ready."""
        answers = yield from self._ask_all("/ready", ("status", "version"), timeout)
        return all(
            any(isinstance(answers[replica.address.text], dict) for replica in replicas.replicas)
            for replicas in self.sets
        )

    def _ask_all(
        self, path: str, members: Sequence[str], timeout: float | None
    ) -> Steps[dict[str, dict[str, Any] | ShoalError]]:
        """Return, by address, each server's JSON document at a path, or the error. The document must have some
        members."""
        deadline, request = self._deadline(timeout), get_request(path, self._headers, may_retry=False)
        calls = [
            self._call(request, replicas, deadline, replica) for replicas in self.sets for replica in replicas.replicas
        ]
        outcomes = yield calls
        answers: dict[str, dict[str, Any] | ShoalError] = {}
        for replica, outcome in zip(self.replicas, outcomes, strict=True):
            try:
                answers[replica.address.text] = read_document(checked(outcome), members)
            except ShoalError as error:
                answers[replica.address.text] = error
        return answers

    def _deadline(self, timeout: float | None) -> float:
        seconds = self.options.timeout if timeout is None else timeout
        check_seconds("timeout", seconds)
        return monotonic() + seconds

    def _call(self, request: Request, replicas: ReplicaSet, deadline: float, target: Replica | None = None) -> Call:
        return Call(request, replicas, self._policy, deadline, target)


def _plain(features: str | list[str]) -> list[str] | None:
    """Return the features of an answer, if they are known without the store's schema."""
    if isinstance(features, str) or any(reference.endswith(":*") for reference in features):
        return None
    return features


def _check_push(view: Any, rows: Any, deletes: Any) -> None:
    """Raise RequestInvalid if the arguments of a push are invalid."""
    if not isinstance(view, str) or not view:
        raise RequestInvalid(f"view is {shown(view)}; give the name of a view")
    if rows is None and deletes is None:
        raise RequestInvalid("the push has neither rows nor deletes; give one of them at least")
    if isinstance(rows, pa.Table | pa.RecordBatch):
        if deletes is not None:
            raise RequestInvalid(
                "a push of Arrow rows cannot have deletes; push those separately, or give rows as columns"
            )
    elif rows is not None:
        check_columns("rows", rows, scalars=False)
    if deletes is not None:
        check_columns("deletes", deletes, scalars=False)


def _length(columns: Columns | pa.RecordBatch | None) -> int:
    """The rows of a part of a push."""
    if columns is None:
        return 0
    return columns.num_rows if isinstance(columns, pa.RecordBatch) else count_rows(columns)


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
