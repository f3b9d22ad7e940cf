"""Make the writer's threads give way to lookups: a delta can wait for milliseconds, a request cannot."""

import ctypes
import os
import platform
import random
import struct

_NICENESS = 10
_SLICE_NANOSECONDS = 100_000
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The number of the system call by machine type; the C library has no function for it."""
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS, _IOPRIO_CLASS_IDLE, _IOPRIO_CLASS_SHIFT = 1, 3, 13
_ATTRIBUTES = struct.Struct("<IIQiIQQQII")
"""`struct sched_attr` of linux/sched/types.h: size, policy, flags, nice, priority, runtime, deadline, period, minimum
and maximum utilisation."""


def leave_room_for_lookups() -> None:
    """Restrict this thread, and those that it starts, to half of the cores, at low priority with short time slices.

    Niceness alone is not enough. If the threads that build a base run on every core, each request waits until one of
    them is preempted. Even a thread of low priority keeps its core for a full time slice, about 3 ms, while other
    threads wait. So the slice is shortened too. Linux supports this from 6.12 on; older kernels ignore it.
    """
    os.nice(_NICENESS)
    cores = list(os.sched_getaffinity(0))
    # The choice is random so that the writers of several stores do not all use the same cores.
    os.sched_setaffinity(0, random.sample(cores, (len(cores) + 1) // 2))
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, niceness, 0, _SLICE_NANOSECONDS, 0, 0, 0, 0)
        # The short slice only improves latency, so a failure of this call is ignored.
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)


def let_others_read_first() -> None:
    """Let the disk serve this thread only while the disk has no other requests (ioprio_set(2), class idle). Disk
    schedulers without priorities ignore this."""
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        this_thread = 0
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, this_thread, _IOPRIO_CLASS_IDLE << _IOPRIO_CLASS_SHIFT)
