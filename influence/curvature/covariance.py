"""Covariances of what goes into a layer and of the gradient that comes back out of it.

`A = E[a aᵀ]` and `S = E[g gᵀ]`, every counted position a sample, as if positions were
independent (Grosse et al. 2023, section 2.3.2; Martens & Grosse 2015). Only their
eigenvectors are used: how much curvature there is along each pair of eigenvectors is
measured afterwards, without that assumption (`eigenvalues.py`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from influence.fold import Fold
from influence.linalg.contract import contract, wide
from influence.model.reading import Reading
from influence.model.task import Labels, Task, read_loss
from influence.types import Batch, Layer, Params, named_leaves


class Covariances(NamedTuple):
    """Second moments of every layer, averaged over counted positions.

    Attributes:
      inputs: `A`, `[*stack, I, I]`, by the layers' `reads`.
      gradients: `S`, `[*stack, O, O]`, by layer.
      positions: how many positions were counted, by the layers' `reads`.
    """

    inputs: dict[str, Array]
    gradients: dict[str, Array]
    positions: dict[str, int]


def fold(task: Task, params: Params, layers: Sequence[Layer], labels: Labels) -> Fold:
    """Returns the pass that computes `Covariances`."""
    layers = tuple(layers)
    return Fold(
        "covariances",
        init=partial(_init, params, layers),
        update=partial(_update, task, layers, labels, params),
        finish=partial(_finish, layers),
    )


def _at(
    a_BxTxI: Array, gs: Mapping[str, Array], given: None, counted: Array
) -> dict[str, Any]:
    """Returns sums over counted positions: of `a aᵀ`, of each `g gᵀ`, and of ones.

    The gradient is zero at every position that is not counted, by their definition, so
    only the inputs need the mask.
    """
    del given
    weight_BxT = _weights(a_BxTxI, counted, gs)
    a = a_BxTxI * weight_BxT[..., None]
    return {
        "inputs": contract("bti,btj->ij", a, a),
        "gradients": {k: contract("bto,btp->op", g, g) for k, g in gs.items()},
        "positions": weight_BxT.sum(dtype=wide(a.dtype)),
    }


READING = Reading(_at)


def _weights(a_BxTxI: Array, counted: Array, gs: Mapping[str, Array]) -> Array:
    """Returns which positions of this activation count, as ones and zeros."""
    examples, positions, _ = a_BxTxI.shape
    if positions == 1:
        counted = counted.any(1, keepdims=True)
    elif counted.shape[1] not in (1, positions):
        raise ValueError(
            f"Layer {min(gs)!r} sees {positions} positions of an example where the "
            f"task counts {counted.shape[1]}, so padding can't be told from text "
            "there. Leave the layer out, or let `counted` return [B, 1] if there is no "
            "padding."
        )
    return jnp.broadcast_to(counted, (examples, positions)).astype(a_BxTxI.dtype)


def _init(params: Params, layers: Sequence[Layer]) -> dict[str, Any]:
    weights = named_leaves(params)
    sums: dict[str, Any] = {}
    for x in layers:
        dtype = wide(weights[x.parameter].dtype)
        empty = {
            "inputs": jnp.zeros((*x.stack, x.columns, x.columns), dtype),
            "gradients": {},
            "positions": jnp.zeros(x.stack, jnp.uint32),
        }
        gradients = sums.setdefault(x.reads, empty)["gradients"]
        gradients[x.name] = jnp.zeros((*x.stack, x.outputs, x.outputs), dtype)
    return sums


@jax.jit(static_argnums=(0, 1, 2), donate_argnums=4)
def _update(
    task: Task,
    layers: tuple[Layer, ...],
    labels: Labels,
    params: Params,
    state: Any,
    batch: Batch,
) -> Any:
    sums = read_loss(task, layers, READING, labels, params, batch, {})
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), state, sums)


def _finish(layers: Sequence[Layer], sums: Any) -> Covariances:
    inputs, gradients, positions = {}, {}, {}
    for layer in layers:
        group = sums[layer.reads]
        count = group["positions"][..., None, None].astype(group["inputs"].dtype)
        inputs[layer.reads] = group["inputs"] / count
        gradients[layer.name] = group["gradients"][layer.name] / count
        positions[layer.reads] = int(group["positions"].max())
    return Covariances(inputs, gradients, positions)
