"""A weight that is used several times is one layer, and its gradient is the sum."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from influence.model.reading import Reading, read
from influence.model.trace import select, trace
from influence.model.weight import matrix
from tests.model.readings import FLOAT64, assert_read, normal

IDS = jnp.array([[3, 0, 3, 7], [1, 8, 0, 0], [2, 2, 2, 4]])


def decoder(p, ids, head):
    """Looks up, mixes positions and features, and ends in logits."""
    x = p["embed"][ids]
    x = x + jnp.tanh(jnp.cumsum(x, 1) @ p["w"])
    return head(x, p["embed"])


def recurrent(p, x, step):
    """Runs over time, `[B, T, D]`."""
    h = jnp.zeros_like(x[:, 0])
    h, out = lax.scan(lambda h, x: (step(p, h, x),) * 2, h, x.swapaxes(0, 1))
    return out.swapaxes(0, 1) + h[:, None]


def cell(p, h, x):
    return jnp.tanh(x @ p["u"] + h @ p["w"] + p["b"][None])


def biased(p, h, x):
    return jnp.tanh(x + (h @ p["w"] + p["b"][None]))


def blocks(p, x, scan):
    """Runs the same two blocks three times over."""

    def block(x, w):
        return jnp.tanh(x @ w), None

    def once(x, _):
        return lax.scan(block, x, p["w"])[0], None

    if scan:
        return lax.scan(once, x, length=3)[0]
    for _ in range(3):
        x, _ = once(x, None)
    return x


X = normal(3, 4, 6)
TABLE = {"embed": normal(9, 6), "w": normal(6, 6)}

# The model, its parameters, its inputs, and the layers with several uses.
SHARED = {
    "tied": (
        partial(decoder, head=lambda x, e: x @ e.T),
        TABLE,
        IDS,
        {"embed": ("matrix", 9, 6)},
    ),
    "tied, by einsum": (
        partial(decoder, head=lambda x, e: jnp.einsum("vd,btd->btv", e, x)),
        TABLE,
        IDS,
        {"embed": ("matrix", 9, 6)},
    ),
    "tied to the rows of a square": (
        lambda p, ids: p["w"][ids % 6] @ p["w"],
        {"w": normal(6, 6)},
        IDS,
        {"w": ("matrix", 6, 6)},
    ),
    "tied, one of them detached": (
        partial(decoder, head=lambda x, e: x @ lax.stop_gradient(e.T)),
        TABLE,
        IDS,
        {"embed": ("embedding", 6, 9)},
    ),
    "tied, one of them scaled": (
        partial(decoder, head=lambda x, e: x @ (e.T * 0.5)),
        TABLE,
        IDS,
        {"embed": ("matrix", 9, 6)},
    ),
    "two lookups": (
        lambda p, ids: p["w"][ids] * p["w"][ids[:, ::-1]],
        {"w": normal(9, 6)},
        IDS,
        {"w": ("embedding", 6, 9)},
    ),
    "two products": (
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"],
        {"w": normal(6, 6)},
        X,
        {"w": ("matrix", 6, 6)},
    ),
    "an autoencoder": (
        lambda p, x: (
            jnp.tanh(x @ p["w"] + p["b"][None, None]) @ p["w"].T + p["c"][None, None]
        ),
        {"w": normal(6, 4), "b": normal(4), "c": normal(6)},
        X,
        {"w": ("matrix", 4, 6)},
    ),
    "two products with one bias": (
        lambda p, x: (
            jnp.tanh(x @ p["w"] + p["b"][None, None]) @ p["w"] + p["b"][None, None]
        ),
        {"w": normal(6, 6), "b": normal(6)},
        X,
        {"w": ("matrix", 6, 7)},
    ),
    "both ways with one bias": (
        lambda p, x: (
            jnp.tanh(x @ p["w"] + p["b"][None, None]) @ p["w"].T + p["b"][None, None]
        ),
        {"w": normal(6, 6), "b": normal(6)},
        X,
        {"w": ("matrix", 6, 6), "b": ("shift", 6, 1)},
    ),
    "two products, one with a bias": (
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None, None]) @ p["w"],
        {"w": normal(6, 6), "b": normal(6)},
        X,
        {"w": ("matrix", 6, 6)},
    ),
    "two weights with one bias": (
        lambda p, x: (
            (x @ p["w"] + p["b"][None, None]) * (x @ p["u"] + p["b"][None, None])
        ),
        {"w": normal(6, 6), "u": normal(6, 6, seed=1), "b": normal(6)},
        X,
        {"b": ("shift", 6, 1)},
    ),
    "two scales": (
        lambda p, x: jnp.sin(x * p["w"][None, None]) * p["w"][None, None],
        {"w": normal(6)},
        X,
        {"w": ("scale", 6, 1)},
    ),
    "a scale and a shift": (
        lambda p, x: jnp.sin(x * p["w"][None, None]) + p["w"][None, None],
        {"w": normal(6)},
        X,
        {"w": ("scale", 6, 1)},
    ),
    "a scale and a product": (
        lambda p, x: jnp.sin(x * p["w"][None, None]) @ p["w"][:, None],
        {"w": normal(6)},
        X,
        {"w": ("matrix", 1, 6)},
    ),
    "recurrent": (
        partial(recurrent, step=cell),
        {"u": normal(6, 6), "w": normal(6, 6, seed=1), "b": normal(6)},
        X,
        {"w": ("matrix", 6, 6), "u": ("matrix", 6, 6), "b": ("shift", 6, 1)},
    ),
    "recurrent, with a bias": (
        partial(recurrent, step=biased),
        {"w": normal(6, 6), "b": normal(6)},
        X,
        {"w": ("matrix", 6, 7)},
    ),
    "recurrent, rematerialised": (
        partial(recurrent, step=jax.checkpoint(cell)),
        {"u": normal(6, 6), "w": normal(6, 6, seed=1), "b": normal(6)},
        X,
        {"w": ("matrix", 6, 6)},
    ),
    "recurrent, transposed outside": (
        lambda p, x: recurrent({"w": p["w"].T, "b": p["b"]}, x, biased) @ p["w"],
        {"w": normal(6, 6), "b": normal(6)},
        X,
        {"w": ("matrix", 6, 6)},
    ),
    "blocks run thrice in a loop": (
        partial(blocks, scan=False),
        {"w": normal(2, 6, 6)},
        X,
        {"w": ("matrix", 6, 6)},
    ),
    "blocks run thrice in a scan": (
        partial(blocks, scan=True),
        {"w": normal(2, 6, 6)},
        X,
        {"w": ("matrix", 6, 6)},
    ),
    "two convolutions": (
        lambda p, x: lax.conv_general_dilated(
            jnp.tanh(lax.conv_general_dilated(x, p["w"], (1,), "SAME")),
            p["w"],
            (1,),
            "SAME",
        ),
        {"w": normal(4, 4, 3)},
        X,
        {"w": ("convolution", 4, 12)},
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_uses_add_up_and_squares_are_taken_after(name):
    apply, params, x, shared = SHARED[name]
    assert not trace(apply, params, x).uncovered
    found = {y.name: y for y in assert_read(apply, params, x)}
    for path, (kind, rows, columns) in shared.items():
        layer = found[path]
        assert (layer.kind, layer.outputs, layer.columns) == (kind, rows, columns)
        assert layer.reads == path


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
@pytest.mark.parametrize("name", ["tied", "recurrent", "blocks run thrice in a scan"])
def test_uses_add_up_under_jit_and_remat(name, wrap):
    apply, params, x, _ = SHARED[name]
    assert_read(wrap(apply), params, x)


def test_uses_of_different_precision_add_up_in_the_higher():
    def apply(p, ids):
        x = p["embed"].astype(jnp.bfloat16)[ids].astype(jnp.float32)
        return x @ p["embed"].T

    params = {"embed": normal(9, 6).astype(jnp.bfloat16).astype(jnp.float32)}
    # The cast loses nothing on the way forward; back, it rounds to eight bits.
    assert_read(apply, params, IDS, tolerance=2**-7)


def test_a_reading_of_whole_gradients_has_its_arrays_copy_by_copy():
    apply, params, x, _ = SHARED["blocks run thrice in a scan"]
    program = trace(apply, params, x)
    turns = normal(2, 6, 6, seed=1)

    def turned(ds, given, common):
        return {name: common * (d @ given[name]).sum(0) for name, d in ds.items()}

    reading = Reading(lambda a, gs, given, common: gs, turned)
    layers, given = program.layers, {"w": {"w": turns}}
    _, found = read(program, layers, reading, jnp.sum, params, x, given, 3.0)
    found = found["w"]["w"]
    d = matrix(layers[0], jax.grad(lambda p: apply(p, x).sum())(params))
    assert jnp.abs(found - 3.0 * d @ turns).max() < FLOAT64 * jnp.abs(d).max()


def test_uses_in_a_remat_and_outside_add_up():
    def apply(p, x):
        return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["w"], x) @ p["w"]

    assert_read(apply, {"w": normal(6, 6)}, X)


def test_a_layer_used_several_times_shares_no_input():
    def apply(p, x):
        return (x @ p["w"]) @ p["w"] + x @ p["v"] + x @ p["u"]

    params = {k: normal(6, 6, seed=i) for i, k in enumerate("wvu")}
    reads = {x.name: x.reads for x in select(trace(apply, params, X), "*")}
    assert reads == {"w": "w", "v": "v", "u": "v"}


def test_a_scan_that_walks_over_a_weight_and_also_uses_it_whole_is_refused():
    def apply(p, x):
        def step(x, w):
            return lax.scan(lambda x, v: (jnp.tanh(x @ w @ v), None), x, p["w"])[
                0
            ], None

        return lax.scan(step, x, p["w"])[0]

    (uncovered,) = trace(apply, {"w": normal(2, 6, 6)}, X).uncovered
    assert "walked over by a `scan`, and used whole inside the same one" in (
        uncovered.reason
    )


def test_statistics_of_uses_that_cannot_add_up_are_an_error():
    def apply(p, x):
        return jnp.tanh(x @ p["w"]).sum(1) @ p["w"]

    params = {"w": normal(6, 6)}
    program = trace(apply, params, X)
    each = Reading(lambda a, gs, given, common: gs)
    with pytest.raises(ValueError, match=r"uses of layer 'w'.*different shapes"):
        read(program, select(program, "*"), each, jnp.sum, params, X, {})
