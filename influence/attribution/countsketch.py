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

Most of that is turning the longer sides of matrices. Any coordinates will do in which
products are what they were, and for which the weighting is known: with `C` the damped
curvature in them, over such gradients and queries `E|v|² E|u|²` is least, coordinate by
coordinate, for

    u = w ⊙ DW,   v = h / w,   w = (diag C⁻¹ / diag C)^¼

which is `(Λ + λ)^-½` in the eigenbasis. Where of longer sides only the directions of
most variance are taken apart, and the rest stays as it is, the product is a little
larger, and a sketch has to be longer by as much for the same error.

An index keeps the signs of these numbers, which say most where they are normally
distributed, as sums of many are. Sums of few coordinates are heavy-tailed: so in long
vectors those that are `K / 64` apart are added up once more, under the 64 patterns of
signs of a Hadamard matrix. That is a rotation, and changes no product.

The shares of layers are gone in the sum: what a look-up finds is to be scored again,
exactly.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from influence.attribution.forms import dense
from influence.attribution.query import Query
from influence.curvature.coordinates import grouped, rotated, turned
from influence.curvature.operator import Curvature
from influence.linalg.basis import Basis, Coordinates, Leading, turn
from influence.linalg.contract import contract, multiply, wide
from influence.linalg.damping import Inverse, Relative
from influence.linalg.kronecker import Kronecker
from influence.model.reading import Reading, by_layer
from influence.model.task import Empirical, Task, read_loss
from influence.types import Batch, Layer, Params, rows

LONGER = 2
"""A side is longer if it is so many times as long as the other."""

MIXED = 64
"""So many sums are mixed with one another; a power of two."""

MIXED_FROM = 8192
"""From so many bytes of signs, lengths are multiples of that."""


@dataclass(frozen=True)
class CountSketch:
    """What makes gradients and queries short.

    Attributes:
      layers: the layers covered.
      inputs: coordinates of the input sides, by the layers' `reads`.
      outputs: those of the output sides, by layer.
      scales: `± w`, one for each pair of coordinates, `[*stack, O, I]` where both sides
        are turned, by layer.
      length: `K`.
      about: in words.
    """

    layers: tuple[Layer, ...]
    inputs: Mapping[str, Coordinates]
    outputs: Mapping[str, Coordinates]
    scales: Mapping[str, Array]
    length: int
    about: str


def count_sketch(
    curvature: Curvature,
    *,
    length: int,
    inverse: Inverse = Relative(),
    seed: int = 0,
    part: int | None = None,
) -> CountSketch:
    """Returns what brings gradients down to `length` numbers.

    Args:
      curvature: whose eigenbasis and eigenvalues are used.
      length: `K`. As long as there are coordinates, or longer, nothing is lost. A
        number with no large factor in common with the layers' sizes is best: rows of a
        matrix that were all added up in place would err together.
      inverse: of the damped curvature; queries may be solved with another.
      seed: of the signs.
      part: of sides that are twice as long as the other, or longer, one of so many
        eigenvectors is used, the leading ones: a sequence is read in less time, and the
        sketch errs a little more. If None, all are.

    Raises:
      ValueError: if the damped curvature of a layer has no inverse, or the length or
        the part is less than 1.

    Example:
      >>> from influence.attribution.countsketch import count_sketch
      >>> short = count_sketch(curvature, length=24)
      >>> short.scales["block.mlp.up"].shape
      (16, 8)
    """
    if length < 1:
        raise ValueError(f"A sketch has 1 number at least, not {length}.")
    if part is not None and part < 1:
        raise ValueError(f"One of {part} eigenvectors is none. Take one of 1 or more.")
    curvature.check_inverse(inverse)
    keys = jax.random.split(jax.random.key(seed), len(curvature.layers))
    long_in, long_out = _longer(curvature.layers)
    inputs: dict[str, Coordinates] = {}
    outputs: dict[str, Coordinates] = {}
    scales = {}
    for x, key in zip(curvature.layers, keys, strict=True):
        block = curvature.blocks[x.name]
        q_in, q_out = block.inputs, block.outputs
        if part is not None:
            q_in = q_in.leading(part) if x.reads in long_in else q_in
            q_out = q_out.leading(part) if x.name in long_out else q_out
        inputs.setdefault(x.reads, q_in)
        outputs[x.name] = q_out
        inverted_OxI = inverse(block.lam_OxI)
        scales[x.name] = _signed(key, _weights(block, q_out, q_in, inverted_OxI))
    turned = "" if part is None else f", of longer sides 1/{part} of the eigenvectors"
    about = f"count sketch of {length}{turned}, damping {inverse}, seed {seed}"
    return CountSketch(curvature.layers, inputs, outputs, scales, length, about)


def _longer(layers: tuple[Layer, ...]) -> tuple[set[str], set[str]]:
    """Returns which sides are longer: inputs, by `reads`, and outputs, by layer.

    An input that several layers read is for all of them or for none.
    """
    read = {x.reads for x in layers if x.columns < LONGER * x.outputs}
    outputs = {x.name for x in layers if x.outputs >= LONGER * x.columns}
    return {x.reads for x in layers} - read, outputs


@jax.jit
def _weights(
    block: Kronecker, q_out: Coordinates, q_in: Coordinates, inverted_OxI: Array
) -> Array:
    """Returns `w`, given the damped inverse in the whole eigenbasis."""

    def variances(eigen_OxI: Array) -> Array:
        by_input = _variances(block.inputs, q_in, eigen_OxI).mT
        return _variances(block.outputs, q_out, by_input).mT

    gradients = variances(jnp.where(inverted_OxI == 0, 0, 1 / inverted_OxI))
    queries = variances(inverted_OxI)
    return jnp.where(gradients == 0, 0, jnp.sqrt(jnp.sqrt(queries / gradients)))


def _variances(basis: Basis, coordinates: Coordinates, along: Array) -> Array:
    """Returns the variances of coordinates, from those along a basis, on the last axis.

    Leading directions keep theirs. What is left of a vector is made of the others.
    """
    if not isinstance(coordinates, Leading) or not basis.blocks:
        return along
    found, start = [], 0
    for q, u in zip(basis.blocks, coordinates.blocks, strict=True):
        lam, rest = along[..., start:], q.shape[-1] - u.shape[-1]
        left = multiply(lam[..., :rest], jnp.square(q[..., :rest]).mT)
        found += [lam[..., rest : q.shape[-1]], left]
        start += q.shape[-1]
    return jnp.concatenate(found, axis=-1)


def _signed(key: Array, w_OxI: Array) -> Array:
    return jax.random.rademacher(key, w_OxI.shape, w_OxI.dtype) * w_OxI


def reader(task: Task, params: Params, sketch: CountSketch) -> Callable[[Batch], Array]:
    """Returns `batch -> u' [B, K]`: every sequence's gradient, made short.

    Costs a forward and an activation-backward pass, and the rotation of the sides that
    are turned.

    Example:
      >>> from influence.attribution.countsketch import count_sketch, reader
      >>> read = reader(task, params, count_sketch(curvature, length=24))
      >>> read(next(iter(batches))).shape
      (5, 24)
    """
    given = {
        reads: (*sides, {name: sketch.scales[name] for name in sides[1]})
        for reads, sides in grouped(
            sketch.layers, sketch.inputs, sketch.outputs
        ).items()
    }
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
    starts = _starts(sketch.layers, sketch.length, sketch.scales)
    kinds = (x.dtype for x in jax.tree.leaves((query.forms, sketch.scales)))
    total_QxK = jnp.zeros((len(query.names), sketch.length), wide(*kinds))
    for x in sketch.layers:
        h = dense(query.forms[x.name]).h_QxOxI
        sides = sketch.outputs[x.name], sketch.inputs[x.reads], sketch.scales[x.name]
        for place, start in starts[x.name].items():
            own = jax.tree.map(itemgetter(place), sides)
            total_QxK = _with(total_QxK, start, *own, h[place])
    return mixed(total_QxK)


@partial(jax.jit, donate_argnums=0)
def _with(
    total_QxK: Array,
    start: int,
    q_out: Coordinates,
    q_in: Coordinates,
    scale_OxI: Array,
    h_QxOxI: Array,
) -> Array:
    """Returns vectors with those of one matrix added, from a place on.

    Query by query: what is in between is larger than all there is to add.
    """
    # Where there is no curvature to divide by there is nothing to multiply either.
    inverse_OxI = jnp.where(scale_OxI == 0, 0, 1 / scale_OxI)

    def one(h_OxI: Array, total_K: Array) -> Array:
        turned = turn(h_OxI, q_out, q_in) * inverse_OxI
        return total_K + jnp.roll(added(turned, len(total_K)), start)

    return jax.lax.map(lambda x: one(*x), (h_QxOxI, total_QxK))


def added(x_OxI: Array, length: int) -> Array:
    """Returns matrices as vectors whose entries `length` apart are added up.

    `[..., O, I]` becomes `[..., K]`.
    """
    flat = x_OxI.reshape(*x_OxI.shape[:-2], -1)
    short = -flat.shape[-1] % length
    padded = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, short)])
    return padded.reshape(*flat.shape[:-1], -1, length).sum(-2)


def _together(
    layers: tuple[Layer, ...],
    length: int,
    scales: Mapping[str, Array],
    short: Mapping[str, Array],
) -> Array:
    """Returns the sum of all matrices' vectors, `[..., K]`, mixed."""
    starts = _starts(layers, length, scales)
    moved = [
        jnp.roll(short[x.name][place], start, axis=-1)
        for x in layers
        for place, start in starts[x.name].items()
    ]
    return mixed(sum(moved[1:], moved[0]))


def _starts(
    layers: tuple[Layer, ...], length: int, scales: Mapping[str, Array]
) -> dict[str, dict[tuple[int, ...], int]]:
    """Returns where each matrix's vector begins, by layer and place in its stack.

    Each begins where the one before it ended, as if all coordinates stood in one row,
    `length` of which are one turn.
    """
    found: dict[str, dict[tuple[int, ...], int]] = {x.name: {} for x in layers}
    start = 0
    for x, place, _ in rows(layers):
        found[x.name][place] = start
        start = (start + math.prod(scales[x.name].shape[-2:])) % length
    return found


def mixed(short: Array) -> Array:
    """Returns vectors `[..., K]`, rotated so that no few of their numbers stand out.

    Numbers that are `K / 64` apart are mixed by a Hadamard matrix; none, where 64 is no
    factor of `K`.
    """
    if short.shape[-1] % MIXED:
        return short
    from scipy.linalg import hadamard  # takes half as long to import as the package

    signs = jnp.asarray(hadamard(MIXED) / math.sqrt(MIXED), short.dtype)
    apart = short.reshape(*short.shape[:-1], MIXED, -1)
    return contract("ij,...jk->...ik", signs, apart).reshape(short.shape)


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
    scales = {k: x for *_, own in given.values() for k, x in own.items()}
    total = _together(layers, length, scales, found)
    return total.astype(wide(total.dtype))


def length_of(size: int) -> int:
    """Returns how many signs fit into so many bytes: 8 or 64 times a prime number.

    The sizes of layers have no such factor, so that no two rows of a matrix are added
    up in place unless they are far apart. Those of long vectors, whose numbers are sums
    of few coordinates, are multiples of what `mixed` mixes.

    Raises:
      ValueError: if not even two bytes are left for them.

    Example:
      >>> from influence.attribution.countsketch import length_of
      >>> length_of(504)
      4024
    """
    if size < 2:
        raise ValueError(f"Signs take 2 bytes at least, not {size}.")
    parts = MIXED if size >= MIXED_FROM else 8
    numbers = range(8 * size // parts, 1, -1)
    return parts * next(
        n for n in numbers if all(n % k for k in range(2, math.isqrt(n) + 1))
    )
