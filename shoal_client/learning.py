"""What a client knows of the views: learned from one server of any shard, and kept when no server answers.

A request waits for it only if the client knows nothing yet, or if an error may come of what it knows. Else what is old
is asked for again beside requests.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from shoal_client.calls import Call, Policy, Steps, checked
from shoal_client.errors import KeyOutsideShard, ShardMisplaced, ShoalError
from shoal_client.reading import read_document
from shoal_client.replicas import Replica, ReplicaSet
from shoal_client.schema import Schema
from shoal_client.wire import Request

_OLD_SECONDS = 30.0
"""A schema so old is asked for again, beside a request."""
_NEW_SECONDS = 1.0
"""A schema so new is not asked for again because of an error."""
_HEDGE_SECONDS = 0.1


class Learning:
    """The schema, and how it is learned.

    Args:
        request: asks for it.
        servers: all that can be asked.
        expected: address → the shard that the client takes a server for, as "2/4"; None for one of all rows.
        max_tries: how often the client sends a request.
        refresh_seconds: what may be spent on asking again beside a request.
        run_beside: carries out an operation that no caller waits for.
    """

    def __init__(
        self,
        request: Request,
        servers: ReplicaSet,
        expected: dict[str, str | None],
        max_tries: int,
        refresh_seconds: float,
        run_beside: Callable[[Steps[None]], None],
    ) -> None:
        self._request = request
        self._servers = servers
        self._expected = expected
        # Until one answers all of them are asked, one more after each tenth of a second.
        count = len(servers.replicas)
        self._policy = Policy(max(max_tries, count), _HEDGE_SECONDS, max_hedges=count)
        self._refresh_seconds = max(refresh_seconds, _NEW_SECONDS)
        self._run_beside = run_beside
        self._schema: Schema | None = None
        self._refresh_at = 0.0
        self._lock = threading.Lock()

    def call(self, deadline: float, target: Replica | None = None) -> Call:
        """The call that asks a server, any or `target`, for the document of /v1/views."""
        return Call(self._request, self._servers, self._policy, deadline, target)

    def known(self, deadline: float) -> Steps[Schema]:
        """What was learned last; learned now if nothing was yet."""
        if self._schema is None:
            return (yield from self.now(deadline))
        if self._takes_refresh():
            self._run_beside(self._refresh())
        return self._schema

    def again(self, schema: Schema, error: ShoalError, deadline: float) -> Steps[Schema]:
        """The schema as it is now, if an error may come of the older one; raises the error if not."""
        target = None
        if isinstance(error, KeyOutsideShard):
            # It knows best which shard it is.
            target = next(replica for replica in self._servers.replicas if replica.address.text == error.address)
        elif monotonic() - schema.learned < _NEW_SECONDS:
            raise error
        try:
            return (yield from self.now(deadline, target))
        except ShardMisplaced:
            raise
        except ShoalError:
            raise error from None

    def now(self, deadline: float, target: Replica | None = None) -> Steps[Schema]:
        """Ask a server what there is, and whether it is the shard that the client takes it for: any server, or
        `target`. It takes half of the time until a deadline at most.

        Raises:
            ShardMisplaced: it is another shard.
            ShoalError: none answered.
        """
        begun = monotonic()
        (outcome,) = yield [self.call(begun + 0.5 * (deadline - begun), target)]
        response = checked(outcome)
        document = read_document(response)
        self._check_shard(response.address, document.get("shard"))
        self._schema = schema = Schema.read(document, monotonic())
        with self._lock:
            self._refresh_at = monotonic() + _OLD_SECONDS
        return schema

    def _takes_refresh(self) -> bool:
        """Whether the schema is to be asked for again now, by this caller alone."""
        with self._lock:
            is_due = monotonic() >= self._refresh_at
            if is_due:
                self._refresh_at = monotonic() + _OLD_SECONDS
            return is_due

    def _refresh(self) -> Steps[None]:
        # If it fails, what was learned before stands. Requests meet the failure themselves where it concerns them.
        with suppress(ShoalError):
            yield from self.now(monotonic() + 2 * self._refresh_seconds)

    def _check_shard(self, address: str, found: Any) -> None:
        expected = self._expected[address]
        if found != expected:
            raise ShardMisplaced(
                f"{address} holds {f'shard {found}' if found else 'all rows'}, the client takes it for "
                f"{f'shard {expected}' if expected else 'a server of all rows'}; correct the client's shards"
            )


def expected_shards(sets: Sequence[ReplicaSet], is_sharded: bool) -> dict[str, str | None]:
    """Address → the shard that a client takes the server there for."""
    return {
        replica.address.text: f"{number}/{len(sets)}" if is_sharded else None
        for number, replicas in enumerate(sets, 1)
        for replica in replicas.replicas
    }
