"""Scores that several processes write, each some of the sequences, joined in the end.

    scores-C.part-START-STOP.zarr   those of sequences START to STOP, as far as they
                                    are whole; with a log and a tail, as all scores

What is done is known as ranges of sequences. What is left is dealt out to however many
processes there are now, each range as a part of its own, and a part that was begun is
never gone on with: it counts as far as it is whole.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from influence.runtime.corpus.packed import Packed, PackedBatches
from influence.runtime.mesh import Layout
from influence.runtime.processes import led, together
from influence.runtime.run.log import committed
from influence.runtime.run.stream import (
    Stream,
    forget,
    log_at,
    stored,
    whole_rows,
)
from influence.types import Batch


class Part(NamedTuple):
    """Scores of some sequences.

    Attributes:
      start: the first of them.
      whole: how many are whole on the disk.
      path: of the zarr folder.
    """

    start: int
    whole: int
    path: Path


@dataclass(frozen=True)
class Walk:
    """What is left of a corpus, in batches that all processes have a share of.

    Attributes:
      layout: the devices.
      batches: `(sequences, size) -> batches`, as the model reads them.
      chosen: the sequences.
      size: how many a batch has.
      lots: which of them each share has.
    """

    layout: Layout
    batches: Callable[[Packed, int], PackedBatches]
    chosen: Packed
    size: int
    lots: Sequence[Sequence[range]]

    @property
    def each(self) -> int:
        """Returns how many sequences of a batch one share has."""
        lanes = self.layout.lanes
        return -(-self.size // lanes) * lanes // self.layout.share.count

    def __len__(self) -> int:
        """Returns the number of batches: of the share that has most."""
        return max(sum(-(-len(x) // self.each) for x in lot) for lot in self.lots)

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """Walks this process's share; with each batch the number of its range."""
        rows, count = range(self.each), 0
        for number, places in enumerate(self.lots[self.layout.share.number]):
            some = self.batches(self.chosen.take(places), self.each)
            for part in some.rows(rows):
                count += 1
                yield part, number
        # Others may have more: no device can be left out of what they do together.
        filler = next(self.batches(self.chosen.take([0]), 1).rows(rows))
        for _ in range(count, len(self)):
            yield filler._replace(real_B=np.zeros_like(filler.real_B)), 0


def parts_of(stream: Stream) -> list[Part]:
    """Returns the parts that were begun of some scores, in order."""
    found = []
    for path in _paths(stream.path):
        lines = committed(log_at(path))
        if lines and lines[0].get("key") == stream.key:
            start = int(path.stem.split("-")[-2])
            found.append(Part(start, whole_rows(lines), path))
    return sorted(found)


def score_parts(
    stream: Stream,
    walk: Callable[[Sequence[Sequence[range]]], Walk],
    score: Callable[[Batch], np.ndarray],
    watched: Callable[[Walk], AbstractContextManager[Callable[[int], None]]],
) -> str:
    """Scores what is left, each process parts of its own, and joins all parts.

    Args:
      stream: where the scores go.
      walk: returns what is walked over, from which sequences each share has.
      score: of a batch, `[B, Q, layers]`, those rows that this process has.
      watched: shows how far it is.

    Returns:
      A checksum of all scores, in the leading process.
    """
    led("clearing parts", lambda: _clear(stream))
    share = walk([]).layout.share
    lots = dealt_out(left(stream), share.count)
    together("dealing out")
    what, streams = walk(lots), [_stream(stream, x) for x in lots[share.number]]
    opened: set[int] = set()
    with watched(what) as advance:
        for part, number in what:
            rows = score(part)[np.asarray(part.real_B)]
            if len(rows) and share.first:
                if number not in opened:
                    streams[number].open()
                    opened.add(number)
                streams[number].add(rows)
            advance(1)
    made: list[str] = []
    led("joining parts", lambda: made.append(_joined(stream)))
    return made[0] if made else ""


def left(stream: Stream) -> list[range]:
    """Returns the sequences that are not scored yet."""
    found, reached = [], whole_rows(committed(log_at(stream.path)))
    for part in parts_of(stream):
        if part.start > reached:
            found.append(range(reached, part.start))
        reached = max(reached, part.start + part.whole)
    every = len(stream.names.train)
    return [*found, range(reached, every)] if reached < every else found


def dealt_out(ranges: Sequence[range], count: int) -> list[list[range]]:
    """Returns some ranges in as many lots of about equal length.

    Example:
      >>> from influence.runtime.run.parts import dealt_out
      >>> dealt_out([range(2, 6), range(8, 14)], 2)
      [[range(2, 6), range(8, 9)], [range(9, 14)]]
    """
    each = -(-sum(map(len, ranges)) // count)
    lots: list[list[range]] = [[] for _ in range(count)]
    number, room = 0, each
    for some in ranges:
        while len(some):
            lots[number].append(some[:room])
            taken = len(lots[number][-1])
            some, room = some[taken:], room - taken
            if not room:
                number, room = number + 1, each
    return lots


def forgotten(path: Path) -> None:
    """Removes what was kept of scores, and in parts, until they were finished."""
    forget(path)
    for part in _paths(path):
        _remove(part)


def _clear(stream: Stream) -> None:
    """Begins the scores or goes on with them; removes parts of others, or of none."""
    stream.open()
    own = {x.path for x in parts_of(stream) if x.whole}
    for path in _paths(stream.path):
        if path not in own:
            _remove(path)


def _paths(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{escape(path.stem)}.part-*-*.zarr"))


def _remove(path: Path) -> None:
    forget(path)
    shutil.rmtree(path)
    for tail in path.parent.glob(f"{escape(path.stem)}.tail-*.npy"):
        tail.unlink()


def _stream(stream: Stream, places: range) -> Stream:
    """Returns where a part is written."""
    name = f"{stream.path.stem}.part-{places.start}-{places.stop}.zarr"
    return Stream(
        stream.path.with_name(name),
        stream.names._replace(train=stream.names.train[places.start : places.stop]),
        stream.attrs,
        stream.dtype,
        stream.batch,
        stream.key,
        stream.every,
    )


def _joined(stream: Stream) -> str:
    """Adds all parts to the scores, as if they had come in their order."""
    reached = whole_rows(committed(log_at(stream.path)))
    for part in parts_of(stream):
        at = part.start
        for rows in stored(part.path):
            new = rows[max(0, reached - at) :]
            at += len(rows)
            if len(new):
                stream.add(new)
                reached += len(new)
    return stream.finish()
