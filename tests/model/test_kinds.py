"""Convolutions, lookups, scales and shifts are layers like any other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from influence.model.reading import Reading, read
from influence.model.trace import trace
from influence.types import rows
from tests.model.readings import assert_read, everything, normal

# A window's size, stride, padding, dilations and feature groups.
WINDOWS: dict[str, dict[str, Any]] = {
    "plain": {"window_strides": (1,), "padding": "SAME"},
    "strided": {"window_strides": (2,), "padding": "VALID"},
    "padded to one side": {"window_strides": (1,), "padding": [(2, 0)]},
    "dilated": {"window_strides": (1,), "padding": "SAME", "rhs_dilation": (2,)},
    "transposed": {"window_strides": (1,), "padding": [(2, 2)], "lhs_dilation": (2,)},
    "strided, dilated": {
        "window_strides": (3,),
        "padding": [(1, 2)],
        "lhs_dilation": (2,),
        "rhs_dilation": (2,),
    },
}
CONVOLUTIONS = [(window, groups) for window in WINDOWS for groups in (1, 2)]


@pytest.mark.parametrize(("window", "groups"), CONVOLUTIONS)
def test_convolutions_over_a_line(window, groups):
    options = WINDOWS[window] | {"feature_group_count": groups}

    def apply(p, x):
        numbers = ("NTC", "TIO", "NTC")
        y = lax.conv_general_dilated(x, p["w"], dimension_numbers=numbers, **options)
        return y + p["b"][None, None]

    params = {"w": normal(3, 4 // groups, 6), "b": normal(6)}
    (layer,) = assert_read(apply, params, normal(3, 9, 4))
    assert (layer.kind, layer.bias) == ("convolution", "b")
    assert layer.stack == ((2,) if groups == 2 else ())
    assert (layer.outputs, layer.columns) == (6 // groups, 3 * 4 // groups + 1)


@pytest.mark.parametrize(("window", "groups"), CONVOLUTIONS)
def test_convolutions_over_a_plane(window, groups):
    twice = {
        k: v if isinstance(v, str) else (*v, *v) for k, v in WINDOWS[window].items()
    }
    options: dict[str, Any] = twice | {"feature_group_count": groups}

    def apply(p, x):
        numbers = ("NHWC", "OIHW", "NCHW")
        return lax.conv_general_dilated(x, p["w"], dimension_numbers=numbers, **options)

    params = {"w": normal(4, 6 // groups, 3, 2)}
    (layer,) = assert_read(apply, params, normal(2, 5, 7, 6))
    assert (layer.outputs, layer.columns) == (4 // groups, 36 // groups)


def test_a_convolution_reads_the_patches_under_its_window():
    def apply(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (2,), "VALID", dimension_numbers=("NTC", "TIO", "NTC")
        )

    params, x = {"w": normal(3, 2, 5)}, normal(4, 7, 2)
    program = trace(apply, params, x)
    inputs = Reading(lambda a, gs, given, common: a)
    _, found = read(program, program.layers, inputs, jnp.sum, params, x, {})
    found = found["w"]
    # Features first, places of the window second.
    patches = [x[:, t : t + 3].swapaxes(1, 2).reshape(4, 6) for t in (0, 2, 4)]
    np.testing.assert_array_equal(found, jnp.stack(patches, 1))


def test_convolutions_vmapped_over_examples_and_scanned_over():
    def block(x, w):
        y = lax.conv_general_dilated(x[None], w, (1,), "SAME")[0]
        return jnp.tanh(y), None

    def apply(p, x):
        return jax.vmap(lambda x: lax.scan(block, x, p["w"])[0])(x)

    (layer,) = assert_read(apply, {"w": normal(3, 4, 4, 3)}, normal(2, 4, 6))
    assert layer.stack == (3,)


@pytest.mark.parametrize(
    ("apply", "w", "said"),
    [
        (
            lambda p, x: lax.conv_general_dilated(
                x, p["w"], (1,), "SAME", batch_group_count=2
            ),
            normal(4, 6, 3),
            "batch_group_count",
        ),
        (
            lambda p, x: lax.conv_general_dilated(p["w"], x, (1,), "SAME"),
            normal(2, 6, 5),
            "as the input, not as the kernel",
        ),
    ],
)
def test_convolutions_that_are_no_layer(apply, w, said):
    program = trace(apply, {"w": w}, normal(4, 6, 5))
    assert not program.layers
    assert said in program.uncovered[0].reason


IDS = jnp.array([[3, 0, 3, 7], [1, 8, 0, 0]])

LOOKUPS = {
    "indexed": lambda w, ids: w[ids],
    "taken": lambda w, ids: jnp.take(w, ids, axis=0),
    "clipped": lambda w, ids: jnp.take(w, ids + 2, axis=0, mode="clip"),
    "filled": lambda w, ids: jnp.take(w, ids + 2, axis=0, mode="fill", fill_value=0),
    "positions first": lambda w, ids: w[ids.T].swapaxes(0, 1),
    "merged": lambda w, ids: w[ids.ravel()].reshape(*ids.shape, -1),
    "vmapped": lambda w, ids: jax.vmap(jax.vmap(lambda i: w[i]))(ids),
    "once an example": lambda w, ids: w[ids[:, 0]],
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups(name):
    (layer,) = assert_read(
        lambda p, ids: LOOKUPS[name](p["w"], ids),
        {"w": normal(9, 5)},
        IDS,
    )
    assert (layer.kind, layer.diagonal) == ("embedding", (True, False))
    assert (layer.outputs, layer.columns) == (5, 9)


def test_rows_may_have_several_axes():
    assert_read(lambda p, ids: p["w"][ids], {"w": normal(9, 2, 3)}, IDS)


def test_a_lookup_in_anything_but_whole_rows_is_refused():
    program = trace(lambda p, ids: p["w"][:, ids], {"w": normal(5, 9)}, IDS)
    assert "not in whole rows" in program.uncovered[0].reason


def normalised(x):
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


ELEMENTWISE = {
    "scale": (lambda w, x: normalised(x) * w[None, None], (6,), "scale"),
    "one plus": (lambda w, x: normalised(x) * (1 + w)[None, None], (6,), "scale"),
    "scale of the denominator": (
        lambda w, x: x * (lax.rsqrt((x**2).mean(-1, keepdims=True)) * w[None, None]),
        (6,),
        "scale",
    ),
    "scale of heads": (
        lambda w, x: x.reshape(-1, 5, 2, 3) * w[None, None],
        (2, 3),
        "scale",
    ),
    "scale of one head": (
        lambda w, x: x.reshape(-1, 5, 2, 3) * w[None, None, None],
        (3,),
        "scale",
    ),
    "two axes, swapped": (
        lambda w, x: x.reshape(-1, 5, 2, 3) * w.T[None, None],
        (3, 2),
        "scale",
    ),
    "one number": (lambda w, x: w * x, (), "scale"),
    "shift": (lambda w, x: jnp.tanh(x) + w[None, None], (6,), "shift"),
    "shift of merged positions": (
        lambda w, x: jnp.sin(x.reshape(-1, 6)) + w[None],
        (6,),
        "shift",
    ),
    "a shift broadcast by itself": (
        lambda w, x: x + jnp.broadcast_to(w, x.shape),
        (6,),
        "shift",
    ),
    "vmapped": (lambda w, x: jax.vmap(lambda x: x * w[None])(x), (6,), "scale"),
    "learned positions": (lambda w, x: x + w[None], (5, 6), "shift"),
    "the first positions": (lambda w, x: x + w[None, :5], (9, 6), "shift"),
    "subtracted": (lambda w, x: x + (-w)[None, None], (6,), "shift"),
    "a half": (lambda w, x: x + (-0.5 * w / 3 - 1)[None, None], (6,), "shift"),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_scales_and_shifts(name):
    apply, shape, kind = ELEMENTWISE[name]
    params = {"w": normal(*shape)}
    (layer,) = assert_read(
        lambda p, x: jnp.sin(apply(p["w"], x)), params, normal(4, 5, 6)
    )
    assert (layer.kind, layer.diagonal, layer.columns) == (kind, (False, True), 1)
    if name == "the first positions":
        assert (layer.name, layer.outputs) == ("w[0:5]", 30)
    else:
        assert layer.outputs == params["w"].size


def test_scales_and_shifts_under_a_scan_and_a_remat():
    @jax.checkpoint
    def block(x, p):
        h = normalised(x) * p["scale"][None, None] + p["shift"][None, None]
        return x + jnp.tanh(h @ p["w"] + p["b"][None, None]), None

    def apply(p, x):
        return lax.scan(block, x, p)[0]

    shapes = {"scale": (2, 6), "shift": (2, 6), "w": (2, 6, 6), "b": (2, 6)}
    params = {k: normal(*shape) for k, shape in shapes.items()}
    layers = assert_read(apply, params, normal(4, 5, 6))
    kinds = [(x.name, x.bias, x.kind, x.stack) for x in layers]
    assert kinds == [
        ("scale", None, "scale", (2,)),
        ("shift", None, "shift", (2,)),
        ("w", "b", "matrix", (2,)),
    ]
    assert [label for *_, label in rows(layers)][:2] == ["scale[0]", "shift[0]"]


def test_a_shift_that_is_no_bias_is_told_from_one():
    def apply(p, x):
        y = x @ p["w"]
        return jnp.sin(y) + p["b"][None, None] + (y + p["c"][None, :, None]) * y

    shapes = {"w": (6, 3), "b": (3,), "c": (5,)}
    params = {k: normal(*shape) for k, shape in shapes.items()}
    layers = assert_read(apply, params, normal(4, 5, 6))
    assert {x.name: (x.kind, x.bias) for x in layers} == {
        "w": ("matrix", None),
        "b": ("shift", None),
        "c": ("shift", None),
    }


def test_every_layer_s_kind_is_asked_for_by_name():
    def apply(p, ids):
        return jnp.sin(p["w"][ids] * p["s"][None, None])

    params = {"w": normal(9, 5), "s": normal(5)}
    layers = everything(trace(apply, params, IDS))
    assert [x.kind for x in layers] == ["embedding", "scale"]
