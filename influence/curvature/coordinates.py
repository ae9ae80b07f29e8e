"""Gradients in a layer's eigenbasis, `Q_Sᵀ DW Q_A`, without the layer's gradient.

What a gradient is made of, `DW = Σ_t g_t a_tᵀ`, is turned position by position where
that is less work than turning the sum.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jax import Array

from influence.linalg import count
from influence.linalg.basis import Basis, turn
from influence.linalg.contract import contract
from influence.model.reading import Reading
from influence.types import Layer


def grouped(
    layers: Sequence[Layer],
    inputs: Mapping[str, Basis],
    outputs: Mapping[str, Basis],
) -> dict[str, tuple[Basis, dict[str, Basis]]]:
    """Returns what `rotated` is given, by the layers' `reads`.

    Args:
      layers: some layers.
      inputs: bases of the input sides, by the layers' `reads`.
      outputs: those of the output sides, by layer.
    """
    found: dict[str, tuple[Basis, dict[str, Basis]]] = {}
    for x in layers:
        _, own = found.setdefault(x.reads, (inputs[x.reads], {}))
        own[x.name] = outputs[x.name]
    return found


def rotated(
    a_BxTxI: Array,
    gs: Mapping[str, Array],
    q_in: Basis,
    q_outs: Mapping[str, Basis],
) -> dict[str, Array]:
    """Returns each example's gradient in the eigenbasis, `[B, O, I]`, by layer.

    The input is rotated once for all layers that read it. Positions are rotated rather
    than gradients where that is the smaller product: `T (O² + I²)` multiplications an
    example against `O I (O + I)`.
    """
    pairs, found = apart(a_BxTxI, gs, q_in, q_outs)
    return found | {k: contract("bto,bti->boi", *x) for k, x in pairs.items()}


def apart(
    a_BxTxI: Array,
    gs: Mapping[str, Array],
    q_in: Basis,
    q_outs: Mapping[str, Basis],
) -> tuple[dict[str, tuple[Array, Array]], dict[str, Array]]:
    """Returns what `rotated` does, without the product where positions are rotated.

    Those layers' positions, `[B, T, O]` and `[B, T, I]`, and all others' gradients.
    """
    a = q_in.into(a_BxTxI)
    pairs, whole = {}, {}
    for name, g in gs.items():
        if _positions_first(a_BxTxI.shape, g.shape, q_in, q_outs[name]):
            pairs[name] = q_outs[name].into(g), a
        else:
            whole[name] = contract("bto,bti->boi", g, a_BxTxI)
    return pairs, turned(whole, q_in, q_outs)


def turned(
    ds: Mapping[str, Array], q_in: Basis, q_outs: Mapping[str, Basis]
) -> dict[str, Array]:
    """Returns gradients `[B, O, I]` in the eigenbasis."""
    return {k: turn(d, q_outs[k], q_in) for k, d in ds.items()}


def _positions_first(
    a: Sequence[int], g: Sequence[int], q_in: Basis, q_out: Basis
) -> bool:
    """Returns whether rotating every position takes fewer multiplications."""
    each = count.turned_positions(a[1], q_out.work, q_in.work)
    return each <= count.turned_matrix(g[-1], a[-1], q_out.work, q_in.work)


def _at(
    a_BxTxI: Array, gs: Mapping[str, Array], given: Any, counted: Array
) -> dict[str, Array]:
    del counted
    return rotated(a_BxTxI, gs, *given)


def _of(ds: Mapping[str, Array], given: Any, counted: Array) -> dict[str, Array]:
    del counted
    return turned(ds, *given)


READING = Reading(_at, _of)
"""Each example's gradient in the eigenbasis, `[B, O, I]`; given is `grouped`."""
