"""How the C library's allocator is set up, where that is glibc's: see mallopt(3), and malloc.h for the numbers."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 64 << 20
_LARGEST_KEPT = 32 << 20
_LARGEST_SHARED = 256 << 10

_LIBRARY = ctypes.CDLL(None)


def keep_freed_memory() -> None:
    """Have the memory of one answer kept for the next: pages fetched anew for each, of which a large answer has
    hundreds, took a third of its time."""
    _set(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    _set(_M_MMAP_THRESHOLD, _LARGEST_KEPT)


def hold_little() -> None:
    """Have memory go back to the system with the work that took it, at the price of fetching it anew for the next.

    All threads begun from now on share one arena: by default each has its own, and each arena grows to the most that
    any work of any thread ever took. And what is large is mapped by itself: by default the size from which it is rises
    to the largest that was ever freed, up to 32 MiB, and such buffers leave an arena in pieces that are never whole
    again."""
    _set(_M_ARENA_MAX, 1)
    _set(_M_MMAP_THRESHOLD, _LARGEST_SHARED)


def return_freed_memory() -> None:
    """Give back to the system what is free; takes milliseconds."""
    if hasattr(_LIBRARY, "malloc_trim"):
        _LIBRARY.malloc_trim(0)


def _set(option: int, value: int) -> None:
    if hasattr(_LIBRARY, "mallopt"):
        _LIBRARY.mallopt(option, value)
