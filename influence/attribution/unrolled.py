"""Influence through training that did not converge, stretch by stretch (SOURCE).

    score_n = -(1/N) Σ_ℓ ∇fᵀ (Π_{k>ℓ} exp(-d_k G_k)) (1 - exp(-d_ℓ G_ℓ)) G_ℓ⁻¹ ∇L_n(θ_ℓ)

(Bae et al. 2024). Training is cut into segments; within each,
curvature `G_ℓ` and gradients are taken at one model, the mean of its checkpoints, and
the distance `d_ℓ = Σ η` its updates go is known. The query walks backwards: in each
segment's eigenbasis it is filtered twice, into what that segment's sequences do to it
(`Travelled`) and what the segment before left of its own (`Remaining`).

With one checkpoint and distance it needs nothing but the final weights and the recipe:
an influence function whose damping is not chosen but follows from training.

An adaptive optimizer descends in a metric of its own, which no eigenbasis of `G` is
good for: there the filters are those of the exact matrix in that metric (`Metric`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from influence.attribution.gradients import gradients
from influence.attribution.measurements import Measurement, unit_of
from influence.attribution.query import Query, posed, query
from influence.attribution.scan import scan
from influence.curvature import gauss_newton
from influence.curvature.operator import Curvature, Gradients
from influence.curvature.solvers import Eigenbasis, Solution, Taken
from influence.curvature.unrolled import Unrolled
from influence.fold import Run, run
from influence.linalg.damping import Absolute, Remaining, Travelled
from influence.linalg.solvers import dot
from influence.model.task import Task
from influence.model.train import Training
from influence.types import Batches, Params


@dataclass(frozen=True)
class Segment:
    """A stretch of training.

    Attributes:
      params: the model there, say the mean of its checkpoints (`mean_params`).
      distance: `d`, the sum of its updates' learning rates, for a loss averaged over
        sequences; divided by `1 - β` under heavy-ball momentum.
    """

    params: Params
    distance: float


@dataclass(frozen=True)
class Metric:
    """What an adaptive optimizer makes of a segment.

    Attributes:
      scale: `params -> s`, the root of its metric by layer, at a model: `adam_scale`.
      batches: the sequences that exact products are averaged over.
      steps: how many of them a segment takes.
    """

    scale: Callable[[Params], Mapping[str, Array]]
    batches: Batches
    steps: int = 5


Fitted = Callable[[Params], Curvature]
"""`params -> curvature`: fits the curvature at a model."""


def source(
    task: Task,
    params: Params,
    segments: Sequence[Segment],
    measurements: Mapping[str, Measurement],
    batches: Batches,
    fitted: Fitted,
    *,
    metric: Metric | None = None,
    run: Run = run,
) -> xr.DataArray:
    """Returns `(query, train)`: influence through each segment, summed.

    Costs for each segment what a fit, a query and a scan cost; in a metric the query is
    as dear as with conjugate gradients.

    Args:
      task: the model and its loss.
      params: the final parameters, which are measured.
      segments: of training, the first one first.
      measurements: by name.
      batches: the training sequences.
      fitted: how curvature is fitted at each segment.
      metric: of an adaptive optimizer; plain descent has none.
      run: carries out the scans.

    Raises:
      ValueError: if there are no segments; as `query` and `scan` do.

    Example:
      >>> from influence.attribution.unrolled import Segment, source
      >>> def fitted(params):
      ...     return influence.fit(task, params, batches, layers="block.*")
      ...
      >>> last = [Segment(params, distance=0.5)]
      >>> unrolled = source(task, params, last, measurements, batches, fitted)
      >>> unrolled.attrs["solver"]
      'SOURCE, 1 segments'
    """
    if not segments:
        raise ValueError("There are no segments: training has one at least.")
    shares, left, values = [], None, ()
    for segment in reversed(segments):
        curvature = fitted(segment.params)
        if left is None:
            left, values = gradients(curvature.layers, params, measurements)
        followed = _followed(task, segment, curvature, left, metric)
        asked = posed(
            curvature,
            Taken(followed.solution, dot(left, followed.solution.solved)),
            {"value": values},
            measurements,
            {**followed.about, "unit": unit_of(measurements.values())},
            None,
        )
        shares.append(_total(task, segment, asked, batches, run))
        left = followed.left
    return _told(
        shares,
        solver=f"SOURCE, {len(segments)} segments"
        + (", in the optimizer's metric" if metric else ""),
        damping=", ".join(f"{x.distance:g}" for x in segments),
    )


class _Followed(NamedTuple):
    """A query behind a segment: what the segment does to it, and what is left."""

    solution: Solution
    about: Mapping[str, str]
    left: dict[str, Array]


def _followed(
    task: Task,
    segment: Segment,
    curvature: Curvature,
    asked: Gradients,
    metric: Metric | None,
) -> _Followed:
    """Returns a query followed through a segment, backwards."""
    if metric is None:
        solver = Eigenbasis(Travelled(segment.distance))
        left = curvature.filtered(asked, Remaining(segment.distance))
        solution = solver(curvature, segment.params, asked)
        return _Followed(solution, solver.about(), left)
    solver = Unrolled(
        task,
        metric.batches,
        segment.distance,
        metric.scale(segment.params),
        metric.steps,
    )
    solution = solver(curvature, segment.params, asked)
    # exp(-d G P) v = v - G h: what is gone is what the matrix makes of the solution.
    act = gauss_newton.operator(task, curvature.layers, segment.params, metric.batches)
    gone = act(solution.solved)
    left = {k: x - gone[k] for k, x in asked.items()}
    return _Followed(solution, solver.about(), left)


def tracin(
    task: Task,
    segments: Sequence[Segment],
    measurements: Mapping[str, Measurement],
    batches: Batches,
    none: Fitted,
    *,
    run: Run = run,
) -> xr.DataArray:
    """Returns `(query, train)`: products of gradients over checkpoints (TracIn).

        score_n = -(1/N) Σ_ℓ d_ℓ ∇f(θ_ℓ)ᵀ ∇L_n(θ_ℓ)

    (Pruthi et al. 2020.) Unlike SOURCE it has no curvature, and takes the measurement's
    gradient at each checkpoint.

    Args:
      task: the model and its loss.
      segments: of training; their models are the checkpoints.
      measurements: by name.
      batches: the training sequences.
      none: returns the layers to take products over, as `identity` does.
      run: carries out the scans.

    Raises:
      ValueError: if there are no segments; as `query` and `scan` do.

    Example:
      >>> from influence.attribution.unrolled import Segment, tracin
      >>> from influence.curvature.diagonal import identity
      >>> def none(params):
      ...     return identity(task, params, batches, layers="block.*")
      ...
      >>> last = [Segment(params, distance=0.5)]
      >>> tracin(task, last, measurements, batches, none).idxmax("train").item()
      'up'
    """
    if not segments:
        raise ValueError("There are no segments: training has one at least.")
    shares = []
    for segment in segments:
        asked = query(
            none(segment.params),
            segment.params,
            measurements,
            solver=Eigenbasis(Absolute(0.0)),
        )
        share = _total(task, segment, asked, batches, run)
        shares.append((segment.distance * share).assign_attrs(share.attrs))
    return _told(shares, solver=f"TracIn, {len(segments)} checkpoints")


def segments(
    training: Training, seed: int, *, count: int = 3, each: int = 2
) -> list[Segment]:
    """Returns a training in stretches of as many updates, each at its mean model.

    (FAST-SOURCE, Bae et al. 2024: the mean of models in place of mean gradients and
    curvatures.)

    Of an adaptive optimizer distances are in its metric, which `source` takes apart.

    Args:
      training: how the model came to be.
      seed: of the training.
      count: how many segments.
      each: how many checkpoints of each segment are averaged, the last at its end.

    Example:
      >>> from influence.attribution.unrolled import segments
      >>> training = train.Training(task, recipe, examples, lambda seed: start)
      >>> [round(x.distance, 2) for x in segments(training, 0, count=2)]
      [1.19, 0.31]
    """
    recipe = training.recipe
    marks = np.linspace(0, recipe.steps, count * each + 1).round().astype(int)
    states = training.states(seed, marks[1:])
    found = []
    for i in range(count):
        own = states[i * each : (i + 1) * each]
        far = training.distance(int(marks[i * each]), int(marks[(i + 1) * each]))
        found.append(Segment(mean_params([x.params for x in own]), far))
    return found


def mean_params(checkpoints: Sequence[Params]) -> Params:
    """Returns the mean of some models, parameter by parameter.

    Example:
      >>> from influence.attribution.unrolled import mean_params
      >>> middle = mean_params([start, params])
      >>> middle["head"].shape
      (8, 10)
    """
    return jax.tree.map(lambda *x: jnp.stack(x).mean(0), *checkpoints)


def _total(
    task: Task, segment: Segment, asked: Query, batches: Batches, run: Run
) -> xr.DataArray:
    return scan(task, segment.params, asked, batches, by_layer=False, run=run).total


def _told(shares: Sequence[xr.DataArray], **about: str) -> xr.DataArray:
    """Returns the sum of segments' shares, saying what it is."""
    total = reduce(add, shares)
    names = [x for x in total.coords if x not in total.dims]
    return total.drop_vars(names).assign_attrs({**shares[0].attrs, **about})
