"""Programs counted from their shapes."""

import jax
import jax.numpy as jnp
import pytest

from influence.model.passes import count

X = jax.ShapeDtypeStruct((6, 5), jnp.float32)
W = jax.ShapeDtypeStruct((5, 7), jnp.float32)
FOUR = 4  # bytes


def test_products_are_multiplications_and_additions():
    found = count(jnp.dot, X, W)
    assert found.flops == 2 * 6 * 5 * 7
    assert found.moved == FOUR * (6 * 5 + 5 * 7 + 6 * 7)
    assert found.made == 0


def test_a_convolution_counts_its_window():
    image = jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((4, 3, 3, 3), jnp.float32)

    def convolved(x, w):
        return jax.lax.conv(x, w, (1, 1), "VALID")

    assert count(convolved, image, kernel).flops == 2 * (2 * 4 * 6 * 6) * 3 * 3 * 3


def test_a_scan_counts_every_step():
    def repeated(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    ws = jax.ShapeDtypeStruct((9, 5, 5), jnp.float32)
    assert count(repeated, X, ws).flops == 9 * 2 * 6 * 5 * 5


def test_what_is_not_read_does_not_count():
    def one_of_two(x, w):
        jnp.dot(x, w)
        return jnp.tanh(x)

    found = count(one_of_two, X, W)
    assert found.flops == 0
    assert found.made == FOUR * 6 * 5


def test_values_are_held_from_when_they_are_made_to_when_they_are_last_read():
    def chain(x):
        y = jnp.sin(x)
        z = jnp.cos(y.reshape(5, 6))  # another shape of `y`, not another value
        return jnp.exp(z)

    assert count(chain, X).held == 2 * FOUR * 30

    def kept(x):
        y = jnp.sin(x)
        return jnp.exp(jnp.cos(y)) + y

    assert count(kept, X).held == 3 * FOUR * 30


def test_a_scan_s_stack_is_held():
    def stacked(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x), jnp.sin(x)), x, None, length=8)[1]

    assert count(stacked, X).held >= 8 * FOUR * 30


@pytest.mark.parametrize("width", [64, 96])
def test_backward_is_counted_as_xla_counts_it(width):
    def loss(ws, x):
        for w in ws:
            x = jnp.tanh(x @ w)
        return (x * x).sum()

    x = jnp.zeros((50, width), jnp.float32)
    ws = [jnp.zeros((width, width), jnp.float32)] * 3
    found = count(jax.value_and_grad(loss), ws, x)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(ws, x).compile()
    theirs = compiled.cost_analysis()
    assert theirs is not None
    # Beside the products, XLA counts an operation for each entry of other results.
    ours = found.flops + found.made / FOUR
    assert ours == pytest.approx(theirs["flops"], rel=0.05)
