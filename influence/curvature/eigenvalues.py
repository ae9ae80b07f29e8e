"""How much curvature there is along each direction of a layer's eigenbasis.

`Λ = E[(Q_Sᵀ DW Q_A)²]` with `DW` the gradient of one whole sequence: summed over its
positions first, squared after (Grosse et al. 2023). That makes `Λ` the
exact diagonal of the Fisher in this basis, correlation between positions included.
Squaring position by position is the classic mistake.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from influence.curvature.coordinates import apart, grouped, turned
from influence.fold import Fold, Sums
from influence.linalg.basis import Basis
from influence.linalg.contract import contract, wide
from influence.model.reading import Reading, by_layer
from influence.model.task import Labels, Task, read_loss
from influence.types import Batch, Layer, Params, named_leaves


class Bases(NamedTuple):
    """The bases eigenvalues are measured in.

    Attributes:
      inputs: `Q_A`, by the layers' `reads`.
      outputs: `Q_S`, by layer.
    """

    inputs: dict[str, Basis]
    outputs: dict[str, Basis]


class Eigenvalues(NamedTuple):
    """Curvature along each pair of eigenvectors, averaged over sequences.

    Attributes:
      lam: `Λ`, `[*stack, O, I]`, by layer.
      sequences: how many sequences were averaged over.
    """

    lam: dict[str, Array]
    sequences: int


def fold(
    task: Task,
    params: Params,
    layers: Sequence[Layer],
    labels: Labels,
    bases: Bases,
) -> Fold:
    """Returns the pass that computes `Eigenvalues` in some bases."""
    layers = tuple(layers)
    return Fold(
        "eigenvalues",
        init=partial(_init, params, layers),
        update=partial(_update, task, layers, labels, params, bases),
        finish=_finish,
        apart=Sums(),
    )


def _at(
    a_BxTxI: Array, gs: Mapping[str, Array], given: Any, counted: Array
) -> dict[str, Array]:
    """Returns the sum over examples of squared gradients in the eigenbasis."""
    del counted
    pairs, found = apart(a_BxTxI, gs, *given)
    made = {k: _of_positions(*x) for k, x in pairs.items()}
    return made | {k: _squared(d) for k, d in found.items()}


def _of_positions(g_BxTxO: Array, a_BxTxI: Array) -> Array:
    """Returns the sum over examples of `(Σ_t g aᵀ)²`, `[O, I]`.

    The longer side is the products' last axis: with the shorter one there, XLA takes up
    to twice as long on a CPU. What is transposed is their sum alone.
    """
    if g_BxTxO.shape[-1] <= a_BxTxI.shape[-1]:
        return _squared(contract("bto,bti->boi", g_BxTxO, a_BxTxI))
    return _squared(contract("bti,bto->bio", a_BxTxI, g_BxTxO)).T


def _squared(x_BxMxN: Array) -> Array:
    """Returns the sum over examples of their numbers' squares."""
    return (x_BxMxN**2).sum(0)


def _of(ds: Mapping[str, Array], given: Any, counted: Array) -> dict[str, Array]:
    """Returns the same from each example's gradient, `[B, O, I]`."""
    del counted
    return {k: _squared(d) for k, d in turned(ds, *given).items()}


READING = Reading(_at, _of)


def _init(params: Params, layers: Sequence[Layer]) -> Any:
    weights = named_leaves(params)
    lam = {
        x.name: jnp.zeros(
            (*x.stack, x.outputs, x.columns), wide(weights[x.parameter].dtype)
        )
        for x in layers
    }
    return lam, jnp.uint32(0)


@jax.jit(static_argnums=(0, 1, 2), donate_argnums=5)
def _update(
    task: Task,
    layers: tuple[Layer, ...],
    labels: Labels,
    params: Params,
    bases: Bases,
    state: Any,
    batch: Batch,
) -> Any:
    lam, sequences = state
    given = grouped(layers, bases.inputs, bases.outputs)
    found = read_loss(task, layers, READING, labels, params, batch, given, passes=1)
    lam = jax.tree.map(lambda x, y: x + y.astype(x.dtype), lam, by_layer(found))
    return lam, sequences + batch.real_B.sum(dtype=jnp.uint32)


def _finish(state: Any) -> Eigenvalues:
    lam, sequences = state
    return Eigenvalues(_mean(lam, sequences), int(sequences))


@jax.jit
def _mean(lam: dict[str, Array], sequences: Array) -> dict[str, Array]:
    return {k: x / sequences.astype(x.dtype) for k, x in lam.items()}
