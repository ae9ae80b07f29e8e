"""What influence functions approximate: the proximal Bregman response function.

    θ(ε) = argmin  (1/B) Σ_i D_i(h(θ, x_i), h(θˢ, x_i)) + ε L(z, θ) + ½ Σ λ |θ - θˢ|²
    D(y, yˢ) = L(y) - L(yˢ) - ⟨∇L(yˢ), y - yˢ⟩

(Bae et al. 2022): raise or lower the loss of one sequence `z`, and stay near the
trained model, in what it says and in its weights. It is defined for a model that has
not converged, where retraining asks another question, and its derivative at `ε = 0` is
`-(G + λ)⁻¹ ∇L(z)`. So it tells apart what scores lose by inverting an approximation of
`G + λ`, and what they lose by being derivatives.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from influence.attribution.measurements import Measurement, together, unit_of
from influence.attribution.scores import told
from influence.curvature.gauss_newton import Matrices
from influence.curvature.operator import Curvature
from influence.fold import Run, filled, run
from influence.linalg.damping import Damping
from influence.linalg.quasi_newton import Point, lbfgs
from influence.linalg.solvers import dot
from influence.model.check import check_batches, check_params
from influence.model.task import Task
from influence.truth.bregman import Objectives, moved
from influence.types import Batch, Batches, Layer, Params

GONE = 1e3
"""An objective whose slope has become so many times as steep has no minimum near."""


class Held(NamedTuple):
    """What holds the model in its place, and how hard it is pulled.

    Attributes:
      corpus: the sequences whose outputs are to stay.
      damping: of each matrix, `λ`: of the scores that are judged.
      n_train: how many sequences the model was trained on: a copy is `ε = 1/n_train`.
      copies: how many copies more, and less: fewer than one are nearer to a derivative.
    """

    corpus: Iterable[Batch]
    damping: Damping
    n_train: int
    copies: float = 1.0


class Until(NamedTuple):
    """When an objective is minimised.

    Attributes:
      slope: how much of it is left, in the norm of the fitted inverse, as a share of
        what it begins with.
      evaluations: of an objective, at most.
    """

    slope: float = 1e-3
    evaluations: int = 500


MINIMISED = Until()


def pbrf(
    task: Task,
    params: Params,
    curvature: Curvature,
    measurements: Mapping[str, Measurement],
    batches: Batches,
    held: Held,
    *,
    until: Until = MINIMISED,
    run: Run = run,
) -> xr.DataArray:
    """Returns `(query, train)`: half the difference between a copy more and one less.

    The objectives are minimised for real, by a quasi-Newton method that begins with the
    fitted curvature; those of a batch side by side. Each evaluation costs a gradient of
    the corpus for every sequence and either sign. Differences of nearly equal numbers
    are taken, so all is in float64, whatever parameters and curvature are in.

    What is left of the slope is the coordinate `slope`. With a copy less the loss may
    grow for ever, and where little holds the model the objective has no minimum: a
    sequence whose objectives are not minimised has `nan`.

    Args:
      task: the model and its loss.
      params: its parameters, `θˢ`.
      curvature: which layers move (all other parameters stay), and what the damping is
        relative to; how it was fitted changes how long it takes, and nothing else.
      measurements: by name.
      batches: the sequences `z`.
      held: what holds the model.
      until: when an objective is minimised.
      run: carries out the pass over the batches.

    Raises:
      ValueError: if a parameter is not finite, a batch is not fit for the task, or no
        objective is minimised.

    Example:
      >>> from influence.truth.pbrf import Held, Until, pbrf
      >>> held = Held(batches, influence.Relative(10.0), n_train=10)
      >>> until = Until(slope=0.05)
      >>> truth = pbrf(
      ...     task, params, curvature, measurements, batches, held, until=until
      ... )
      >>> truth.dims, truth.idxmax("train").item()
      (('query', 'train'), 'up')
    """
    check_params(params)
    check_batches(task, params, batches)
    corpus, values = list(held.corpus), together(measurements.values())
    copy = held.copies / held.n_train
    with jax.enable_x64(True):
        wide, curved = (_wider(x) for x in (params, curvature.loaded()))

    def read(batch: Batch) -> np.ndarray:
        with jax.enable_x64(True):
            objectives = Objectives(
                task, wide, curved, corpus, batch, copy, held.damping
            )
            x, slope_M = _minimised(objectives, until)
            measured = _measured(values, curved.layers, wide, x)
        up, down = np.split(np.asarray(measured, float), 2)
        slope_N = slope_M.reshape(2, -1).max(0)
        change = (up - down) / (2 * held.copies)
        change[slope_N > until.slope] = np.nan
        return np.column_stack([slope_N, change])

    n = len(batches.ids)
    shape = (n, 1 + len(measurements))
    found = run(filled("proximal Bregman responses", read, shape), batches)
    _check_minimised(found[:, 0], until)
    about = {
        "solver": "PBRF",
        "damping": str(held.damping),
        "copies": held.copies,
        "unit": unit_of(measurements.values()),
    }
    return xr.DataArray(
        found[:, 1:].T,
        coords={
            "query": list(measurements),
            "train": list(batches.ids),
            "slope": ("train", found[:, 0]),
        },
        dims=("query", "train"),
        name="score",
        attrs=told(held.n_train, about.items()),
    )


def _check_minimised(slope_N: np.ndarray, until: Until) -> None:
    if (slope_N > until.slope).all():
        raise ValueError(
            f"After {until.evaluations} evaluations none of {len(slope_N)} sequences' "
            f"objectives is minimised: of the slope they began with "
            f"{slope_N.min():.2g} is left where it is least, with a tolerance of "
            f"{until.slope:g}. Allow more evaluations; if the slope has grown, damp "
            "more, or ask for fewer copies."
        )


def _wider(tree: Any) -> Any:
    def leaf(x: Array) -> Array:
        whole = not jnp.issubdtype(x.dtype, jnp.floating)
        return x if whole else jnp.asarray(x, jnp.float64)

    return jax.tree.map(leaf, tree)


def _minimised(objectives: Objectives, until: Until) -> tuple[Matrices, np.ndarray]:
    """Returns where the objectives are least, and what is left of each one's slope."""

    def size(point: Point) -> Array:
        return jnp.sqrt(dot(point.slope, objectives.precondition(point.slope)))

    walk = lbfgs(objectives.evaluate, objectives.precondition, objectives.start())
    first = next(walk)
    begun_M, point, slope_M = size(first), first, jnp.ones_like(first.value_M)
    for point in islice(walk, until.evaluations):
        slope_M = size(point) / begun_M
        if bool(((slope_M <= until.slope) | ~(slope_M < GONE)).all()):
            break
    # What is not finite is not minimised.
    return point.x, np.nan_to_num(np.asarray(slope_M, float), nan=np.inf)


def _measured(
    values: Callable[[Params], Array],
    layers: Sequence[Layer],
    params: Params,
    x: Matrices,
) -> Array:
    return jax.jit(jax.vmap(lambda y: values(moved(layers, params, y))))(x)
