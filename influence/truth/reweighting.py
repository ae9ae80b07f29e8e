"""EK-FAC with its spectrum reweighted to agree with retraining on a few queries.

    score = Σ_parts w_part · score_part

A score is a sum over layers and over bands of eigenvalues, and how much to trust each
is a matter of how the model was trained: what a damping says with one number. With a
handful of exact influences (`metagradients`) the weights are fitted, towards equal ones
as far as the data says nothing, and applied to queries that never were so expensive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from influence.attribution.gradients import gradients
from influence.attribution.measurements import Measurement, unit_of
from influence.attribution.query import solved
from influence.attribution.scan import scan
from influence.curvature.operator import Curvature, Gradients
from influence.curvature.solvers import Solution, Solver
from influence.fold import Run, run
from influence.linalg.damping import Inverse, Relative
from influence.model.task import Task
from influence.truth.correlation import check_alike
from influence.types import Batches, Params

EDGES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Where bands begin and end: shares of a matrix's eigenvalues, the largest first."""

RIDGES = tuple(10.0**k for k in range(-4, 4))
"""Pulls towards equal weights that are tried."""


@dataclass(frozen=True)
class Band:
    """An inverse, on some of the eigenvalues of a matrix and zero on the others.

    Attributes:
      inverse: of those.
      low: the share of larger eigenvalues that are left out.
      high: the share up to which they are kept.
    """

    inverse: Inverse
    low: float
    high: float

    def __call__(self, lam_OxI: Array) -> Array:
        """Returns the inverse of the band's eigenvalues."""
        flat = lam_OxI.reshape(-1)
        rank = jnp.argsort(jnp.argsort(-flat)).reshape(lam_OxI.shape)
        size = flat.shape[0]
        # A band of a small matrix may hold none; every eigenvalue is in one.
        kept = (rank >= round(self.low * size)) & (rank < round(self.high * size))
        return jnp.where(kept, self.inverse(lam_OxI), 0)


def contributions(
    task: Task,
    params: Params,
    curvature: Curvature,
    measurements: Mapping[str, Measurement],
    batches: Batches,
    *,
    inverse: Inverse = Relative(),
    edges: Sequence[float] = EDGES,
    run: Run = run,
) -> xr.DataArray:
    """Returns `(query, train, part)`: scores through each matrix and band of it.

    They sum to the scores that `inverse` gives. Costs a scan of as many times more
    queries as there are bands.

    Args:
      task: the model and its loss.
      params: its parameters.
      curvature: as fitted to the model; none of its layers may be stacked over others.
      measurements: by name.
      batches: the training sequences.
      inverse: how eigenvalues are damped and inverted.
      edges: of the bands, from 0 to 1.
      run: carries out the scan.

    Raises:
      ValueError: as `query` does.

    Example:
      >>> from influence.truth.reweighting import contributions
      >>> parts = contributions(task, params, curvature, measurements, batches)
      >>> np.testing.assert_allclose(parts.sum("part"), scores.total, atol=1e-3)
    """
    found, _ = gradients(curvature.layers, params, measurements)
    bands = [Band(inverse, *pair) for pair in pairwise(edges)]
    repeated = {k: jnp.repeat(x, len(bands), axis=0) for k, x in found.items()}
    names = [f"{name}@{i}" for name in measurements for i in range(len(bands))]
    asked = solved(curvature, params, repeated, {}, names, _Banded(tuple(bands)), None)
    layers = scan(task, params, asked, batches, run=run).layers
    q, n, m = len(measurements), layers.sizes["train"], layers.sizes["layer"]
    values = layers.values.reshape(q, len(bands), n, m).transpose(0, 2, 3, 1)
    return xr.DataArray(
        values.reshape(q, n, -1),
        dims=("query", "train", "part"),
        coords={
            "query": list(measurements),
            "train": layers["train"].values,
            "part": [
                f"{x} {low:g}-{high:g}"
                for x in layers["layer"].values
                for low, high in pairwise(edges)
            ],
        },
        attrs={**layers.attrs, "unit": unit_of(measurements.values())},
    )


@dataclass(frozen=True)
class Reweighted:
    """Weights of the parts of scores.

    Attributes:
      weights: `(part,)`.
      ridge: the pull towards equal weights that they were fitted with.
    """

    weights: xr.DataArray
    ridge: float

    def __call__(self, parts: xr.DataArray) -> xr.DataArray:
        """Returns scores `(query, train)`: the weighted sum of their parts."""
        total = (parts * self.weights).sum("part")
        about = {"reweighted": f"{len(self.weights)} parts, ridge {self.ridge:g}"}
        return total.rename("score").assign_attrs({**parts.attrs, **about})


def reweight(
    parts: xr.DataArray, exact: xr.DataArray, ridges: Sequence[float] = RIDGES
) -> Reweighted:
    """Fits weights of the parts of scores to exact influence.

    Least squares over all sequences, every query divided by the spread of its exact
    influence, with a ridge towards equal weights; of the ridges the one that predicts
    each query best from the others.

    Args:
      parts: as `contributions` returns them, of two queries at least.
      exact: `(query, train)` of the same queries.
      ridges: to choose from, as shares of the parts' mean square.

    Raises:
      ValueError: if there are fewer than two queries, or the two are of different
        queries or sequences.

    Example:
      >>> from influence.attribution.metagradients import metagradients
      >>> from influence.attribution.measurements import likelihoods
      >>> from influence.truth.reweighting import contributions, reweight
      >>> few = likelihoods(task, examples.take([0, 2, 4]))
      >>> smooth = train.Recipe(100, 5, 0.03, train.AdamW(root=1e-8))
      >>> training = train.Training(task, smooth, examples, lambda seed: start)
      >>> exact = metagradients(training, 0, few)
      >>> parts = contributions(task, params, curvature, few, batches)
      >>> better = reweight(parts, exact)(parts)
      >>> better.dims
      ('query', 'train')
    """
    if parts.sizes["query"] < 2:
        raise ValueError(
            f"{parts.sizes['query']} query says nothing about others. Give two or more."
        )
    check_alike(parts, exact)
    x_QxNxP, y_QxN = parts.values.astype(float), exact.values.astype(float)
    spread_Q = y_QxN.std(1)
    x_QxNxP, y_QxN = x_QxNxP / spread_Q[:, None, None], y_QxN / spread_Q[:, None]
    # Scaled, so that equal weights of one fit as well as any equal weights do.
    total_QxN = x_QxNxP.sum(2)
    scale = float((total_QxN * y_QxN).sum() / (total_QxN**2).sum())
    gram_QxPxP = np.einsum("qnp,qnr->qpr", x_QxNxP, x_QxNxP)
    moment_QxP = np.einsum("qnp,qn->qp", x_QxNxP, y_QxN)
    chosen = min(
        ridges,
        key=lambda ridge: _left_out(
            x_QxNxP, y_QxN, gram_QxPxP, moment_QxP, scale, ridge
        ),
    )
    weights = _ridge(gram_QxPxP.sum(0), moment_QxP.sum(0), scale, chosen)
    return Reweighted(
        xr.DataArray(weights, dims="part", coords={"part": parts["part"].values}),
        chosen,
    )


def _left_out(
    x_QxNxP: np.ndarray,
    y_QxN: np.ndarray,
    gram_QxPxP: np.ndarray,
    moment_QxP: np.ndarray,
    scale: float,
    ridge: float,
) -> float:
    """Returns the squared error on each query of the weights that others give."""
    gram, moment, error = gram_QxPxP.sum(0), moment_QxP.sum(0), 0.0
    for x, y, own, of in zip(x_QxNxP, y_QxN, gram_QxPxP, moment_QxP, strict=True):
        weights = _ridge(gram - own, moment - of, scale, ridge)
        error += float(((x @ weights - y) ** 2).sum())
    return error


def _ridge(
    gram: np.ndarray, moment: np.ndarray, scale: float, ridge: float
) -> np.ndarray:
    """Returns least squares' weights, pulled towards `scale`."""
    pull = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    rest = moment - gram @ np.full(len(gram), scale)
    return scale + np.linalg.solve(gram + pull, rest)


@dataclass(frozen=True)
class _Banded(Solver):
    """Solves for one band after the other, queries repeated for each."""

    bands: tuple[Band, ...]

    def __call__(
        self, curvature: Curvature, params: Params, gradients: Gradients
    ) -> Solution:
        """Returns the solutions in the order of the gradients."""
        del params
        every = len(self.bands)
        parts = [
            curvature.filtered({k: v[i::every] for k, v in gradients.items()}, band)
            for i, band in enumerate(self.bands)
        ]
        return Solution(
            {
                k: jnp.stack([x[k] for x in parts], axis=1).reshape(v.shape)
                for k, v in gradients.items()
            },
            {},
        )

    def about(self) -> dict[str, str]:
        """Returns the damping of the bands."""
        return {
            "solver": f"eigenbasis, {len(self.bands)} bands",
            "damping": str(self.bands[0].inverse),
        }
