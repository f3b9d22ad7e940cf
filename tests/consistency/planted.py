"""Planted bugs for the checker: each function breaks one promise of the server, in the process that calls it."""
# ruff: noqa: B010 - mypy rejects plain assignments to these attributes, so the bugs use setattr.

import asyncio
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.engine import feature_store
from shoal.engine.base.errors import IdempotencyKeyReused
from shoal.engine.feature_store import FeatureStore
from shoal.engine.store.open_version import read_version
from shoal.engine.store.version import StoreVersion
from shoal.loaders.apply import entries
from shoal.loaders.commit import live_replacement
from shoal.loaders.commit.request_log import PushOutcome, RequestLog
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push import push_queue
from shoal.loaders.push.push import Push, Pushed, push
from shoal.loaders.push.push_queue import PushQueue


def pushes_die_at_a_snapshot() -> None:
    setattr(entries, "retained", lambda version, base, schema: None)


def pushes_are_answered_before_their_commit() -> None:
    submit = PushQueue.submit
    under_way: set[Any] = set()

    async def answer_first(queue: PushQueue, view: str, order: Push) -> Pushed:
        task = asyncio.create_task(submit(queue, view, order))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        return Pushed(PushOutcome(sum(batch.num_rows for batch in order.rows), 0), queue._writer.version().id)

    setattr(PushQueue, "submit", answer_first)


def older_deltas_hide_newer_pushes() -> None:
    setattr(entries, "_without_late_rows", lambda batch, version: batch)


def repeated_pushes_are_applied_again() -> None:
    setattr(RequestLog, "known", lambda log, view, request_id: None)


def versions_mix_old_and_new_views() -> None:
    def mixed(store: Path, live: Any, previous: StoreVersion | None, **options: Any) -> StoreVersion:
        read = read_version(store, live, previous, **options)
        if previous is None or read.id % 3 or "left" not in previous.views:
            return read
        return dataclasses.replace(read, views={**read.views, "left": previous.views["left"]})

    setattr(feature_store, "read_version", mixed)


def pushes_are_torn_into_rows() -> None:
    def one_by_one(writer: StoreWriter, view: str, pushes: list[Push]) -> list[Pushed | IdempotencyKeyReused]:
        answers: list[Pushed | IdempotencyKeyReused] = []
        for order in pushes:
            rows = [batch.slice(row, 1) for batch in order.rows for row in range(batch.num_rows)]
            for row in rows[:-1]:
                push(writer, view, [Push([row])])
            answers += push(writer, view, [Push(rows[-1:], order.request_id)])
        return answers

    setattr(push_queue, "push", one_by_one)


def a_replaced_environment_says_nothing() -> None:
    setattr(live_replacement, "retire_live", lambda live: None)


def workers_lag_behind() -> None:
    newest = FeatureStore.version
    looked = {"at": 0.0}

    def seldom(store: FeatureStore) -> StoreVersion:
        if store._version is not None and time.monotonic() - looked["at"] < 0.3:
            return store._version
        looked["at"] = time.monotonic()
        return newest(store)

    setattr(FeatureStore, "version", seldom)


PLANTED: dict[str, Callable[[], None]] = {
    plant.__name__: plant
    for plant in (
        pushes_die_at_a_snapshot,
        pushes_are_answered_before_their_commit,
        older_deltas_hide_newer_pushes,
        repeated_pushes_are_applied_again,
        versions_mix_old_and_new_views,
        pushes_are_torn_into_rows,
        a_replaced_environment_says_nothing,
        workers_lag_behind,
    )
}
