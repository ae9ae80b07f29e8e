"""Correlations are the textbook's, query by query, with intervals over what varies."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from influence.truth.correlation import pearson


def scores(values):
    return xr.DataArray(
        values,
        {"query": list("ab"), "train": [str(i) for i in range(values.shape[1])]},
        ["query", "train"],
    )


RNG = np.random.default_rng(0)
TRUTH = scores(RNG.normal(size=(2, 40)))
NEAR = TRUTH + scores(RNG.normal(size=(2, 40)))


def test_it_is_the_textbook_s_whichever_way_arrays_lie():
    found = pearson(NEAR.transpose("train", "query"), TRUTH)
    known = [stats.pearsonr(NEAR.sel(query=q), TRUTH.sel(query=q))[0] for q in "ab"]
    np.testing.assert_allclose(found.each, known)  # pyright: ignore
    assert found.interval.value == pytest.approx(np.mean(known))  # pyright: ignore


def test_the_interval_is_what_other_samples_of_sequences_say():
    many = RNG.normal(size=(500, 2, 2, 40))
    noisy = [pearson(scores(x + y), scores(x), resamples=2) for x, y in many]
    spread = np.quantile([x.interval.value for x in noisy], [0.025, 0.975])
    _, low, high = pearson(NEAR, TRUTH).interval
    # As wide as what fresh samples spread, to a third: each is of forty sequences.
    assert high - low == pytest.approx(spread[1] - spread[0], rel=0.35)


def test_what_is_the_same_for_all_sequences_tells_nothing():
    assert pearson(scores(np.ones((2, 40))), TRUTH).interval == (0, 0, 0)


def test_what_is_not_finite_is_an_error():
    odd = NEAR.copy(deep=True)
    odd.values[1, [3, 5]] = np.nan, np.inf
    with pytest.raises(ValueError, match="'b', 2 of 40 numbers that were predicted"):
        pearson(odd, TRUTH)
    with pytest.raises(ValueError, match="'b', 2 of 40 numbers that were measured"):
        pearson(TRUTH, odd)


def test_other_sequences_are_an_error():
    with pytest.raises(ValueError, match="different names along 'train': 39 and 40"):
        pearson(NEAR.isel(train=slice(1, None)), TRUTH)
