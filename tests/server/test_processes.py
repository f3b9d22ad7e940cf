"""The supervisor and its processes when they are killed, hang, are stopped, or are told to reload."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal.engine.process.run_directory import read_server_record
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.every_type import USERS, user_rows
from tests.server.serving import Connection, Server, eventually, is_gone, standing_still

LOOKUP: dict[str, Any] = {"features": ["users:score"], "entities": {"users_id": [1, 2]}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for the servers of this file, one at a time."""
    directory = tmp_path_factory.mktemp("processes")
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, USERS, user_rows(10))
    stores.load(directory / "store", root)
    return directory / "store"


def test_killed_workers_are_replaced(store: Path) -> None:
    with Server(store) as server:
        server.await_ready()
        before = server.record.workers
        os.kill(before[0], signal.SIGKILL)
        assert server.lookup(**LOOKUP).json["features"] == {"users:score": [0.25, 0.5]}
        os.kill(before[1], signal.SIGKILL)
        eventually(lambda: len({*server.record.workers} - {*before}) == 2, "two new workers")
        server.await_ready()
        assert server.lookup(**LOOKUP).status == 200
        assert f"pid {before[0]}, was ended by SIGKILL" in server.log
        pids = {line.partition('pid="')[2].partition('"')[0] for line in gauge_lines(server)}
        assert not pids & {str(pid) for pid in before}


def gauge_lines(server: Server) -> list[str]:
    content = server.ask("GET", "/metrics").body.decode()
    return [line for line in content.splitlines() if line.startswith("shoal_worker_version{")]


def test_children_end_with_a_killed_supervisor_and_another_can_follow(store: Path) -> None:
    with Server(store, {"log": str(store.parent / "orphaned.log")}) as server:
        children = [*server.record.workers, server.record.writer]
        server.kill()
        with Server(store) as next_server:
            assert all(is_gone(pid) for pid in children if pid)
            next_server.await_ready()


def test_a_stopped_server_finishes_what_is_under_way(store: Path) -> None:
    body = b'{"features": ["users:score"], "entities": {"users_id": [1, 2]}}'
    head = f"POST /v1/lookup HTTP/1.1\r\nHost: shoal\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    log = store.parent / "drained.log"
    with Server(store, {"log": str(log)}, workers=1) as server, server.raw_socket() as slow:
        server.await_ready()
        slow.sendall(head + body[:10])
        with server.connection() as other:
            assert other.ask("GET", "/ready").status == 200
            server.process.send_signal(signal.SIGTERM)
            refused = eventually(
                lambda: answer if (answer := other.ask("GET", "/ready")).status == 503 else None, "a 503 of /ready"
            )
        assert refused.error == ("Draining", "the server is stopping")
        assert refused.headers["connection"] == "close"
        eventually(lambda: refuses_connections(server), "a refused connection")
        assert server.process.poll() is None
        slow.sendall(body[10:])
        answer = slow.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b'"users:score":[0.25,0.5]' in answer
        assert server.process.wait(20) == 0
    assert read_server_record(store) is None
    assert not (store / "run" / "server.json").exists()
    assert log.read_text().split()[1:] == ["started"]


def refuses_connections(server: Server) -> bool:
    try:
        server.raw_socket().close()
    except ConnectionRefusedError:
        return True
    return False


def test_requests_that_do_not_end_are_cut_off(store: Path) -> None:
    with Server(store, drain_seconds=0.5) as server, server.raw_socket() as slow:
        slow.sendall(b"POST /v1/lookup HTTP/1.1\r\nHost: shoal\r\nContent-Length: 100\r\n\r\n{")
        eventually(lambda: connections(server) == 1, "the slow client's connection")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert slow.recv(100) == b""


def test_a_second_signal_ends_all_at_once(store: Path) -> None:
    with Server(store, drain_seconds=600.0) as server, server.raw_socket() as slow:
        slow.sendall(b"POST /v1/lookup HTTP/1.1\r\nHost: shoal\r\nContent-Length: 100\r\n\r\n{")
        eventually(lambda: connections(server) == 1, "the slow client's connection")
        workers = server.record.workers
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: "draining" in server.log, "the drain")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0
        assert all(is_gone(pid) for pid in workers)


def connections(server: Server) -> int:
    """Return the number of the workers' connections, without listening sockets."""
    table = Path("/proc/net/tcp").read_text().splitlines()[1:]
    port = f":{int(server.record.address.rpartition(':')[2]):04X}"
    return sum(line.split()[1].endswith(port) and line.split()[3] == "01" for line in table)


def test_a_worker_that_hangs_is_replaced(store: Path) -> None:
    with Server(store, silent_seconds=2.5) as server:
        hanging = server.record.workers[0]
        os.kill(hanging, signal.SIGSTOP)
        eventually(lambda: hanging not in server.record.workers and len(server.record.workers) == 2, "a new worker")
        assert is_gone(hanging)
        assert f"pid {hanging}, gave no sign of life" in server.log


def test_processes_that_were_frozen_together_go_on(store: Path) -> None:
    log = store.parent / "frozen.log"
    with Server(store, {"log": str(log)}, silent_seconds=4.0) as server:
        server.await_ready()
        writer = eventually(lambda: server.record.writer, "the writer")
        before = server.record
        supervisor, (first, second) = server.process.pid, before.workers
        # The processes are frozen as by a debugger, by `docker pause`, or by a machine that stalls some of them for a
        # long time.
        for frozen in ([supervisor], [supervisor, first, second, writer], [supervisor, second]):
            with ExitStack() as stopped:
                for pid in frozen:
                    stopped.enter_context(standing_still(pid))
                time.sleep(1.0 if frozen == [supervisor] else 4.5)
            for _ in range(3):
                reloads = noted(log).count("SIGHUP")
                server.process.send_signal(signal.SIGHUP)
                eventually(lambda count=reloads: noted(log).count("SIGHUP") > count, "the supervisor's next turn")  # type: ignore[misc]
            assert server.lookup(**LOOKUP).status == 200
            assert server.record == before, server.log


def test_a_writer_that_hangs_is_replaced_and_one_that_is_busy_is_not(store: Path) -> None:
    log = store.parent / "signals.log"
    # This writer waits for signals and does nothing else meanwhile.
    with Server(store, {"log": str(log)}, silent_seconds=2.5) as server:
        hanging = eventually(lambda: server.record.writer, "the writer")
        eventually(lambda: f"{hanging} started" in noted(log), "its start")
        os.kill(hanging, signal.SIGSTOP)
        busy = eventually(lambda: server.record.writer if server.record.writer != hanging else None, "a new writer")
        assert is_gone(hanging)
        assert f"writer, pid {hanging}, gave no sign of life" in server.log
        eventually(lambda: f"{busy} started" in noted(log), "the new writer")
        # A hanging worker is replaced after the same time as a silent writer, so its end shows that this time has
        # passed.
        worker = server.record.workers[0]
        os.kill(worker, signal.SIGSTOP)
        eventually(lambda: is_gone(worker), "the end of the worker")
        assert server.record.writer == busy


def test_the_writer_is_told_to_reload_and_is_replaced(store: Path) -> None:
    log = store.parent / "signals.log"
    with Server(store, {"log": str(log)}) as server:
        first = server.record.writer
        assert first is not None
        eventually(lambda: f"{first} started" in noted(log), "the writer")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: f"{first} SIGHUP" in noted(log), "the writer's reload")
        os.kill(first, signal.SIGKILL)
        second = eventually(lambda: server.record.writer if server.record.writer != first else None, "a new writer")
        eventually(lambda: f"{second} started" in noted(log), "the new writer")


def noted(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def test_connections_are_spread_over_the_workers(store: Path) -> None:
    with Server(store) as server:
        for number in (40, 8, 8, 8):
            opened = [Connection(server.record.address) for _ in range(number)]
            assert {connection.ask("GET", "/health").status for connection in opened} == {200}
            spread = eventually(partial(served, server, number), f"{number} connections of workers")
            assert len(spread) == 2
            assert min(spread.values()) >= number // 4
            for connection in opened:
                connection.close()
            # Closed connections do not count for the next round.
            eventually(lambda: served(server, 0) is not None, "no connections")


def served(server: Server, number: int) -> Counter[int] | None:
    """Return the number of connections of each worker, or None if the total is not `number`."""
    port = int(server.record.address.rpartition(":")[2])
    spread = Counter(
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.pid and connection.laddr[1:] == (port,) and connection.status == psutil.CONN_ESTABLISHED
    )
    return spread if spread.total() == number else None


def test_a_unix_socket_at_a_long_path(store: Path) -> None:
    path = store.parent / ("a" * 90) / ("b" * 90) / "shoal.sock"
    with Server(store, unix_socket=str(path)) as server:
        assert server.record.address == f"unix:{path}"
        server.await_ready()
        assert server.lookup(**LOOKUP).json["features"] == {"users:score": [0.25, 0.5]}
        second = serve_elsewhere(store, unix_socket=str(path))
        assert second.returncode == 1
        assert f"AddressUnusable: another process listens on {path}" in second.stderr
        server.kill()
    assert path.is_socket()
    with Server(store, unix_socket=str(path)) as server:
        server.await_ready()
    assert not path.exists()


def test_a_file_that_is_no_socket_stays(store: Path) -> None:
    path = store.parent / "notes.txt"
    path.write_text("mine")
    failed = serve_elsewhere(store, unix_socket=str(path))
    assert failed.returncode == 1
    assert f"AddressUnusable: cannot listen on {path}" in failed.stderr
    assert path.read_text() == "mine"


def test_a_taken_port_and_a_served_store(store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        failed = serve_elsewhere(store, port=port)
        assert f"AddressUnusable: cannot listen on 127.0.0.1:{port}" in failed.stderr
    with Server(store) as server:
        command = [sys.executable, "-m", "tests.server.serve", f'{{"store": "{store}", "port": 0}}', "null"]
        failed = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert f"ServerRunning: {store} is served by process {server.process.pid} at http://" in failed.stderr
        assert server.ask("GET", "/health").status == 200


def serve_elsewhere(store: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """Start a server on another store, and return its completed process; it is expected to fail."""
    text = json.dumps({"store": str(store.parent / f"other-{time.monotonic_ns()}"), "workers": 1} | settings)
    command = [sys.executable, "-m", "tests.server.serve", text, "null"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)
