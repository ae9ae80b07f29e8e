"""Parts of scores add up to scores, and weights find again what they were made by."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import influence
from influence.attribution.measurements import likelihoods
from influence.model.supervised import Classification, labelled
from influence.truth.reweighting import contributions, reweight
from influence.truth.selection import select_damping

RNG = np.random.default_rng(0)
POINTS = labelled(RNG.normal(size=(30, 6)), RNG.integers(0, 3, 30))
HELD_OUT = labelled(RNG.normal(size=(5, 6)), RNG.integers(0, 3, 5), list("abcde"))
TASK = Classification(lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"])
PARAMS = {
    "in": jnp.asarray(RNG.normal(size=(6, 5))),
    "out": jnp.asarray(RNG.normal(size=(5, 3))),
}
BATCHES = POINTS.batches(10)
ASKED = likelihoods(TASK, HELD_OUT)


@cache
def curvature():
    return influence.fit(TASK, PARAMS, BATCHES)


@cache
def parts():
    return contributions(
        TASK, PARAMS, curvature(), ASKED, BATCHES, edges=(0.0, 0.1, 0.4, 1.0)
    )


def scored(damping):
    solver = influence.Eigenbasis(damping)
    asked = influence.query(curvature(), PARAMS, ASKED, solver=solver)
    return influence.scan(TASK, PARAMS, asked, BATCHES).total


def test_contributions_add_up_to_the_scores():
    assert parts().sizes["part"] == 2 * 3
    np.testing.assert_allclose(
        parts().sum("part"), scored(influence.Relative()), atol=1e-12
    )


def test_a_band_is_the_inverse_on_its_eigenvalues_alone():
    whole = parts().sel(part=[x for x in parts()["part"].values if x.startswith("in")])
    layer = influence.scan(
        TASK, PARAMS, influence.query(curvature(), PARAMS, ASKED), BATCHES
    ).layers.sel(layer="in")
    np.testing.assert_allclose(whole.sum("part"), layer, atol=1e-12)


def test_weights_find_again_what_exact_influence_was_made_by():
    weights = RNG.uniform(0.5, 2, size=6)
    exact = (parts() * xr.DataArray(weights, dims="part")).sum("part")
    found = reweight(parts(), exact, ridges=(1e-9, 1.0))
    assert found.ridge == 1e-9
    np.testing.assert_allclose(found.weights, weights, rtol=1e-4)
    np.testing.assert_allclose(found(parts()), exact, rtol=1e-3, atol=1e-6)


def test_where_the_data_says_nothing_weights_stay_equal():
    exact = 3 * parts().sum("part")
    found = reweight(parts(), exact, ridges=(1e6,))
    np.testing.assert_allclose(found.weights, 3, rtol=1e-9)


def test_one_query_is_too_few_and_others_are_none_of_its_own():
    with pytest.raises(ValueError, match="different names along 'query'"):
        reweight(parts(), parts().sum("part")[::-1])
    with pytest.raises(ValueError, match="1 query says nothing"):
        reweight(parts()[:1], parts()[:1].sum("part"))


def test_the_damping_that_scores_were_made_with_is_chosen():
    dampings = [influence.Relative(x) for x in (0.01, 0.3, 10.0)]
    found = select_damping(dampings, scored, scored(dampings[1]))
    assert found.damping == dampings[1]
    assert found.agreement[dampings[1]] == pytest.approx(1)
    assert str(found).count("*") == 1
    with pytest.raises(ValueError, match="no dampings"):
        select_damping([], scored, scored(dampings[0]))
    with pytest.raises(ValueError, match="different names along 'query'"):
        select_damping(dampings, scored, scored(dampings[0])[1:])
