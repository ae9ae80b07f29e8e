"""A score predicts retrainings if the sums over what is kept rank them."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from influence.truth.lds import ceiling, correlated, lds, predicted
from influence.truth.retraining import resampled, same_seed

RNG = np.random.default_rng(0)
M, N, Q = 30, 20, 4
NAMES = {"query": list("abcd"), "train": [str(i) for i in range(N)]}


def truth(measured_MxSxQ, weight_MxN):
    return xr.Dataset(
        {
            "measured": (("subset", "seed", "query"), measured_MxSxQ),
            "weight": (("subset", "train"), weight_MxN),
        },
        coords={**NAMES, "seed": range(measured_MxSxQ.shape[1])},
    )


WEIGHT = same_seed(M, 0.3).weights(N)
SCORES = xr.DataArray(RNG.normal(size=(Q, N)), coords=NAMES, dims=list(NAMES))
LINEAR = truth((WEIGHT @ SCORES.values.T)[:, None], WEIGHT)
NOISY = truth(LINEAR.measured.values + RNG.normal(size=(M, 1, Q)), WEIGHT)


def test_the_truth_predicts_itself():
    itself = correlated(NOISY.measured.mean("seed"), NOISY)
    assert itself.interval.value == pytest.approx(1)
    assert itself.interval.low == pytest.approx(1)


def test_scores_that_retraining_is_linear_in_predict_it():
    assert lds(SCORES, LINEAR).interval.value == pytest.approx(1)
    assert lds(-SCORES, LINEAR).interval.value == pytest.approx(-1)


def test_a_subset_s_score_is_the_sum_over_what_is_kept():
    found = predicted(SCORES, LINEAR)
    for m in range(M):
        kept = np.flatnonzero(WEIGHT[m])
        np.testing.assert_allclose(found[m], SCORES.values[:, kept].sum(1), atol=1e-12)


def test_each_query_s_is_the_rank_correlation_that_scipy_computes():
    found = lds(SCORES, NOISY)
    sums = predicted(SCORES, NOISY).values
    for i in range(Q):
        known, _ = stats.spearmanr(sums[:, i], NOISY.measured.values[:, 0, i])
        assert found.each[i].item() == pytest.approx(known)


def test_what_is_compared_is_compared_on_the_same_samples():
    first, other = lds(SCORES, NOISY), lds(SCORES**3, NOISY)
    assert (first - first) == (0, 0, 0)
    assert (first / first) == (1, 1, 1)
    difference = first - other
    assert difference.low < difference.value < difference.high
    # What varies between subsets is common to both, and cancels: the interval is much
    # narrower than that of two scores judged on subsets of their own.
    apart = np.hypot(first.samples.std(), other.samples.std())
    assert difference.high - difference.low < 0.7 * 2 * 1.96 * apart


def test_the_interval_covers_what_very_many_subsets_say():
    rng = np.random.default_rng(1)

    def noisy(subsets, draw):
        weight = same_seed(subsets, 0.3, draw=draw).weights(N)
        sums = weight @ SCORES.values.T
        return truth((sums + rng.normal(size=sums.shape))[:, None], weight)

    known = lds(SCORES, noisy(5000, 1000), resamples=2).interval.value
    found = [lds(SCORES, noisy(M, i), resamples=200).interval for i in range(40)]
    # Percentile intervals of 30 subsets cover somewhat less often than 95 %; of 40, 32
    # are four standard errors below even so.
    assert sum(x.low <= known <= x.high for x in found) >= 32


def test_scores_that_are_all_alike_rank_nothing():
    assert lds(0 * SCORES, NOISY).interval.value == 0


def test_one_seed_is_deterministic_and_several_say_how_reliable_they_are():
    assert ceiling(NOISY) == 1
    signal, noise = RNG.normal(size=(400, 1, Q)), RNG.normal(size=(400, 8, Q))
    weight = same_seed(400, 0.3).weights(N)
    # Means of 8 have 8 parts of signal to one of noise: a reliability of 8/9, whose
    # root is what a perfect prediction correlates with them.
    found = ceiling(truth(signal + noise, weight))
    assert found == pytest.approx((8 / 9) ** 0.5, abs=0.02)
    perfect = correlated(
        xr.DataArray(signal[:, 0], dims=("subset", "query")),
        truth(signal + noise, weight),
        resamples=10,
    )
    assert perfect.interval.value == pytest.approx(found, abs=0.03)


def test_what_does_not_belong_together_is_an_error():
    with pytest.raises(ValueError, match="different names along 'train'"):
        lds(SCORES[:, 1:], NOISY)
    few = NOISY.isel(query=[0])
    with pytest.raises(ValueError, match="4 queries"):
        _ = lds(SCORES, NOISY) - lds(SCORES[:1], few)


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_protocol_leaves_some_out_and_keeps_some(drop):
    with pytest.raises(ValueError, match="between 0 and 1"):
        same_seed(drop=drop)


def test_protocols_draw_what_they_say():
    assert set(same_seed(5, 0.01).weights(200).sum(1)) == {198}
    assert set(resampled(5).weights(200).sum(1)) == {100}
    assert resampled(repeats=3).seeds == (1, 2, 3)
    with pytest.raises(ValueError, match="rank nothing"):
        same_seed(1)
