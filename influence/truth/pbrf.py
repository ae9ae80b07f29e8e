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

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from influence.attribution.measurements import Measurement, together
from influence.attribution.scores import told
from influence.curvature.gauss_newton import Matrices
from influence.curvature.operator import Curvature
from influence.fold import Run, collected, run
from influence.linalg.damping import Damping
from influence.linalg.quasi_newton import Point, lbfgs
from influence.linalg.solvers import dot
from influence.model.check import check_batches, check_params
from influence.model.task import Task
from influence.truth.bregman import Objectives, moved
from influence.types import Batch, Batches, Layer, Params


def pbrf(
    task: Task,
    params: Params,
    curvature: Curvature,
    measurements: Mapping[str, Measurement],
    batches: Batches,
    *,
    corpus: Iterable[Batch],
    n_train: int,
    damping: Damping,
    tolerance: float = 1e-3,
    evaluations: int = 500,
    run: Run = run,
) -> xr.DataArray:
    """Returns `(query, train)`: half the difference between one copy more and one less.

    The objectives are minimised for real, by a quasi-Newton method that begins with the
    fitted curvature; those of a batch side by side. Each evaluation costs a gradient of
    the corpus for every sequence and either sign. Differences of nearly equal numbers
    are taken: it wants float64.

    Args:
      task: the model and its loss.
      params: its parameters, `θˢ`.
      curvature: which layers move (all other parameters stay), and what `damping` is
        relative to; how it was fitted changes how long it takes, and nothing else.
      measurements: by name.
      batches: the sequences `z`.
      corpus: the sequences whose outputs are to stay.
      n_train: how many sequences the model was trained on: a copy is `ε = 1/n_train`.
      damping: of each matrix, `λ`: of the scores that are judged.
      tolerance: of an objective's slope, in the norm of the fitted inverse, as a share
        of what it begins with. What was reached is the coordinate `slope`.
      evaluations: of an objective, at most.
      run: carries out the pass over the batches.

    Raises:
      ValueError: if a parameter is not finite, a batch is not fit for the task, or an
        objective is not minimised.

    Example:
      >>> from influence.truth.pbrf import pbrf
      >>> truth = pbrf(
      ...     task, params, curvature, measurements, batches,
      ...     corpus=batches, n_train=10, damping=influence.Relative(10.0),
      ...     tolerance=0.05,
      ... )
      >>> truth.dims, truth.idxmax("train").item()
      (('query', 'train'), 'up')
    """
    check_params(params)
    check_batches(task, params, batches)
    corpus, values = list(corpus), together(measurements.values())

    def read(batch: Batch) -> np.ndarray:
        objectives = Objectives(
            task, params, curvature, corpus, batch, 1 / n_train, damping
        )
        x, slope_M = _minimised(objectives, tolerance, evaluations)
        measured = _measured(values, curvature.layers, params, x)
        up, down = np.split(np.asarray(measured, float), 2)
        return np.column_stack([slope_M.reshape(2, -1).max(0), (up - down) / 2])

    n = len(batches.ids)
    found = run(collected("proximal Bregman responses", read), batches)[:n]
    return xr.DataArray(
        found[:, 1:].T,
        coords={
            "query": list(measurements),
            "train": list(batches.ids),
            "slope": ("train", found[:, 0]),
        },
        dims=("query", "train"),
        name="score",
        attrs=told(n_train, {"solver": "PBRF", "damping": str(damping)}.items()),
    )


def _minimised(
    objectives: Objectives, tolerance: float, evaluations: int
) -> tuple[Matrices, np.ndarray]:
    """Returns where the objectives are least, and what is left of each one's slope."""

    def size(point: Point) -> Array:
        return jnp.sqrt(dot(point.slope, objectives.precondition(point.slope)))

    walk = lbfgs(objectives.evaluate, objectives.precondition, objectives.start())
    first = next(walk)
    begun_M, slope_M = size(first), jnp.ones_like(first.value_M)
    for point in islice(walk, evaluations):
        slope_M = size(point) / begun_M
        if bool((slope_M <= tolerance).all()):
            return point.x, np.asarray(slope_M, float)
    left = np.asarray(slope_M, float).reshape(2, -1).max(0)
    raise ValueError(
        f"After {evaluations} evaluations {int((left > tolerance).sum())} of "
        f"{len(left)} sequences' objectives are not minimised: of the slope they began "
        f"with {left.max():.2g} is left where it is most, with a tolerance of "
        f"{tolerance:g}. Damp more, use float64, or allow more evaluations."
    )


def _measured(
    values: Callable[[Params], Array],
    layers: Sequence[Layer],
    params: Params,
    x: Matrices,
) -> Array:
    return jax.jit(jax.vmap(lambda y: values(moved(layers, params, y))))(x)
