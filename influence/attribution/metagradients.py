"""Exact influence: the derivative of training itself with respect to its weights.

    score_n = d f(θ_T(w)) / d w_n  at w = 1,   θ_{t+1} = step(θ_t, batch_t, w)

by reverse mode through every update (MAGIC, Ilyas & Engstrom 2025). What a removed
sequence does to a measurement is predicted to first order in its weight, with no other
approximation; it needs the whole trajectory, and answers for one seed.

Two passes. Forwards, the state is kept at the start of every stretch of updates; then
stretch by stretch backwards, each one walked again from where it began. With stretches
of `√T` updates memory holds `2 √T` states. What is walked again does not depend on the
question, so all measurements' cotangents go back together through one linearisation.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil, sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from influence.attribution.measurements import Measurement, together, unit_of
from influence.attribution.scores import told
from influence.fold import Fold, Run, run
from influence.model import train
from influence.model.check import check_batches
from influence.model.task import Task
from influence.model.train import Recipe, State, Training
from influence.types import Inputs

AT_ONCE = 8
"""How many measurements' cotangents go through a stretch side by side."""


def metagradients(
    training: Training,
    seed: int,
    measurements: Mapping[str, Measurement],
    *,
    by_token: bool = False,
    at_once: int = AT_ONCE,
    run: Run = run,
) -> xr.DataArray:
    """Returns `(query, train)`: each sequence's exact influence through training.

    Or `(query, train, token)`: that of each label, at the position it is predicted
    from; they sum to the sequence's.

    Costs a training, and for each measurement about two and a half.

    Args:
      training: how the model came to be.
      seed: of the training.
      measurements: by name.
      by_token: whether labels are kept apart.
      at_once: how many measurements go back side by side; fewer take less memory.
      run: carries out the two passes.

    Raises:
      ValueError: if a sequence is not fit for the task, training does not end in finite
        numbers, or its derivative is none.

    Example:
      >>> from influence.attribution.metagradients import metagradients
      >>> smooth = train.Recipe(100, 5, 0.03, train.AdamW(root=1e-8))
      >>> training = train.Training(task, smooth, examples, lambda seed: start)
      >>> exact = metagradients(training, 0, measurements)
      >>> exact.dims, exact.idxmax("train").item()
      (('query', 'train'), 'up')
    """
    batches = training.examples.batches(training.recipe.batch)
    check_batches(training.task, training.start(seed), batches)
    stretches = _stretches(training.order(seed))
    trail = run(forward(training, seed), stretches)
    counts = training.task.counts(training.data)
    ones = jnp.ones(counts.shape) if by_token and counts.ndim > 1 else training.ones
    found = run(backward(training, trail, measurements, ones, at_once), trail.stretches)
    _check(found, list(measurements))
    names, ids = list(measurements), list(training.examples.ids)
    dims: dict[str, Sequence[Any]] = {"query": names, "train": ids}
    if found.ndim > len(dims):
        dims["token"] = range(found.shape[2])
    unit = unit_of(measurements.values())
    about = {"solver": "metagradient", "seed": str(seed), "unit": unit}
    return xr.DataArray(
        found,
        coords=dims,
        dims=list(dims),
        name="score",
        attrs=told(len(training.examples), about.items()),
    )


class Stretch(NamedTuple):
    """Some updates in a row.

    Attributes:
      begun: the state they begin in.
      order: which sequences each takes, `int32[K, B]`.
    """

    begun: State
    order: np.ndarray


class Trail(NamedTuple):
    """A training run that can be walked back.

    Attributes:
      stretches: the last first.
      ended: the state it ended in.
    """

    stretches: Sequence[Stretch]
    ended: State


def forward(training: Training, seed: int) -> Fold:
    """Returns the pass over stretches of an order that ends in a `Trail`."""

    def init() -> Trail:
        return Trail((), training.begun(seed))

    def update(trail: Trail, order: np.ndarray) -> Trail:
        ended = train.walked(
            training.task,
            training.recipe,
            training.data,
            training.ones,
            trail.ended,
            order,
        )
        return Trail((Stretch(trail.ended, order), *trail.stretches), ended)

    return Fold("training, kept", init, update, _finite)


def backward(
    training: Training,
    trail: Trail,
    measurements: Mapping[str, Measurement],
    ones: Array,
    at_once: int,
) -> Fold:
    """Returns the pass over a trail's stretches that ends in scores, `[Q, *ones]`."""
    values = together(measurements.values())

    def init() -> tuple[Any, Array]:
        gradients = jax.jit(jax.jacrev(values))(trail.ended.params)
        ended = _smooth(trail.ended)
        params = dict(enumerate(jax.tree.leaves(gradients)))
        # Of the state only the parameters are measured, and they come first.
        cotangents = [
            params.get(i, jnp.zeros((len(measurements), *x.shape), x.dtype))
            for i, x in enumerate(ended)
        ]
        return cotangents, jnp.zeros((len(measurements), *ones.shape), ones.dtype)

    def update(state: tuple[Any, Array], stretch: Stretch) -> tuple[Any, Array]:
        return _pulled(
            training.task, training.recipe, at_once, training.data, stretch, *state
        )

    return Fold("metagradients", init, update, lambda state: np.asarray(state[1]))


def _stretches(order: np.ndarray) -> list[np.ndarray]:
    each = ceil(sqrt(len(order)))
    return [order[i : i + each] for i in range(0, len(order), each)]


def _finite(trail: Trail) -> Trail:
    bad = [x for x in _smooth(trail.ended) if not bool(jnp.isfinite(x).all())]
    if bad:
        raise ValueError(
            f"Training ended in {len(bad)} arrays that are not finite. Lower the "
            "learning rate."
        )
    return trail


def _check(found: np.ndarray, names: Sequence[str]) -> None:
    bad = [name for name, x in zip(names, found, strict=True) if not _is_finite(x)]
    if bad:
        raise ValueError(
            f"The derivative of training is not finite for {len(bad)} measurements, "
            f"{bad[0]!r} the first. An update has no derivative where a second moment "
            "is zero: give the optimizer a `root`."
        )


def _is_finite(x: np.ndarray) -> bool:
    return bool(np.isfinite(x).all())


def _smooth(state: State) -> list[Array]:
    """Returns what of a state has a derivative: everything but counters."""
    leaves = jax.tree.leaves(state)
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def _with(state: State, smooth: Sequence[Array]) -> State:
    """Returns the state with other values of what has a derivative."""
    leaves, structure = jax.tree.flatten(state)
    left = iter(smooth)
    found = [next(left) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in leaves]
    return jax.tree.unflatten(structure, found)


@jax.jit(static_argnums=(0, 1, 2), donate_argnums=(5, 6))
def _pulled(
    task: Task,
    recipe: Recipe,
    at_once: int,
    data: Inputs,
    stretch: Stretch,
    cotangents_Q: list[Array],
    found_QxN: Array,
) -> tuple[list[Array], Array]:
    """Returns cotangents at the start of a stretch, and scores with its share."""
    each = jax.checkpoint(partial(train.step, task, recipe, data))

    def run(smooth: list[Array], weights_N: Array) -> list[Array]:
        state = _with(stretch.begun, smooth)
        state, _ = jax.lax.scan(partial(each, weights_N), state, stretch.order)
        return _smooth(state)

    ones = jnp.ones(found_QxN.shape[1:], found_QxN.dtype)
    _, pull = jax.vjp(run, _smooth(stretch.begun), ones)
    cotangents_Q, share_QxN = _mapped(pull, cotangents_Q, at_once)
    return cotangents_Q, found_QxN + share_QxN


def _mapped(pull: Callable[[Any], Any], cotangents_Q: Any, at_once: int) -> Any:
    """Returns `pull` of each row, `at_once` of them at a time, the last filled up.

    As `jax.lax.map` does with a batch size, but compiled once: it compiles what is left
    over as another program, and this one is long.
    """
    rows = len(jax.tree.leaves(cotangents_Q)[0])
    each = min(at_once, rows)
    padding = -rows % each

    def cut(x: Array) -> Array:
        filled = jnp.concatenate([x, jnp.zeros((padding, *x.shape[1:]), x.dtype)])
        return filled.reshape(-1, each, *x.shape[1:])

    found = jax.lax.map(jax.vmap(pull), jax.tree.map(cut, cotangents_Q))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], found)
