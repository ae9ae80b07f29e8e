"""Curvatures that are not EK-FAC are what they say, and EK-FAC in other bases too."""

from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence
from influence.curvature import gauss_newton
from influence.curvature.covariance import PerSequence, PerToken
from influence.curvature.diagonal import diagonal, identity
from influence.curvature.kfac import kfac
from influence.linalg.damping import Absolute
from influence.model.task import Empirical, LanguageModel, Sampled
from tests import cases
from tests.curvature import exact

ROUNDING = 1e-10  # float64, sums of a few hundred products of numbers near one
NAMES = ["raw-loop", "nnx-scan"]


@cache
def fitted(name, fit, **options):
    case = cases.case(cases.MAKERS[name], True)
    batches = case.examples.batches(3)
    if fit is not identity:
        options = {"labels": Empirical(), **options}
    return case, fit(case.task, case.params, batches, **options)


def probe(curvature):
    return {k: cases.normal(0, x.lam_OxI.shape) for k, x in curvature.blocks.items()}


def acts_alike(found, expected, tolerance=ROUNDING):
    """Compares what curvatures do: the sign of an eigenvector is nobody's business."""
    v = probe(expected)
    products = found.multiply(v)
    for k, x in expected.multiply(v).items():
        scale = float(jnp.abs(x).max())
        np.testing.assert_allclose(
            products[k], x, rtol=0, atol=tolerance * scale, err_msg=k
        )


def test_kfac_is_the_product_of_its_factors_in_units_of_a_sequence():
    case, curvature = fitted("raw-loop", kfac)
    a, g = exact.head(case)
    positions = len(a) / len(case.examples)
    factors = jnp.kron(g.T @ g / len(g), a.T @ a / len(a))
    dense = curvature.blocks["head"].dense()
    np.testing.assert_allclose(dense, positions * factors, atol=ROUNDING)


@pytest.mark.parametrize("name", NAMES)
def test_kfac_has_the_eigenvectors_of_ekfac(name):
    _, kronecker = fitted(name, kfac)
    _, refitted = fitted(name, influence.fit)
    blocks = {
        k: x._replace(lam_OxI=refitted.blocks[k].lam_OxI)
        for k, x in kronecker.blocks.items()
    }
    acts_alike(replace(kronecker, blocks=blocks), refitted)


@pytest.mark.parametrize("name", NAMES)
def test_diagonal_is_the_mean_squared_gradient(name):
    case, curvature = fitted(name, diagonal)
    grads = exact.gradients(case, curvature.layers)
    for k, block in curvature.blocks.items():
        expected = (grads[k] ** 2).mean(0)
        np.testing.assert_allclose(block.lam_OxI, expected, atol=ROUNDING)


def test_identity_solves_to_what_it_is_given():
    _, curvature = fitted("raw-scan", identity)
    v = probe(curvature)
    for k, x in curvature.solve(v, Absolute(0)).items():
        np.testing.assert_array_equal(x, v[k])


@pytest.mark.parametrize("name", NAMES)
def test_shampoo_s_basis_diagonalises_second_moments_of_whole_gradients(name):
    case, curvature = fitted(name, influence.fit, factors=PerSequence())
    grads = exact.gradients(case, curvature.layers)
    for k, block in curvature.blocks.items():
        turned = jax.vmap(block.rotate)(grads[k])
        for moments in (
            jnp.einsum("n...oi,n...oj->...ij", turned, turned),
            jnp.einsum("n...oi,n...pi->...op", turned, turned),
        ):
            size = moments.shape[-1]
            off = moments * (
                1 - jnp.eye(size).reshape(*[1] * (moments.ndim - 2), size, size)
            )
            assert float(jnp.abs(off).max()) < ROUNDING * float(moments.max())
        # And the eigenvalues are the exact Fisher's diagonal in it, as ever.
        expected = (turned**2).mean(0)
        np.testing.assert_allclose(
            block.lam_OxI, expected, atol=ROUNDING * float(expected.max())
        )


def test_shampoo_s_basis_gives_ekfac_where_the_data_make_them_equal():
    # Sequences with one label: `DW = g aᵀ`, so `DWᵀ DW = |g|² a aᵀ`. With a head of
    # zeros `|g|` is the same everywhere, and the rows of the embedding have length one.
    embed = cases.normal(0, (cases.V, cases.D))
    params = {
        "embed": embed / jnp.linalg.norm(embed, axis=1, keepdims=True),
        "head": jnp.zeros((cases.D, cases.V)),
    }
    task = LanguageModel(lambda p, t: p["embed"][t] @ p["head"])
    # Every label in another number of sequences, lest two eigenvalues be the same.
    labels = np.repeat(np.arange(cases.V), np.arange(1, cases.V + 1))
    first = np.random.default_rng(0).integers(0, cases.V, len(labels))
    batches = influence.sequences(np.stack([first, labels], 1).tolist()).batches(11)
    found, expected = (
        influence.fit(task, params, batches, labels=Empirical(), factors=factors)
        for factors in (PerSequence(), PerToken())
    )
    acts_alike(found, expected)


def test_blocks_along_the_diagonal_forget_what_is_between_them():
    case, curvature = fitted("raw-loop", influence.fit, factors=PerToken(blocks=2))
    a, _ = exact.head(case)
    between = np.kron(np.eye(2), np.ones((cases.D // 2, cases.D // 2)))
    _, q = np.linalg.eigh(np.asarray(a.T @ a) * between)
    found = np.asarray(curvature.blocks["head"].inputs.dense(cases.D))
    # Each eigenvector of the cut covariance is one of the basis, up to its sign.
    np.testing.assert_allclose(np.abs(q.T @ found).max(0), 1, atol=1e-9)
    assert not (found * (1 - between)).any()


def test_a_side_too_wide_keeps_the_standard_basis():
    case, curvature = fitted("raw-loop", influence.fit, factors=PerToken(widest=9))
    block = curvature.blocks["head"]
    assert block.outputs.blocks == ()
    assert len(block.inputs.blocks) == 1
    grads = exact.gradients(case, curvature.layers)["head"]
    expected = (jax.vmap(block.rotate)(grads) ** 2).mean(0)
    np.testing.assert_allclose(block.lam_OxI, expected, atol=ROUNDING)


def test_a_curvature_says_what_it_was_fitted_by():
    for fit, options, said in (
        (kfac, {}, "K-FAC of"),
        (kfac, {"factors": PerToken(blocks=2)}, "K-FAC, 2 blocks a factor of"),
        (identity, {}, "identity of"),
        (influence.fit, {"factors": PerSequence()}, "EK-FAC, Shampoo's basis of"),
    ):
        _, curvature = fitted("raw-scan", fit, **options)
        assert str(curvature).startswith(said)
    with pytest.raises(ValueError, match="1 block or more, not 0"):
        PerToken(blocks=0)


def test_several_draws_are_the_mean_of_single_ones():
    case, curvature = fitted("raw-loop", diagonal)
    several = diagonal(
        case.task, case.params, case.examples.batches(3), labels=Sampled(5, draws=3)
    )
    singles = [
        diagonal(case.task, case.params, case.examples.batches(7), labels=Later(5, i))
        for i in range(3)
    ]
    for k, block in several.blocks.items():
        expected = sum(x.blocks[k].lam_OxI for x in singles) / 3
        np.testing.assert_allclose(block.lam_OxI, expected, atol=ROUNDING)
    with pytest.raises(ValueError, match="once or more, not 0 times"):
        Sampled(draws=0)


@dataclass(frozen=True)
class Later:
    """One draw of labels, some draws further on."""

    seed: int
    by: int
    draws: int = 1

    def __call__(self, task, outputs, batch, draw):
        """Returns what `Sampled` returns for the later draw."""
        # The diagonal's pass is the second that draws labels, as EK-FAC's is.
        return Sampled(self.seed)(task, outputs, batch, draw - 1 + 3 + self.by)


def test_many_draws_tend_to_the_gauss_newton_matrix():
    case, _ = fitted("raw-loop", diagonal)
    batches = case.examples.batches(7)
    curvature = diagonal(
        case.task, case.params, batches, layers="head", labels=Sampled(draws=400)
    )
    act = gauss_newton.operator(case.task, curvature.layers, case.params, batches)
    exact = jnp.diag(gauss_newton.dense(curvature.layers, act, jnp.float64))
    found = curvature.blocks["head"].lam_OxI.ravel()
    # 2800 sampled gradients: their mean squares are off by a few per cent.
    error = float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
    assert error < 0.06


@pytest.mark.parametrize("name", ["nnx-scan", "raw-loop"])
def test_embeddings_and_norms_have_the_exact_fisher_s_diagonal_too(name):
    layers = ["*", "embedding:*", "scale:*"]
    case, curvature = fitted(name, influence.fit, layers=tuple(layers))
    kinds = {x.kind for x in curvature.layers}
    assert kinds == {"matrix", "embedding", "scale"}
    grads = exact.gradients(case, curvature.layers)
    for x in curvature.layers:
        block = curvature.blocks[x.name]
        assert (block.inputs.blocks == ()) == x.diagonal[0]
        assert (block.outputs.blocks == ()) == x.diagonal[1]
        expected = (jax.vmap(block.rotate)(grads[x.name]) ** 2).mean(0)
        scale = float(expected.max())
        np.testing.assert_allclose(block.lam_OxI, expected, atol=ROUNDING * scale)


@cache
def tied():
    """Returns a model that looks up, repeats a matrix and ends in its first table."""

    def apply(params, tokens):
        x = params["embed"][tokens]
        for _ in range(2):
            x = x + jnp.tanh(x @ params["w"])
        return x @ params["embed"].T

    keys = jax.random.split(jax.random.key(0))
    params = {
        "embed": jax.random.normal(keys[0], (cases.V, 4), jnp.float64),
        "w": jax.random.normal(keys[1], (4, 4), jnp.float64),
    }
    return cases.Case(LanguageModel(apply), params, cases.texts(7))


@pytest.mark.parametrize("factors", [PerToken(), PerSequence()])
def test_a_tied_and_repeated_model_has_the_exact_fisher_s_diagonal(factors):
    case = tied()
    batches = case.examples.batches(3)
    curvature = influence.fit(
        case.task, case.params, batches, labels=Empirical(), factors=factors
    )
    assert {x.name for x in curvature.layers} == {"embed", "w"}
    grads = exact.gradients(case, curvature.layers)
    for k, block in curvature.blocks.items():
        expected = (jax.vmap(block.rotate)(grads[k]) ** 2).mean(0)
        np.testing.assert_allclose(block.lam_OxI, expected, atol=1e-9)


@pytest.mark.parametrize("fit", [influence.fit, kfac])
def test_padding_and_filled_up_rows_change_nothing_of_a_tied_model(fit):
    # Where a table is looked up its ids are the layer's outputs, padding's included:
    # batches of three repeat the first example of the last one twice.
    case = tied()
    found, expected = (
        fit(case.task, case.params, case.examples.batches(n), labels=Empirical())
        for n in (3, 7)
    )
    acts_alike(found, expected, 1e-9)
    tokens, counts = (case.examples.inputs[k] for k in ("tokens", "counts"))
    other = np.where(counts, tokens, 1)
    padded = influence.Examples({"tokens": other, "counts": counts}, case.examples.ids)
    found = fit(case.task, case.params, padded.batches(7), labels=Empirical())
    acts_alike(found, expected, 1e-9)
