"""The logic of both clients, without input and output: the calls of a lookup or a push, and the meaning of their
outcomes.

Each operation is a generator. It yields calls to carry out in parallel, receives their outcomes, and returns the
result. A client only carries out the calls.
"""

import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.client.addresses import parse_address
from shoal.client.answers import Answer, Pushed
from shoal.client.arguments import (
    check_header,
    check_how,
    check_seconds,
    read_features,
    read_max_age,
)
from shoal.client.calls import Call, Policy, Steps, checked
from shoal.client.columns import as_list, check_columns, count_rows
from shoal.client.errors import (
    DeadlineExceeded,
    DeadlinePassed,
    KeyOutsideShard,
    LookupInvalid,
    Overloaded,
    PushIncomplete,
    RequestInvalid,
    ShoalError,
)
from shoal.client.hashing import first_hashes, shard_starts, shards_of
from shoal.client.learning import Learning, expected_shards
from shoal.client.quoting import abbreviated
from shoal.client.reading import read_answer, read_document, read_pushed
from shoal.client.replicas import Replica, ReplicaSet
from shoal.client.schema import Schema
from shoal.client.settings import Options
from shoal.client.sharded import Part, behind, disagreement, divide, join
from shoal.client.wire import (
    EVENT_TIME,
    Columns,
    Format,
    Partial,
    Request,
    Stale,
    get_request,
    is_arrow,
    lookup_request,
    push_request,
)

if TYPE_CHECKING:
    import pyarrow as pa

_FIRST_WAIT_SECONDS = 0.005


class Core:
    """The operations of a client.

    Args:
        run_beside: a function that runs an operation in the background.
    """

    def __init__(self, given: Options, run_beside: Callable[[Steps[None]], None]) -> None:
        self.options = given
        self.sets = [ReplicaSet([parse_address(text) for text in texts], given.limits) for texts in given.shards]
        # Each server knows the full schema, even if it holds only a shard.
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
        """Look up features: see `shoal.client.client.Client.lookup`."""
        deadline = self._deadline(timeout)
        check_how(stale, partial, form)
        age = read_max_age(max_age)
        features = read_features(features)
        check_columns("entities", entities, scalars=True)
        request_options: dict[str, Any] = {"max_age": age, "stale": stale, "partial": partial, "form": form}
        request_options["headers"] = self._headers
        if not self.options.is_sharded:
            request = lookup_request(features, entities, **request_options)
            (outcome,) = yield [self._call(request, self.sets[0], deadline)]
            return read_answer(checked(outcome), form, count_rows(entities), _plain(features))
        schema = yield from self._learning.known(deadline)
        try:
            return (yield from self._ask_shards(schema, features, entities, request_options, form, deadline))
        except (LookupInvalid, RequestInvalid, KeyOutsideShard) as error:
            # A view or a feature service may be new, the join keys of a view may have changed, or a server may hold
            # another shard.
            schema = yield from self._learning.again(schema, error, deadline)
        return (yield from self._ask_shards(schema, features, entities, request_options, form, deadline))

    def _ask_shards(
        self,
        schema: Schema,
        features: str | Sequence[str],
        entities: Columns,
        request_options: Mapping[str, Any],
        form: Format,
        deadline: float,
    ) -> Steps[Answer]:
        references = schema.references(features)
        count, parts = divide(schema, references, entities, self._starts)
        requests = {part: lookup_request(part.references, part.entities, **request_options) for part in parts}
        asked = parts
        begin = 0.0
        wait = _FIRST_WAIT_SECONDS
        answered_by: dict[Part, tuple[Replica, ...]] = {}
        while asked:
            calls = []
            for part in asked:
                call = self._call(requests[part], self.sets[part.shard], deadline)
                call.avoid = answered_by.get(part, ())
                call.not_before = begin
                calls.append(call)
            outcomes = yield calls
            for part, call, outcome in zip(asked, calls, outcomes, strict=True):
                if isinstance(outcome, DeadlineExceeded | Overloaded | DeadlinePassed) and part.answer is not None:
                    raise disagreement(parts, "the shards did not agree in time") from outcome
                part.answer = read_answer(checked(outcome), form, part.keys, part.references)
                answered_by[part] = (call.answered_by,) if call.answered_by is not None else ()
            asked = behind(parts, self.options.max_skew)
            now = monotonic()
            # The wait doubles each time, so that a shard with a long lag does not get many more requests.
            begin = now + min(wait, 0.5 * (deadline - now)) * random.uniform(0.5, 1.0)
            wait *= 2
            if asked and deadline - now < _FIRST_WAIT_SECONDS:
                raise disagreement(parts, "the shards did not agree in time")
            if not all(self.sets[part.shard].retries.take() for part in asked):
                raise disagreement(parts, "the shards do not agree, and the client's retry budget is used up")
        return join(schema, references, count, parts, form)

    # --- pushes ------------------------------------------------------------------------------------------------

    def push(
        self,
        view: str,
        rows: "Columns | pa.RecordBatch | pa.Table | None",
        deletes: Columns | None,
        idempotency_key: str | None,
        timeout: float | None,
    ) -> Steps[Pushed]:
        """Push rows: see `shoal.client.client.Client.push`."""
        key = uuid.uuid4().hex if idempotency_key is None else idempotency_key
        deadline = self._deadline(timeout)
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
        rows: "Columns | pa.RecordBatch | pa.Table | None",
        deletes: Columns | None,
        key: str,
        deadline: float,
    ) -> Steps[Pushed]:
        if is_arrow(rows):
            from shoal.client.arrow import one_batch

            rows = one_batch(rows)
        schema = yield from self._learning.known(deadline)
        if view not in schema.views:
            schema = yield from self._learning.now(deadline)
        known = schema.view(view)
        # All replicas, and all repetitions of a request, must get the same event time.
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
        self, join_keys: Sequence[tuple[str, str]], rows: "Columns | pa.RecordBatch | None", deletes: Columns | None
    ) -> dict[int, tuple[Any, Columns | None]]:
        """Divide a push; return shard → its rows and deletions."""
        if not self.options.is_sharded:
            return {0: (rows, deletes)}
        shares: dict[int, tuple[Any, Columns | None]] = {}
        for shard, share in self._divided(join_keys, rows).items():
            shares[shard] = (share, None)
        for shard, share in self._divided(join_keys, deletes).items():
            shares[shard] = (shares.get(shard, (None, None))[0], share)
        return shares

    def _divided(
        self, join_keys: Sequence[tuple[str, str]], columns: "Columns | pa.RecordBatch | None"
    ) -> dict[int, Any]:
        if columns is None:
            return {}
        names = columns.schema.names if is_arrow(columns) else columns.keys()
        missing = [name for name, _ in join_keys if name not in names]
        if missing:
            raise RequestInvalid(f"the push lacks the join key {missing[0]!r}")
        keys = [
            (name, kind, as_list(columns.column(name) if is_arrow(columns) else columns[name]))
            for name, kind in join_keys
        ]
        of_row = shards_of(first_hashes(keys), self._starts)
        shares: dict[int, Any] = {}
        for shard in np.unique(of_row).tolist():
            rows = np.flatnonzero(of_row == shard)
            if is_arrow(columns):
                from shoal.client.arrow import take_rows

                shares[shard] = take_rows(columns, rows)
            else:
                shares[shard] = {name: _taken(values, rows.tolist()) for name, values in columns.items()}
        return shares

    # --- schemas and status ------------------------------------------------------------------------------------

    def views(self, timeout: float | None) -> Steps[dict[str, Any]]:
        """Return the document of /v1/views from one server."""
        (outcome,) = yield [self._learning.call(self._deadline(timeout))]
        return read_document(checked(outcome), ("views", "services"))

    def status(self, timeout: float | None) -> Steps[dict[str, dict[str, Any] | ShoalError]]:
        """Return, by address, each server's document of /v1/status, or the error."""
        return (yield from self._ask_all("/v1/status", ("server", "views"), timeout))

    def ready(self, timeout: float | None) -> Steps[bool]:
        """Return whether each shard has a ready server."""
        answers = yield from self._ask_all("/ready", ("status", "version"), timeout)
        return all(
            any(isinstance(answers[replica.address.text], dict) for replica in replicas.replicas)
            for replicas in self.sets
        )

    def _ask_all(
        self, path: str, members: Sequence[str], timeout: float | None
    ) -> Steps[dict[str, dict[str, Any] | ShoalError]]:
        """Return, by address, each server's JSON document at a path, or the error. The document must have all
        `members`."""
        deadline = self._deadline(timeout)
        request = get_request(path, self._headers, may_retry=False)
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
    """Return the features of an answer; None if they are not known without the store's schema."""
    if isinstance(features, str) or any(reference.endswith(":*") for reference in features):
        return None
    return features


def _check_push(view: Any, rows: Any, deletes: Any) -> None:
    """Raise RequestInvalid if the arguments of a push are invalid."""
    if not isinstance(view, str) or not view:
        raise RequestInvalid(f"view is {abbreviated(view)}; give the name of a view")
    if rows is None and deletes is None:
        raise RequestInvalid("the push has neither rows nor deletes; give one of them at least")
    if is_arrow(rows):
        if deletes is not None:
            raise RequestInvalid(
                "a push of Arrow rows cannot have deletes; push those separately, or give rows as columns"
            )
    elif rows is not None:
        check_columns("rows", rows, scalars=False)
    if deletes is not None:
        check_columns("deletes", deletes, scalars=False)


def _length(columns: "Columns | pa.RecordBatch | None") -> int:
    """Return the number of rows in a part of a push."""
    if columns is None:
        return 0
    return columns.num_rows if is_arrow(columns) else count_rows(columns)


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


def _timed(columns: Any, timestamp_field: str | None, now: datetime) -> Any:
    """Return rows with event times. If the rows have no event times, add the event time `now`."""
    if columns is None:
        return None
    if is_arrow(columns):
        if {EVENT_TIME, timestamp_field} & set(columns.schema.names):
            return columns
        from shoal.client.arrow import with_time

        return with_time(columns, EVENT_TIME, now)
    if {EVENT_TIME, timestamp_field} & columns.keys() or not columns:
        return columns
    return {**columns, EVENT_TIME: [now] * count_rows(columns)}


def _taken(values: Any, rows: list[int]) -> list[Any]:
    listed = as_list(values)
    return [listed[row] for row in rows]
