"""Features and influence: enrichment, measurements, and paths that sum to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.attribution.measurements import likelihoods
from influence.attribution.query import query
from influence.curvature.ekfac import fit
from influence.fold import run
from influence.interpret.activations import JumpReLU, ReLU, TopK
from influence.interpret.dictionary import Dictionary, encode, pre_activations
from influence.interpret.link import (
    Activities,
    _draws,
    _means,
    _strata,
    activities,
    activity,
    enriched,
    pooled,
    through,
)
from tests.interpret import cases

D, F = 8, 20


def subject():
    _, table = cases.sparse(12, D, 50, 3)
    return cases.model(table), cases.examples(50, 20, 9)


def random_dictionary(activation) -> Dictionary:
    rng = np.random.default_rng(3)
    sizes = ((D, F), F, (F, D), D)
    return Dictionary(*(jnp.asarray(rng.normal(size=x)) for x in sizes), activation)  # pyright: ignore


def drawn(seed: int, sequences: int = 400, features: int = 30) -> Activities:
    rng = np.random.default_rng(seed)
    busy = rng.uniform(0.2, 1, (sequences, 1))
    tokens = np.full(sequences, 50)
    on = rng.binomial(50, 0.2 * busy, (sequences, features))
    return Activities(on, on.astype(float), tokens)


def test_activities_are_sums_over_the_tokens_that_count():
    source, data = subject()
    own = random_dictionary(TopK(3))
    found = run(activities(source, own, cases.SITE), data.batches(6))
    z = encode(own, source.params["table"][data.inputs["tokens"][:, :-1]])
    np.testing.assert_array_equal(found.on_NxF, (z > 0).sum(1))
    length = np.linalg.norm(own.decoder_FxO, axis=1)
    np.testing.assert_allclose(found.sum_NxF, np.asarray(z).sum(1) * length, rtol=1e-12)
    np.testing.assert_array_equal(found.tokens_N, 8)


def test_a_feature_that_the_chosen_have_stands_out_alone():
    own = drawn(0)
    own.on_NxF[:20, 7] += 15
    found = enriched(own, range(20))
    assert found.first(3, 0.05) == [7]
    assert found.lift_F[7] > 2
    np.testing.assert_allclose(found.rate_F, own.rate_NxF[:20].mean(0))


def test_of_what_stands_out_alike_the_feature_that_writes_most_is_first():
    own = drawn(0)
    own.on_NxF[:20, 7:9] += 15
    own.sum_NxF[:] = own.on_NxF
    own.sum_NxF[:, 8] *= 3
    assert enriched(own, range(20)).first(2) == [8, 7]


def test_how_much_more_is_written_is_the_mean_over_random_choices():
    own, places = drawn(2), np.arange(20)
    found = enriched(own, places, strata=5)
    written = own.sum_NxF / 50
    stratum = _strata(own.rate_NxF.sum(1), 5)
    draws = _draws(stratum, places, 20_000, np.random.default_rng(0))
    expected = written[:20].mean(0) - _means(written, draws).mean(0)
    # The spread of a mean of twenty rates is about 0.02, of 20,000 of them 0.0002.
    np.testing.assert_allclose(found.more_F, expected, atol=1e-3)


def test_by_chance_few_stand_out():
    # One in twenty choices would have a feature with a corrected p of 0.05.
    least = [
        enriched(drawn(seed), range(20), seed=seed).p_F.min() for seed in range(20)
    ]
    assert np.mean(np.array(least) <= 0.05) <= 0.2


def test_sequences_in_which_much_goes_on_are_compared_with_their_like():
    own = drawn(1)
    busiest = np.argsort(-own.rate_NxF.sum(1))[:20]
    assert enriched(own, busiest, strata=1).p_F.min() < 0.05
    assert enriched(own, busiest, strata=20).p_F.min() > 0.05


def test_with_nothing_to_compare_with_it_is_refused():
    for chosen in ([], range(300)):
        with pytest.raises(ValueError, match="are to be compared"):
            enriched(drawn(0), chosen)


def test_pooled_influence_is_a_sum_over_tokens():
    rng = np.random.default_rng(0)
    scores, on = rng.normal(size=(4, 6)), rng.random((4, 6, 3)) < 0.3
    found = pooled(scores, on)
    for i in range(3):
        np.testing.assert_allclose(found.sum_F[i], scores[on[..., i]].sum(), atol=1e-12)
        assert found.tokens_F[i] == on[..., i].sum()


def test_a_feature_is_a_measurement_with_its_own_gradient():
    source, data = subject()
    own, weights = random_dictionary(ReLU()), np.zeros((20, 9))
    weights[2, 3], weights[5, 1] = 1.0, 0.5
    measured = activity(source.task, own, cases.SITE, 4, data.inputs, weights)
    tokens = data.inputs["tokens"]

    def by_hand(params):
        pre = pre_activations(own, params["table"][tokens])[..., 4]
        return pre[2, 3] + 0.5 * pre[5, 1]

    np.testing.assert_allclose(measured(source.params), by_hand(source.params))
    a, b = (jax.grad(f)(source.params) for f in (measured, by_hand))
    jax.tree.map(np.testing.assert_allclose, a, b)


def test_a_measurement_of_nothing_is_refused():
    source, data = subject()
    own = random_dictionary(ReLU())
    with pytest.raises(ValueError, match="no feature 20"):
        activity(source.task, own, cases.SITE, 20, data.inputs, np.ones((20, 9)))
    with pytest.raises(ValueError, match="all weights are 0"):
        activity(source.task, own, cases.SITE, 2, data.inputs, np.zeros((20, 9)))


@pytest.mark.parametrize(
    "activation", [ReLU(), TopK(3), JumpReLU(jnp.linspace(0.0, 2.0, F))]
)
def test_paths_and_what_is_left_over_are_the_gradient_that_passes_the_site(activation):
    source, data = subject()
    own = random_dictionary(activation)
    (asked,) = likelihoods(source.task, data.take([3])).values()
    paths = through(asked, source.params, own, cases.SITE, F)
    tokens = data.inputs["tokens"][3:4]

    def log_p(x):
        y = jnp.tanh(x @ source.params["inner"])
        log_p = jax.nn.log_softmax((x + y) @ source.params["out"], -1)
        return jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], 2).sum()

    x = source.params["table"][tokens]
    g = jax.grad(log_p)(x)

    def left(table):
        value = table[tokens]
        made = encode(own, value) @ own.decoder_FxO
        return (g * (value - made)).sum()

    whole = jax.grad(lambda t: (g * t[tokens]).sum())(source.params["table"])
    parts = [jax.grad(x.measurement)(source.params)["table"] for x in paths]
    rest = jax.grad(left)(source.params["table"])
    np.testing.assert_allclose(sum(parts) + rest, whole, atol=1e-12)
    z = encode(own, x)
    for path in paths:
        effect = (g @ own.decoder_FxO[path.feature] * z[..., path.feature]).sum()
        np.testing.assert_allclose(path.effect, effect, rtol=1e-9)
    sizes = [abs(x.effect) for x in paths]
    assert sizes == sorted(sizes, reverse=True)


def test_the_engine_ranks_sequences_for_a_feature():
    source, data = subject()
    own = random_dictionary(ReLU())
    curvature = fit(source.task, source.params, data.batches(6), layers="embedding:*")
    measured = {
        str(i): activity(source.task, own, cases.SITE, i, data.inputs, np.ones((20, 9)))
        for i in (2, 5)
    }
    assert query(curvature, source.params, measured).names == ("2", "5")
