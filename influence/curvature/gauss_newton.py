"""Exact products with the Gauss–Newton matrix of the loss, and the matrix itself.

    G v = (1/B) Σ_examples Jᵀ H J v

with `J` the Jacobian of the model's outputs with respect to the layers and `H` the
Hessian of the summed loss with respect to the outputs: for softmax and cross-entropy
the Fisher matrix, whatever the labels (Martens 2020). All layers together, no block
left out; vectors are matrices `[Q, *stack, O, I]` by layer, as a curvature's are.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from influence.linalg.contract import wide
from influence.linalg.solvers import Operator, add
from influence.model.tangents import Leaves, covered, derivatives, matrices, tangent
from influence.model.task import Task, losses
from influence.types import Batch, Layer, Params, with_leaves

Matrices = Mapping[str, Array]
"""Matrices `[Q, *stack, O, I]` by layer."""

ROWS = 256
"""How many directions at a time are sent through the model to form a matrix."""

NO_EXAMPLES = (
    "There is no example to multiply with the Gauss-Newton matrix of: the batches are "
    "empty, or what made them was walked over before. Give a list of batches, or "
    "`examples.batches(size)`, which can be walked over again."
)


@jax.jit(static_argnums=(0, 1))
def multiply(
    task: Task,
    layers: tuple[Layer, ...],
    params: Params,
    batch: Batch,
    v: Matrices,
) -> dict[str, Array]:
    """Returns `G v` on one batch; the model is linearised once for all of `v`.

    Costs a forward pass, and a forward- and a backward-mode pass for each `v`.
    """
    outputs, push, pull = _linearised(task, layers, params, batch)

    def loss(outputs: Any) -> Array:
        total = losses(task, outputs, task.labels(batch.inputs), batch).sum()
        return total / batch.real_B.sum().astype(total.dtype)

    def product(one: Matrices) -> dict[str, Array]:
        _, curved = jax.jvp(jax.grad(loss), (outputs,), (push(one),))
        return pull(curved)

    return jax.vmap(product)(v)


def _linearised(
    task: Task, layers: tuple[Layer, ...], params: Params, batch: Batch
) -> tuple[Any, Any, Any]:
    """Returns the outputs, `v -> J v` and `u -> Jᵀ u`, `v` a matrix for each layer."""
    leaves = covered(params, layers)

    def run(leaves: Leaves) -> Any:
        return task.outputs(with_leaves(params, leaves), batch.inputs)

    outputs, forward, backward = derivatives(run, leaves)

    def push(v: Matrices) -> Any:
        return forward(tangent(layers, leaves, v))

    def pull(u: Any) -> dict[str, Array]:
        (cotangent,) = backward(u)
        found = matrices(layers, cotangent)
        return {k: x.astype(wide(x.dtype)) for k, x in found.items()}

    return outputs, push, pull


def operator(
    task: Task, layers: Sequence[Layer], params: Params, batches: Iterable[Batch]
) -> Operator:
    """Returns `v -> G v`, averaged over the examples of some batches.

    Raises:
      ValueError: if there is no example.
    """
    layers, batches = tuple(layers), list(batches)
    counts = [float(batch.real_B.sum()) for batch in batches]
    if not sum(counts):
        raise ValueError(NO_EXAMPLES)

    def act(v: Matrices) -> Matrices:
        total = jax.tree.map(jnp.zeros_like, v)
        for batch, count in zip(batches, counts, strict=True):
            found = multiply(task, layers, params, batch, v)
            total = add(total, jnp.asarray(count / sum(counts)), found)
        return total

    return act


def dense(layers: Sequence[Layer], act: Operator, dtype: Any) -> Array:
    """Returns the matrix an operator multiplies with, `[P, P]`, for tiny models.

    Its rows are the layers' matrices one after the other, as `flat` puts them. `ROWS`
    of them are multiplied at a time.
    """
    size = sum(_size(x) for x in layers)
    units = jnp.eye(size, dtype=dtype)
    parts = [units[i : i + ROWS] for i in range(0, size, ROWS)]
    return jnp.concatenate([flat(layers, act(unflat(layers, x))) for x in parts])


def flat(layers: Sequence[Layer], v: Matrices) -> Array:
    """Returns matrices as vectors, `[Q, P]`, layer after layer."""
    return jnp.concatenate([v[x.name].reshape(-1, _size(x)) for x in layers], axis=1)


def unflat(layers: Sequence[Layer], v_QxP: Array) -> dict[str, Array]:
    """Returns vectors as matrices; `flat` undone."""
    ends = list(accumulate(_size(x) for x in layers))
    parts = jnp.split(v_QxP, ends[:-1], axis=1)
    return {
        x.name: part.reshape(-1, *x.stack, x.outputs, x.columns)
        for x, part in zip(layers, parts, strict=True)
    }


def _size(layer: Layer) -> int:
    return prod((*layer.stack, layer.outputs, layer.columns))
