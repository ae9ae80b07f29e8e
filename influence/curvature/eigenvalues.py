"""How much curvature there is along each direction of a layer's eigenbasis.

`Λ = E[(Q_Sᵀ DW Q_A)²]` with `DW` the gradient of one whole sequence: summed over its
positions first, squared after (Grosse et al. 2023, section 2.3.2). That makes `Λ` the
exact diagonal of the Fisher in this basis, correlation between positions included.
Squaring position by position is the classic mistake.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from influence.fold import Fold
from influence.linalg.contract import contract
from influence.model.reading import Reading
from influence.model.task import Labels, Task, read_loss
from influence.types import Batch, Layer, Params


class Basis(NamedTuple):
    """Eigenvectors, in columns.

    Attributes:
      inputs: `Q_A`, `[*stack, I, I]`, by the layers' `reads`.
      gradients: `Q_S`, `[*stack, O, O]`, by layer.
    """

    inputs: dict[str, Array]
    gradients: dict[str, Array]


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
    basis: Basis,
) -> Fold:
    """Returns the pass that computes `Eigenvalues` in a basis."""
    layers = tuple(layers)
    return Fold(
        "eigenvalues",
        init=partial(_init, layers, basis),
        update=partial(_update, task, layers, labels, params, basis),
        finish=_finish,
    )


def _at(
    a_BxTxI: Array, gs: Mapping[str, Array], given: Any, counted: Array
) -> dict[str, Array]:
    """Returns the sum over examples of squared gradients in the eigenbasis.

    The input is rotated once for all layers that read it. Positions are rotated rather
    than gradients where that is the smaller product: `T (O² + I²)` multiplications an
    example against `O I (O + I)`.
    """
    del counted
    q_in, q_outs = given
    _, positions, inputs = a_BxTxI.shape
    rotated = contract("bti,ij->btj", a_BxTxI, q_in)
    squares = {}
    for name, g in gs.items():
        outputs = g.shape[-1]
        if positions * (outputs**2 + inputs**2) <= outputs * inputs * (
            outputs + inputs
        ):
            g = contract("bto,op->btp", g, q_outs[name])
            d = contract("bto,bti->boi", g, rotated)
        else:
            d = contract("bto,bti->boi", g, a_BxTxI)
            d = contract("boi,op,ij->bpj", d, q_outs[name], q_in)
        squares[name] = (d**2).sum(0)
    return squares


def _of(ds: Mapping[str, Array], given: Any, counted: Array) -> dict[str, Array]:
    """Returns the same from each example's gradient, `[B, O, I]`."""
    del counted
    q_in, q_outs = given
    return {
        name: (contract("boi,op,ij->bpj", d, q_outs[name], q_in) ** 2).sum(0)
        for name, d in ds.items()
    }


READING = Reading(_at, _of)


def _init(layers: Sequence[Layer], basis: Basis) -> Any:
    lam = {
        x.name: jnp.zeros(
            (*x.stack, x.outputs, x.columns), basis.gradients[x.name].dtype
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
    basis: Basis,
    state: Any,
    batch: Batch,
) -> Any:
    lam, sequences = state
    names: dict[str, list[str]] = {}
    for x in layers:
        names.setdefault(x.reads, []).append(x.name)
    given = {
        reads: (basis.inputs[reads], {name: basis.gradients[name] for name in group})
        for reads, group in names.items()
    }
    found = read_loss(task, layers, READING, labels, params, batch, given, draw=1)
    flat = {name: x for group in found.values() for name, x in group.items()}
    lam = jax.tree.map(lambda x, y: x + y.astype(x.dtype), lam, flat)
    return lam, sequences + batch.real_B.sum(dtype=jnp.uint32)


def _finish(state: Any) -> Eigenvalues:
    lam, sequences = state
    mean = jax.tree.map(lambda x: x / sequences.astype(x.dtype), lam)
    return Eigenvalues(mean, int(sequences))
