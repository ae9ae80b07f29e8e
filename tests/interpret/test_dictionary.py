"""Dictionaries: what folding keeps, and what is reconstructed exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.interpret.activations import Gated, JumpReLU, ReLU, TopK
from influence.interpret.dictionary import (
    Dictionary,
    decode,
    encode,
    reconstruct,
    unit,
)
from influence.interpret.source import Centre
from influence.interpret.training import folded

D, F = 6, 20


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


ACTIVATIONS = {
    "relu": ReLU(),
    "topk": TopK(3),
    "jumprelu": JumpReLU(jnp.abs(normal(F, seed=5))),
    "gated": Gated(normal(F, seed=6), jnp.exp(normal(F, seed=7)), normal(F, seed=8)),
}


def dictionary(activation, *, skip: bool = False, outputs: int = D) -> Dictionary:
    rows = normal(F, outputs, seed=3)
    rows = 2 * rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    return Dictionary(
        normal(D, F, seed=1),
        normal(F, seed=2),
        rows,
        normal(outputs, seed=4),
        activation,
        normal(outputs, D, seed=9) if skip else None,
    )


@pytest.mark.parametrize("k", [2 * D, 2 * D + 5])
def test_an_orthogonal_basis_and_its_negative_reconstruct_exactly(k):
    basis = jnp.linalg.qr(normal(D, D))[0]
    both = jnp.concatenate([basis, -basis])
    whole = Dictionary(both.T, jnp.zeros(2 * D), both, jnp.zeros(D), TopK(k))
    x = normal(50, D, seed=1)
    np.testing.assert_allclose(reconstruct(whole, x), x, atol=1e-13)  # rounding


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rows_of_length_one_reconstruct_the_same(name):
    own, x = dictionary(ACTIVATIONS[name]), normal(50, D, seed=1)
    made = unit(own)
    np.testing.assert_allclose(jnp.linalg.norm(made.decoder_FxO, axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(reconstruct(made, x), reconstruct(own, x), atol=1e-12)
    np.testing.assert_allclose(encode(made, x), 2 * encode(own, x), atol=1e-12)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_folding_changes_no_encoding(name, skip):
    own, x = dictionary(ACTIVATIONS[name], skip=skip, outputs=4), normal(50, D, seed=1)
    reads, writes = (
        Centre(normal(n, seed=n), jnp.asarray(s), jnp.asarray(1.0))
        for n, s in ((D, 1.7), (4, 0.3))
    )
    inside = reads.scale * (x - reads.mean_D[None])
    made = folded(own, reads, writes)
    np.testing.assert_allclose(encode(made, x), encode(own, inside), atol=1e-12)
    y = writes.mean_D[None] + reconstruct(own, inside) / writes.scale
    np.testing.assert_allclose(reconstruct(made, x), y, atol=1e-12)


def test_a_gate_is_what_the_paper_says():
    gate = ACTIVATIONS["gated"]
    pre = normal(3, F, seed=11)
    for row, z in zip(pre, gate(pre), strict=True):
        on = row + gate.gate_F > 0
        magnitude = row * gate.scale_F + gate.bias_F
        np.testing.assert_array_equal(z, np.asarray(on) * np.maximum(magnitude, 0))


def test_a_skip_transcoder_asks_for_what_it_read():
    own = dictionary(ReLU(), skip=True)
    with pytest.raises(ValueError, match="Pass what it read"):
        decode(own, jnp.zeros((1, F)))


def test_leading_axes_do_not_matter():
    own, x = dictionary(ACTIVATIONS["topk"], skip=True), normal(2, 3, 5, D, seed=1)
    flat = reconstruct(own, x.reshape(-1, D))
    np.testing.assert_allclose(reconstruct(own, x).reshape(-1, D), flat, atol=1e-13)
