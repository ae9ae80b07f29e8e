"""Parts of a parameter, and a parameter times a number, are layers of their own."""

import jax.numpy as jnp
import pytest
from jax import lax

from influence.model.trace import select, trace
from influence.model.weight import arrangement, overlap
from tests.model.readings import assert_read, normal

X = normal(3, 4, 6)


def mixed(q, k, v):
    return jnp.einsum("bqd,bkd->bqk", q, k) @ v


def sliced(p, x):
    w = p["w"]
    return mixed(x @ w[:, :2], x @ w[:, 2:4], x @ w[:, 4:])


def split(p, x):
    return mixed(*(x @ w for w in jnp.split(p["w"], 3, axis=1)))


@pytest.mark.parametrize("apply", [sliced, split])
def test_a_fused_kernel_is_three_layers_that_read_one_activation(apply):
    layers = assert_read(apply, {"w": normal(6, 6)}, X)
    assert [x.name for x in layers] == ["w[:, 0:2]", "w[:, 2:4]", "w[:, 4:6]"]
    assert {x.reads for x in layers} == {"w[:, 0:2]"}
    assert {x.parameter for x in layers} == {"w"}


def test_a_fused_product_is_one_layer():
    def apply(p, x):
        return mixed(*jnp.split(x @ p["w"] + p["b"][None, None], 3, axis=-1))

    (layer,) = assert_read(apply, {"w": normal(6, 6), "b": normal(6)}, X)
    assert (layer.name, layer.bias) == ("w", "b")


def test_stacked_blocks_in_a_loop_are_layers_with_their_biases():
    def apply(p, x):
        for i in range(3):
            x = jnp.tanh(x * p["s"][i][None, None] @ p["w"][i] + p["b"][i][None, None])
        return x

    params = {"w": normal(3, 6, 6), "b": normal(3, 6), "s": normal(3, 6, seed=1)}
    layers = assert_read(apply, params, X)
    matrices = [x for x in layers if x.kind == "matrix"]
    assert [x.name for x in matrices] == ["w[0]", "w[1]", "w[2]"]
    assert {x.bias for x in matrices} == {"b"}
    assert [x.name for x in layers if x.kind == "scale"] == ["s[0]", "s[1]", "s[2]"]
    assert not trace(apply, params, X).uncovered


def test_parts_under_a_scan_and_used_twice():
    def block(x, w):
        return jnp.tanh(x @ w[:, :6] + jnp.tanh(x @ w[:, 6:]) @ w[:, 6:]), None

    (first, second) = assert_read(
        lambda p, x: lax.scan(block, x, p["w"])[0], {"w": normal(2, 6, 12)}, X
    )
    assert (first.name, second.name) == ("w[:, 0:6]", "w[:, 6:12]")
    assert first.stack == (2,)


def test_parts_of_a_part():
    def apply(p, x):
        return x @ p["w"][:, 2:][1:, 1:3]

    (layer,) = assert_read(apply, {"w": normal(6, 6)}, X[..., :5])
    assert layer.name == "w[1:6, 3:5]"


def test_a_part_is_chosen_by_its_own_name_or_the_whole_s():
    program = trace(split, {"w": normal(6, 6)}, X)
    assert len(select(program, "w")) == 3
    assert [x.name for x in select(program, "w[:, 2:4]")] == ["w[:, 2:4]"]


FACTORS = {
    "times a half": lambda w: w * 0.5,
    "a third": lambda w: w / 3,
    "negative": lambda w: -w,
    "plus one": lambda w: 1 + w,
    "one minus": lambda w: 1 - w,
    "before and after a transposition": lambda w: (2 * (w.T / 3)).T - 1,
}


@pytest.mark.parametrize("name", FACTORS)
def test_a_weight_times_a_number(name):
    def apply(p, x):
        return jnp.tanh(x @ FACTORS[name](p["w"]) + p["b"][None, None]) @ p["v"]

    params = {"w": normal(6, 6), "b": normal(6), "v": normal(6, 6, seed=1)}
    layers = assert_read(apply, params, X)
    # A bias that is not scaled alike is no column of the same matrix.
    assert (layers[0].bias is None) == (name not in ("plus one",))


def test_a_weight_and_its_bias_scaled_alike():
    def apply(p, x):
        return x @ (0.5 * p["w"]) + (0.5 * p["b"])[None, None]

    (layer,) = assert_read(apply, {"w": normal(6, 6), "b": normal(6)}, X)
    assert layer.bias == "b"


def test_the_pair_of_a_low_rank_adapter_is_two_layers():
    def apply(p, x):
        frozen = x @ lax.stop_gradient(p["w"])
        return jnp.tanh(frozen + x @ p["a"] @ p["b"] * (16 / 2))

    params = {"w": normal(6, 6), "a": normal(6, 2), "b": normal(2, 6)}
    assert {x.name for x in assert_read(apply, params, X)} == {"a", "b"}
    (frozen,) = trace(apply, params, X).uncovered
    assert (frozen.name, frozen.reason) == ("w", "its gradient is stopped")


def test_a_merged_adapter_is_refused_saying_how_to_write_it():
    def apply(p, x):
        return x @ (p["w"] + 2 * (p["a"] @ p["b"]))

    params = {"w": normal(6, 6), "a": normal(6, 2), "b": normal(2, 6)}
    reasons = {x.name: x.reason for x in trace(apply, params, X).uncovered}
    assert "`x @ W + (x @ A) @ B`" in reasons["w"]
    assert "`(x @ A) @ B`" in reasons["a"]
    assert "optimize=" in reasons["b"]


def test_the_path_of_an_einsum_makes_its_weights_layers():
    def apply(p, x, **options):
        return jnp.einsum("bti,ij,jo->bto", x, p["a"], p["b"], **options)

    params = {"a": normal(6, 2), "b": normal(2, 1)}

    def merged(p, x):
        return apply(p, x, optimize=[(1, 2), (0, 1)])

    for uncovered in trace(merged, params, X).uncovered:
        assert "optimize=[(0, 1), (0, 1)]" in uncovered.reason

    def unmerged(p, x):
        return apply(p, x, optimize=[(0, 1), (0, 1)])

    assert {x.name for x in assert_read(unmerged, params, X)} == {"a", "b"}


def test_parts_overlap_where_they_do_along_every_axis():
    left, right, top = ((1, 0, 3),), ((1, 3, 6),), ((0, 0, 2),)
    assert not overlap([left, right, left])
    assert overlap([left, top])
    assert overlap([(), left])
    assert not overlap([(*top, *left), right])


def test_arrangements_tell_views_apart():
    square = (100, 100)
    turned = ("transpose", (1, 0))
    there = arrangement(square, [])
    assert there == arrangement(square, [turned, turned])
    assert there == arrangement(square, [("reshape", (10**4,)), ("reshape", square)])
    assert there != arrangement(square, [turned])
    assert there != arrangement(square, [turned, ("reshape", (50, 200))])
    blocks = [("reshape", (100, 2, 50)), ("transpose", (0, 2, 1)), ("reshape", square)]
    assert there != arrangement(square, blocks)
