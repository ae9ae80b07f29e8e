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
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = (mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1))
    # One arena: a piece freed by one thread serves the next, whichever it is.
    return all(kept) and bool(mallopt(M_ARENA_MAX, 1))
