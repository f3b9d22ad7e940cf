"""The processes that serve a store, and the memory that each takes."""

import time
from pathlib import Path
from typing import Any

import psutil

from engine.run_directory import read_server_record


def describe_server(store: Path) -> dict[str, Any] | None:
    """Where a store is served on this machine, and by which processes; None if it is not.

    RSS and PSS are in bytes. PSS, the proportional set size, counts a page that n processes share as 1/n of it in each,
    so that the sum over all processes is what they take together.
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
        memory, started = process.memory_full_info(), process.create_time()
    except psutil.Error:
        return None  # It ended after the record was read.
    return {"role": role, "pid": pid, "rss": memory.rss, "pss": memory.pss, "uptime_seconds": time.time() - started}
