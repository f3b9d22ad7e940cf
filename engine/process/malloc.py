"""Configure the allocator of the C library, if the library is glibc. See mallopt(3), and malloc.h for the numbers."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 64 << 20
_LARGEST_KEPT = 32 << 20
_LARGEST_SHARED = 256 << 10

_LIBRARY = ctypes.CDLL(None)


def keep_freed_memory() -> None:
    """Keep the memory of one answer for the next answer. A large answer takes hundreds of memory pages. Allocating
    these pages again for each answer took a third of the answer's time."""
    _set(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    _set(_M_MMAP_THRESHOLD, _LARGEST_KEPT)


def limit_malloc_arenas() -> None:
    """Return memory to the system when a piece of work ends. The price is that the next piece of work must allocate its
    memory again.

    All threads that start from now on share one arena. By default each thread has its own arena, and each arena grows
    to the largest amount that any work of its thread ever used.

    Also, each large buffer gets its own memory map. By default, the size from which a buffer gets its own map rises to
    the size of the largest buffer that was ever freed, up to 32 MiB. Smaller buffers then come from the arena, and
    fragment the arena for good."""
    _set(_M_ARENA_MAX, 1)
    _set(_M_MMAP_THRESHOLD, _LARGEST_SHARED)


def return_freed_memory() -> None:
    """Return free memory to the system; this takes milliseconds."""
    if hasattr(_LIBRARY, "malloc_trim"):
        _LIBRARY.malloc_trim(0)


def _set(option: int, value: int) -> None:
    if hasattr(_LIBRARY, "mallopt"):
        _LIBRARY.mallopt(option, value)
