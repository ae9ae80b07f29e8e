"""The proximal Bregman response is what scores are the derivative of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence
from influence.attribution.measurements import likelihoods
from influence.curvature.solvers import Exact
from influence.linalg.damping import Absolute, Relative
from influence.model.supervised import Classification, Regression, labelled
from influence.model.task import LanguageModel
from influence.truth.bregman import divergence
from influence.truth.pbrf import Held, Until, pbrf
from influence.types import named_leaves, with_leaves
from tests import cases

RNG = np.random.default_rng(0)
X, X_HELD = RNG.normal(size=(12, 4)), RNG.normal(size=(3, 4))
LINE = Regression(lambda params, x: x @ params["w"][:, 0])
MLP = Classification(lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"])
WEIGHTS = {
    "in": RNG.normal(size=(4, 3)) / 2,
    "out": RNG.normal(size=(3, 3)) / 2,
}


def classes():
    """Returns a perceptron, its points, its measurements and its curvature."""
    points = labelled(X, RNG.integers(0, 3, 12))
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    asked = likelihoods(MLP, labelled(X_HELD, np.array([0, 1, 2]), list("abc")))
    return MLP, params, points, asked, influence.fit(MLP, params, points.batches(5))


def test_of_a_linear_regression_it_is_the_closed_form():
    y, y_held = RNG.normal(size=12), RNG.normal(size=3)
    w = RNG.normal(size=4)
    points, params = labelled(X, y), {"w": jnp.asarray(w)[:, None]}
    curvature = influence.fit(LINE, params, points.batches(12))
    asked = likelihoods(LINE, labelled(X_HELD, y_held))
    damping, n_train = 0.3, 20
    found = pbrf(
        LINE,
        params,
        curvature,
        asked,
        points.batches(5),
        Held(points.batches(7), Absolute(damping), n_train),
        until=Until(1e-9),
    )

    def moved(n, eps):
        # (XᵀX/N + ε x xᵀ + λ) (w - wˢ) = -ε x (xᵀ wˢ - y)
        x = X[n]
        matrix = X.T @ X / 12 + eps * np.outer(x, x) + damping * np.eye(4)
        return w - eps * np.linalg.solve(matrix, x * (x @ w - y[n]))

    def measured(w):
        return -0.5 * (X_HELD @ w - y_held) ** 2

    expected = [
        (measured(moved(n, 1 / n_train)) - measured(moved(n, -1 / n_train))) / 2
        for n in range(12)
    ]
    np.testing.assert_allclose(found.values.T, expected, atol=1e-8)
    assert found["slope"].max() < 1e-9
    assert found.attrs["unit"] == "nats per added copy"


@pytest.mark.parametrize("damping", [Absolute(0.05), Relative(0.5)])
def test_for_small_weights_it_is_the_dense_damped_solution(damping):
    task, params, points, asked, curvature = classes()
    exact = Exact(task, points.batches(12), damping)
    query = influence.query(curvature, params, asked, solver=exact)
    many = 10**4
    scores = influence.scan(task, params, query, points.batches(12), n_train=many)
    found = pbrf(
        task,
        params,
        curvature,
        asked,
        points.batches(12),
        Held(points.batches(12), damping, many),
        until=Until(1e-6),
    )
    # The symmetric difference is off by the square of a copy's weight.
    scale = np.abs(scores.total).max().item()
    np.testing.assert_allclose(found, scores.total, atol=1e-5 * scale)
    assert found.dims == ("query", "train")
    np.testing.assert_array_equal(found["train"], scores.total["train"])


def test_responses_do_not_depend_on_who_is_beside_them():
    task, params, points, asked, curvature = classes()
    together, apart = (
        pbrf(
            task,
            params,
            curvature,
            asked,
            points.batches(size),
            Held(points.batches(12), Relative(0.5), 12),
            until=Until(1e-7),
        )
        for size in (12, 5)
    )
    np.testing.assert_allclose(together, apart, atol=1e-6 * float(abs(apart).max()))


def test_only_the_curvature_s_layers_move():
    task, params, points, asked, _ = classes()
    top = influence.fit(task, params, points.batches(12), layers="out")
    features = jnp.tanh(X @ params["in"])
    held = jnp.tanh(X_HELD @ params["in"])
    linear = Classification(lambda params, x: x @ params["out"])
    inputs = labelled(np.asarray(features), points.inputs["label"])
    alone = likelihoods(
        linear, labelled(np.asarray(held), np.array([0, 1, 2]), list("abc"))
    )
    whole, only = (
        pbrf(
            task,
            params,
            top,
            asked,
            x.batches(12),
            Held(x.batches(12), Absolute(0.1), 12),
            until=Until(1e-8),
        )
        for task, x, asked in ((task, points, asked), (linear, inputs, alone))
    )
    np.testing.assert_allclose(whole, only, atol=1e-8)


def test_of_cross_entropy_the_divergence_is_that_of_kullback_and_leibler():
    apply, params = cases.MAKERS["raw-loop"](False, dtype=jnp.float64)
    params = cases.randomised(params, jnp.float64)
    leaves = {k: x * 1.1 for k, x in named_leaves(params).items()}
    moved = with_leaves(params, leaves)
    task, examples = LanguageModel(apply), cases.texts(7)
    (batch,) = examples.batches(7)
    found = divergence(task, params, moved, batch)
    before, after = (
        jax.nn.log_softmax(apply(p, batch.inputs["tokens"])) for p in (params, moved)
    )
    kl_BxT = (jnp.exp(before) * (before - after)).sum(-1)
    expected = jnp.where(task.counts(batch.inputs), kl_BxT, 0).sum(1)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    # Whatever the labels.
    other = Classification(MLP.apply)
    point = labelled(X, RNG.integers(0, 3, 12))
    third = labelled(X, (point.inputs["label"] + 1) % 3)
    weights = jax.tree.map(jnp.asarray, WEIGHTS)
    bigger = jax.tree.map(lambda x: 1.5 * x, weights)
    first, second = (
        divergence(other, weights, bigger, next(iter(x.batches(12))))
        for x in (point, third)
    )
    np.testing.assert_allclose(first, second, atol=1e-12)
    assert first.min() > 0


def test_a_share_of_a_copy_is_nearer_to_the_derivative():
    task, params, points, asked, curvature = classes()
    batches, damping = points.batches(12), Relative(0.5)
    query = influence.query(
        curvature, params, asked, solver=Exact(task, batches, damping)
    )
    scores = influence.scan(task, params, query, batches).total
    off = []
    for copies in (0.1, 0.01):
        held = Held(batches, damping, 12, copies)
        found = pbrf(task, params, curvature, asked, batches, held, until=Until(1e-8))
        off.append(float(np.abs(found - scores).max()))
    # A symmetric difference is off by the square of what is taken.
    assert off[1] == pytest.approx(off[0] / 100, rel=0.5)


def test_where_nothing_is_minimised_it_is_an_error():
    task, params, points, asked, curvature = classes()
    held = Held(points.batches(12), Absolute(0.01), 12)
    with pytest.raises(ValueError, match=r"After 2 evaluations none of 12.*of 1e-09"):
        pbrf(
            task,
            params,
            curvature,
            asked,
            points.batches(12),
            held,
            until=Until(1e-9, 2),
        )


def test_a_sequence_whose_objective_has_no_minimum_has_no_number():
    # Ten copies less of a sequence are more than the damping holds.
    task, params, points, asked, curvature = classes()
    found = pbrf(
        task,
        params,
        curvature,
        asked,
        points.batches(12),
        Held(points.batches(12), Relative(0.5), 12, copies=10.0),
        until=Until(1e-4),
    )
    lost = found["slope"].values > 1e-4
    assert 0 < lost.sum() < 12
    assert np.isnan(found.values[:, lost]).all()
    assert np.isfinite(found.values[:, ~lost]).all()
