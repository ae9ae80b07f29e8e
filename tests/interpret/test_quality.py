"""Measures of a dictionary, against numbers worked out by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.fold import run
from influence.interpret import quality
from influence.interpret.activations import ReLU, TopK
from influence.interpret.dictionary import Dictionary, encode, reconstruct
from influence.interpret.quality import scrambled
from influence.model.sites import Address
from tests.interpret import cases


def subject():
    _, table = cases.sparse(12, 8, 50, 3)
    return cases.model(table), cases.examples(50, 20, 9)


def random_dictionary(activation, outputs=8) -> Dictionary:
    rng = np.random.default_rng(3)
    return Dictionary(
        *(jnp.asarray(rng.normal(size=x)) for x in ((8, 20), 20, (20, outputs), 8)),
        activation,  # pyright: ignore
    )


def judged(source, data, dictionary, site=cases.SITE, writes=None, size=6):
    centre = cases.centred(source, data, writes or site)[writes or site]
    fold = quality.fold(source, dictionary, centre, site, writes)
    return run(fold, data.batches(size)), centre


def losses(source, data, x_NxTxD, writes: bool = False):
    """Returns the mean loss with values in the site's place, the last token's left."""
    tokens = jnp.asarray(data.inputs["tokens"])
    own = source.params["table"][tokens]
    image = jnp.tanh(own @ source.params["inner"])
    inside = (jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1)[None, :, None]
    if writes:
        image = jnp.where(inside, x_NxTxD, image)
    else:
        own = jnp.where(inside, x_NxTxD, own)
        image = jnp.tanh(own @ source.params["inner"])
    logits = (own + image) @ source.params["out"]
    log_p = jax.nn.log_softmax(logits[:, :-1], -1)
    return -np.take_along_axis(log_p, tokens[:, 1:, None], 2).mean(), log_p  # pyright: ignore


@pytest.mark.parametrize("activation", [ReLU(), TopK(3)])
def test_every_measure_is_its_definition(activation):
    source, data = subject()
    own = random_dictionary(activation)
    found, centre = judged(source, data, own)
    x = source.params["table"][data.inputs["tokens"][:, :-1]].reshape(-1, 8)
    missed, spread = x - reconstruct(own, x), x - x.mean(0, keepdims=True)
    z = np.asarray(encode(own, x))
    assert found.tokens == len(x)
    explained = 1 - (missed**2).sum() / (spread**2).sum()
    np.testing.assert_allclose(found.variance_explained, explained, rtol=1e-9)
    np.testing.assert_allclose(found.l0, (z > 0).sum(1).mean())
    np.testing.assert_allclose(found.density_F, (z > 0).mean(0))
    np.testing.assert_allclose(found.maximum_F, z.max(0), rtol=1e-12)
    assert found.dead == (z == 0).all(0).mean()
    whole = source.params["table"][data.inputs["tokens"]]
    clean, log_p = losses(source, data, whole)
    other, log_q = losses(source, data, reconstruct(own, whole))
    zero, _ = losses(source, data, 0 * whole)
    mean, _ = losses(source, data, jnp.broadcast_to(centre.mean_D, whole.shape))
    ours = found.clean, found.replaced, found.zero, found.mean
    np.testing.assert_allclose(ours, (clean, other, zero, mean), rtol=1e-9)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    np.testing.assert_allclose(found.kl, kl, rtol=1e-8)
    worse = replace(found, clean=1.0, replaced=1.5, zero=3.0, mean=2.0)
    assert (worse.recovered, worse.recovered_of_mean) == (0.75, 0.5)


def test_a_transcoder_is_judged_by_what_it_writes():
    source, data = subject()
    own = random_dictionary(ReLU())
    found, _ = judged(source, data, own, writes=Address("image"))
    whole = source.params["table"][data.inputs["tokens"]]
    other, _ = losses(source, data, reconstruct(own, whole), writes=True)
    np.testing.assert_allclose(found.replaced, other, rtol=1e-9)
    x = whole[:, :-1].reshape(-1, 8)
    y = jnp.tanh(x @ source.params["inner"])
    missed = ((y - reconstruct(own, x)) ** 2).sum()
    explained = 1 - missed / ((y - y.mean(0, keepdims=True)) ** 2).sum()
    np.testing.assert_allclose(found.variance_explained, explained, rtol=1e-9)


def test_a_perfect_dictionary_costs_nothing():
    source, data = subject()
    both = jnp.concatenate([jnp.eye(8), -jnp.eye(8)])
    own = Dictionary(both.T, jnp.zeros(16), both, jnp.zeros(8), ReLU())
    found, _ = judged(source, data, own)
    np.testing.assert_allclose(found.variance_explained, 1, atol=1e-12)
    np.testing.assert_allclose(found.replaced, found.clean, rtol=1e-12)
    np.testing.assert_allclose(found.kl, 0, atol=1e-12)


def test_variance_far_from_zero_is_not_lost():
    source, data = subject()
    far = replace(
        source, params={**source.params, "table": source.params["table"] + 1e5}
    )
    both = jnp.concatenate([jnp.eye(8), -jnp.eye(8)]) / 2
    own = Dictionary(both.T, jnp.zeros(16), both, jnp.zeros(8), ReLU())
    found, _ = judged(far, data, own)
    x = far.params["table"][data.inputs["tokens"][:, :-1]].reshape(-1, 8)
    missed, spread = x - reconstruct(own, x), x - x.mean(0, keepdims=True)
    explained = 1 - (missed**2).sum() / (spread**2).sum()
    # Rounding of numbers of 1e5 beside a spread of one; E[y²] - E[y]² leaves 1e-6.
    np.testing.assert_allclose(found.variance_explained, explained, rtol=1e-9)


def test_nothing_is_recovered_of_what_costs_nothing():
    source, data = subject()
    found, _ = judged(source, data, random_dictionary(ReLU()))
    assert np.isnan(replace(found, clean=2.0, zero=1.5).recovered)


def test_batches_do_not_matter():
    source, data = subject()
    one, other = (
        judged(source, data, random_dictionary(TopK(3)), size=n)[0] for n in (3, 20)
    )
    for name in ("variance_explained", "l0", "clean", "replaced", "kl"):
        a, b = getattr(one, name), getattr(other, name)
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_densities_count_every_feature_that_is_on():
    source, data = subject()
    found, _ = judged(source, data, random_dictionary(TopK(3)))
    assert sum(n for _, n in found.densities()) == (found.density_F > 0).sum()


def test_random_weights_are_the_same_numbers_elsewhere():
    source, _ = subject()
    mixed = scrambled(source.params, 0)
    for name, x in source.params.items():
        assert (mixed[name] != x).any()
        np.testing.assert_array_equal(np.sort(mixed[name].ravel()), np.sort(x.ravel()))


def test_a_corpus_without_text_is_refused():
    source, data = subject()
    fold = quality.fold(
        source,
        random_dictionary(ReLU()),
        cases.centred(source, data)[cases.SITE],
        cases.SITE,
    )
    with pytest.raises(ValueError, match="no position to judge"):
        run(fold, [])
