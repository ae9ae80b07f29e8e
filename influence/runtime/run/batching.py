"""How many sequences a batch, and how many layers at a time: what there is room for."""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax

from influence.runtime.processes import several
from influence.types import Layer

T = TypeVar("T")

TOKENS = 512
"""In the smallest batch that is tried, unless one sequence has more."""

WORTH = 1.05
"""How much faster a batch twice as large must be to be taken."""

TIMES = 3
"""How often a batch is timed; the fastest counts, others wait for something else."""

SHARE = 0.5
"""Of the memory that is free, what factors may take if nothing is said."""


class Measured(NamedTuple):
    """A batch size, and what it was chosen by.

    Attributes:
      size: sequences a batch.
      seconds: that one batch took, at best.
    """

    size: int
    seconds: float


def sizes(context: int, most: int) -> Iterator[int]:
    """Yields the sizes of batches that are tried: each is twice the one before."""
    size = max(1, TOKENS // context)
    while size < most:
        yield size
        size *= 2
    yield most


def fastest(
    work: Callable[[int], Callable[[], object]], tried: Iterator[int]
) -> Measured:
    """Returns the size that takes least time a sequence, of those there is room for.

    The first time is that of compiling, and does not count. Larger sizes are not tried
    once one is hardly faster, or its like would need more memory than there is; halves
    of the smallest are if there is no room for that.

    Args:
      work: `size -> what to time`.
      tried: sizes, each larger than the one before.

    Raises:
      MemoryError: if there is no room for a single sequence.
    """
    best: Measured | None = None
    for size in tried:
        try:
            one = work(size)
            one()
            seconds = min(_seconds(one) for _ in range(TIMES))
        except jax.errors.JaxRuntimeError as error:
            if not exhausted(error):
                raise
            if best is not None:
                return best
            if size == 1:
                raise _no_room(size) from error
            return fastest(work, iter([size // 2]))
        found = Measured(size, seconds)
        if best and best.seconds / best.size < WORTH * found.seconds / size:
            return best
        best = found
        if not _room_for_twice():
            return best
    if best is None:
        raise ValueError("No batch size was tried.")
    return best


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def exhausted(error: BaseException) -> bool:
    """Returns whether an error says that the device's memory is full."""
    said = "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
    return said or isinstance(error, MemoryError)


def halving(work: Callable[[int], T], size: int, say: Callable[[int], object]) -> T:
    """Does some work in batches of a size, or of half of it while memory is too small.

    Args:
      work: `size -> result`.
      size: to begin with.
      say: is told every size that is gone down to.

    Raises:
      MemoryError: if there is no room for a single sequence.
    """
    if several():  # none can go down alone, so the error of one ends them all
        return work(size)
    while True:
        try:
            return work(size)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not exhausted(error):
                raise
            if size == 1:
                raise _no_room(size) from error
            size //= 2
        say(size)


def _no_room(size: int) -> MemoryError:
    return MemoryError(
        f"{jax.local_devices()[0]} has no room for a batch of {size} sequences. Take "
        "fewer layers, a shorter context, or bfloat16."
    )


def free_bytes() -> int:
    """Returns how much memory the device has left, or the system if it is a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    lines = Path("/proc/meminfo")
    if not lines.exists():
        return 8 << 30  # no way to ask: what a small machine has
    fields = dict(x.split(":", 1) for x in lines.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _room_for_twice() -> bool:
    """Returns whether there is room for as much again as the process has ever had."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get(
        "peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return free_bytes() > peak


def factor_bytes(layer: Layer) -> int:
    """Returns what a layer's factors take at the most, in float32.

    Two covariances and as many eigenvectors, or eigenvectors and eigenvalues twice.
    """
    inputs, outputs = (
        size if whole else size**2
        for size, whole in zip(
            (layer.columns, layer.outputs), layer.diagonal, strict=True
        )
    )
    copies = 1
    for length in layer.stack:
        copies *= length
    both, lam = inputs + outputs, layer.columns * layer.outputs
    return 4 * copies * max(2 * both, both + 2 * lam)


def groups(layers: Sequence[Layer], limit: float) -> list[tuple[Layer, ...]]:
    """Returns layers in groups whose factors take at most `limit` bytes.

    Layers that read one activation stay together; one group may be larger if what reads
    one activation is.
    """
    together: dict[str, list[Layer]] = {}
    for x in layers:
        together.setdefault(x.reads, []).append(x)
    found: list[tuple[Layer, ...]] = []
    used = 0.0
    for members in together.values():
        need = sum(map(factor_bytes, members))
        if found and used + need <= limit:
            found[-1] = (*found[-1], *members)
            used += need
        else:
            found.append(tuple(members))
            used = need
    return found
