"""Lanes change where sums are kept, not what they are."""

import jax
import numpy as np
import pytest

from influence.curvature import covariance, eigenvalues, eigenvectors
from influence.fold import Fold, collected, lanes, run
from influence.model.task import Sampled
from influence.model.trace import select, trace
from tests import cases

CASE = cases.case(cases.MAKERS["raw-scan"], bias=True)
SIZE = 6
BATCHES = list(CASE.examples.batches(SIZE))  # seven sequences: the last batch has one
LABELS = Sampled(seed=3)
TOLERANCE = 1e-12
"""Sums of some dozen float64 numbers in another order."""


def layers():
    inputs = BATCHES[0].inputs
    return select(trace(CASE.task.outputs, CASE.params, inputs), "*")


def covariances() -> Fold:
    return covariance.fold(CASE.task, CASE.params, layers(), LABELS)


def spectra() -> Fold:
    own, factors = layers(), covariance.PerToken()
    found = run(covariances(), BATCHES)
    bases = run(eigenvectors.fold(own, factors, found), eigenvectors.sides(own))
    return eigenvalues.fold(CASE.task, CASE.params, own, LABELS, bases)


def cut(count):
    return [
        jax.tree.map(lambda x: np.reshape(x, (count, -1, *np.shape(x)[1:])), batch)
        for batch in BATCHES
    ]


@pytest.mark.parametrize("make", [covariances, spectra])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_lanes_sum_what_one_pass_sums(make, count):
    fold = make()
    whole, apart = run(fold, BATCHES), run(lanes(fold, count), cut(count))
    assert jax.tree.structure(whole) == jax.tree.structure(apart)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=TOLERANCE * np.abs(x).max())


def test_nothing_goes_from_lane_to_lane_before_the_end():
    fold = lanes(covariances(), 2)
    state = fold.update(fold.init(), cut(2)[0])
    sums, sequences = state
    alone = run(covariances(), [jax.tree.map(lambda x: x[0], cut(2)[0])])
    assert sequences.tolist() == [3, 3]
    name = next(iter(alone.inputs))
    mean = sums[name]["inputs"][0][0] / alone.positions[name]
    np.testing.assert_allclose(mean, alone.inputs[name][0], rtol=1e-12)


def test_a_pass_that_is_no_sum_has_no_lanes():
    with pytest.raises(ValueError, match="'reads' is no sum over examples"):
        lanes(collected("reads", lambda batch: batch.real_B), 2)
