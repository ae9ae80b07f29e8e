"""Every solver reaches the damped solution it is meant to reach."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence
from influence.curvature import gauss_newton
from influence.curvature.solvers import (
    ConjugateGradients,
    Diverged,
    Eigenbasis,
    Exact,
    LiSSA,
    Neumann,
)
from influence.linalg.damping import Absolute, Relative, Truncated
from influence.model.task import LanguageModel
from influence.types import rows, with_leaves
from tests import cases

# Two layers of one model that take part in everything: 160 weights.
LAYERS = ["blocks.1.up.w", "blocks.0.q.w"]


@cache
def setting(own_rule=False):
    apply, params = cases.MAKERS["raw-loop"](False, dtype=jnp.float64)
    task = LanguageModel(with_own_rule(apply) if own_rule else apply)
    params = cases.randomised(params, jnp.float64)
    examples = cases.texts(7)
    curvature = influence.fit(task, params, examples.batches(3), layers=LAYERS)
    v = {
        x.name: jax.random.normal(
            jax.random.key(i), (2, x.outputs, x.columns), jnp.float64
        )
        for i, x in enumerate(curvature.layers)
    }
    return task, params, examples, curvature, v


def with_own_rule(apply):
    """Returns a model that ends in a function with a backward rule of its own."""

    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, None), lambda _, g: (g,))
    return lambda params, tokens: same(apply(params, tokens))


@cache
def explicit():
    """Returns the Gauss–Newton matrix, from explicit Jacobians and `diag(p) - p pᵀ`."""
    task, params, examples, curvature, _ = setting()
    tokens = jnp.asarray(examples.inputs["tokens"])
    counts = np.asarray(task.counts(examples.inputs))
    leaves = {x.name: jnp.zeros((x.outputs, x.columns)) for x in curvature.layers}

    def logits(v):
        moved = {k: params_leaf(params, k) + x.T for k, x in v.items()}
        return task.apply(with_leaves(params, moved), tokens)[counts]

    jacobian = jax.jacobian(logits)(leaves)
    j = jnp.concatenate(
        [jacobian[x.name].reshape(counts.sum(), cases.V, -1) for x in curvature.layers],
        axis=-1,
    )
    p = jax.nn.softmax(logits(leaves))
    h = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    return np.asarray(jnp.einsum("nvi,nvw,nwj->ij", j, h, j) / len(examples))


def params_leaf(params, name):
    _, block, layer, _ = name.split(".")
    return params["blocks"][int(block)][layer]["w"]


def solution(damping):
    """Returns the damped solution by a dense inverse."""
    _, _, _, curvature, v = setting()
    amounts = [
        np.full(x.outputs * x.columns, float(damping.amount(b.lam_OxI).squeeze()))
        for x in curvature.layers
        for b in [curvature.blocks[x.name]]
    ]
    damped = explicit() + np.diag(np.concatenate(amounts))
    flat = gauss_newton.flat(curvature.layers, v)
    return np.linalg.solve(damped, np.asarray(flat).T).T


@pytest.mark.parametrize("own_rule", [False, True])
@pytest.mark.parametrize("size", [7, 3])
def test_gauss_newton_products_are_the_dense_matrix(own_rule, size):
    task, params, examples, curvature, v = setting(own_rule)
    act = gauss_newton.operator(task, curvature.layers, params, examples.batches(size))
    found = gauss_newton.dense(curvature.layers, act, jnp.float64)
    np.testing.assert_allclose(found, explicit(), atol=1e-10)
    product = gauss_newton.flat(curvature.layers, act(v))
    flat = gauss_newton.flat(curvature.layers, v)
    np.testing.assert_allclose(product, flat @ explicit(), atol=1e-9)


@pytest.mark.parametrize(
    ("make", "tolerance", "dampings"),
    [
        # All reach the solution: the exact one to rounding, the others as far as the
        # steps they are given go. Without a preconditioner only strong damping helps.
        (lambda *given: Exact(*given), 1e-9, [Relative(0.1), Absolute(0.05)]),
        (
            lambda *given: ConjugateGradients(*given, steps=80, tolerance=1e-9),
            1e-6,
            [Relative(0.1), Absolute(0.05)],
        ),
        (
            lambda *given: Neumann(*given, steps=300, rate=0.3, decay=1.0),
            1e-4,
            [Relative(0.1)],
        ),
        (lambda *given: LiSSA(*given, steps=2000), 1e-3, [Absolute(0.05)]),
    ],
    ids=["exact", "conjugate gradients", "neumann", "lissa"],
)
def test_solvers_reach_the_dense_damped_solution(make, tolerance, dampings):
    task, params, examples, curvature, v = setting()
    for damping in dampings:
        solver = make(task, examples.batches(7), damping)
        found = solver(curvature, params, v)
        expected = solution(damping)
        flat = gauss_newton.flat(curvature.layers, found.solved)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(flat, expected, rtol=0, atol=tolerance * scale)
        assert solver.about()["damping"] == str(damping)


def test_the_eigenbasis_solves_the_fitted_curvature():
    _, params, _, curvature, v = setting()
    found = Eigenbasis(Relative(0.1))(curvature, params, v)
    for k, x in curvature.solve(v, Relative(0.1)).items():
        np.testing.assert_array_equal(found.solved[k], x)


def test_what_has_not_converged_says_so():
    task, params, examples, curvature, v = setting()
    solver = ConjugateGradients(
        task, examples.batches(7), Relative(1e-6), steps=2, tolerance=1e-9
    )
    measurements = influence.completions(task, {"a": ([1, 2], [3]), "b": ([4], [5])})
    query = influence.query(curvature, params, measurements, solver=solver)
    facts = dict(query.facts)
    assert facts["converged"] == (0.0, 0.0)
    assert min(facts["residual"]) > 1e-9
    scores = influence.scan(task, params, query, examples.batches(7))
    assert scores.total["converged"].values.tolist() == [0.0, 0.0]
    assert "at most 2 steps" in scores.total.attrs["solver"]


def test_what_can_only_go_wrong_is_refused():
    task, params, examples, curvature, v = setting()
    batches = examples.batches(7)
    with pytest.raises(Diverged, match=r"diverged: after \d+ steps.*Damp more"):
        LiSSA(task, batches, steps=2000, rate=1e3)(curvature, params, v)
    with pytest.raises(ValueError, match="160 parameters.*limit is 100"):
        Exact(task, batches, largest=100)(curvature, params, v)
    with pytest.raises(TypeError, match="Truncated.*only the eigenbasis has"):
        ConjugateGradients(task, batches, Truncated())(curvature, params, v)  # pyright: ignore
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        LiSSA(task, batches, depth=5)  # pyright: ignore


@pytest.mark.parametrize(
    "make",
    [
        lambda *given: ConjugateGradients(*given),
        lambda *given: Exact(*given),
        lambda *given: Neumann(*given),
        lambda *given: LiSSA(*given),
    ],
    ids=["conjugate gradients", "exact", "neumann", "lissa"],
)
def test_batches_that_are_used_up_are_no_curvature_of_zero(make):
    task, params, examples, curvature, v = setting()
    once = (x for x in examples.batches(7))
    solver = make(task, once, Relative(1.0))
    list(once)
    with pytest.raises(ValueError, match="no example to multiply"):
        solver(curvature, params, v)


def test_the_rate_of_lissa_is_bounded_by_every_matrix_of_a_stack():
    case = cases.case(cases.MAKERS["raw-scan-remat"], False)
    batches, damping = case.examples.batches(7), Relative(10.0)
    curvature = influence.fit(case.task, case.params, batches)
    assert any(x.stack for x in curvature.layers)
    v = {k: jnp.ones((1, *x.lam_OxI.shape)) for k, x in curvature.blocks.items()}
    most = 0.0
    for x, place, _ in rows(curvature.layers):
        lam = curvature.blocks[x.name].lam_OxI
        most += float((lam + damping.amount(lam))[place].max())
    found, expected = (
        LiSSA(case.task, batches, damping, steps=2, rate=rate)(
            curvature, case.params, v
        )
        for rate in (None, 1 / most)
    )
    for k, x in found.solved.items():
        np.testing.assert_allclose(x, expected.solved[k], rtol=1e-9)
