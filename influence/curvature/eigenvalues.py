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

from influence.fold import Fold, Sums
from influence.linalg import count
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
    return {k: (d**2).sum(0) for k, d in rotated(a_BxTxI, gs, *given).items()}


def _of(ds: Mapping[str, Array], given: Any, counted: Array) -> dict[str, Array]:
    """Returns the same from each example's gradient, `[B, O, I]`."""
    del counted
    return {k: (d**2).sum(0) for k, d in turned(ds, *given).items()}


def rotated(
    a_BxTxI: Array, gs: Mapping[str, Array], q_in: Basis, q_outs: Mapping[str, Basis]
) -> dict[str, Array]:
    """Returns each example's gradient in the eigenbasis, `[B, O, I]`, by layer.

    The input is rotated once for all layers that read it. Positions are rotated rather
    than gradients where that is the smaller product: `T (O² + I²)` multiplications an
    example against `O I (O + I)`.
    """
    a = q_in.into(a_BxTxI)
    found, whole = {}, {}
    for name, g in gs.items():
        if _positions_first(a_BxTxI.shape, g.shape, q_in, q_outs[name]):
            found[name] = contract("bto,bti->boi", q_outs[name].into(g), a)
        else:
            whole[name] = contract("bto,bti->boi", g, a_BxTxI)
    return {**found, **turned(whole, q_in, q_outs)}


def turned(
    ds: Mapping[str, Array], q_in: Basis, q_outs: Mapping[str, Basis]
) -> dict[str, Array]:
    """Returns gradients `[B, O, I]` in the eigenbasis."""
    return {k: q_outs[k].into(q_in.into(d).mT).mT for k, d in ds.items()}


def _positions_first(
    a: Sequence[int], g: Sequence[int], q_in: Basis, q_out: Basis
) -> bool:
    """Returns whether rotating every position takes fewer multiplications."""
    in_blocks, out_blocks = ([q.shape[-1] for q in x.blocks] for x in (q_in, q_out))
    each = count.turned_positions(a[1], out_blocks, in_blocks)
    return each <= count.turned_matrix(g[-1], a[-1], out_blocks, in_blocks)


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
    names: dict[str, list[str]] = {}
    for x in layers:
        names.setdefault(x.reads, []).append(x.name)
    given = {
        reads: (bases.inputs[reads], {name: bases.outputs[name] for name in group})
        for reads, group in names.items()
    }
    found = read_loss(task, layers, READING, labels, params, batch, given, passes=1)
    lam = jax.tree.map(lambda x, y: x + y.astype(x.dtype), lam, by_layer(found))
    return lam, sequences + batch.real_B.sum(dtype=jnp.uint32)


def _finish(state: Any) -> Eigenvalues:
    lam, sequences = state
    mean = jax.tree.map(lambda x: x / sequences.astype(x.dtype), lam)
    return Eigenvalues(mean, int(sequences))
