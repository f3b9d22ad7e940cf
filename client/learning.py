"""The client's copy of the schema: read from one server of any shard, and kept if no server answers.

A request waits for a new schema only if the client has no schema yet, or if an old schema may have caused an error.
Otherwise an old schema is refreshed in the background.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from shoal.client.calls import Call, Policy, Steps, checked
from shoal.client.errors import KeyOutsideShard, ShardMisplaced, ShoalError
from shoal.client.reading import read_document
from shoal.client.replicas import Replica, ReplicaSet
from shoal.client.schema import Schema
from shoal.client.wire import Request

_OLD_SECONDS = 30.0
"""A schema of this age is refreshed in the background."""
_NEW_SECONDS = 1.0
"""A schema younger than this is not refreshed because of an error."""
_HEDGE_SECONDS = 0.1


class Learning:
    """The schema, and the calls that read it.

    Args:
        request: the request for the schema.
        servers: all servers.
        expected: address → the shard that the client expects there, such as "2/4"; None for a server of all rows.
        max_tries: the maximum number of times that the client sends a request.
        refresh_seconds: the timeout of a background refresh.
        run_beside: a function that runs an operation in the background.
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
        # The client asks one more server every tenth of a second, until a server answers.
        count = len(servers.replicas)
        self._policy = Policy(max(max_tries, count), _HEDGE_SECONDS, max_hedges=count)
        self._refresh_seconds = max(refresh_seconds, _NEW_SECONDS)
        self._run_beside = run_beside
        self._schema: Schema | None = None
        self._refresh_at = 0.0
        self._lock = threading.Lock()

    def call(self, deadline: float, target: Replica | None = None) -> Call:
        """Return the call that reads /v1/views from any server, or from `target`."""
        return Call(self._request, self._servers, self._policy, deadline, target)

    def known(self, deadline: float) -> Steps[Schema]:
        """Return the last schema; read it now if there is no schema yet."""
        if self._schema is None:
            return (yield from self.now(deadline))
        if self._takes_refresh():
            self._run_beside(self._refresh())
        return self._schema

    def again(self, schema: Schema, error: ShoalError, deadline: float) -> Steps[Schema]:
        """Return a new schema if the old one may have caused an error; otherwise raise the error."""
        target = None
        if isinstance(error, KeyOutsideShard):
            # Ask the server that sent the error, because it knows its shard.
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
        """Read the schema from any server, or from `target`, and check that this server holds the expected shard. This
        takes at most half of the time until the deadline.

        Raises:
            ShardMisplaced: the server holds another shard.
            ShoalError: no server answered.
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
        """Return whether this caller must refresh the schema now; true for one caller at a time."""
        with self._lock:
            is_due = monotonic() >= self._refresh_at
            if is_due:
                self._refresh_at = monotonic() + _OLD_SECONDS
            return is_due

    def _refresh(self) -> Steps[None]:
        # If the refresh fails, the old schema stays. Requests that need the failed server report its failure
        # themselves.
        with suppress(ShoalError):
            yield from self.now(monotonic() + 2 * self._refresh_seconds)

    def _check_shard(self, address: str, found: Any) -> None:
        expected = self._expected[address]
        if found != expected:
            raise ShardMisplaced(
                f"{address} holds {f'shard {found}' if found else 'all rows'}, but the client expects "
                f"{f'shard {expected}' if expected else 'all rows'}; correct the client's shards"
            )


def expected_shards(sets: Sequence[ReplicaSet], is_sharded: bool) -> dict[str, str | None]:
    """Return address → the expected shard."""
    return {
        replica.address.text: f"{number}/{len(sets)}" if is_sharded else None
        for number, replicas in enumerate(sets, 1)
        for replica in replicas.replicas
    }
