"""What features are: surveys, windows and words, against all activations at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from influence.fold import run
from influence.interpret import features
from influence.interpret.activations import ReLU, TopK
from influence.interpret.dictionary import Dictionary, encode
from influence.interpret.source import Source
from influence.model.sites import read
from influence.model.task import LanguageModel
from influence.model.transformer import Apply, Config, Decoder
from tests.interpret import cases

D, F = 8, 20


def subject():
    _, table = cases.sparse(12, D, 50, 3)
    source, data = cases.model(table), cases.examples(50, 40, 9)
    rng = np.random.default_rng(3)
    sizes = ((D, F), F, (F, D), D)
    own = Dictionary(*(jnp.asarray(rng.normal(size=x)) for x in sizes), TopK(3))  # pyright: ignore
    z = np.array(encode(own, source.params["table"][data.inputs["tokens"]]))
    z[:, -1] = 0  # the last token has no label, and does not count
    return source, data, own, z


def surveyed(size: int = 7, **options):
    source, data, own, z = subject()
    fold = features.survey(source, own, cases.SITE, **options)
    return run(fold, data.batches(size)), z


def test_a_survey_counts_every_activation():
    found, z = surveyed()
    flat = z[:, :-1].reshape(-1, F)
    assert found.tokens == len(flat)
    np.testing.assert_array_equal(found.on_F, (flat > 0).sum(0))
    np.testing.assert_allclose(found.sum_F, flat.sum(0), rtol=1e-12)
    np.testing.assert_allclose(found.maximum_F, flat.max(0))
    np.testing.assert_array_equal(found.counts_FxE.sum(1), found.on_F)
    for i in range(F):
        inner = np.concatenate([[0], found.edges[1:-1], [np.inf]])
        own = flat[:, i][flat[:, i] > 0]
        np.testing.assert_array_equal(found.counts_FxE[i], np.histogram(own, inner)[0])


@pytest.mark.parametrize("size", [7, 40])
def test_the_top_are_the_sequences_with_the_largest_activations(size):
    found, z = surveyed(size, top=5)
    highest = np.sort(z.max(1), axis=0)[::-1][:5].T
    np.testing.assert_allclose(found.top.value_FxK, highest)
    for i, (values, rows, at) in enumerate(zip(*found.top[:3], strict=True)):
        on = values > 0
        np.testing.assert_allclose(z[rows[on], at[on], i], values[on])


def test_the_drawn_are_some_in_which_the_feature_is_on():
    found, z = surveyed(drawn=6)
    on = (z.max(1) > 0).sum(0)
    np.testing.assert_array_equal((found.drawn.value_FxK > 0).sum(1), np.minimum(on, 6))
    for rows, values in zip(
        found.drawn.sequence_FxK, found.drawn.value_FxK, strict=True
    ):
        own = rows[values > 0]
        assert len(set(own.tolist())) == len(own)
    other, _ = surveyed(drawn=6, seed=1)
    assert (found.drawn.sequence_FxK != other.drawn.sequence_FxK).any()


def test_windows_are_what_is_around_a_place():
    source, data, own, z = subject()
    found = run(features.survey(source, own, cases.SITE, top=4), data.batches(7)).top
    rows, at = found.sequence_FxK, found.token_FxK
    fold = features.windows(source, own, cases.SITE, rows, at, 2)
    seen = run(fold, data.batches(7))
    for i, k, w in np.ndindex(seen.shape):
        place = at[i, k] + w - 2
        if 0 <= place < 8:
            np.testing.assert_allclose(
                seen[i, k, w], z[rows[i, k], place, i], rtol=1e-6
            )
        else:
            assert np.isnan(seen[i, k, w])


def test_words_are_the_change_of_logits_along_a_feature():
    config = Config(11, 8, width=D, hidden=12, heads=2, blocks=2, tied=True)
    params = nnx.state(Decoder(config, rngs=nnx.Rngs(0)))
    source = Source(LanguageModel(Apply(config), 8), params)
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(F, D)), jnp.float32)
    own = Dictionary(rows.T, rows[:, 0], rows, rows[0], ReLU())
    inputs = {
        "tokens": jnp.asarray(rng.integers(0, 11, (3, 8))),
        "counts": jnp.ones((3, 8), bool),
    }
    found = features.words(source, own, inputs, 4)
    assert found is not None
    final = read(source.task.outputs, (features.FINAL,))(params, inputs)[features.FINAL]
    norm, head = params["norm"]["scale"][...], params["embed"]["embedding"][...]

    def logits(x):
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon)
        return (x * norm[None, None]) @ head.T

    step = 1e-3 * rows[5][None, None]
    change = (logits(final + step) - logits(final - step)) / 2e-3
    change = change.mean((0, 1)) - change.mean()
    # Central differences of float32 numbers: a thousandth is what they can tell.
    np.testing.assert_allclose(
        found.up_FxK[5], np.sort(change)[::-1][:4], rtol=1e-2, atol=1e-3
    )
    np.testing.assert_array_equal(found.suppressed_FxK[5], np.argsort(change)[:4])


def test_a_model_without_a_last_site_has_no_words():
    source, data, own, _ = subject()
    assert features.words(source, own, data.take(range(2)).inputs) is None


def test_the_nearest_are_those_of_the_largest_cosine():
    *_, own, _ = subject()
    rows = own.decoder_FxO / jnp.linalg.norm(own.decoder_FxO, axis=1, keepdims=True)
    cosine = np.array(rows @ rows.T)
    np.fill_diagonal(cosine, -2)
    places, values = features.nearest(own, 3)
    np.testing.assert_allclose(values, np.sort(cosine, 1)[:, ::-1][:, :3], atol=1e-12)
    np.testing.assert_allclose(
        np.take_along_axis(cosine, places, 1), values, atol=1e-12
    )
