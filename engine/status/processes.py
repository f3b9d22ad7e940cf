"""The processes that serve a store, and the memory of each process."""

import time
from pathlib import Path
from typing import Any

import psutil

from shoal.engine.process.run_directory import read_server_record


def describe_server(store: Path) -> dict[str, Any] | None:
    """Return the address of a store's server on this machine, and the server's processes; None if no server runs.

    RSS and PSS are in bytes. PSS, the proportional set size, counts 1/n of each page that n processes share. So the sum
    of PSS over all processes is their total memory.
    """
    record = read_server_record(store)
    if record is None:
        return None
    roles = [("supervisor", record.pid), ("writer", record.writer), *(("worker", pid) for pid in record.workers)]
    processes = [_describe(role, pid) for role, pid in roles if pid is not None]
    return {"address": record.address, "processes": [process for process in processes if process is not None]}


def _describe(role: str, pid: int) -> dict[str, Any] | None:
    try:
        process = psutil.Process(pid)
        memory = process.memory_full_info()
        started = process.create_time()
    except psutil.Error:
        return None  # The process ended after the record was read.
    return {"role": role, "pid": pid, "rss": memory.rss, "pss": memory.pss, "uptime_seconds": time.time() - started}
