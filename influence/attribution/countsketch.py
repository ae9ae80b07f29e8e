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

which is `(Λ + λ)^-½` in the eigenbasis. Along the leading directions of either side
(`influence.curvature.leading`) what is left of vectors stays as it is: `E|v|² E|u|²` is
larger, and a sketch has to be longer by as much for the same error, but where it has
room for every coordinate. What those directions leave out is missing whatever the
length.

An index keeps the signs of these numbers, which say most where they are normally
distributed, as sums of many are. Sums of few coordinates are heavy-tailed: so in long
vectors those that are `K / 64` apart are added up once more, under the 64 patterns of
signs of a Hadamard matrix. That is a rotation, and changes no product.

The shares of layers are gone in the sum: what a look-up finds is to be scored again,
exactly.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from influence.attribution.forms import dense
from influence.attribution.query import Query
from influence.curvature.coordinates import grouped
from influence.curvature.leading import (
    Directions,
    of_matrix,
    of_positions,
    variances,
    whole,
)
from influence.curvature.operator import Curvature
from influence.linalg.basis import Basis
from influence.linalg.contract import contract, wide
from influence.linalg.damping import Inverse, Relative
from influence.linalg.kronecker import Kronecker
from influence.model.reading import Reading, by_layer
from influence.model.task import Empirical, Task, read_loss
from influence.types import Batch, Layer, Params, rows

MIXED = 64
"""So many sums are mixed with one another; a power of two."""

MIXED_FROM = 8192
"""From so many bytes of signs, lengths are multiples of that."""


@dataclass(frozen=True)
class CountSketch:
    """What makes gradients and queries short.

    Attributes:
      layers: the layers covered.
      directions: those that gradients are multiplied with.
      scales: `± w`, one for each coordinate, `[*stack, C]`, by layer.
      length: `K`.
      about: in words.
    """

    layers: tuple[Layer, ...]
    directions: Directions
    scales: Mapping[str, Array]
    length: int
    about: str


def count_sketch(
    curvature: Curvature,
    *,
    length: int | None = None,
    inverse: Inverse = Relative(),
    seed: int = 0,
    directions: Directions | None = None,
) -> CountSketch:
    """Returns what brings gradients down to `length` numbers.

    Args:
      curvature: whose eigenbasis and eigenvalues are used.
      length: `K`. As long as there are coordinates, or longer, nothing is lost; a
        little longer if None, so that numbers can be mixed. A number with no large
        factor in common with the layers' sizes is best: rows of a matrix that were all
        added up in place would err together.
      inverse: of the damped curvature; queries may be solved with another.
      seed: of the signs.
      directions: leading eigenvectors of the curvature's; all of them if None.

    Raises:
      ValueError: if the damped curvature of a layer has no inverse, or the length is
        less than 1.

    Example:
      >>> from influence.attribution.countsketch import count_sketch
      >>> short = count_sketch(curvature, length=24)
      >>> short.scales["block.mlp.up"].shape
      (128,)
    """
    if length is not None and length < 1:
        raise ValueError(f"A sketch has 1 number at least, not {length}.")
    curvature.check_inverse(inverse)
    keys = jax.random.split(jax.random.key(seed), len(curvature.layers))
    taken = whole(curvature) if directions is None else directions
    scales = {}
    for x, key in zip(curvature.layers, keys, strict=True):
        block = curvature.blocks[x.name]
        w_C = _weights(block, taken.of(x), inverse(block.lam_OxI))
        scales[x.name] = jax.random.rademacher(key, w_C.shape, w_C.dtype) * w_C
    if length is None:
        length = room(taken, curvature.layers)
    about = f"count sketch of {length}, damping {inverse}, seed {seed}"
    if directions is not None:
        about += ", leading directions"
    return CountSketch(curvature.layers, taken, scales, length, about)


def room(directions: Directions, layers: tuple[Layer, ...]) -> int:
    """Returns how long vectors with room for every coordinate are, to be mixed."""
    return MIXED * -(-directions.count(layers) // MIXED)


@jax.jit
def _weights(block: Kronecker, own: tuple[Basis, Basis], inverted_OxI: Array) -> Array:
    """Returns `w`, given the damped inverse in the whole eigenbasis."""
    every = block.outputs, block.inputs
    damped_OxI = jnp.where(inverted_OxI == 0, 0, 1 / inverted_OxI)
    gradients = variances(own, every, damped_OxI)
    queries = variances(own, every, inverted_OxI)
    return jnp.where(gradients == 0, 0, jnp.sqrt(jnp.sqrt(queries / gradients)))


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
            sketch.layers, sketch.directions.inputs, sketch.directions.outputs
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
    found = {}
    for x in sketch.layers:
        h = dense(query.forms[x.name]).h_QxOxI
        given = *sketch.directions.of(x), sketch.scales[x.name]
        for _, place, label in rows([x]):
            own = jax.tree.map(itemgetter(place), given)
            found[label] = _short(sketch.length, *own, h[place])
    pieces = [found[label] for *_, label in rows(sketch.layers)]
    return _together(sketch.length, _sizes(sketch.layers, sketch.scales), pieces)


@partial(jax.jit, static_argnums=0)
def _short(length: int, u: Basis, v: Basis, scale_C: Array, h_QxOxI: Array) -> Array:
    """Returns one matrix's part in queries' vectors.

    Query by query: what is in between is larger than what comes of it.
    """
    # Where there is no curvature to divide by there is nothing to multiply either.
    inverse_C = jnp.where(scale_C == 0, 0, 1 / scale_C)

    def one(h_OxI: Array) -> Array:
        return added(of_matrix(h_OxI, u, v) * inverse_C, length)

    return jax.lax.map(one, h_QxOxI)


def added(x_C: Array, length: int) -> Array:
    """Returns longer vectors `[..., C]` with entries `length` apart added up."""
    if x_C.shape[-1] <= length:
        return x_C
    even = filled(x_C, length * -(-x_C.shape[-1] // length))
    return even.reshape(*x_C.shape[:-1], -1, length).sum(-2)


def filled(x_C: Array, length: int) -> Array:
    """Returns vectors with zeros behind, up to a length."""
    return jnp.pad(x_C, [(0, 0)] * (x_C.ndim - 1) + [(0, length - x_C.shape[-1])])


@partial(jax.jit, static_argnums=(0, 1))
def _together(length: int, sizes: tuple[int, ...], pieces: Sequence[Array]) -> Array:
    """Returns the sum of all matrices' vectors, `[..., K]`, mixed.

    Each begins where the one before it ended, as if all coordinates stood in one row,
    `length` of which are one turn. Those that are shorter than a turn are put in a row
    before they are moved: on a CPU moving vectors takes as long as half of all that is
    done to a gradient.

    Args:
      length: `K`.
      sizes: how many coordinates each matrix has.
      pieces: its vector, `[..., min(C, K)]`.
    """
    found: list[Array] = []
    each = zip(accumulate(sizes, initial=0), sizes, pieces, strict=False)
    for short, run in groupby(each, lambda x: x[1] < length):
        starts, _, own = zip(*run, strict=True)
        if short:
            starts, own = starts[:1], [jnp.concatenate(own, axis=-1)]
        for start, x in zip(starts, own, strict=True):
            turn = filled(added(x, length), length)
            found.append(jnp.roll(turn, start % length, axis=-1))
    return mixed(sum(found[1:], found[0]))


def _sizes(layers: tuple[Layer, ...], scales: Mapping[str, Array]) -> tuple[int, ...]:
    """Returns how many coordinates every matrix has, in the order of `rows`."""
    return tuple(scales[x.name].shape[-1] for x, *_ in rows(layers))


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
    v, us, scales = given
    found = of_positions(a_BxTxI, gs, v, us)
    return {k: added(d * scales[k][None], length) for k, d in found.items()}


def _of(
    length: int, ds: Mapping[str, Array], given: Any, counted: Array
) -> dict[str, Array]:
    """Returns the same from each example's gradient, `[B, O, I]`."""
    del counted
    v, us, scales = given
    found = {k: of_matrix(d, us[k], v) for k, d in ds.items()}
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
    pieces = [found[x.name][place] for x, place, _ in rows(layers)]
    total = _together(length, _sizes(layers, scales), pieces)
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
