"""The law every kind of layer and every way to write one is held to."""

import jax
import jax.numpy as jnp
import numpy as np

from influence.linalg.contract import contract
from influence.model.reading import Reading, by_layer, read
from influence.model.trace import select, trace
from influence.model.weight import matrix
from influence.types import named_leaves

FLOAT64 = 1e-10  # sums of a few hundred products of numbers near one, in float64


def _gradients(a, gs, given, common):
    """Reads each example's gradient."""
    del given, common
    return {name: contract("bto,bti->boi", g, a) for name, g in gs.items()}


def _squares(a, gs, given, common):
    """Reads the squared gradient's sum over examples."""
    return _squares_of(_gradients(a, gs, given, common), given, common)


def _squares_of(ds, given, common):
    del given, common
    return {name: (d**2).sum(0) for name, d in ds.items()}


gradients = Reading(_gradients)
squares = Reading(_squares, _squares_of)


def everything(program):
    """Returns the layers of all kinds."""
    kinds = {x.kind for x in program.layers}
    return select(program, [f"{kind}:*" for kind in kinds])


def assert_read(apply, params, x, tolerance=FLOAT64):
    """Asserts that readings are gradients, and of squares squared gradients.

    Args:
      apply: `(params, x) -> outputs`.
      params: its parameters.
      x: inputs with a leading axis of examples.
      tolerance: what entries may differ by, relative to the largest.
    """
    program = trace(apply, params, x)
    layers = everything(program)

    def loss(out):
        return sum(jnp.sin(y).sum() for y in jax.tree.leaves(out))

    def alone(row):
        one = jax.tree.map(lambda y: y[None], row)
        return jax.grad(lambda params: loss(apply(params, one)))(params)

    leaves = named_leaves(jax.vmap(alone)(x))
    expected = {y.name: jax.vmap(lambda z, y=y: matrix(y, z))(leaves) for y in layers}
    found = by_layer(read_jitted(program, layers, gradients, loss, params, x))
    summed = by_layer(read_jitted(program, layers, squares, loss, params, x))
    for y in layers:
        d = np.asarray(expected[y.name])
        assert np.abs(d).max() > 0, f"{y.name} is told nothing by this example"
        each = np.moveaxis(found[y.name], len(y.stack), 0)
        atol = tolerance * np.abs(d).max()
        np.testing.assert_allclose(each, d, rtol=0, atol=atol, err_msg=y.name)
        atol = tolerance * (d**2).sum(0).max()
        np.testing.assert_allclose(
            summed[y.name], (d**2).sum(0), rtol=0, atol=atol, err_msg=y.name
        )
    return layers


def read_jitted(program, layers, reading, loss, params, x):
    """Returns a reading, compiled."""

    def run(params, x):
        return read(program, layers, reading, loss, params, x, {})[1]

    return jax.jit(run)(params, x)


def normal(*shape, seed=0):
    """Returns random numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))
