"""A pass over data, as a value.

Covariances, eigenvalues and scores are all one shape of computation: begin with an
empty state, take in one batch after the other, make something of the state. Written
so, a pass knows nothing of progress bars, checkpoints or devices; whoever runs it adds
those once for all passes (`run` here is the plainest such loop).

A pass may say what of it can be done apart, and whoever has several devices does so:
`Sums` in lanes beside one another, `Rows` example by example, `Items` one by one.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Sums(NamedTuple):
    """The state is a sum over examples, array by array, that begins at zero."""


class Rows(NamedTuple):
    """Every example is read by itself: the state is a list, an array for each batch.

    Attributes:
      axis: of these arrays, the one of the examples.
    """

    axis: int


class Items(NamedTuple):
    """What is walked over are no batches but items, each worked on by itself.

    `update(state, item)` is `put(state, item, work(take(item)))`.

    Attributes:
      take: `item -> arrays`.
      work: `arrays -> arrays`; pure.
      put: `(state, item, arrays) -> state`.
      cost: `item -> number`: how long the work takes, compared with other items'.
    """

    take: Callable[[Any], Any]
    work: Callable[[Any], Any]
    put: Callable[[Any, Any, Any], Any]
    cost: Callable[[Any], float]


class Fold(NamedTuple):
    """Three pure functions that make one pass over data.

    Attributes:
      name: what the pass computes, for whoever watches it.
      init: `() -> state`.
      update: `(state, batch) -> state`. May consume the state it is given: hold on to
        the one it returns.
      finish: `state -> value`.
      apart: what of the pass can be done apart; None if batches have to follow one
        another.

    Example:
      >>> longest = fold.Fold(
      ...     "longest",
      ...     init=lambda: 0,
      ...     update=lambda n, batch: max(n, int(batch.inputs["counts"].sum(1).max())),
      ...     finish=lambda n: n,
      ... )
      >>> fold.run(longest, batches)
      7
    """

    name: str
    init: Callable[[], Any]
    update: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]
    apart: Sums | Rows | Items | None = None


class Run(Protocol):
    """Whatever carries out a fold: `run(fold, batches) -> value`."""

    def __call__(self, fold: Fold, batches: Iterable[Any]) -> Any:
        """Folds over all batches, in order."""
        ...


def collected(name: str, read: Callable[[Any], Any], axis: int = 0) -> Fold:
    """Returns the pass that reads every batch by itself and joins what it read.

    Args:
      name: what the pass computes.
      read: `batch -> array`.
      axis: of the array, the one along which batches are joined.
    """

    def update(state: list[Any], batch: Any) -> list[Any]:
        state.append(read(batch))
        return state

    def finish(state: list[Any]) -> np.ndarray:
        return np.concatenate([np.asarray(x) for x in state], axis=axis)

    return Fold(name, init=list, update=update, finish=finish, apart=Rows(axis))


def filled(name: str, read: Callable[[Any], Any], shape: tuple[int, ...]) -> Fold:
    """Returns the pass that writes what it reads of every batch below one another.

    What is not read yet is not a number: the state has one shape all along, so that a
    pass can be saved part way.

    Args:
      name: what the pass computes.
      read: `batch -> array`, with a row for each example.
      shape: of all rows together; rows beyond, of examples that fill up the last batch,
        are left out.
    """

    def update(state: tuple[np.ndarray, int], batch: Any) -> tuple[np.ndarray, int]:
        found, done = state[0].copy(), int(state[1])
        rows = np.asarray(read(batch))
        found[done : done + len(rows)] = rows[: len(found) - done]
        return found, done + len(rows)

    return Fold(
        name,
        init=lambda: (np.full(shape, np.nan), 0),
        update=update,
        finish=lambda state: state[0],
    )


def each(
    name: str,
    init: Callable[[], Any],
    items: Items,
) -> Fold:
    """Returns the pass that works on every item by itself; its value is its state."""

    def update(state: Any, item: Any) -> Any:
        return items.put(state, item, items.work(items.take(item)))

    return Fold(name, init=init, update=update, finish=lambda x: x, apart=items)


def lanes(fold: Fold, count: int, axis: str | None = None) -> Fold:
    """Returns a pass that sums in lanes, each over examples of its own, joined at last.

    The state has a leading axis of lanes, and so has every array of a batch: examples
    in the order of the lanes, `[lanes, B / lanes, …]`. Nothing goes from lane to lane
    before the end, so lanes on several devices need not wait for each other. Of labels
    that hang on an example's own key none changes.

    Args:
      fold: a pass over `Sums`.
      count: how many lanes.
      axis: what a mesh that lanes are spread over calls that axis, for models that say
        how their own values are sharded.

    Raises:
      ValueError: if the state of the pass is no sum.

    Example:
      >>> from influence.curvature import covariance
      >>> sampled = influence.Sampled()
      >>> one_pass = covariance.fold(task, params, curvature.layers, sampled)
      >>> cut = [
      ...     jax.tree.map(lambda x: x.reshape(5, 2, *x.shape[1:]), batch)
      ...     for batch in examples.batches(10)
      ... ]
      >>> fold.run(fold.lanes(one_pass, 5), cut).sequences
      10
    """
    if not isinstance(fold.apart, Sums):
        raise ValueError(
            f"The pass {fold.name!r} is no sum over examples, so it can't be walked in "
            "lanes. Carry it out with one."
        )

    def init() -> Any:
        return jax.tree.map(
            lambda x: jnp.zeros((count, *x.shape), x.dtype), jax.eval_shape(fold.init)
        )

    return fold._replace(
        init=init,
        update=jax.vmap(fold.update, spmd_axis_name=axis),
        finish=lambda state: fold.finish(joined(state)),
    )


def joined(state: Any) -> Any:
    """Returns the sum over all lanes of a state, an array without their axis each."""
    return jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), state)


def run(fold: Fold, batches: Iterable[Any]) -> Any:
    """Carries out a fold with a plain loop.

    Example:
      >>> from influence.curvature import covariance
      >>> sampled = influence.Sampled()
      >>> one_pass = covariance.fold(task, params, curvature.layers, sampled)
      >>> fold.run(one_pass, batches).sequences
      10
    """
    state = fold.init()
    for batch in batches:
        state = fold.update(state, batch)
    return fold.finish(state)
