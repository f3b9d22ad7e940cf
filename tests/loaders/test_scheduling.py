"""The kernel applies the scheduling that a process requests to leave room for lookups."""

import json
import os
import platform
import subprocess
import sys
import threading

import psutil
import pytest

from shoal.loaders.scrub.scheduling import let_others_read_first

_GET = {"x86_64": 315, "aarch64": 275}
_PROGRAM = f"""
import ctypes, json, os, struct, threading
from shoal.loaders.scrub.scheduling import leave_room_for_lookups
leave_room_for_lookups()
found = ctypes.create_string_buffer(56)
def ask():
    assert ctypes.CDLL(None).syscall({_GET.get(platform.machine())}, 0, found, 56, 0) == 0
thread = threading.Thread(target=ask)
thread.start()
thread.join()
nice, _, slice = struct.unpack_from("<iIQ", found, 16)
print(json.dumps([nice, slice, len(os.sched_getaffinity(0))]))
"""


@pytest.mark.skipif(platform.machine() not in _GET, reason="the system call has another number there")
def test_threads_are_nice_keep_to_half_of_the_cores_and_have_short_slices() -> None:
    printed = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True).stdout
    nice, slice_nanoseconds, cores = json.loads(printed)
    assert nice >= os.getpriority(os.PRIO_PROCESS, 0) + 10
    assert cores == (len(os.sched_getaffinity(0)) + 1) // 2
    if tuple(map(int, platform.release().split(".")[:2])) >= (6, 12):
        assert slice_nanoseconds == 100_000


@pytest.mark.skipif(platform.machine() not in _GET, reason="the system call has another number there")
def test_one_thread_reads_when_nobody_else_does_and_the_others_as_before() -> None:
    found = []

    def read() -> None:
        let_others_read_first()
        found.append(psutil.Process(threading.get_native_id()).ionice().ioclass)

    before = psutil.Process().ionice().ioclass
    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert found == [psutil.IOPRIO_CLASS_IDLE]
    assert psutil.Process().ionice().ioclass == before
