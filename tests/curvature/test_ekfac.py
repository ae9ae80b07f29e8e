"""EK-FAC is what it says, whatever the batches."""

from functools import cache
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence
from influence.curvature import covariance
from influence.curvature.kfac import kfac
from influence.fold import run
from influence.linalg.damping import Absolute, Relative
from influence.model.task import Empirical, LanguageModel, Sampled
from influence.model.trace import select, trace
from tests import cases
from tests.curvature import exact

# Every way to write the model, with biases or without in turn.
ALTERNATING = list(zip(cases.MAKERS, cycle([True, False]), strict=False))
SOME = {
    ("raw-loop", True),
    ("raw-scan-remat", False),
    ("nnx-scan", False),
    ("linen-loop", True),
}
"""Between them: every library, a loop and a scan, biases and none, rematerialised."""

ROUNDING = 1e-10  # float64, sums of a few hundred products of numbers near one


@cache
def fitted(name, bias, labels=Empirical(), size=3):
    case = cases.case(cases.MAKERS[name], bias)
    batches = case.examples.batches(size)
    return case, influence.fit(case.task, case.params, batches, labels=labels)


@pytest.mark.parametrize(("name", "bias"), cases.thinned(ALTERNATING, SOME))
def test_eigenvalues_are_the_diagonal_of_the_exact_fisher(name, bias):
    case, curvature = fitted(name, bias)
    grads = exact.gradients(case, curvature.layers)
    for x in curvature.layers:
        block = curvature.blocks[x.name]
        rotated = jax.vmap(block.rotate)(grads[x.name])
        # `diag(Qᵀ E[v vᵀ] Q) = E[(Qᵀ v)²]`, with the exact per-sequence gradients `v`.
        expected = (rotated**2).mean(0)
        scale = float(expected.max())
        np.testing.assert_allclose(
            block.lam_OxI, expected, rtol=0, atol=ROUNDING * scale, err_msg=x.name
        )


@pytest.mark.parametrize("name", ["raw-loop", "raw-scan"])
def test_eigenvectors_are_those_of_covariances_over_counted_positions(name):
    case = cases.case(cases.MAKERS[name], True)
    (batch,) = case.examples.batches(len(case.examples))
    program = trace(case.task.outputs, case.params, batch.inputs)
    layers = select(program, "head")
    fold = covariance.fold(case.task, case.params, layers, Empirical())
    found = run(fold, case.examples.batches(2))

    a, g = exact.head(case)
    assert found.positions["head"] == len(a)
    np.testing.assert_allclose(found.inputs["head"][0], a.T @ a / len(a), atol=ROUNDING)
    np.testing.assert_allclose(
        found.gradients["head"][0], g.T @ g / len(a), atol=ROUNDING
    )


@pytest.mark.parametrize("inverse", [Relative(0.1), Absolute(1e-3)])
def test_solve_after_multiply_is_the_identity(inverse):
    _, curvature = fitted("nnx-scan", True)
    damped = {k: 1 / inverse(x.lam_OxI) for k, x in curvature.blocks.items()}
    v = {
        k: cases.normal(i, (3, *x.lam_OxI.shape))
        for i, (k, x) in enumerate(curvature.blocks.items())
    }
    # Three queries at once; `G + damping` is `G` with the damped eigenvalues.
    blocks = {k: x._replace(lam_OxI=damped[k]) for k, x in curvature.blocks.items()}
    product = jax.tree.map(jnp.copy, v)
    product = {k: jax.vmap(blocks[k].multiply)(x) for k, x in product.items()}
    solved = curvature.solve(product, inverse)
    for k, x in v.items():
        np.testing.assert_allclose(solved[k], x, atol=1e-8)


def test_multiply_is_the_dense_matrix():
    _, curvature = fitted("raw-scan", True)
    dense = curvature.dense()
    v = {k: cases.normal(0, (2, *x.lam_OxI.shape)) for k, x in curvature.blocks.items()}
    for k, x in curvature.multiply(v).items():
        stack = dense[k].shape[:-2]
        flat = v[k].reshape(2, *stack, -1)
        expected = jnp.einsum("...ij,q...j->q...i", dense[k], flat)
        np.testing.assert_allclose(x.reshape(2, *stack, -1), expected, atol=ROUNDING)


def test_ekfac_is_closer_to_the_exact_block_than_kfac():
    case, curvature = fitted("raw-loop", True)
    grads = exact.gradients(case, curvature.layers)
    batches = case.examples.batches(3)
    coarse = kfac(case.task, case.params, batches, labels=Empirical())
    for x in curvature.layers:
        flat = grads[x.name].reshape(len(case.examples), -1)
        block = flat.T @ flat / len(flat)
        refitted, product = (
            float(jnp.linalg.norm(block - y.blocks[x.name].dense()))
            for y in (curvature, coarse)
        )
        assert refitted < product


@pytest.mark.parametrize("labels", [Empirical(), Sampled(3)])
def test_neither_batch_size_nor_order_changes_anything(labels):
    case = cases.case(cases.MAKERS["raw-scan"], True)
    shuffled = case.examples.take([3, 0, 6, 2, 1, 5, 4])
    fits = [
        influence.fit(case.task, case.params, batches, labels=labels)
        for batches in (
            case.examples.batches(7),
            case.examples.batches(2),
            shuffled.batches(3),
        )
    ]
    first = fits[0]
    v = {k: cases.normal(0, x.lam_OxI.shape) for k, x in first.blocks.items()}
    # Compared by what they do: the sign of an eigenvector is nobody's business.
    expected = first.multiply(v)
    for other in fits[1:]:
        assert (other.positions, other.sequences) == (first.positions, first.sequences)
        for k, x in other.multiply(v).items():
            scale = float(jnp.abs(expected[k]).max())
            np.testing.assert_allclose(x, expected[k], atol=1e-9 * scale, err_msg=k)


def test_layers_that_share_an_input_get_what_separate_ones_get():
    def apply(params, tokens, separate):
        x = params["embed"][tokens]
        other = jnp.sin(jnp.arcsin(x)) if separate else x
        y = jnp.tanh(x @ params["a"]) + jnp.cos(other @ params["b"])
        return y @ params["head"]

    draw = [
        jax.random.uniform(k, s, jnp.float64, -0.5, 0.5)
        for k, s in zip(
            jax.random.split(jax.random.key(0), 4),
            [(11, 4), (4, 5), (4, 5), (5, 11)],
            strict=True,
        )
    ]
    params = dict(zip(("embed", "a", "b", "head"), draw, strict=True))
    batches = cases.texts(6).batches(3)
    found = [
        influence.fit(
            LanguageModel(lambda p, t, separate=separate: apply(p, t, separate)),
            params,
            batches,
            labels=Empirical(),
        )
        for separate in (False, True)
    ]
    assert [len({x.reads for x in y.layers}) for y in found] == [2, 3]
    v = {k: jnp.ones(x.lam_OxI.shape, jnp.float64) for k, x in found[0].blocks.items()}
    apart = found[1].multiply(v)
    for k, x in found[0].multiply(v).items():
        np.testing.assert_allclose(x, apart[k], rtol=1e-8)


def test_a_second_call_does_not_compile():
    case = cases.case(cases.MAKERS["raw-scan"], True)
    other = cases.texts(7, seed=5)
    influence.fit(case.task, case.params, case.examples.batches(3), labels=Sampled())
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiled.append(event) if "backend_compile" in event else None
        )
    )
    influence.fit(case.task, case.params, other.batches(3), labels=Sampled())
    assert not compiled


def test_a_curvature_prints_its_matrices():
    _, curvature = fitted("raw-scan", True)
    said = str(curvature)
    assert "13 matrices, 7 sequences" in said
    assert "blocks.q.w[0]" in said
    assert "blocks.q.w[1]" in said


def test_a_fit_refuses_what_would_be_silently_wrong():
    case = cases.case(cases.MAKERS["raw-loop"], True)
    batches = case.examples.batches(3)
    params = jax.tree.map(jnp.copy, case.params)
    params["blocks"][1]["up"]["w"] = (
        params["blocks"][1]["up"]["w"].at[0, 0].set(jnp.nan)
    )
    with pytest.raises(ValueError, match=r"'blocks\.1\.up\.w' has 1 entries of 96"):
        influence.fit(case.task, params, batches)
    with pytest.raises(ValueError, match="No layer matches 'attention'"):
        influence.fit(case.task, case.params, batches, layers="attention")
    with pytest.raises(TypeError, match="an iterator, which is used up"):
        influence.fit(case.task, case.params, iter(batches))  # pyright: ignore
    wrong = influence.sequences([[1, 2, 3], [4, 11, 5]], ["fine", "wrong"])
    with pytest.raises(
        ValueError, match=r"'wrong' has token id 11 at position 1.*0 to 10"
    ):
        influence.fit(case.task, case.params, wrong.batches(1))
    short = LanguageModel(case.task.apply, context=5)
    with pytest.raises(ValueError, match="6 tokens long.*context is 5"):
        influence.fit(short, case.params, batches)


def test_a_layer_that_nothing_reaches_is_named():
    def apply(params, tokens):
        x = params["embed"][tokens]
        return x @ params["head"] + 0.0 * (x @ params["idle"])

    params = {
        "embed": jnp.ones((11, 4), jnp.float64),
        "head": jnp.ones((4, 11), jnp.float64),
        "idle": jnp.ones((4, 11), jnp.float64),
    }
    task = LanguageModel(apply)
    with pytest.raises(
        ValueError, match="covariance of gradients of layer 'idle' is zero"
    ):
        influence.fit(task, params, cases.texts(4).batches(2))


def test_a_singular_curvature_is_named():
    _, curvature = fitted("raw-loop", True)
    name = "blocks.0.q.w"
    v = {name: jnp.ones(curvature.blocks[name].lam_OxI.shape, jnp.float64)}
    empty = curvature.blocks[name]._replace(lam_OxI=jnp.zeros_like(v[name]))
    broken = influence.Curvature(curvature.layers, {name: empty}, 1, 1, "none")
    with pytest.raises(ValueError, match=r"'blocks\.0\.q\.w' is singular"):
        broken.solve(v, Relative(0.1))
    with pytest.raises(ValueError, match="There is no curvature for 'other'"):
        curvature.solve({"other": v[name]})
    with pytest.raises(ValueError, match=r"shape \(3, 3\), which does not end"):
        curvature.solve({name: jnp.ones((3, 3), jnp.float64)})
