"""Scores are inner products with gradients, however they are contracted."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence
from influence.attribution.forms import Dense, Factored, Plain, dense, factored
from influence.attribution.measurements import contrast, mean
from influence.attribution.scan import _expanded, cheaper
from influence.linalg.damping import Relative
from influence.model.task import Empirical
from influence.model.weight import matrix
from influence.types import named_leaves, rows
from tests import cases
from tests.curvature import exact

ROUNDING = 1e-9  # float64, after an inverse with a condition number of some thousands
# That all models are read alike is what `test_trace` is about.
NAMES = ["raw-loop", "raw-scan-remat", "nnx-scan"]
ASKED = {"one": ([1, 2], [3, 4]), "two": ([5], [6]), "three": ([7, 8, 9], [10])}


@cache
def asked(name, bias=True, compress=None):
    case = cases.case(cases.MAKERS[name], bias)
    batches = case.examples.batches(3)
    curvature = influence.fit(case.task, case.params, batches, labels=Empirical())
    measurements = influence.completions(case.task, ASKED)
    query = influence.query(curvature, case.params, measurements, compress=compress)
    return case, curvature, measurements, query


@cache
def explicit(name, bias=True):
    """Returns `-(1/N) ∇fᵀ (G + damping)⁻¹ ∇L` of each matrix, by dense inverses."""
    case, curvature, measurements, _ = asked(name, bias)
    train = exact.gradients(case, curvature.layers)
    asking = [jax.jit(jax.grad(f))(case.params) for f in measurements.values()]
    queries = [named_leaves(jax.tree.map(np.asarray, x)) for x in asking]
    blocks = {k: np.asarray(x) for k, x in curvature.dense().items()}
    found = np.zeros((len(queries), len(case.examples), len(rows(curvature.layers))))
    for k, (x, place, _) in enumerate(rows(curvature.layers)):
        block = blocks[x.name][place]
        damped = block + 0.1 * np.trace(block) / len(block) * np.eye(len(block))
        g_NxD = np.asarray(train[x.name])[(slice(None), *place)]
        g_NxD = g_NxD.reshape(len(case.examples), -1)
        for q, leaves in enumerate(queries):
            h = np.linalg.solve(damped, np.asarray(matrix(x, leaves))[place].ravel())
            found[q, :, k] = -(g_NxD @ h) / len(case.examples)
    return found


@pytest.mark.parametrize("name", cases.thinned(NAMES, ["raw-loop", "nnx-scan"]))
@pytest.mark.parametrize("form", [None, dense, factored])
def test_scores_are_explicit_inner_products(name, form):
    case, curvature, _, query = asked(name)
    scores = influence.scan(
        case.task, case.params, query, case.examples.batches(3), form=form
    )
    expected = explicit(name)
    np.testing.assert_allclose(
        scores.layers, expected, atol=ROUNDING * np.abs(expected).max()
    )
    assert scores.layers.dims == ("query", "train", "layer")
    assert list(scores.layers["train"].values) == list(case.examples.ids)
    labels = [label for _, _, label in rows(curvature.layers)]
    assert list(scores.layers["layer"].values) == labels


def test_scores_of_a_full_rank_query_are_those_of_the_query():
    case, _, _, query = asked("raw-scan-remat")
    *_, cut = asked("raw-scan-remat", compress=Plain(9))
    batches = case.examples.batches(4)
    whole = influence.scan(case.task, case.params, query, batches)
    parts = influence.scan(case.task, case.params, cut, batches)
    np.testing.assert_allclose(whole.layers, parts.layers, atol=ROUNDING)


@pytest.mark.parametrize("name", cases.thinned(NAMES, ["raw-loop", "nnx-scan"]))
@pytest.mark.parametrize("form", [None, factored])
def test_layers_and_tokens_sum_to_the_score(name, form):
    case, _, _, query = asked(name)
    batches = case.examples.batches(3)
    scores = influence.scan(case.task, case.params, query, batches)
    tokens = influence.token_scores(
        case.task,
        case.params,
        query,
        batches,
        n_train=len(case.examples),
        form=form,
    )
    assert tokens.dims == ("query", "train", "token")
    scale = float(np.abs(scores.total).max())
    np.testing.assert_allclose(tokens.sum("token"), scores.total, atol=ROUNDING * scale)
    np.testing.assert_allclose(
        scores.layers.sum("layer"), scores.total, atol=ROUNDING * scale
    )


def test_batch_size_changes_no_score():
    case, _, _, query = asked("raw-scan-remat")
    whole, parts = (
        influence.scan(case.task, case.params, query, case.examples.batches(size))
        for size in (7, 2)
    )
    np.testing.assert_allclose(whole.layers, parts.layers, atol=1e-12)


def test_the_sign_says_what_training_on_a_sequence_would_do():
    case, curvature, *_ = asked("raw-loop")
    tokens, counts = (
        case.examples.inputs["tokens"][0],
        case.examples.inputs["counts"][0],
    )
    text = tokens[counts].tolist()
    own = influence.completions(case.task, {"itself": (text[:1], text[1:])})
    query = influence.query(curvature, case.params, own)
    batches = case.examples.batches(7)
    scores = influence.scan(case.task, case.params, query, batches)
    # Training on a sequence makes the sequence likelier.
    assert float(scores.total[0, 0]) > 0
    assert scores.layers.attrs["sign"].startswith(
        "positive: adding the sequence raises"
    )


def test_a_score_is_per_added_copy():
    case, _, _, query = asked("raw-loop")
    batches = case.examples.batches(7)
    here, elsewhere = (
        influence.scan(case.task, case.params, query, batches, n_train=n)
        for n in (None, 700)
    )
    np.testing.assert_allclose(here.layers, elsewhere.layers * 100)
    assert here.layers.attrs["n_train"] == 7
    assert here.layers.attrs["unit"] == "nats per added copy"
    assert here.layers.attrs["damping"] == "0.1 × mean eigenvalue of each matrix"


def test_rankings_are_by_score():
    case, _, _, query = asked("raw-loop")
    scores = influence.scan(case.task, case.params, query, case.examples.batches(7))
    total = scores.total.sel(query="two")
    first, last = scores.top(7)[1], scores.bottom(7)[1]
    assert [x.score for x in first] == sorted(total.values.tolist(), reverse=True)
    assert [x.id for x in last] == [x.id for x in first][::-1]
    assert str(scores.top(2)).count("nats per added copy") == 3


@pytest.mark.parametrize("queries", [1, 3, 4, 5, 10])
def test_no_query_is_lost_where_groups_of_them_do_not_come_out_even(queries):
    keys = jax.random.split(jax.random.key(queries), 4)
    shapes = [(2, 7, 3), (2, 7, 5), (queries, 5, 2), (queries, 3, 2)]
    draw = partial(jax.random.normal, dtype=jnp.float64)
    a_BxTxI, g_BxTxO, left, right = map(draw, keys, shapes)
    h_QxOxI = left @ right.mT
    expected = jnp.einsum("bto,bti,qoi->bq", g_BxTxO, a_BxTxI, h_QxOxI)
    found = _expanded(a_BxTxI, g_BxTxO, Factored(left, right))
    np.testing.assert_allclose(found, expected, rtol=1e-10)  # order of sums


def test_the_cheaper_form_is_chosen():
    def thin(queries):
        return Factored(jnp.zeros((queries, 512, 8)), jnp.zeros((queries, 512, 8)))

    assert cheaper(32, 128, thin(1)) is factored
    assert cheaper(32, 128, thin(1000)) is dense
    assert cheaper(32, 128, Dense(jnp.zeros((1, 512, 512)))) is dense


def test_tokens_of_layers_that_see_other_positions_have_no_axis():
    def apply(params, tokens):
        x = params["embed"][tokens]
        pooled = jnp.tanh(x.mean(1) @ params["pool"])
        return (x + pooled[:, None]) @ params["head"]

    params = {
        "embed": jnp.ones((11, 4)),
        "pool": jnp.ones((4, 4)),
        "head": jnp.ones((4, 11)),
    }
    draw = iter(jax.random.split(jax.random.key(0), 3))
    params = jax.tree.map(
        lambda x: jax.random.normal(next(draw), x.shape, jnp.float64), params
    )
    task = influence.LanguageModel(apply)
    batches = cases.texts(5).batches(5)
    curvature = influence.fit(task, params, batches, labels=Empirical())
    query = influence.query(curvature, params, influence.completions(task, ASKED))
    influence.scan(task, params, query, batches)
    with pytest.raises(ValueError, match="different numbers of positions"):
        influence.token_scores(task, params, query, batches, n_train=5)


def test_any_function_of_the_parameters_can_be_measured():
    case, curvature, _, _ = asked("raw-loop")
    tokens = jnp.array([[1, 2, 3]])

    def rather(params):
        log_p = jax.nn.log_softmax(case.task.apply(params, tokens)[0, -1])
        return log_p[4] - log_p[5]

    query = influence.query(curvature, case.params, {"rather": rather})
    assert dict(query.facts)["value"] == (float(rather(case.params)),)
    scores = influence.scan(case.task, case.params, query, case.examples.batches(7))
    apart = influence.completions(
        case.task, {"+": ([1, 2, 3], [4]), "-": ([1, 2, 3], [5])}
    )
    both = influence.query(curvature, case.params, apart)
    parts = influence.scan(case.task, case.params, both, case.examples.batches(7)).total
    # A contrast's scores are the contrast of the scores.
    np.testing.assert_allclose(scores.total[0], parts[0] - parts[1], atol=ROUNDING)
    named = {"rather": contrast(apart["+"], apart["-"]), "mean": mean(*apart.values())}
    query = influence.query(curvature, case.params, named)
    found = influence.scan(case.task, case.params, query, case.examples.batches(7))
    np.testing.assert_allclose(found.total[0], scores.total[0], atol=ROUNDING)
    np.testing.assert_allclose(found.total[1], parts.mean("query"), atol=ROUNDING)


def test_a_second_scan_does_not_compile():
    case, _, _, query = asked("raw-scan-remat")
    influence.scan(case.task, case.params, query, case.examples.batches(3))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiled.append(event) if "backend_compile" in event else None
        )
    )
    other = cases.texts(7, seed=9)
    influence.scan(case.task, case.params, query, other.batches(3))
    assert not compiled


def test_measurements_that_would_be_silently_wrong_are_refused():
    case, curvature, *_ = asked("raw-loop")

    def ask(measurement, **options):
        return influence.query(
            curvature, case.params, {"asked": measurement}, **options
        )

    with pytest.raises(
        ValueError, match=r"'asked' returns an array of shape \(8, 11\)"
    ):
        ask(lambda params: params["head"])
    with pytest.raises(ValueError, match="'asked' does not depend on any"):
        ask(lambda params: params["embed"].sum())
    with pytest.raises(ValueError, match="'asked' is nan"):
        ask(lambda params: jnp.log(-jnp.abs(params["head"]).sum()))
    with pytest.raises(ValueError, match="name at least one"):
        influence.query(curvature, case.params, {})
    with pytest.raises(ValueError, match="rank 99 is above that of every layer"):
        ask(lambda params: params["head"].sum(), compress=Plain(99))
    wrong = influence.completions(case.task, {"asked": ([1, 99], [2])})["asked"]
    with pytest.raises(ValueError, match="'asked' has token id 99 at position 1"):
        ask(wrong)


def test_a_model_without_the_query_s_layers_is_refused():
    _, _, _, query = asked("raw-loop")
    other = cases.case(cases.MAKERS["nnx-loop"], True)
    with pytest.raises(ValueError, match=r"no layer 'blocks\.0\.q\.w'"):
        influence.scan(other.task, other.params, query, other.examples.batches(7))


def test_damping_travels_with_the_scores():
    case, curvature, measurements, _ = asked("raw-loop")
    query = influence.query(
        curvature,
        case.params,
        measurements,
        solver=influence.Eigenbasis(Relative(0.5)),
        compress=Plain(2),
    )
    scores = influence.scan(case.task, case.params, query, case.examples.batches(7))
    assert scores.total.attrs["damping"].startswith("0.5 × mean")
    assert scores.total.attrs["query_rank"] == "rank 2"
