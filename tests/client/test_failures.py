"""Replicas die, stop or fail, and networks lose answers. No lookup fails that another replica could answer, no push is
applied twice, and retries stay within their budget."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pyarrow as pa
import pytest

from shoal.client import Client, DeadlineExceeded, Limits, NoAnswer, ServerError
from shoal.client.aio import AsyncClient
from shoal.client.errors import IdempotencyKeyReused, PushIncomplete
from tests.client.conftest import PATIENT, Published, addresses
from tests.faulty_network import faulty_network
from tests.server.serving import Server

FEATURES = ["users:score"]
ONE = {"users_id": [3]}


@pytest.fixture(scope="module")
def replicas(published: Published) -> Iterator[list[Server]]:
    """Three servers, each with a store of the same data. The last test kills servers."""
    starting = [published.server(f"replica-{number}") for number in range(3)]
    with ExitStack() as servers:
        yield [servers.enter_context(server) for server in starting]


def stop(server: Server, number: int = signal.SIGSTOP) -> None:
    for worker in server.record.workers:
        os.kill(worker, number)


def test_a_stopped_replica_is_hedged_and_then_left_out(replicas: list[Server]) -> None:
    with Client(addresses(replicas[:2]), timeout=20.0, hedge=0.02) as client:
        for _ in range(40):
            client.lookup(FEATURES, ONE)
        stop(replicas[1])
        try:
            started = time.monotonic()
            for _ in range(100):
                assert client.lookup(FEATURES, ONE).to_pydict() == {"users:score": [0.75]}
            # Without hedges, the first lookup on the stopped replica would take until its deadline.
            assert time.monotonic() - started < 15.0
        finally:
            stop(replicas[1], signal.SIGCONT)


def test_an_asynchronous_client_hedges_too(replicas: list[Server]) -> None:
    async def ask() -> None:
        async with AsyncClient(addresses(replicas[:2]), timeout=20.0, hedge="p95") as client:
            for _ in range(40):
                await client.lookup(FEATURES, ONE)
            stop(replicas[0])
            try:
                started = time.monotonic()
                for _ in range(100):
                    assert (await client.lookup(FEATURES, ONE)).to_pydict() == {"users:score": [0.75]}
                assert time.monotonic() - started < 15.0
            finally:
                stop(replicas[0], signal.SIGCONT)

    asyncio.run(ask())


def test_a_replica_that_does_not_answer_is_left_out_after_one_deadline(replicas: list[Server]) -> None:
    stop(replicas[2])
    try:
        with Client(addresses(replicas[1:]), timeout=0.5) as client:
            late = 0
            for _ in range(60):
                try:
                    client.lookup(FEATURES, ONE)
                except DeadlineExceeded:
                    late += 1
            # The client tries the replica again after half a second, then after a second, and so on.
            assert late <= 3
    finally:
        stop(replicas[2], signal.SIGCONT)


def test_retries_stay_within_their_budget(replicas: list[Server]) -> None:
    with faulty_network(replicas[0].record.address) as network:
        network.fail(method="POST", times=float("inf"), status=503)
        limits = Limits(retry_share=0.1, retry_reserve=5)
        with Client(network.url, timeout=5.0, limits=limits) as client:
            for _ in range(100):
                with pytest.raises(ServerError) as failure:
                    client.lookup(FEATURES, ONE)
                assert failure.value.status == 503
        asked = sum(request.startswith("POST") for request in network.requests)
        assert 100 < asked <= 100 + 5 + 10


def test_an_answer_that_is_lost_or_cut_or_slow_is_asked_for_again(replicas: list[Server]) -> None:
    with faulty_network(replicas[0].record.address) as network, Client(network.url, **PATIENT) as client:
        users = {"users_id": list(range(200)) * 200}
        for fault in ({"lost": True}, {"cut": 64 << 10}, {"status": 503}, {"status": 502}):
            network.fail(method="POST", **fault)
            answer = client.lookup(FEATURES, users, format="npy")
            assert answer.to_numpy().shape == (40_000, 1)
            assert [met.met for met in network.faults] == [1]
            network.mend()
        # A slow answer ends at the deadline, although some of its bytes arrive all the time.
        network.fail(method="POST", times=9, slow=0.2)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.lookup(FEATURES, {"users_id": list(range(200)) * 500}, format="npy", timeout=0.5)
        assert time.monotonic() - started < 3.0


def test_a_push_whose_answer_was_lost_is_applied_once(replicas: list[Server]) -> None:
    with faulty_network(replicas[0].record.address) as network, Client(network.url, **PATIENT) as client:
        client.views()
        network.fail(method="POST", text="/v1/push", lost=True)
        pushed = client.push("users", {"users_id": [5000], "score": [1.0]})
        assert sum("/v1/push" in request for request in network.requests) == 2
        again = client.push("users", {"users_id": [5000], "score": [2.0]}, idempotency_key="once")
        repeated = client.push("users", {"users_id": [5000], "score": [2.0]}, idempotency_key="once")
        assert (pushed.rows, pushed.superseded) == (again.rows, again.superseded) == (1, 0)
        # A second application of the push would have found its own row, and would have made a new version.
        assert repeated.versions == again.versions
        batch = pa.RecordBatch.from_pydict({"users_id": [5001], "score": [2.0]})
        in_arrow = [client.push("users", batch, idempotency_key="arrow") for _ in range(2)]
        assert in_arrow[0].versions == in_arrow[1].versions
        network.requests.clear()
        with pytest.raises(IdempotencyKeyReused):
            client.push("users", {"users_id": [5000], "score": [3.0]}, idempotency_key="once")
        assert sum("/v1/push" in request for request in network.requests) == 1
        assert client.lookup(FEATURES, {"users_id": [5000]}).to_pydict() == {"users:score": [2.0]}


def test_a_push_goes_to_all_replicas_and_says_which_have_it(replicas: list[Server]) -> None:
    urls = addresses(replicas)
    with Client(urls, timeout=20.0) as client:
        assert set(client.push("users", {"users_id": [6000], "score": [3.0]}).versions) == set(urls)
        for url in urls:
            assert Client(url, **PATIENT).lookup(FEATURES, {"users_id": [6000]}).to_pydict() == {"users:score": [3.0]}
        stop(replicas[1])
        try:
            with pytest.raises(PushIncomplete) as failure:
                client.push("users", {"users_id": [6000], "score": [4.0]}, timeout=1.0)
            assert (set(failure.value.failed), len(failure.value.done)) == ({urls[1]}, 2)
        finally:
            stop(replicas[1], signal.SIGCONT)
        key = failure.value.idempotency_key
        client.push("users", {"users_id": [6000], "score": [4.0]}, idempotency_key=key)
        for url in urls:
            assert Client(url, **PATIENT).lookup(FEATURES, {"users_id": [6000]}).to_pydict() == {"users:score": [4.0]}


def test_no_lookup_fails_while_replicas_are_killed(replicas: list[Server]) -> None:
    # This test must be the last of the file, because it kills servers.
    failures: list[BaseException] = []
    answered = [0, 0]
    over = threading.Event()

    def ask(client: Client, place: int) -> None:
        while not over.is_set():
            try:
                assert client.lookup(FEATURES, ONE).to_pydict() == {"users:score": [0.75]}
                answered[place] += 1
            except BaseException as error:
                failures.append(error)

    async def ask_asynchronously() -> None:
        async with AsyncClient(addresses(replicas), **PATIENT) as client:
            while not over.is_set():
                for answer in await asyncio.gather(*(client.lookup(FEATURES, ONE) for _ in range(4))):
                    assert answer.to_pydict() == {"users:score": [0.75]}
                    answered[1] += 1

    def run_asynchronously() -> None:
        try:
            asyncio.run(ask_asynchronously())
        except BaseException as error:
            failures.append(error)

    with Client(addresses(replicas), **PATIENT) as client:
        threads = [threading.Thread(target=ask, args=(client, 0)) for _ in range(3)]
        threads.append(threading.Thread(target=run_asynchronously))
        for thread in threads:
            thread.start()
        for server in replicas[:2]:
            time.sleep(0.5)
            workers = server.record.workers
            server.kill()
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
        time.sleep(0.7)
        over.set()
        for thread in threads:
            thread.join()
        assert failures == []
        assert min(answered) > 20
        stop(replicas[2])
        with pytest.raises((NoAnswer, DeadlineExceeded)):
            client.lookup(FEATURES, ONE, timeout=0.3)
        stop(replicas[2], signal.SIGCONT)
        assert client.lookup(FEATURES, ONE).to_pydict() == {"users:score": [0.75]}
