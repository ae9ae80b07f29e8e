"""Self-influence, normalised scores, and the parts of a query are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import influence
from influence.attribution.duplicates import near_duplicates
from influence.attribution.measurements import completions, contrast, mean
from influence.attribution.normalise import relatif, unit
from influence.attribution.query_tokens import query_tokens
from influence.attribution.scores import Scores, check_alike, standard_error
from influence.attribution.self_influence import self_influence
from influence.attribution.sketch import random, trak
from influence.attribution.tokens import concentrated
from influence.curvature.diagonal import diagonal
from influence.curvature.halves import halves
from influence.types import rows
from tests.attribution.test_scan import ROUNDING, asked
from tests.cases import thinned
from tests.curvature import exact


@pytest.mark.parametrize("name", thinned(["raw-loop", "raw-scan"], ["raw-loop"]))
def test_self_influence_is_the_gradient_s_product_with_itself(name):
    case, curvature, *_ = asked(name)
    found = self_influence(case.task, case.params, curvature, case.examples.batches(3))
    assert found.dims == ("train", "layer")
    grads = exact.gradients(case, curvature.layers)
    dense = curvature.dense()
    for x, place, label in rows(curvature.layers):
        block = dense[x.name][place]
        damped = block + 0.1 * jnp.trace(block) / len(block) * jnp.eye(len(block))
        g = grads[x.name][(slice(None), *place)].reshape(len(case.examples), -1)
        expected = (g * jnp.linalg.solve(damped, g.T).T).sum(1) / len(case.examples)
        scale = float(expected.max())
        np.testing.assert_allclose(
            found.sel(layer=label), expected, atol=ROUNDING * scale
        )


def test_a_sequence_s_own_score_is_its_self_influence():
    case, curvature, *_ = asked("raw-loop")
    tokens = case.examples.inputs["tokens"][0][case.examples.inputs["counts"][0]]
    own = influence.completions(
        case.task, {"itself": (tokens[:1].tolist(), tokens[1:].tolist())}
    )
    query = influence.query(curvature, case.params, own)
    batches = case.examples.batches(7)
    score = influence.scan(case.task, case.params, query, batches).total[0, 0]
    found = self_influence(case.task, case.params, curvature, batches).sum("layer")
    np.testing.assert_allclose(score, found[0], rtol=1e-9)
    # Under the inverse curvature it is as long as itself: its cosine is one.
    scores = influence.scan(case.task, case.params, query, batches).total
    cosines = unit(scores, found)
    np.testing.assert_allclose(cosines[0, 0], 1, rtol=1e-9)
    assert float(abs(cosines).max()) <= 1 + 1e-9
    assert cosines.attrs["normalisation"] == "unit norm"


def test_relatif_divides_by_the_root_of_own_influence():
    case, curvature, _, query = asked("raw-loop")
    batches = case.examples.batches(7)
    scores = influence.scan(case.task, case.params, query, batches).total
    own = self_influence(case.task, case.params, curvature, batches)
    found = relatif(scores, own)
    expected = scores.values / np.sqrt(own.sum("layer").values)
    np.testing.assert_allclose(found, expected)
    assert found.attrs["unit"] == "nats per root of own influence"
    assert found.attrs["damping"] == scores.attrs["damping"]
    other = self_influence(
        case.task, case.params, curvature, batches, inverse=influence.Absolute(1.0)
    )
    with pytest.raises(ValueError, match="different damping can't be combined: 0.1 × "):
        relatif(scores, other)
    with pytest.raises(ValueError, match="'text-0-0' has no influence on itself"):
        relatif(scores, own * xr.ones_like(own).where(own["train"] != "text-0-0", 0))
    with pytest.raises(ValueError, match="itself of 2 of 7 sequences, as 'text-0-0'"):
        relatif(scores, own[2:])
    turned = relatif(scores, own[::-1])
    np.testing.assert_array_equal(turned, found)


def test_scores_are_in_the_unit_of_what_is_measured():
    case, curvature, _, _ = asked("raw-loop")
    pair = completions(case.task, {"a": ([1], [2]), "b": ([3], [4])})
    rather = {"a rather than b": contrast(pair["a"], mean(*pair.values()))}
    kinds = {
        "nats": [pair, rather],
        "units of the measurement": [
            {**pair, "norm": lambda params: sum(map(jnp.sum, jax.tree.leaves(params)))},
            {"twice": contrast(lambda params: 2 * pair["a"](params), pair["b"])},
        ],
    }
    for name, questions in kinds.items():
        for each in questions:
            query = influence.query(curvature, case.params, each)
            scores = query.scores(np.ones((len(each), 1)), ["x"], None)
            assert scores.attrs["unit"] == f"{name} per added copy"
            short = random(curvature.layers, rank=2)
            batches = case.examples.batches(7)
            projected = trak(case.task, case.params, short, each, batches)
            assert projected.attrs["unit"] == scores.attrs["unit"]


def test_a_sequence_whose_gradient_is_no_number_is_in_no_ranking():
    layers = xr.DataArray(
        [[[1.0, 2.0], [np.nan, 9.0], [np.nan, np.nan], [-4.0, 1.0]]],
        {"query": ["q"], "train": list("abcd"), "layer": ["x", "y"]},
        ("query", "train", "layer"),
        attrs={"unit": "nats per added copy"},
    )
    scores = Scores(layers)
    np.testing.assert_array_equal(scores.total, [[3, np.nan, np.nan, -3]])
    assert [x.id for x in scores.top(4)[0]] == ["a", "d"]
    assert [x.id for x in scores.bottom(1)[0]] == ["d"]


def test_what_was_made_alike_can_be_combined():
    case, _, _, query = asked("raw-loop")
    batches = case.examples.batches(7)
    scores = influence.scan(case.task, case.params, query, batches).total
    check_alike([scores, scores])
    elsewhere = influence.scan(case.task, case.params, query, batches, n_train=9).total
    with pytest.raises(
        ValueError, match="different n_train can't be combined: 7 and 9"
    ):
        check_alike([scores, elsewhere])


@pytest.mark.parametrize("name", thinned(["raw-loop", "nnx-scan"], ["raw-loop"]))
def test_the_cube_sums_to_the_score_along_every_axis(name):
    case, curvature, measurements, query = asked(name)
    batches = case.examples.batches(7)
    whole = influence.token_scores(
        case.task, case.params, query, batches, n_train=7, by_layer=True
    ).sel(query="one")
    parts = query_tokens(curvature, case.params, "one", measurements["one"])
    assert parts.names[:2] == ("one@0", "one@1")
    cube = influence.token_scores(
        case.task, case.params, parts, batches, n_train=7, by_layer=True
    )
    assert cube.dims == ("query", "train", "layer", "token")
    scale = float(abs(whole).max())
    np.testing.assert_allclose(cube.sum("query"), whole, atol=ROUNDING * scale)
    scores = influence.scan(case.task, case.params, query, batches)
    np.testing.assert_allclose(
        cube.sum(["query", "layer", "token"]),
        scores.total.sel(query="one"),
        atol=ROUNDING * scale,
    )
    # The prompt has two tokens and the completion two: of the last, no update is made.
    assert not cube.values[3:].any()
    assert (abs(cube.values[:3]).sum((1, 2, 3)) > 0).all()


def test_a_score_that_hangs_on_one_token_is_marked():
    shares = xr.DataArray([[5.0, 0.1, 0.1], [1.0, 1.0, -1.0]], dims=["train", "token"])
    assert concentrated(shares).values.tolist() == [True, False]


def test_near_duplicates_are_grouped():
    base = list(range(20))
    tokens = [base, [99, *base[1:]], list(range(50, 70)), base[:-2], [7, 8]]
    groups = near_duplicates(tokens, n=3, similarity=0.6)
    assert groups.tolist() == [0, 0, 1, 0, 2]
    assert near_duplicates(tokens, n=3, similarity=1.0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="not 0 and 0.5"):
        near_duplicates(tokens, n=0)


def test_standard_errors_cover_what_endless_data_would_give():
    # A linear model whose curvature is noisy because labels are sampled. `E[Λ]` is the
    # same for every half, so a fit with very many draws stands for endless data.
    rng = np.random.default_rng(0)
    params = {
        "embed": jnp.asarray(rng.standard_normal((11, 3))),
        "head": jnp.asarray(0.3 * rng.standard_normal((3, 11))),
    }
    task = influence.LanguageModel(lambda p, t: p["embed"][t] @ p["head"])
    tokens = rng.integers(0, 11, (240, 6)).tolist()
    batches = influence.sequences(tokens).batches(40)
    asked = influence.completions(task, {f"{i}": ([i], [i + 1]) for i in range(8)})

    def scores(batches_to_fit, labels):
        curvature = diagonal(task, params, batches_to_fit, labels=labels)
        query = influence.query(curvature, params, asked)
        return influence.scan(task, params, query, batches, by_layer=False).total

    endless = scores(batches, influence.Sampled(99, draws=100))
    inside = []
    for seed in range(4):
        labels = influence.Sampled(seed)
        whole = scores(batches, labels)
        error = standard_error(*(scores(x, labels) for x in halves(batches)))
        inside.append((abs(whole - endless) <= 2 * error).values)
        assert error.dims == ("query",)
    # Two standard errors cover 95 % of a normal error; 1920 scores, much alike within a
    # query, so that a fit more or less moves the rate by a few per cent.
    assert 0.85 < np.mean(inside) < 1
    with pytest.raises(ValueError, match="different names along 'train'"):
        standard_error(endless, endless[:, ::-1])
    with pytest.raises(ValueError, match="One batch can't be halved"):
        halves(influence.sequences(tokens).batches(240))
