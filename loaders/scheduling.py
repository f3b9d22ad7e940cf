"""How the writer's threads share the cores with lookups: a delta can wait for milliseconds, a request cannot."""

import ctypes
import os
import platform
import random
import struct

_NICENESS = 10
_SLICE_NANOSECONDS = 100_000
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The system call's number; the C library has no function for it."""
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS, _IOPRIO_CLASS_IDLE, _IOPRIO_CLASS_SHIFT = 1, 3, 13
_ATTRIBUTES = struct.Struct("<IIQiIQQQII")
"""`struct sched_attr` of linux/sched/types.h: size, policy, flags, nice, priority, runtime, deadline, period, and least
and greatest utilisation."""


def leave_room_for_lookups() -> None:
    """Have this thread, and those that it starts, keep to half of the cores, and behind whoever else wants those.

    Niceness alone does not do it: where the threads that build a base have every core, each request that comes waits
    for one of them to be interrupted. And whoever runs is left its slice, some 3 ms, though it is nice and others
    wait: so the slice is made short, which Linux allows from 6.12 on, and older ones pass over.
    """
    os.nice(_NICENESS)
    cores = list(os.sched_getaffinity(0))
    # Which ones does not matter, but that the writers of several stores do not all take the same.
    os.sched_setaffinity(0, random.sample(cores, (len(cores) + 1) // 2))
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, niceness, 0, _SLICE_NANOSECONDS, 0, 0, 0, 0)
        # What it is for is to be faster: where it is refused, all goes on as it did.
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)


def let_others_read_first() -> None:
    """Have the disk serve this thread when nobody else wants anything of it (ioprio_set(2), class idle). Schedulers of
    disks that know no priorities pass over it."""
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        this_thread = 0
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, this_thread, _IOPRIO_CLASS_IDLE << _IOPRIO_CLASS_SHIFT)
