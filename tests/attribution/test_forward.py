"""What predicting each token does sums to the score, and is a derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence
from influence.attribution.forms import dense
from influence.attribution.forward import output_token_scores
from influence.attribution.input_tokens import input_token_scores
from influence.fold import run
from influence.model.tangents import covered, tangent
from influence.model.task import token_losses
from influence.types import named_leaves, with_leaves
from tests.attribution.test_scan import ROUNDING, asked


@pytest.mark.parametrize("name", ["raw-loop", "nnx-scan"])
def test_output_tokens_sum_to_the_score(name):
    case, _, _, query = asked(name)
    batches = case.examples.batches(3)
    found = output_token_scores(case.task, case.params, query, batches)
    total = influence.scan(case.task, case.params, query, batches).total
    assert found.dims == ("query", "train", "token")
    assert found.attrs == total.attrs
    scale = float(np.abs(total).max())
    np.testing.assert_allclose(found.sum("token"), total, atol=ROUNDING * scale)
    # Nothing is predicted where no label counts.
    counts = np.asarray(case.task.counts(case.examples.inputs))
    assert not found.values[:, ~counts].any()


def test_an_output_token_s_share_is_what_the_update_does_to_its_log_probability():
    case, curvature, _, query = asked("raw-loop")
    (batch,) = case.examples.batches(7)
    leaves = covered(case.params, curvature.layers)
    step = 1e-5

    def log_p(sign):
        h = {k: dense(x).h_QxOxI[1] for k, x in query.forms.items()}
        move = tangent(curvature.layers, leaves, h)
        moved = {k: x + sign * step * move[k] for k, x in leaves.items()}
        outputs = case.task.outputs(with_leaves(case.params, moved), batch.inputs)
        labels = case.task.labels(batch.inputs)
        return -token_losses(case.task, outputs, labels, batch)

    expected = (log_p(1) - log_p(-1)) / (2 * step) / 7
    found = output_token_scores(
        case.task, case.params, query, case.examples.batches(7)
    )[1]
    # A central difference is off by the third derivative times the step squared.
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale)


def test_one_query_is_scanned_in_forward_mode_and_many_are_not():
    case, curvature, measurements, query = asked("raw-loop")
    batches = case.examples.batches(3)
    one = influence.query(curvature, case.params, {"one": measurements["one"]})
    passes = []

    def watched(fold, batches):
        passes.append(fold.name)
        return run(fold, batches)

    expected = influence.scan(case.task, case.params, query, batches).total
    for asked_for in (one, query):
        found = influence.scan(
            case.task, case.params, asked_for, batches, by_layer=False, run=watched
        )
        assert found.layers["layer"].values.tolist() == ["all"]
        for name in asked_for.names:
            np.testing.assert_allclose(
                found.total.sel(query=name), expected.sel(query=name), atol=ROUNDING
            )
    assert passes == ["scores, forward mode", "scores"]


def test_a_model_with_a_backward_rule_of_its_own_is_scanned_too():
    case, curvature, _, query = asked("raw-loop")

    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, None), lambda _, g: (g,))
    task = influence.LanguageModel(lambda p, t: same(case.task.apply(p, t)))
    batches = case.examples.batches(7)
    found = output_token_scores(task, case.params, query, batches)
    expected = output_token_scores(case.task, case.params, query, batches)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


@pytest.mark.parametrize("name", ["raw-loop", "nnx-scan"])
def test_an_input_token_s_share_is_what_scaling_its_embedding_does(name):
    case, _, _, query = asked(name)
    batches = case.examples.batches(7)
    found = input_token_scores(case.task, case.params, query, batches)
    assert found.dims == ("query", "train", "token")
    # All shares together are what scaling every embedding at once does, here by a
    # central difference.
    table = "embed" if name == "raw-loop" else "embed.embedding"
    rows = named_leaves(case.params)[table]
    step = 1e-5

    def scores(scale):
        params = with_leaves(case.params, {table: rows * scale})
        return influence.scan(case.task, params, query, batches).total

    expected = (scores(1 + step) - scores(1 - step)) / (2 * step)
    total = found.sum("token")
    scale = float(abs(expected).max())
    np.testing.assert_allclose(total, expected, atol=1e-5 * scale)


def test_input_tokens_are_told_from_each_other():
    case, curvature, _, query = asked("raw-loop")
    batches = case.examples.batches(7)
    found = input_token_scores(case.task, case.params, query, batches)[0, 0]
    tokens = case.examples.inputs["tokens"][0]
    place = next(i for i, x in enumerate(tokens) if list(tokens).count(x) == 1)
    rows = case.params["embed"]
    step = 1e-5

    def score(scale):
        moved = rows.at[tokens[place]].multiply(scale)
        params = {**case.params, "embed": moved}
        return float(influence.scan(case.task, params, query, batches).total[0, 0])

    expected = (score(1 + step) - score(1 - step)) / (2 * step)
    scale = float(abs(found).max())
    np.testing.assert_allclose(found[place], expected, atol=1e-5 * scale)


def test_input_tokens_need_one_embedding():
    case, _, _, query = asked("raw-loop")
    with pytest.raises(ValueError, match="'wte' matches none"):
        input_token_scores(
            case.task, case.params, query, case.examples.batches(7), embedding="wte"
        )
