"""Gradients by the leading directions of either side: all but a corner of them.

    [Uᵀ D V,  Uᵀ D (1 - V Vᵀ),  (1 - U Uᵀ) D V]

With `U` and `V` the leading eigenvectors of the output and the input side these are
coordinates of `P_U D + D P_V - P_U D P_V`, a gradient's projection on the tangent space
of matrices of low rank (Candès and Recht 2009, arXiv 0805.4471). What is missing is
what lies in directions of little variance on *both* sides, `(1 - U Uᵀ) D (1 - V Vᵀ)`:
there the damping is most of the curvature, and scores come from elsewhere. Positions
are multiplied with `K_S + K_A` directions, a fraction of turning either side.

Along each pair of eigenvectors the scores of gradients with one another vary as
`(Λ / (Λ + λ))²`. As many directions are taken as leave to the corner a given share of
that, in every layer; of all such numbers those that take the least work.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.curvature.coordinates import rotated
from influence.curvature.operator import Curvature
from influence.linalg import count
from influence.linalg.basis import Basis
from influence.linalg.contract import contract, multiply
from influence.linalg.damping import Inverse
from influence.types import Layer

STEPS = 64
"""In so many steps the number of a side's directions is chosen."""


@partial(
    jax.tree_util.register_dataclass, data_fields=["inputs", "outputs"], meta_fields=[]
)
@dataclass(frozen=True)
class Directions:
    """Orthonormal directions of layers' sides.

    Attributes:
      inputs: of the input sides, by the layers' `reads`.
      outputs: of the output sides, by layer.
    """

    inputs: Mapping[str, Basis]
    outputs: Mapping[str, Basis]

    def of(self, layer: Layer) -> tuple[Basis, Basis]:
        """Returns a layer's: of the outputs, and of the inputs."""
        return self.outputs[layer.name], self.inputs[layer.reads]

    def coordinates(self, layer: Layer) -> int:
        """Returns `C`, how many coordinates each matrix of a layer has."""
        q_out, q_in = self.of(layer)
        k_out, k_in = q_out.directions(layer.outputs), q_in.directions(layer.columns)
        rows = 0 if q_in.whole else k_out * layer.columns
        columns = 0 if q_out.whole else k_in * layer.outputs
        return k_out * k_in + rows + columns

    def count(self, layers: Sequence[Layer]) -> int:
        """Returns how many coordinates the matrices of some layers have."""
        return sum(math.prod(x.stack) * self.coordinates(x) for x in layers)


def whole(curvature: Curvature) -> Directions:
    """Returns all eigenvectors: nothing is missing then."""
    return Directions(
        {x.reads: curvature.blocks[x.name].inputs for x in curvature.layers},
        {x.name: curvature.blocks[x.name].outputs for x in curvature.layers},
    )


def leading(
    curvature: Curvature, inverse: Inverse, *, kept: float, least: float = 0.0
) -> Directions:
    """Returns the leading eigenvectors that keep so much, with the least work.

    Args:
      curvature: whose eigenvectors are taken.
      inverse: of the damped curvature.
      kept: which share of the variance of scores, in every layer, is kept at least.
      least: which share of every side's directions is taken at least.

    Raises:
      ValueError: if a share is not between 0 and 1, or the damped curvature of a layer
        has no inverse.

    Example:
      >>> from influence.curvature.leading import leading
      >>> few = leading(curvature, influence.Relative(), kept=0.9)
      >>> sizes = [(x.outputs, x.columns, few.coordinates(x)) for x in curvature.layers]
      >>> all(c <= outputs * inputs for outputs, inputs, c in sizes)
      True
    """
    for name, share in (("kept", kept), ("least", least)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is a share, from 0 to 1, not {share}.")
    curvature.check_inverse(inverse)
    read: dict[str, list[Layer]] = {}
    for x in curvature.layers:
        read.setdefault(x.reads, []).append(x)
    inputs, outputs = {}, {}
    for reads, layers in read.items():
        blocks = [curvature.blocks[x.name] for x in layers]
        q_in, q_outs = blocks[0].inputs, [x.outputs for x in blocks]
        varied = [_varied(x.lam_OxI, inverse) for x in blocks]
        share, shares = _least_work(varied, q_in, q_outs, kept, least)
        inputs[reads] = q_in.leading(share)
        for x, q, own in zip(layers, q_outs, shares, strict=True):
            outputs[x.name] = q.leading(own)
    return Directions(inputs, outputs)


def _varied(lam_OxI: Array, inverse: Inverse) -> np.ndarray:
    """Returns the variance of scores along each pair of eigenvectors, `[O, I]`."""
    squared = np.square(np.asarray(lam_OxI * inverse(lam_OxI), float))
    return squared.reshape(-1, *squared.shape[-2:]).sum(0)


def _least_work(
    varied: Sequence[np.ndarray],
    q_in: Basis,
    q_outs: Sequence[Basis],
    kept: float,
    least: float,
) -> tuple[float, list[float]]:
    """Returns the share of an input's directions, and that of each of its outputs'."""
    shares_S = np.linspace(least, 1, STEPS + 1)
    inputs = varied[0].shape[1]
    into = _Side.of(q_in, inputs, shares_S)
    work_S, best = into.work_S.astype(float), []
    for own_OxI, q_out in zip(varied, q_outs, strict=True):
        outputs = len(own_OxI)
        out = _Side.of(q_out, outputs, shares_S)
        corner_SxS = out.rest_SxN @ own_OxI @ into.rest_SxN.T
        arms = count.arms(
            outputs, inputs, out.directions_S[:, None], into.directions_S[None]
        )
        each_SxS = np.where(
            corner_SxS <= (1 - kept) * own_OxI.sum(), out.work_S[:, None] + arms, np.inf
        )
        best.append(each_SxS.argmin(0))
        work_S += each_SxS.min(0)
    step = int(work_S.argmin())
    return float(shares_S[step]), [float(shares_S[x[step]]) for x in best]


@dataclass(frozen=True)
class _Side:
    """What comes of taking each of some shares of a side's directions.

    Attributes:
      rest_SxN: which directions are not taken.
      directions_S: how many are.
      work_S: the multiplications of a vector with them.
    """

    rest_SxN: np.ndarray
    directions_S: np.ndarray
    work_S: np.ndarray

    @classmethod
    def of(cls, basis: Basis, size: int, shares_S: np.ndarray) -> "_Side":
        """Returns them for one side, of some size."""
        if not basis.blocks:
            none_S = np.zeros(len(shares_S), int)
            return cls(np.zeros((len(none_S), size), bool), none_S + size, none_S)
        lengths = np.array([q.shape[-1] for q in basis.blocks])
        taken_SxB = np.ceil(shares_S[:, None] * lengths).astype(int)
        pairs = zip(lengths, taken_SxB.T, strict=True)
        rest = np.concatenate([np.arange(n) < n - k[:, None] for n, k in pairs], axis=1)
        return cls(rest, taken_SxB.sum(1), taken_SxB @ lengths)


def variances(
    own: tuple[Basis, Basis], whole: tuple[Basis, Basis], lam_OxI: Array
) -> Array:
    """Returns what coordinates vary by, `[..., C]`, given what pairs of vectors do.

    Args:
      own: the directions of outputs and inputs.
      whole: the eigenvectors they were taken from.
      lam_OxI: the variances along pairs of these.
    """
    (u, q_out), (v, q_in) = zip(own, whole, strict=True)
    along_v_KxO = _along(v, q_in, lam_OxI).mT
    parts = [_along(u, q_out, along_v_KxO).mT]
    if not v.whole:
        parts.append(_along(u, q_out, _left(v, q_in, lam_OxI).mT).mT)
    if not u.whole:
        parts.append(_left(u, q_out, along_v_KxO))
    return _flat(parts)


def _along(own: Basis, whole: Basis, lam: Array) -> Array:
    """Returns the variances along leading directions, on the last axis."""
    if not whole.blocks:
        return lam
    parts = zip(_cut(lam, whole), own.blocks, strict=True)
    found = [x[..., x.shape[-1] - u.shape[-1] :] for x, u in parts]
    return jnp.concatenate(found, axis=-1)


def _left(own: Basis, whole: Basis, lam: Array) -> Array:
    """Returns the variances of a vector's numbers without them, on the last axis."""
    found = []
    parts = zip(_cut(lam, whole), own.blocks, whole.blocks, strict=True)
    for x, u, q in parts:
        rest = q.shape[-1] - u.shape[-1]
        found.append(multiply(x[..., :rest], jnp.square(q[..., :rest]).mT))
    return jnp.concatenate(found, axis=-1)


def _cut(lam: Array, whole: Basis) -> list[Array]:
    ends = np.cumsum([q.shape[-1] for q in whole.blocks])
    return jnp.split(lam, ends[:-1].tolist(), axis=-1)


def of_positions(
    a_BxTxI: Array, gs: Mapping[str, Array], v: Basis, us: Mapping[str, Basis]
) -> dict[str, Array]:
    """Returns the coordinates of each example's gradient, `[B, C]`, by layer.

    Positions are multiplied with the directions, or the gradient, whichever is less
    work.

    Args:
      a_BxTxI: the input of some layers.
      gs: the gradients at their outputs, `[B, T, O]`, by layer.
      v: directions of the inputs.
      us: directions of the outputs, by layer.
    """
    found = {}
    for name, g in gs.items():
        u, shape = us[name], (a_BxTxI.shape[1], g.shape[-1], a_BxTxI.shape[-1])
        if u.whole and v.whole:
            turned = rotated(a_BxTxI, {name: g}, v, {name: u})
            found[name] = _flat([turned[name]])
        elif _positions_first(*shape, u, v):
            found[name] = _of_positions(a_BxTxI, g, u, v)
        else:
            found[name] = of_matrix(contract("bto,bti->boi", g, a_BxTxI), u, v)
    return found


def _positions_first(
    positions: int, outputs: int, inputs: int, u: Basis, v: Basis
) -> bool:
    """Returns whether multiplying every position takes fewer multiplications."""
    arms = count.arms(outputs, inputs, u.directions(outputs), v.directions(inputs))
    turned = u.work if u.whole else u.work + v.work
    each = positions * (turned + arms)
    matrix = count.turned_matrix(outputs, inputs, u.work, v.work)
    return each <= count.gradient(positions, outputs, inputs) + matrix


def _of_positions(a_BxTxI: Array, g_BxTxO: Array, u: Basis, v: Basis) -> Array:
    # The shorter of two factors first: XLA transposes it on a CPU.
    a, g = v.into(a_BxTxI), u.into(g_BxTxO)
    columns = contract("btk,bto->bko", a, g_BxTxO)
    rows = contract("btk,bti->bki", g, a_BxTxI)
    both = contract("btk,btj->bkj", g, a) if v.whole else v.into(rows)
    return _coordinates(rows, columns, both, u, v)


def of_matrix(d_OxI: Array, u: Basis, v: Basis) -> Array:
    """Returns the coordinates of matrices, `[..., C]`.

    Args:
      d_OxI: the matrices, `[..., O, I]`.
      u: directions of the outputs.
      v: directions of the inputs.
    """
    rows = u.into(d_OxI, axis=-2)
    return _coordinates(rows, v.into(d_OxI).mT, v.into(rows), u, v)


def _coordinates(
    rows_KxI: Array, columns_KxO: Array, both: Array, u: Basis, v: Basis
) -> Array:
    """Returns coordinates from `Uᵀ D`, `Vᵀ Dᵀ` and `Uᵀ D V`."""
    parts = [both]
    if not v.whole:
        parts.append(rows_KxI - v.out_of(both))
    if not u.whole:
        parts.append(columns_KxO - u.out_of(both.mT))
    return _flat(parts)


def _flat(parts: Sequence[Array]) -> Array:
    """Returns the entries of matrices, one behind the other."""
    return jnp.concatenate([x.reshape(*x.shape[:-2], -1) for x in parts], axis=-1)
