"""Coordinates along leading directions have the products of projected gradients."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence
from influence.curvature.leading import (
    STEPS,
    Directions,
    leading,
    of_matrix,
    of_positions,
    whole,
)
from influence.linalg.basis import Basis, eigen
from influence.linalg.contract import contract
from influence.types import Layer
from tests import cases

ROUNDING = 1e-11  # float64; what is compared is of the order of 100.

OUT, IN, T, B = 12, 7, 5, 3

# How sides of 12 and 7 can be cut, and which shares of their directions are taken.
SIDES = {
    "whole": ((12,), (7,)),
    "in blocks": ((8, 4), (4, 3)),
    "one side standard": ((), (7,)),
    "both sides standard": ((), ()),
}
SHARES = [(0.3, 0.4), (0.0, 0.5), (0.5, 0.0), (1.0, 0.2), (0.2, 1.0), (1.0, 1.0)]


def basis(seed, stack, *lengths):
    """Returns eigenvectors of random blocks of some lengths."""
    square = [cases.normal(seed + n, (*stack, n, n)) for n in lengths]
    return Basis(tuple(eigen(x @ x.mT)[1] for x in square))


def sides(cut, share, stack=()):
    outputs, inputs = SIDES[cut]
    u, v = basis(1, stack, *outputs), basis(2, stack, *inputs)
    return u.leading(share[0]), v.leading(share[1])


def projected(d, u, v):
    """Returns `P_U D + D P_V - P_U D P_V`, with dense projections."""
    left, right = u.dense(OUT), v.dense(IN)
    p, q = left @ left.mT, right @ right.mT
    return p @ d + d @ q - p @ d @ q


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("cut", SIDES)
@pytest.mark.parametrize("share", SHARES)
def test_products_are_those_of_projections_on_the_tangent_space(cut, share, stack):
    u, v = sides(cut, share, stack)
    x, y = (cases.normal(i, (*stack, OUT, IN)) for i in (3, 4))
    found = (of_matrix(x, u, v) * of_matrix(y, u, v)).sum(-1)
    expected = (projected(x, u, v) * projected(y, u, v)).sum((-1, -2))
    np.testing.assert_allclose(found, expected, atol=ROUNDING)
    # Nothing is missing where a side has no directions of its own, or all of them.
    missing = max(share) < 1 and cut in ("whole", "in blocks")
    assert np.allclose(found, (x * y).sum((-1, -2))) != missing


@pytest.mark.parametrize("positions", [2, 500])
@pytest.mark.parametrize("cut", SIDES)
@pytest.mark.parametrize("share", SHARES)
def test_positions_have_the_coordinates_of_their_gradient(cut, share, positions):
    # Few positions are multiplied with directions themselves, many are added up first.
    u, v = sides(cut, share)
    a, g = (cases.normal(i, (B, positions, n)) for i, n in ((3, IN), (4, OUT)))
    found = of_positions(a, {"w": g}, v, {"w": u})["w"]
    expected = of_matrix(contract("bto,bti->boi", g, a), u, v)
    # Of 500 positions sums are a hundred times as large as of 5.
    np.testing.assert_allclose(found, expected, atol=100 * ROUNDING)


@pytest.mark.parametrize("cut", SIDES)
@pytest.mark.parametrize("share", SHARES)
def test_coordinates_are_counted(cut, share):
    u, v = sides(cut, share)
    # `columns` are 1 more than `inputs` where there is a bias.
    layer = Layer("w", "w.bias", IN - 1, OUT, (2, 3), "w", (), (), "matrix")
    taken = Directions({"w": v}, {"w": u})
    size = of_matrix(jnp.zeros((OUT, IN)), u, v).size
    assert taken.coordinates(layer) == size
    assert taken.count([layer]) == 2 * 3 * size


@pytest.fixture(scope="module")
def fitted():
    """Returns a curvature with layers that share an input, and others."""

    def apply(params, tokens_BxT):
        x = params["embed"][tokens_BxT]
        y = jnp.tanh(x @ params["gate"]) * (x @ params["up"])
        return (x + y @ params["down"]) @ params["head"]

    sizes = {"embed": (cases.V, 6), "gate": (6, 40), "up": (6, 40), "down": (40, 6)}
    like = {k: jax.ShapeDtypeStruct(x, float) for k, x in sizes.items()}
    like["head"] = jax.ShapeDtypeStruct((6, cases.V), float)
    case = cases.Case(
        influence.LanguageModel(apply),
        cases.randomised(like, float),
        cases.texts(9),
    )
    layers = ["gate", "up", "down", "head"]
    return influence.fit(
        case.task, case.params, case.examples.batches(3), layers=layers
    )


def corner(block, u, v, inverse):
    """Returns which share of the variance of scores neither side's directions see."""
    varied = np.square(np.asarray(block.lam_OxI * inverse(block.lam_OxI)))
    rest = varied[: len(varied) - u.blocks[0].shape[-1]]
    return rest[:, : rest.shape[1] - v.blocks[0].shape[-1]].sum() / varied.sum()


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.99])
def test_so_much_is_kept_in_every_layer_and_with_less_work_it_would_not(fitted, kept):
    inverse = influence.Relative()
    found = leading(fitted, inverse, kept=kept)
    assert not all(u.whole for u in found.outputs.values())
    step = 1 / STEPS
    for x in fitted.layers:
        block, (u, v) = fitted.blocks[x.name], found.of(x)
        assert corner(block, u, v, inverse) <= 1 - kept
        taken = u.blocks[0].shape[-1]
        if taken:
            fewer = block.outputs.leading(taken / x.outputs - max(step, 1 / x.outputs))
            assert corner(block, fewer, v, inverse) > 1 - kept
    readers = [x for x in fitted.layers if x.reads == fitted.layers[0].reads]
    assert len(readers) == 2
    v = found.inputs[readers[0].reads]
    if taken := v.blocks[0].shape[-1]:
        fewer = fitted.blocks[readers[0].name].inputs.leading((taken - 1) / 6)
        left = [
            corner(fitted.blocks[x.name], found.outputs[x.name], fewer, inverse)
            for x in readers
        ]
        assert max(left) > 1 - kept


def test_a_least_share_of_directions_is_taken_of_every_side(fitted):
    found = leading(fitted, influence.Relative(), kept=0.0, least=1 / 3)
    for x in fitted.layers:
        u, v = found.of(x)
        assert u.blocks[0].shape[-1] == math.ceil(x.outputs / 3)
        assert v.blocks[0].shape[-1] == math.ceil(x.columns / 3)


def test_all_directions_keep_everything(fitted):
    every = whole(fitted)
    weights = sum(x.lam_OxI.size for x in fitted.blocks.values())
    assert every.count(fitted.layers) == weights
    found = leading(fitted, influence.Relative(), kept=1.0)
    for x in fitted.layers:
        assert corner(fitted.blocks[x.name], *found.of(x), influence.Relative()) == 0


@pytest.mark.parametrize("share", [{"kept": 1.1}, {"kept": 0.5, "least": -0.1}])
def test_a_share_is_no_more_than_all_and_no_less_than_nothing(fitted, share):
    with pytest.raises(ValueError, match="is a share, from 0 to 1, not"):
        leading(fitted, influence.Relative(), **share)


def test_curvature_without_an_inverse_is_refused(fitted):
    name = fitted.layers[0].name
    flat = fitted.blocks[name]._replace(lam_OxI=0 * fitted.blocks[name].lam_OxI)
    singular = replace(fitted, blocks={**fitted.blocks, name: flat})
    with pytest.raises(ValueError, match=name):
        leading(singular, influence.Relative(0.0), kept=0.9)
