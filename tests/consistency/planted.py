"""Bugs to be found: each breaks, in the process that calls it, one thing that the server promises."""
# ruff: noqa: B010 - setattr is for what is otherwise wrong to assign to, to mypy as well.

import asyncio
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import feature_store
from engine.errors import IdempotencyKeyReused
from engine.feature_store import FeatureStore
from engine.reading import read_version
from engine.version import StoreVersion
from loaders import apply, live_replacement, push_queue
from loaders.push import Push, Pushed, push
from loaders.push_queue import PushQueue
from loaders.request_log import Applied, RequestLog
from loaders.store_writer import StoreWriter


def pushes_die_at_a_snapshot() -> None:
    setattr(apply, "retained", lambda version, base, schema: None)


def pushes_are_answered_before_their_commit() -> None:
    submit = PushQueue.submit
    under_way: set[Any] = set()

    async def answer_first(queue: PushQueue, view: str, order: Push) -> Pushed:
        task = asyncio.create_task(submit(queue, view, order))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        return Pushed(Applied(sum(batch.num_rows for batch in order.rows), 0), queue._writer.version().id)

    setattr(PushQueue, "submit", answer_first)


def older_deltas_hide_newer_pushes() -> None:
    setattr(apply, "_without_late_rows", lambda batch, version: batch)


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
    newest, looked = FeatureStore.version, {"at": 0.0}

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
