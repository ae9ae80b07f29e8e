"""SOURCE is exact unrolling where the loss is quadratic and steps are small."""

import jax.numpy as jnp
import numpy as np
import pytest

from influence.attribution.measurements import likelihoods
from influence.attribution.metagradients import metagradients
from influence.attribution.unrolled import Metric, Segment, mean_params, source, tracin
from influence.curvature.diagonal import identity
from influence.curvature.operator import Curvature
from influence.linalg.basis import Basis
from influence.linalg.kronecker import Kronecker
from influence.model import train
from influence.model.supervised import Regression, labelled

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(16, 4)), RNG.normal(size=16)
POINTS = labelled(X, Y)
HELD_OUT = labelled(RNG.normal(size=(3, 4)), RNG.normal(size=3), list("abc"))
TASK = Regression(lambda params, x: (x @ params["w"])[:, 0])
ASKED = likelihoods(TASK, HELD_OUT)
BATCHES = POINTS.batches(16)


def training(steps, distance):
    """Returns full-batch gradient descent at a constant rate over some distance."""
    recipe = train.Recipe(steps, 16, distance / steps, train.SGD(), warmup=0, last=1.0)
    return train.Training(TASK, recipe, POINTS, lambda seed: {"w": jnp.zeros((4, 1))})


def exact(params):
    """Returns the Gauss–Newton matrix of least squares as a curvature."""
    (layer,) = identity(TASK, params, BATCHES).layers
    lam, q = np.linalg.eigh(X.T @ X / 16)
    block = Kronecker(Basis((jnp.asarray(q),)), Basis(()), jnp.asarray(lam)[None])
    return Curvature((layer,), {"w": block}, 16, 16, "none", "exact")


def trail(training):
    ones = np.ones(16)
    models = [training.start(0)]
    for step in range(1, training.recipe.steps + 1):
        short = train.Recipe(
            step, 16, training.recipe.rate, train.SGD(), warmup=0, last=1.0
        )
        part = train.Training(TASK, short, POINTS, training.start)
        models.append(part(ones, 0))
    return models


def error(steps):
    whole = training(steps, 1.5)
    models = trail(whole)
    segments = [Segment(x, 1.5 / steps) for x in models[:-1]]
    found = source(TASK, models[-1], segments, ASKED, BATCHES, exact)
    known = metagradients(whole, 0, ASKED)
    return float(abs(found - known).max() / abs(known).max())


@pytest.mark.slow  # trains in 8 and in 32 steps, and follows each
def test_source_with_a_segment_a_step_is_unrolling_as_steps_get_small():
    coarse, fine = error(8), error(32)
    # exp(-η G) and 1 - η G differ by η² G² / 2 a step, by η over all steps.
    assert fine < 0.1
    assert fine == pytest.approx(coarse / 4, rel=0.3)


def test_segments_in_one_are_the_segments_one_by_one_if_nothing_changes_between():
    params = {"w": jnp.asarray(RNG.normal(size=(4, 1)))}
    whole = source(TASK, params, [Segment(params, 2.0)], ASKED, BATCHES, exact)
    parts = [Segment(params, x) for x in (0.5, 1.2, 0.3)]
    found = source(TASK, params, parts, ASKED, BATCHES, exact)
    np.testing.assert_allclose(found, whole, atol=1e-12)
    assert found.attrs["solver"] == "SOURCE, 3 segments"
    assert found.attrs["unit"] == "nats per added copy"


def test_in_a_metric_it_is_preconditioned_descent_on_a_quadratic():
    params = {"w": jnp.asarray(RNG.normal(size=(4, 1)))}
    square = RNG.uniform(0.2, 3.0, size=4)  # P, what the optimizer divides by
    far = (0.7, 0.4)
    metric = Metric(lambda _: {"w": jnp.sqrt(jnp.asarray(square))[None]}, BATCHES, 6)
    segments = [Segment(params, x) for x in far]
    found = source(TASK, params, segments, ASKED, BATCHES, exact, metric=metric)
    # As many small steps as make a flow of it: w ← w - η P ∇.
    steps, matrix = 4000, X.T @ X / 16
    w = np.asarray(params["w"])
    gradients = (X * (X @ w - Y[:, None])).T / 16
    moved = np.zeros((4, 16))
    for distance in far:
        for _ in range(steps):
            moved -= distance / steps * square[:, None] * (matrix @ moved + gradients)
    x, y = HELD_OUT.inputs["x"], HELD_OUT.inputs["label"]
    known = -(x * (x @ w - y[:, None])) @ moved
    # Euler's steps are off by their size.
    np.testing.assert_allclose(found, known, atol=1e-3 * abs(known).max())
    assert found.attrs["solver"] == "SOURCE, 2 segments, in the optimizer's metric"


def test_training_for_ever_is_the_influence_function():
    params = {"w": jnp.asarray(RNG.normal(size=(4, 1)))}
    found = source(TASK, params, [Segment(params, 1e4)], ASKED, BATCHES, exact)
    gradients = np.asarray(X * (X @ np.asarray(params["w"]) - Y[:, None]))
    x, y = HELD_OUT.inputs["x"], HELD_OUT.inputs["label"]
    query = -x * (x @ np.asarray(params["w"]) - y[:, None])
    known = -query @ np.linalg.solve(X.T @ X / 16, gradients.T) / 16
    np.testing.assert_allclose(found, known, atol=1e-10)


def test_tracin_adds_up_products_of_gradients():
    models = [{"w": jnp.asarray(RNG.normal(size=(4, 1)))} for _ in range(2)]
    segments = [Segment(x, d) for x, d in zip(models, (0.5, 2.0), strict=True)]

    def none(params):
        return identity(TASK, params, BATCHES)

    found = tracin(TASK, segments, ASKED, BATCHES, none)
    known = 0
    for segment in segments:
        w = np.asarray(segment.params["w"])
        g = X * (X @ w - Y[:, None])
        x, y = HELD_OUT.inputs["x"], HELD_OUT.inputs["label"]
        known = known + segment.distance * (x * (x @ w - y[:, None])) @ g.T / 16
    np.testing.assert_allclose(found, known, atol=1e-12)


def test_no_segments_is_an_error():
    params = {"w": jnp.zeros((4, 1))}
    for act in (
        lambda: source(TASK, params, [], ASKED, BATCHES, exact),
        lambda: tracin(TASK, [], ASKED, BATCHES, exact),
    ):
        with pytest.raises(ValueError, match="no segments"):
            act()


def test_the_mean_of_models_is_that_of_every_parameter():
    models = [{"w": jnp.full((4, 1), x)} for x in (1.0, 2.0, 6.0)]
    np.testing.assert_allclose(mean_params(models)["w"], 3.0)
