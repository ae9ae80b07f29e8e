"""Influence through training that did not converge, stretch by stretch (SOURCE).

    score_n = -(1/N) Σ_ℓ ∇fᵀ (Π_{k>ℓ} exp(-d_k G_k)) (1 - exp(-d_ℓ G_ℓ)) G_ℓ⁻¹ ∇L_n(θ_ℓ)

(Bae et al. 2024). Training is cut into segments; within each,
curvature `G_ℓ` and gradients are taken at one model, the mean of its checkpoints, and
the distance `d_ℓ = Σ η` its updates go is known. The query walks backwards: in each
segment's eigenbasis it is filtered twice, into what that segment's sequences do to it
(`Travelled`) and what the segment before left of its own (`Remaining`).

With one checkpoint and distance it needs nothing but the final weights and the recipe:
an influence function whose damping is not chosen but follows from training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr

from influence.attribution.measurements import Measurement
from influence.attribution.query import Query, gradients, query, solved
from influence.attribution.scan import scan
from influence.curvature.operator import Curvature
from influence.curvature.solvers import Eigenbasis
from influence.fold import Run, run
from influence.linalg.damping import Absolute, Remaining, Travelled
from influence.model.task import Task
from influence.model.train import State, Training
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
    run: Run = run,
) -> xr.DataArray:
    """Returns `(query, train)`: influence through each segment, summed.

    Costs for each segment what a fit, a query and a scan cost.

    Args:
      task: the model and its loss.
      params: the final parameters, which are measured.
      segments: of training by gradient descent, the first one first.
      measurements: by name.
      batches: the training sequences.
      fitted: how curvature is fitted at each segment.
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
        asked = solved(
            curvature,
            segment.params,
            left,
            {"value": values},
            measurements,
            Eigenbasis(Travelled(segment.distance)),
            None,
        )
        shares.append(_total(task, segment, asked, batches, run))
        left = curvature.filtered(left, Remaining(segment.distance))
    return _told(
        shares,
        solver=f"SOURCE, {len(segments)} segments",
        damping=", ".join(f"{x.distance:g}" for x in segments),
    )


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

    Of an adaptive optimizer the metric is one number here, the mean over parameters of
    what it divides by in each segment: coarser than plain descent's.

    Args:
      training: how the model came to be.
      seed: of the training.
      count: how many segments.
      each: how many checkpoints of each segment are averaged, the last at its end.

    Example:
      >>> from influence.attribution.unrolled import segments
      >>> training = train.Training(task, recipe, examples, lambda seed: start)
      >>> [round(x.distance, 2) for x in segments(training, 0, count=2)]
      [20.83, 3.96]
    """
    recipe = training.recipe
    marks = np.linspace(0, recipe.steps, count * each + 1).round().astype(int)
    states = training.states(seed, marks[1:])
    found = []
    for i in range(count):
        own = states[i * each : (i + 1) * each]
        far = training.distance(int(marks[i * each]), int(marks[(i + 1) * each]))
        if recipe.optimizer.adaptive:
            far *= float(np.mean([_metric(training, x) for x in own]))
        found.append(Segment(mean_params([x.params for x in own]), far))
    return found


def _metric(training: Training, state: State) -> float:
    """Returns the mean of one over the root second moment, of sequences' gradients."""
    moments = optax.tree_utils.tree_get(state.optimizer, "nu")
    labels = np.asarray(training.task.counts(training.data)).sum()
    each = labels / len(training.examples)
    roots = np.concatenate([np.sqrt(x).ravel() for x in jax.tree.leaves(moments)])
    # A parameter that was never moved has no metric.
    return float((1 / (roots[roots > 0] * each)).mean())


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
