"""A short vector for every sequence, whose product with a query's is about its score.

    score = -(1/N) Σ_layers ⟨h, DW⟩ = -(1/N) ⟨v, u⟩
    u = (Λ + λ)^-½ ⊙ Q_Sᵀ DW Q_A,   v = (Λ + λ)^½ ⊙ Q_Sᵀ h Q_A

Every coordinate of `u` and `v`, of all layers one behind the other, gets a random sign;
coordinates that are `K` apart are added up (the count sketch of Charikar et al. 2002).
`K` numbers are left of either, whose product is right on average:

    E⟨v', u'⟩ = ⟨v, u⟩,   Var⟨v', u'⟩ ≤ about (|u|² |v|² + ⟨u, v⟩²) / K

A weighting that `u` is divided by and `v` multiplied with changes no score, only the
error. Over queries that are gradients of the same kind as the sequences', after the
inverse curvature, `E|u|² E|v|²` is least for the root of `1 / (Λ + λ)` (by Cauchy and
Schwarz), which is why both are weighted so. There is no matrix to keep, and a sequence
costs one addition a coordinate beyond what refitting eigenvalues costs.

The shares of layers are gone in the sum: what a look-up finds is to be scored again,
exactly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.attribution.forms import dense
from influence.attribution.query import Query
from influence.curvature.coordinates import rotated, turned
from influence.curvature.operator import Curvature
from influence.linalg.basis import Basis
from influence.linalg.contract import wide
from influence.linalg.damping import Inverse, Relative
from influence.linalg.kronecker import Kronecker
from influence.model.reading import Reading, by_layer
from influence.model.task import Empirical, Task, read_loss
from influence.types import Batch, Layer, Params, rows


@dataclass(frozen=True)
class CountSketch:
    """What makes gradients and queries short.

    Attributes:
      layers: the layers covered.
      blocks: each layer's eigenbasis, by name.
      scales: `± (Λ + λ)^-½`, `[*stack, O, I]`, by layer.
      length: `K`.
      about: in words.
    """

    layers: tuple[Layer, ...]
    blocks: Mapping[str, Kronecker]
    scales: Mapping[str, Array]
    length: int
    about: str


def count_sketch(
    curvature: Curvature,
    *,
    length: int,
    inverse: Inverse = Relative(),
    seed: int = 0,
) -> CountSketch:
    """Returns what brings gradients down to `length` numbers.

    Args:
      curvature: whose eigenbasis and eigenvalues are used.
      length: `K`. As long as there are coordinates, or longer, nothing is lost. A
        number with no large factor in common with the layers' sizes is best: rows of a
        matrix that were all added up in place would err together.
      inverse: of the damped curvature; queries may be solved with another.
      seed: of the signs.

    Raises:
      ValueError: if the damped curvature of a layer has no inverse, or the length is
        less than 1.

    Example:
      >>> from influence.attribution.countsketch import count_sketch
      >>> short = count_sketch(curvature, length=24)
      >>> short.scales["block.mlp.up"].shape
      (16, 8)
    """
    if length < 1:
        raise ValueError(f"A sketch has 1 number at least, not {length}.")
    curvature.check_inverse(inverse)
    keys = jax.random.split(jax.random.key(seed), len(curvature.layers))
    scales = {
        x.name: _signed(key, inverse(curvature.blocks[x.name].lam_OxI))
        for x, key in zip(curvature.layers, keys, strict=True)
    }
    about = f"count sketch of {length}, damping {inverse}, seed {seed}"
    return CountSketch(curvature.layers, curvature.blocks, scales, length, about)


def _signed(key: Array, inverted_OxI: Array) -> Array:
    signs = jax.random.rademacher(key, inverted_OxI.shape, inverted_OxI.dtype)
    return signs * jnp.sqrt(inverted_OxI)


def reader(task: Task, params: Params, sketch: CountSketch) -> Callable[[Batch], Array]:
    """Returns `batch -> u' [B, K]`: every sequence's gradient, made short.

    Costs a forward and an activation-backward pass, and the rotation into the
    eigenbasis.

    Example:
      >>> from influence.attribution.countsketch import count_sketch, reader
      >>> read = reader(task, params, count_sketch(curvature, length=24))
      >>> read(next(iter(batches))).shape
      (5, 24)
    """
    given: dict[str, tuple[Basis, dict[str, Basis], dict[str, Array]]] = {}
    for x in sketch.layers:
        block = sketch.blocks[x.name]
        _, outputs, scales = given.setdefault(x.reads, (block.inputs, {}, {}))
        outputs[x.name], scales[x.name] = block.outputs, sketch.scales[x.name]
    return partial(_read, task, sketch.layers, sketch.length, params, given)


def asked(sketch: CountSketch, query: Query) -> Array:
    """Returns `v' [Q, K]`: queries, made short.

    Minus its product with a sequence's `u'` is, on average, `N` times the score.

    Raises:
      ValueError: if the query is of other layers.

    Example:
      >>> from influence.attribution.countsketch import asked, count_sketch
      >>> asked(count_sketch(curvature, length=24), query).shape
      (1, 24)
    """
    if query.layers != sketch.layers:
        raise ValueError(
            f"The query is of {len(query.layers)} layers and the sketch of "
            f"{len(sketch.layers)}, and they differ. Make both from one curvature."
        )
    short = {}
    for x in sketch.layers:
        h = dense(query.forms[x.name]).h_QxOxI
        short[x.name] = _short(
            sketch.length,
            len(x.stack),
            sketch.blocks[x.name],
            sketch.scales[x.name],
            h,
        )
    return _together(sketch.layers, sketch.length, short)


@partial(jax.jit, static_argnums=(0, 1))
def _short(
    length: int, stack: int, block: Kronecker, scale_OxI: Array, h_QxOxI: Array
) -> Array:
    """Returns a layer's queries, each of its matrices made short, `[*stack, Q, K]`."""
    turn = jax.vmap(block.rotate, in_axes=stack, out_axes=stack)
    # Where there is no curvature to divide by there is nothing to multiply either.
    inverse_OxI = jnp.where(scale_OxI == 0, 0, 1 / scale_OxI)
    return added(turn(h_QxOxI) * jnp.expand_dims(inverse_OxI, stack), length)


def added(x_OxI: Array, length: int) -> Array:
    """Returns matrices as vectors whose entries `length` apart are added up.

    `[..., O, I]` becomes `[..., K]`.
    """
    flat = x_OxI.reshape(*x_OxI.shape[:-2], -1)
    short = -flat.shape[-1] % length
    padded = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, short)])
    return padded.reshape(*flat.shape[:-1], -1, length).sum(-2)


def _together(
    layers: tuple[Layer, ...], length: int, short: Mapping[str, Array]
) -> Array:
    """Returns the sum of all matrices' vectors, `[..., K]`.

    Each begins where the one before it ended, as if all coordinates stood in one row.
    """
    moved, start = [], 0
    for x, place, _ in rows(layers):
        moved.append(jnp.roll(short[x.name][place], start % length, axis=-1))
        start += x.outputs * x.columns
    return jnp.stack(moved).sum(0)


def _at(
    length: int,
    a_BxTxI: Array,
    gs: Mapping[str, Array],
    given: Any,
    counted: Array,
) -> dict[str, Array]:
    """Returns each example's vector, `[B, K]`, by layer."""
    del counted
    q_in, q_outs, scales = given
    found = rotated(a_BxTxI, gs, q_in, q_outs)
    return {k: added(d * scales[k][None], length) for k, d in found.items()}


def _of(
    length: int, ds: Mapping[str, Array], given: Any, counted: Array
) -> dict[str, Array]:
    """Returns the same from each example's gradient, `[B, O, I]`."""
    del counted
    q_in, q_outs, scales = given
    found = turned(ds, q_in, q_outs)
    return {k: added(d * scales[k][None], length) for k, d in found.items()}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _read(
    task: Task,
    layers: tuple[Layer, ...],
    length: int,
    params: Params,
    given: Mapping[str, Any],
    batch: Batch,
) -> Array:
    reading = Reading(partial(_at, length), partial(_of, length))
    found = by_layer(
        read_loss(task, layers, reading, Empirical(), params, batch, given)
    )
    total = _together(layers, length, found)
    return total.astype(wide(total.dtype))


def length_of(size: int) -> int:
    """Returns how many signs fit into so many bytes: eight times a prime number.

    The sizes of layers have no such factor, so that no two rows of a matrix are added
    up in place unless they are far apart.

    Raises:
      ValueError: if not even two bytes are left for them.

    Example:
      >>> from influence.attribution.countsketch import length_of
      >>> length_of(504)
      4024
    """
    if size < 2:
        raise ValueError(f"Signs take 2 bytes at least, not {size}.")
    numbers = np.arange(2, size + 1)
    prime = [n for n in numbers if all(n % k for k in range(2, int(n**0.5) + 1))]
    return 8 * int(prime[-1])
