"""How much a sequence owes to itself: `gᵀ (G + damping)⁻¹ g / N`.

The score of a sequence for its own log-probability. Large where the model has memorised
what nothing else explains: mislabelled, rare or repeated text (Koh & Liang 2017); also
what normalised scores are divided by (`normalise.py`).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import xarray as xr
from jax import Array

from influence.attribution.scores import labelled
from influence.curvature.coordinates import rotated, turned
from influence.curvature.operator import Curvature
from influence.fold import Run, collected, run
from influence.linalg.damping import Inverse, Relative
from influence.model.check import check_batches, check_params
from influence.model.reading import Reading, by_matrix
from influence.model.task import Empirical, Task, read_loss
from influence.types import Batch, Batches, Layer, Params, rows


def self_influence(
    task: Task,
    params: Params,
    curvature: Curvature,
    batches: Batches,
    *,
    inverse: Inverse = Relative(),
    n_train: int | None = None,
    run: Run = run,
) -> xr.DataArray:
    """Returns `(train, layer)`: each sequence's influence on itself, never negative.

    Costs what the pass for eigenvalues costs.

    Args:
      task: the model and its loss.
      params: its parameters.
      curvature: as fitted to the model.
      batches: the sequences.
      inverse: how the curvature is damped and inverted.
      n_train: how many sequences the model was trained on, if not those of `batches`.
      run: carries out the pass.

    Raises:
      ValueError: as `scan` does, and if the damped curvature has no inverse.

    Example:
      >>> from influence.attribution.self_influence import self_influence
      >>> own = self_influence(task, params, curvature, batches)
      >>> own.dims
      ('train', 'layer')
      >>> own.sum("layer").idxmax("train").item()
      'pi'
    """
    check_params(params)
    check_batches(task, params, batches)
    curvature = curvature.loaded()
    curvature.check_inverse(inverse)
    scales = {k: inverse(x.lam_OxI) for k, x in curvature.blocks.items()}
    read = partial(_read, task, curvature.layers, params, curvature, scales)
    values = run(collected("self-influence", read), batches)
    dims = {
        "train": list(batches.ids),
        "layer": [label for _, _, label in rows(curvature.layers)],
    }
    n_train = len(batches.ids) if n_train is None else n_train
    about = {
        "layers": " ".join(x.name for x in curvature.layers),
        "solver": "eigenbasis",
        "damping": str(inverse),
        "curvature": curvature.about,
        "curvature_sequences": curvature.sequences,
    }
    return labelled(values[: len(batches.ids)], dims, n_train, about.items())


def _at(
    a_BxTxI: Array, gs: Mapping[str, Array], given: Any, counted: Array
) -> dict[str, Array]:
    del counted
    *bases, scales = given
    found = rotated(a_BxTxI, gs, *bases)
    return _weighed(found, scales)


def _of(ds: Mapping[str, Array], given: Any, counted: Array) -> dict[str, Array]:
    del counted
    *bases, scales = given
    return _weighed(turned(ds, *bases), scales)


def _weighed(ds: Mapping[str, Array], scales: Mapping[str, Array]) -> dict[str, Array]:
    """Returns `Σ d² scale` of each example, `[B]`, by layer."""
    return {k: jnp.einsum("boi,oi->b", d**2, scales[k]) for k, d in ds.items()}


READING = Reading(_at, _of)


@jax.jit(static_argnums=(0, 1))
def _read(
    task: Task,
    layers: tuple[Layer, ...],
    params: Params,
    curvature: Curvature,
    scales: Mapping[str, Array],
    batch: Batch,
) -> Array:
    given: dict[str, Any] = {}
    for x in layers:
        block = curvature.blocks[x.name]
        _, outputs, scale = given.setdefault(x.reads, (block.inputs, {}, {}))
        outputs[x.name], scale[x.name] = block.outputs, scales[x.name]
    found = read_loss(task, layers, READING, Empirical(), params, batch, given)
    return by_matrix(layers, found)
