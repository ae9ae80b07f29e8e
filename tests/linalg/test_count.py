"""What is counted is what XLA counts."""

import jax
import jax.numpy as jnp
import pytest

from influence.curvature.coordinates import turned
from influence.curvature.leading import of_positions
from influence.linalg import count
from influence.linalg.basis import Basis
from influence.linalg.contract import contract, gram

# XLA also counts what is not a product: additions, paddings, masks, one an entry. With
# these sizes they are less than a twentieth of all.
BESIDE = 0.05

B, T, OUT, IN, Q, R = 3, 40, 48, 64, 5, 7


def zeros(*shape):
    return jnp.zeros(shape, jnp.float32)


def basis(*sizes):
    return Basis(tuple(zeros(n, n) for n in sizes))


def matrices_turned(d):
    return turned({"w": d}, basis(32, 32), {"w": basis(OUT)})["w"]


def positions_turned(a, g):
    return basis(32, 32).into(a), basis(OUT).into(g)


def factors_scanned(a, g, left, right):
    ours = contract("bto,qor->btqr", g, left), contract("bti,qir->btqr", a, right)
    return contract("btqr,btqr->bq", *ours)


def matrices_scanned(a, g, h):
    d = contract("bto,bti->boi", g, a)
    return contract("bn,qn->bq", d.reshape(B, -1), h.reshape(Q, -1))


def tokens_scanned(a, g, h):
    return contract("btqo,bto->btq", contract("bti,qoi->btqo", a, h), g)


LEFT, RIGHT = Basis((zeros(OUT, 6),)), Basis((zeros(IN, 8),))
A, G, H = zeros(B, T, IN), zeros(B, T, OUT), zeros(Q, OUT, IN)

CASES = {
    "gram": (count.gram(200, IN), gram, zeros(200, IN)),
    "gram by strips": (count.gram(200, 512), gram, zeros(200, 512)),
    "gram by uneven strips": (count.gram(200, 387), gram, zeros(200, 387)),
    "matrices turned": (
        B * count.turned_matrix(OUT, IN, count.turn([OUT]), count.turn([32, 32])),
        matrices_turned,
        zeros(B, OUT, IN),
    ),
    "leading directions": (
        B * T * (LEFT.work + RIGHT.work + count.arms(OUT, IN, 6, 8))
        + B * 6 * (2 * count.onto([(IN, 8)]) + count.onto([(OUT, 8)])),
        lambda a, g: of_positions(a, {"w": g}, RIGHT, {"w": LEFT})["w"],
        zeros(B, T, IN),
        zeros(B, T, OUT),
    ),
    "leading directions of all of one side": (
        B * T * count.arms(OUT, IN, OUT, 8) + 2 * B * OUT * IN * 8,
        lambda a, g: of_positions(a, {"w": g}, RIGHT, {"w": Basis(())})["w"],
        zeros(B, T, IN),
        zeros(B, T, OUT),
    ),
    "positions turned": (
        B * count.turned_positions(T, count.turn([OUT]), count.turn([32, 32])),
        positions_turned,
        A,
        G,
    ),
    "scanned through factors": (
        count.factored_scan(B * T, Q, R, OUT, IN),
        factors_scanned,
        A,
        G,
        zeros(Q, OUT, R),
        zeros(Q, IN, R),
    ),
    "scanned through matrices": (
        count.dense_scan(B, T, Q, OUT, IN),
        matrices_scanned,
        A,
        G,
        H,
    ),
    "tokens scanned": (count.dense_tokens(B * T, Q, OUT, IN), tokens_scanned, A, G, H),
    "multiplied out": (
        count.expanded(Q, R, OUT, IN),
        lambda x, y: x @ y.mT,
        zeros(Q, OUT, R),
        zeros(Q, IN, R),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_of_xla(case):
    counted, fn, *args = CASES[case]
    found = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert found is not None
    assert 2 * counted == pytest.approx(found["flops"], rel=BESIDE)


def test_a_standard_basis_costs_nothing():
    assert count.turn([]) == 0
    assert count.turned_positions(T, 0, 0) == 0
    assert count.turned_matrix(OUT, IN, 0, count.turn([IN])) == OUT * IN * IN
