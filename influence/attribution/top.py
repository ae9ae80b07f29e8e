"""Each query's most extreme sequences, of a corpus too large to keep every score of."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax import Array

from influence.fold import Fold
from influence.types import Batch


class Heap(NamedTuple):
    """What may still be among the most extreme.

    Attributes:
      scores: `[Q, n]`.
      places: which sequences they are of, `[Q, n]`.
      reached: how many sequences were seen.
    """

    scores: np.ndarray
    places: np.ndarray
    reached: int


def fold(read: Callable[[Batch], Array], queries: int, each: int) -> Fold:
    """Returns the pass that finds the `each` highest and `each` lowest of every query.

    Memory does not grow with the corpus: `4 each` scores a query. Of equal scores the
    first in the corpus are kept. The value is the places of all that were kept, once
    each, in the corpus's order.

    Args:
      read: `batch -> scores [B, Q, layers]`, as `scan.reader` returns it.
      queries: `Q`.
      each: how many of either sign.

    Example:
      >>> from influence.attribution import top
      >>> from influence.attribution.scan import reader
      >>> read = reader(task, params, query, by_layer=False)
      >>> places = fold.run(top.fold(read, queries=1, each=1), batches)
      >>> [batches.ids[place] for place in places]
      ['up', 'e']
    """
    if each < 1:
        raise ValueError(f"The top {each} sequences are none. Ask for one at least.")

    def init() -> Heap:
        empty = (queries, 0)
        return Heap(np.zeros(empty), np.zeros(empty, np.int64), 0)

    def update(heap: Heap, batch: Batch) -> Heap:
        real_B = np.asarray(batch.real_B)
        new = np.asarray(read(batch)).sum(-1, dtype=np.float64)[real_B].T
        reached = int(heap.reached)
        places = np.broadcast_to(np.arange(reached, reached + new.shape[1]), new.shape)
        heap = Heap(
            np.concatenate([heap.scores, new], axis=1),
            np.concatenate([heap.places, places], axis=1),
            reached + new.shape[1],
        )
        # Ordering takes longer than adding: it waits until there is much to drop.
        return _kept(heap, each) if heap.scores.shape[1] > 4 * each else heap

    def finish(heap: Heap) -> np.ndarray:
        return np.unique(_kept(heap, each).places)

    return Fold(f"the top {each}", init=init, update=update, finish=finish)


def _kept(heap: Heap, each: int) -> Heap:
    """Returns the `each` highest and lowest of every query, in the corpus's order."""
    count = heap.scores.shape[1]
    if count <= 2 * each:
        return heap
    up = np.argsort(-heap.scores, axis=1, kind="stable")[:, :each]
    down = np.argsort(heap.scores, axis=1, kind="stable")[:, :each]
    order = np.sort(np.concatenate([up, down], axis=1), axis=1)
    return Heap(
        np.take_along_axis(heap.scores, order, axis=1),
        np.take_along_axis(heap.places, order, axis=1),
        heap.reached,
    )
