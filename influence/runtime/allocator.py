"""Memory that is asked of the system once, not anew at every batch.

On a CPU, XLA allocates what a program needs as it starts and frees it as it ends. By
default the GNU C library hands large pieces back to the system at once, and the next
batch pays for getting them again, page by page: a quarter of the processor time of a
forward and backward pass of a small model.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""The parameters of `mallopt`, as `malloc.h` numbers them."""


def keep_memory() -> bool:
    """Has this process keep the memory it frees; returns whether its C library can.

    For programs of one's own; the command line does so by itself. What a process has
    once had it then never gives back, so its memory is the most it ever needed.
    """
    return _told(M_MMAP_MAX, 0) and _told(M_TRIM_THRESHOLD, -1) and one_arena()


def one_arena() -> bool:
    """Has a piece freed by one thread serve the next, whichever it is.

    With an arena for each thread a process holds the most that each ever needed, and
    grows as long as another one may be used. Returns whether its C library can.
    """
    return _told(M_ARENA_MAX, 1)


def _told(parameter: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(parameter, value))
