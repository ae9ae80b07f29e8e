"""A pass as it is carried out: on one device as it is written, on several dealt out."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from influence.fold import Fold, Items, Rows, Sums, joined, lanes
from influence.runtime.mesh import DATA, Layout, dealt
from influence.types import Batch

ROUND = 4
"""How many items a device are dealt out at a time; between rounds a pass may stop."""


class Placed(NamedTuple):
    """A pass on the devices it is carried out on.

    Attributes:
      init: `() -> state`.
      walk: `done -> what is taken in next, and of how much that is`, one by one.
      update: `(state, what) -> state`.
      finish: `state -> value`.
      kept: `state -> state`, as it is saved: whatever the devices, it is the same.
      again: `state -> state`, from what was saved.
    """

    init: Callable[[], Any]
    walk: Callable[[int], Iterator[tuple[Any, int]]]
    update: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]
    kept: Callable[[Any], Any]
    again: Callable[[Any], Any]


def placed(fold: Fold, batches: Any, layout: Layout | None) -> Placed:
    """Returns a pass on some devices; as it is if there is one, or nothing is apart."""
    if layout is not None:
        if isinstance(fold.apart, Items):
            return _items(fold, fold.apart, batches, layout)
        if isinstance(fold.apart, Sums):
            return _sums(fold, batches, layout)
        if isinstance(fold.apart, Rows):
            return _rows(fold, fold.apart, batches, layout)
    return Placed(
        fold.init,
        lambda done: ((x, 1) for x in islice(iter(batches), done, None)),
        fold.update,
        fold.finish,
        _same,
        _same,
    )


def first(fold: Fold, batches: Any, layout: Layout | None) -> Any:
    """Returns the state after the first batch alone, when it is there."""
    here = placed(fold, batches, layout)
    what, _ = next(here.walk(0))
    return jax.block_until_ready(here.update(here.init(), what))


def _sums(fold: Fold, batches: Any, layout: Layout) -> Placed:
    """Returns a pass over sums: in lanes, which are joined when it is saved or ends."""
    beside = lanes(fold, layout.lanes, DATA)
    where = layout.laned(jax.eval_shape(beside.init))
    joint = jax.jit(joined, out_shardings=layout.state(jax.eval_shape(fold.init)))
    return Placed(
        jax.jit(beside.init, out_shardings=where),
        partial(_walk, batches, layout),
        lambda state, part: beside.update(state, layout.in_lanes(part)),
        lambda state: fold.finish(joint(state)),
        joint,
        jax.jit(partial(_in_first, layout.lanes), out_shardings=where),
    )


def _in_first(count: int, state: Any) -> Any:
    """Returns a state with lanes, all of which but the first are empty."""
    return jax.tree.map(
        lambda x: jnp.zeros((count, *x.shape), x.dtype).at[0].set(x), state
    )


def _rows(fold: Fold, apart: Rows, batches: Any, layout: Layout) -> Placed:
    """Returns a pass that reads every example by itself: gathered when it ends."""
    size = _size(batches)

    def real(x: Any) -> np.ndarray:
        return layout.whole(x).take(np.arange(size), axis=apart.axis)

    return Placed(
        fold.init,
        partial(_walk, batches, layout),
        lambda state, part: fold.update(state, layout.spread(part)),
        lambda state: fold.finish(jax.tree.map(real, state)),
        _same,
        _same,
    )


def _items(fold: Fold, apart: Items, batches: Any, layout: Layout) -> Placed:
    """Returns a pass over items: in rounds, of which each device works on some."""
    items, devices = list(batches), layout.devices

    def walk(done: int) -> Iterator[tuple[Any, int]]:
        for start in range(done, len(items), ROUND * len(devices)):
            some = items[start : start + ROUND * len(devices)]
            yield some, len(some)

    def update(state: Any, some: list[Any]) -> Any:
        whose = dealt([apart.cost(x) for x in some], len(devices))
        likes, theirs = [], []
        # All are sent on their way before the first is worked on: devices that wait
        # for one another to send would work one after the other.
        for item, number in zip(some, whose, strict=True):
            taken = apart.take(item)
            likes.append(jax.eval_shape(apart.work, taken))
            theirs.append(
                jax.tree.map(lambda x, n=number: layout.at(x, devices[n]), taken)
            )
        done = [None if None in _leaves(x) else apart.work(x) for x in theirs]
        for item, x, like in zip(some, done, likes, strict=True):
            state = apart.put(state, item, _put(layout, x, like))
        return state

    return Placed(fold.init, walk, update, fold.finish, _same, _same)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)


def _put(layout: Layout, found: Any, like: Any) -> Any:
    """Returns what one device has found, cut over all."""
    if found is None:
        return jax.tree.map(lambda x: layout.from_one(None, x), like)
    return jax.tree.map(layout.from_one, found, like)


def _walk(batches: Any, layout: Layout, done: int) -> Iterator[tuple[Batch, int]]:
    for part in layout.parts(batches, done, _size(batches)):
        yield part, 1


def _size(batches: Any) -> int:
    """Returns how many rows a batch has."""
    return len(next(iter(batches)).real_B)


def _same(x: Any) -> Any:
    return x
