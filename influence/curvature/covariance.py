"""Covariances of what goes into a layer and of the gradient that comes back out of it.

Only their eigenvectors are used by EK-FAC: how much curvature there is along each pair
of eigenvectors is measured afterwards (`eigenvalues.py`). Two ways to choose them:

* `PerToken`: `A = E[a aᵀ]`, `S = E[g gᵀ]`, every counted position a sample, as if
  positions were independent (Martens & Grosse 2015; Grosse et al. 2023).
* `PerSequence`: `A = E[DWᵀ DW]`, `S = E[DW DWᵀ]` with `DW` the gradient of a whole
  sequence, correlation between positions included: the factors of Shampoo (Gupta et al.
  2018; with eigenvalues corrected, Eschenhagen et al. 2025).
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from influence.fold import Fold, Sums
from influence.linalg.basis import split
from influence.linalg.contract import contract, half, mirrored, wide
from influence.model.reading import Reading
from influence.model.task import Labels, Task, read_loss
from influence.types import Batch, Layer, Params, named_leaves

Moments = tuple[Array, ...]
"""One side's second moments: blocks `[*stack, n, n]`, or its diagonal `[*stack, N]`."""


class Covariances(NamedTuple):
    """Second moments of every layer, averaged over samples.

    Attributes:
      inputs: `A`, by the layers' `reads`.
      gradients: `S`, by layer.
      positions: how many samples were averaged over, by the layers' `reads`.
      sequences: how many sequences they came from.
    """

    inputs: dict[str, Moments]
    gradients: dict[str, Moments]
    positions: dict[str, int]
    sequences: int


@dataclass(frozen=True)
class Factors(abc.ABC):
    """How the sides of a layer are looked at.

    Attributes:
      blocks: into how many blocks along the diagonal each covariance is cut (Grosse et
        al. 2023, appendix A). Memory and eigendecompositions shrink by as much.
      widest: sides with blocks longer than this keep the standard basis, and only the
        diagonal of their covariance is formed: for heads over large vocabularies.
    """

    blocks: int = 1
    widest: int = 16384

    basis: ClassVar[str] = ""
    """What to say of the eigenvectors behind the name of a curvature."""

    @property
    def about(self) -> str:
        """Says what is not usual about the factors."""
        cut = f", {self.blocks} blocks a factor" if self.blocks > 1 else ""
        return self.basis + cut

    def __post_init__(self) -> None:
        """Raises for a number of blocks there can't be."""
        if self.blocks < 1:
            raise ValueError(f"A covariance has 1 block or more, not {self.blocks}.")

    def inputs(self, layer: Layer) -> tuple[int, ...]:
        """Returns the lengths of the blocks of a layer's input side."""
        if layer.diagonal[0]:
            return ()
        return split(layer.columns, self.blocks, self.widest)

    def outputs(self, layer: Layer) -> tuple[int, ...]:
        """Returns the lengths of the blocks of a layer's output side."""
        if layer.diagonal[1]:
            return ()
        return split(layer.outputs, self.blocks, self.widest)

    @abc.abstractmethod
    def grouped(self, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        """Returns the layers, told which of them share an input side."""

    @abc.abstractmethod
    def reading(self, layers: Sequence[Layer]) -> Reading:
        """Returns the reading that sums the samples' second moments."""


@dataclass(frozen=True)
class PerToken(Factors):
    """Every counted position is a sample, as if positions were independent.

    Example:
      >>> from influence.curvature.covariance import PerToken
      >>> halves = PerToken(blocks=2)
      >>> influence.fit(task, params, batches, layers="block.*", factors=halves).method
      'EK-FAC, 2 blocks a factor'
    """

    def grouped(self, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        """Returns the layers: those that read one activation share its covariance."""
        return tuple(layers)

    def reading(self, layers: Sequence[Layer]) -> Reading:
        """Returns the reading that sums `a aᵀ` and `g gᵀ` over counted positions.

        Both are masked. A gradient is zero at positions that are not counted, but in a
        table that is also looked up what stands in its place are the ids, one-hot.
        """
        own = {x.name: x for x in layers}

        def at(a_BxTxI, gs, given, counted):
            del given
            weight_BxT = _weights(a_BxTxI, counted, gs)
            mask_BxTx1 = weight_BxT[..., None]
            masked = {k: g * mask_BxTx1.astype(g.dtype) for k, g in gs.items()}
            first = own[next(iter(gs))]
            return {
                "inputs": moments(a_BxTxI, a_BxTxI * mask_BxTx1, self.inputs(first)),
                "gradients": {
                    k: moments(g, masked[k], self.outputs(own[k]))
                    for k, g in gs.items()
                },
                "positions": weight_BxT.sum(dtype=wide(a_BxTxI.dtype)),
            }

        return Reading(at)


@dataclass(frozen=True)
class PerSequence(Factors):
    """Every sequence's gradient is a sample; costs `O I (T + O + I)` an example.

    Example:
      >>> from influence.curvature.covariance import PerSequence
      >>> shampoo = PerSequence()
      >>> influence.fit(task, params, batches, layers="block.*", factors=shampoo).method
      "EK-FAC, Shampoo's basis"
    """

    basis: ClassVar[str] = ", Shampoo's basis"

    def grouped(self, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        """Returns the layers, each with an input side of its own."""
        return tuple(x._replace(reads=x.name) for x in layers)

    def reading(self, layers: Sequence[Layer]) -> Reading:
        """Returns the reading that sums `DWᵀ DW` and `DW DWᵀ` over sequences."""
        own = {x.name: x for x in layers}

        def at(a_BxTxI, gs, given, counted):
            ds = {k: contract("bto,bti->boi", g, a_BxTxI) for k, g in gs.items()}
            return of(ds, given, counted)

        def of(ds, given, counted):
            del given
            ((name, d),) = ds.items()
            return {
                "inputs": moments(d, d, self.inputs(own[name])),
                "gradients": {name: moments(d.mT, d.mT, self.outputs(own[name]))},
                "positions": counted.any(1).sum(dtype=wide(d.dtype)),
            }

        return Reading(at, of)


def moments(x_BxTxN: Array, y_BxTxN: Array, blocks: tuple[int, ...]) -> Moments:
    """Returns `Σ x yᵀ` block by block along the diagonal, or `Σ x y` without blocks.

    Args:
      x_BxTxN: vectors.
      y_BxTxN: the same ones, each by a weight: blocks are symmetric, and given on and
        above their diagonals (`half`).
      blocks: their lengths.
    """
    if not blocks:
        return (contract("bti,bti->i", x_BxTxN, y_BxTxN),)
    ends = [sum(blocks[: i + 1]) for i in range(len(blocks) - 1)]
    both = (jnp.split(x, ends, axis=-1) for x in (x_BxTxN, y_BxTxN))
    return tuple(
        half(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
        for x, y in zip(*both, strict=True)
    )


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


def fold(
    task: Task,
    params: Params,
    layers: Sequence[Layer],
    labels: Labels,
    factors: Factors = PerToken(),
) -> Fold:
    """Returns the pass that computes `Covariances`."""
    layers = tuple(layers)
    return Fold(
        "covariances",
        init=partial(_init, params, layers, factors),
        update=partial(_update, task, layers, factors, labels, params),
        finish=partial(_finish, layers),
        apart=Sums(),
    )


def _init(params: Params, layers: Sequence[Layer], factors: Factors) -> Any:
    weights = named_leaves(params)
    sums: dict[str, Any] = {}
    for x in layers:
        dtype = wide(weights[x.parameter].dtype)
        empty = {
            "inputs": _empty(x.stack, x.columns, factors.inputs(x), dtype),
            "gradients": {},
            "positions": jnp.zeros(x.stack, jnp.uint32),
        }
        gradients = sums.setdefault(x.reads, empty)["gradients"]
        gradients[x.name] = _empty(x.stack, x.outputs, factors.outputs(x), dtype)
    return sums, jnp.uint32(0)


def _empty(
    stack: tuple[int, ...], size: int, blocks: tuple[int, ...], dtype: Any
) -> Moments:
    shapes = [(n, n) for n in blocks] or [(size,)]
    return tuple(jnp.zeros((*stack, *shape), dtype) for shape in shapes)


@jax.jit(static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _update(
    task: Task,
    layers: tuple[Layer, ...],
    factors: Factors,
    labels: Labels,
    params: Params,
    state: Any,
    batch: Batch,
) -> Any:
    sums, sequences = state
    reading = factors.reading(layers)
    found = read_loss(task, layers, reading, labels, params, batch, {})
    sums = jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, found)
    return sums, sequences + batch.real_B.sum(dtype=jnp.uint32)


def _finish(layers: Sequence[Layer], state: Any) -> Covariances:
    sums, sequences = state
    inputs, gradients, positions = {}, {}, {}
    for layer in layers:
        group = sums[layer.reads]
        count = group["positions"]
        inputs[layer.reads] = _mean(group["inputs"], count)
        gradients[layer.name] = _mean(group["gradients"][layer.name], count)
        positions[layer.reads] = int(count.max())
    return Covariances(inputs, gradients, positions, int(sequences))


@jax.jit
def _mean(sums: Moments, count: Array) -> Moments:
    """Returns means of all samples, whole matrices."""
    return tuple(
        (mirrored(x) if x.ndim > count.ndim + 1 else x)
        / count.reshape(*count.shape, *[1] * (x.ndim - count.ndim)).astype(x.dtype)
        for x in sums
    )
