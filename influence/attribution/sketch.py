"""Short vectors in place of gradients: projected layer by layer, never formed.

    g̃ = Pᵀ DW R,   DW = Σ_t g_t a_tᵀ

Two matrices a layer, `P` of its outputs and `R` of its inputs, bring a gradient of
`O × I` down to `K × K` (LoGra, Choe et al. 2024): positions are projected before they
are multiplied. Projected gradients are few enough numbers for their covariance to be
formed and inverted, which is what LoGra, TRAK (Park et al. 2023) and TrackStar (Chang
et al. 2025) do; what they differ in is across what they invert it, and what they divide
by.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from influence.attribution.gradients import gradients
from influence.attribution.measurements import Measurement, unit_of
from influence.attribution.scores import told
from influence.curvature.operator import Curvature
from influence.fold import Run, collected, run
from influence.linalg.contract import contract, wide
from influence.model.check import check_batches, check_params
from influence.model.reading import Reading, by_layer
from influence.model.task import Empirical, Labels, Sampled, Task, read_loss
from influence.types import Batch, Batches, Layer, Params


class Projection(NamedTuple):
    """What gradients are projected with.

    Attributes:
      layers: the layers, each read by itself.
      left: `P`, `[*stack, O, K]`, by layer.
      right: `R`, `[*stack, I, K]`, by layer.
      about: in words.
    """

    layers: tuple[Layer, ...]
    left: Mapping[str, Array]
    right: Mapping[str, Array]
    about: str


def random(layers: Sequence[Layer], rank: int, seed: int = 0) -> Projection:
    """Returns normal random projections, of sides longer than the rank.

    Args:
      layers: the layers.
      rank: `K`; a shorter side is kept whole.
      seed: of the projections.

    Example:
      >>> from influence.attribution import sketch
      >>> sketch.random(curvature.layers, rank=4).left["block.mlp.up"].shape
      (16, 4)
    """
    keys = jax.random.split(jax.random.key(seed), (len(layers), 2))

    def side(key: Array, stack: tuple[int, ...], size: int) -> Array:
        if size <= rank:
            return jnp.broadcast_to(jnp.eye(size), (*stack, size, size))
        return jax.random.normal(key, (*stack, size, rank)) / rank**0.5

    return Projection(
        _apart(layers),
        {
            x.name: side(k[0], x.stack, x.outputs)
            for x, k in zip(layers, keys, strict=True)
        },
        {
            x.name: side(k[1], x.stack, x.columns)
            for x, k in zip(layers, keys, strict=True)
        },
        f"random, {rank} × {rank}",
    )


def leading(curvature: Curvature, rank: int) -> Projection:
    """Returns projections onto the eigenvectors with most curvature, of either side.

    Example:
      >>> from influence.attribution import sketch
      >>> sketch.leading(curvature, rank=4).right["block.mlp.up"].shape
      (8, 4)
    """

    def side(x: Layer, outputs: bool) -> Array:
        block = curvature.blocks[x.name]
        basis = block.outputs if outputs else block.inputs
        size = x.outputs if outputs else x.columns
        q = jnp.broadcast_to(basis.dense(size), (*x.stack, size, size))
        energy = block.lam_OxI.sum(-1 if outputs else -2)
        best = jnp.argsort(-energy, axis=-1)[..., None, : min(rank, size)]
        return jnp.take_along_axis(q, best, axis=-1)

    return Projection(
        _apart(curvature.layers),
        {x.name: side(x, True) for x in curvature.layers},
        {x.name: side(x, False) for x in curvature.layers},
        f"leading eigenvectors, {rank} × {rank}",
    )


def sketches(
    task: Task,
    params: Params,
    projection: Projection,
    batches: Batches,
    *,
    labels: Labels = Empirical(),
    run: Run = run,
) -> dict[str, np.ndarray]:
    """Returns each sequence's projected gradient, `[N, K]`, by layer.

    Costs a forward and an activation-backward pass.

    Args:
      task: the model and its loss.
      params: its parameters.
      projection: of each layer.
      batches: the sequences.
      labels: those in the data, or the model's own.
      run: carries out the pass.

    Raises:
      ValueError: as `scan` does.

    Example:
      >>> from influence.attribution import sketch
      >>> short = sketch.random(curvature.layers, rank=4)
      >>> sketch.sketches(task, params, short, batches)["block.mlp.up"].shape
      (10, 16)
    """
    check_params(params)
    check_batches(task, params, batches)
    read = partial(_read, task, projection.layers, labels, params, _given(projection))
    flat = run(collected("sketches", read), batches)[: len(batches.ids)]
    return _by_layer(projection, flat)


def asked(
    params: Params, projection: Projection, measurements: Mapping[str, Measurement]
) -> dict[str, np.ndarray]:
    """Returns each measurement's projected gradient, `[Q, K]`, by layer.

    Raises:
      ValueError: as `query` does.
    """
    found, _ = gradients(projection.layers, params, measurements)
    small = {
        x.name: projection.left[x.name].mT @ found[x.name] @ projection.right[x.name]
        for x in projection.layers
    }
    return {k: np.asarray(x).reshape(len(x), -1) for k, x in small.items()}


def logra(
    task: Task,
    params: Params,
    projection: Projection,
    measurements: Mapping[str, Measurement],
    batches: Batches,
    *,
    damping: float = 0.1,
    normalise: bool = False,
    run: Run = run,
) -> xr.DataArray:
    """Returns `(query, train)`: `-(1/N) Σ_layers q̃ᵀ (E[g̃ g̃ᵀ] + damping)⁻¹ g̃`.

    Layer by layer, with the covariance of the sequences' own projected gradients
    (LoGra). Normalised, both sides are multiplied by the inverse's root instead and
    brought to length one, all layers together: TrackStar without an optimizer's term.

    Args:
      task: the model and its loss.
      params: its parameters.
      projection: of each layer.
      measurements: by name.
      batches: the training sequences.
      damping: as a multiple of each layer's mean eigenvalue.
      normalise: whether scores are cosines.
      run: carries out the pass.

    Raises:
      ValueError: as `query` does.

    Example:
      >>> from influence.attribution import sketch
      >>> short = sketch.random(curvature.layers, rank=4)
      >>> found = sketch.logra(task, params, short, measurements, batches)
      >>> found.attrs["solver"]
      'LoGra, random, 4 × 4'
    """
    train = sketches(task, params, projection, batches, run=run)
    query = asked(params, projection, measurements)
    roots = {k: _root(x, x, damping) for k, x in train.items()}
    q = np.concatenate([query[k] @ roots[k] for k in roots], axis=1)
    g = np.concatenate([train[k] @ roots[k] for k in roots], axis=1)
    if normalise:
        q, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, g))
    name = "TrackStar" if normalise else "LoGra"
    about = {
        "solver": f"{name}, {projection.about}",
        "damping": f"{damping:g} × mean eigenvalue of each layer",
        **({"unit": "cosine"} if normalise else {}),
    }
    return _labelled(-q @ g.T, measurements, batches, about)


def trak(
    task: Task,
    params: Params,
    projection: Projection,
    measurements: Mapping[str, Measurement],
    batches: Batches,
    *,
    damping: float = 0.1,
    run: Run = run,
) -> xr.DataArray:
    """Returns `(query, train)`: `-(1/N) q̃ᵀ (E[g̃' g̃'ᵀ] + damping)⁻¹ g̃`, all layers.

    TRAK for any task: the covariance of projected gradients towards labels that the
    model draws itself is the Gauss–Newton matrix of its outputs, projected, which for
    one logit is TRAK's kernel with its weights. To be averaged over several models.

    Args:
      task: the model and its loss.
      params: its parameters.
      projection: of each layer.
      measurements: by name.
      batches: the training sequences.
      damping: as a multiple of the mean eigenvalue.
      run: carries out the two passes.

    Raises:
      ValueError: as `query` does.

    Example:
      >>> from influence.attribution import sketch
      >>> short = sketch.random(curvature.layers, rank=4)
      >>> found = sketch.trak(task, params, short, measurements, batches)
      >>> found.attrs["solver"]
      'TRAK, random, 4 × 4'
    """
    own, drawn = (
        sketches(task, params, projection, batches, labels=labels, run=run)
        for labels in (Empirical(), Sampled())
    )
    g, other = (np.concatenate(list(x.values()), axis=1) for x in (own, drawn))
    q = np.concatenate(list(asked(params, projection, measurements).values()), axis=1)
    root = _root(other, g, damping)
    about = {
        "solver": f"TRAK, {projection.about}",
        "damping": f"{damping:g} × mean eigenvalue",
    }
    return _labelled(-(q @ root) @ (g @ root).T, measurements, batches, about)


def _root(kernel_NxK: np.ndarray, like: np.ndarray, damping: float) -> np.ndarray:
    """Returns the inverse's symmetric root, `[K, K]`."""
    values, q = np.linalg.eigh(kernel_NxK.T.astype(float) @ kernel_NxK / len(like))
    values = np.maximum(values, 0)
    return (q / np.sqrt(values + damping * values.mean())) @ q.T


def _labelled(
    values: np.ndarray,
    measurements: Mapping[str, Measurement],
    batches: Batches,
    about: Mapping[str, str],
) -> xr.DataArray:
    n = len(batches.ids)
    return xr.DataArray(
        values / n,
        coords={"query": list(measurements), "train": list(batches.ids)},
        dims=("query", "train"),
        name="score",
        attrs=told(n, {"unit": unit_of(measurements.values()), **about}.items()),
    )


def _apart(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Returns layers that each have an input of their own to be projected."""
    return tuple(x._replace(reads=x.name) for x in layers)


def _given(projection: Projection) -> dict[str, tuple[Array, Array]]:
    return {
        x.name: (projection.left[x.name], projection.right[x.name])
        for x in projection.layers
    }


def _at(
    a_BxTxI: Array,
    gs: Mapping[str, Array],
    given: tuple[Array, Array],
    counted: Array,
) -> dict[str, Array]:
    del counted
    ((name, g_BxTxO),) = gs.items()
    left, right = given
    g = contract("bto,ok->btk", g_BxTxO, left)
    a = contract("bti,ij->btj", a_BxTxI, right)
    return {name: contract("btk,btj->bkj", g, a)}


def _of(
    ds: Mapping[str, Array], given: tuple[Array, Array], counted: Array
) -> dict[str, Array]:
    del counted
    ((name, d_BxOxI),) = ds.items()
    left, right = given
    return {name: contract("ok,boi,ij->bkj", left, d_BxOxI, right)}


READING = Reading(_at, _of)


@jax.jit(static_argnums=(0, 1, 2))
def _read(
    task: Task,
    layers: tuple[Layer, ...],
    labels: Labels,
    params: Params,
    given: Mapping[str, tuple[Array, Array]],
    batch: Batch,
) -> Array:
    """Returns each example's projections, layer after layer, `[B, K]`."""
    found = by_layer(read_loss(task, layers, READING, labels, params, batch, given))
    parts = []
    for x in layers:
        first = jnp.moveaxis(found[x.name], len(x.stack), 0)
        parts.append(first.reshape(len(first), -1).astype(wide(first.dtype)))
    return jnp.concatenate(parts, axis=1)


def _by_layer(projection: Projection, flat_NxK: np.ndarray) -> dict[str, np.ndarray]:
    sizes = [
        int(
            np.prod(
                (
                    *x.stack,
                    projection.left[x.name].shape[-1],
                    projection.right[x.name].shape[-1],
                )
            )
        )
        for x in projection.layers
    ]
    parts = np.split(flat_NxK, np.cumsum(sizes)[:-1], axis=1)
    return {x.name: part for x, part in zip(projection.layers, parts, strict=True)}
