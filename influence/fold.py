"""A pass over data, as a value.

Covariances, eigenvalues and scores are all one shape of computation: begin with an
empty state, take in one batch after the other, make something of the state. Written
so, a pass knows nothing of progress bars, checkpoints or devices; whoever runs it adds
those once for all passes (`run` here is the plainest such loop).
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np


class Fold(NamedTuple):
    """Three pure functions that make one pass over data.

    Attributes:
      name: what the pass computes, for whoever watches it.
      init: `() -> state`.
      update: `(state, batch) -> state`. May consume the state it is given: hold on to
        the one it returns.
      finish: `state -> value`.

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

    return Fold(name, init=list, update=update, finish=finish)


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
