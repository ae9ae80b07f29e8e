"""Steering: edits of features do what they say, where they say it, and nothing else."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from influence.interpret import steering
from influence.interpret.activations import JumpReLU, ReLU, TopK
from influence.interpret.dictionary import Dictionary, encode
from influence.interpret.steering import (
    GENERATED,
    PROMPT,
    Steered,
    Steering,
    ablate,
    add,
    changed,
    clamp,
    compare,
    gathered,
    in_units,
    scale,
)
from influence.model.config import Config
from influence.model.generate import generate
from influence.model.positions import places, view
from influence.model.sites import Address, read
from influence.model.task import LanguageModel
from influence.model.transformer import Apply, structure
from tests.interpret import cases
from tests.model.test_transformer import parameters

V, T, WIDTH, FEATURES = 11, 8, 8, 20
CONFIG = Config(V, 16, width=WIDTH, hidden=12, heads=2, blocks=3)
APPLY, SITE = Apply(CONFIG), Address("resid", 1)
READS, WRITES = Address("mlp_in", 1), Address("mlp_out", 1)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (3, T)))
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]

ACTIVATIONS = {
    "relu": ReLU(),
    "topk": TopK(5),
    "jumprelu": JumpReLU(jnp.full(FEATURES, 0.4)),
}
EACH = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


@pytest.fixture(scope="module")
def params():
    return parameters(CONFIG)


@partial(jax.jit, static_argnums=0)
def run(apply, params, tokens):
    return apply(params, tokens)


def dictionary(activation=ACTIVATIONS["relu"]):
    rng = np.random.default_rng(3)
    return Dictionary(
        jnp.asarray(rng.normal(size=(WIDTH, FEATURES))),
        jnp.asarray(rng.normal(size=FEATURES)),
        jnp.asarray(rng.normal(size=(FEATURES, WIDTH))),
        jnp.asarray(rng.normal(size=WIDTH)),
        activation,
    )


def logits(
    params, edits, *, own=None, site=SITE, writes=None, prompt=None, tokens=None
):
    own = own or dictionary()
    held = Steering(params, own, gathered(edits, own), prompt)
    model = Steered(APPLY, site, writes or site)
    return run(model, held, TOKENS if tokens is None else tokens)


def activations(params, own, site=SITE):
    return encode(own, values(params, site))


def values(params, site):
    return jax.jit(read(APPLY, [site]))(params, TOKENS)[site]


def busiest(z, place=-1):
    """Returns the feature that is on the most at a position of the first text."""
    return int(z[0, place].argmax())


def close(found, wanted):
    # Rounding in another order is all that may differ.
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-11)


def by_hand(params, tokens, at=None, inside=None):
    """Returns logits by a loop over blocks, with functions of their values.

    Args:
      params: the model's.
      tokens: token ids.
      at: in the second block, what becomes of its input.
      inside: in the second block, what becomes of the MLP's output, by its input.
    """
    decoder = nnx.merge(structure(CONFIG), params)
    place, _ = places(tokens, None)
    x = decoder.embed(tokens)
    graph, stacked = nnx.split(decoder.blocks)
    for i, which in enumerate(CONFIG.view_L):
        block = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], stacked))
        own = view(place, None, *CONFIG.views[which], dtype=x.dtype)
        x = at(x) if at and i == 1 else x
        middle = x + block.attention(block.attention_norm(x), own)
        into = block.mlp_norm(middle)
        out = block.mlp(into)
        x = middle + (inside(into, out) if inside and i == 1 else out)
    return decoder.norm(x) @ decoder.head.kernel[...]


@EACH
@pytest.mark.parametrize("writes", [SITE, WRITES], ids=str)
def test_a_feature_clamped_to_its_own_activation_changes_nothing(
    params, activation, writes
):
    site, own = SITE if writes == SITE else READS, dictionary(activation)
    z = activations(params, own, site)
    on, off = busiest(z), int(z[0, -1].argmin())
    assert z[0, -1, on] > 0
    assert z[0, -1, off] == 0
    first = TOKENS[:1]
    edits = [clamp(i, float(z[0, -1, i]), (T - 1, T - 1)) for i in (on, off)]
    options = {"own": own, "site": site, "writes": writes, "tokens": first}
    close(logits(params, edits, **options), run(APPLY, params, first))
    moved = [edits[0]._replace(add=edits[0].add + 1), edits[1]]
    assert (
        abs(logits(params, moved, **options) - run(APPLY, params, first)).max() > 1e-3
    )


@EACH
def test_to_ablate_is_to_clamp_to_zero_and_to_scale_by_it(params, activation):
    own = dictionary(activation)
    i = busiest(activations(params, own))
    found = logits(params, [ablate(i)], own=own)
    np.testing.assert_array_equal(found, logits(params, [clamp(i, 0.0)], own=own))
    np.testing.assert_array_equal(found, logits(params, [scale(i, 0.0)], own=own))
    assert abs(found - run(APPLY, params, TOKENS)).max() > 1e-3


@EACH
def test_what_is_added_is_what_the_table_says(params, activation):
    own = dictionary(activation)
    x = values(params, SITE)
    i = busiest(encode(own, x))
    f, d = encode(own, x)[..., i : i + 1], own.decoder_FxO[i][None, None]
    table = {
        add(i, 3.0): 3.0 * jnp.ones_like(f),
        add(i, -6.0): -6.0 * jnp.ones_like(f),
        clamp(i, 5.0): 5.0 - f,
        scale(i, 2.5): 1.5 * f,
        ablate(i): -f,
    }
    place = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], TOKENS.shape)
    for edit, wanted in table.items():
        close(changed(own, gathered([edit], own), x, place), wanted * d)


def test_adding_is_linear_in_the_stream(params):
    x = values(params, SITE)
    own = dictionary()

    def stream(*edits):
        place = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], TOKENS.shape)
        return changed(own, gathered(edits, own), x, place)

    both = stream(add(2, 1.5), add(7, -4.0))
    close(both, stream(add(2, 1.5)) + stream(add(7, -4.0)))
    close(stream(add(2, 1.5), add(2, 2.0)), stream(add(2, 3.5)))
    close(stream(add(2, -3.0)), -2 * stream(add(2, 1.5)))


def test_logits_before_an_edit_are_untouched(params):
    plain = np.asarray(run(APPLY, params, TOKENS))
    for start in (0, 3, T - 1):
        found = np.asarray(logits(params, [add(4, 6.0, (start, T))]))
        close(found[:, :start], plain[:, :start])
        assert (abs(found - plain)[:, start:].max(-1) > 1e-6).all()


def test_positions_are_counted_from_the_end_of_each_prompt(params):
    lengths = jnp.asarray([3, 5, T])

    def edited(positions):
        found = logits(params, [add(4, 6.0, positions)], prompt=lengths)
        return abs(found - run(APPLY, params, TOKENS)).max(-1) > 1e-9

    def from_(starts):
        return np.arange(T)[None] >= np.asarray(starts)[:, None]

    # What is edited is seen from there on.
    np.testing.assert_array_equal(edited(steering.ALWAYS), from_([0, 0, 0]))
    np.testing.assert_array_equal(edited(PROMPT), from_([0, 0, 0]))
    np.testing.assert_array_equal(edited(GENERATED), from_([3, 5, T]))
    np.testing.assert_array_equal(edited((-1, -1)), from_([2, 4, T - 1]))
    np.testing.assert_array_equal(edited((-4, -4)), from_([T, 1, T - 4]))
    np.testing.assert_array_equal(edited((2, 2)), from_([5, 7, T]))


def test_edits_of_the_prompt_and_of_what_follows_make_up_those_of_all(params):
    lengths = jnp.asarray([3, 5, T])
    parts = [clamp(4, 6.0, PROMPT), clamp(4, 6.0, GENERATED)]
    found = logits(params, parts, prompt=lengths)
    close(found, logits(params, [clamp(4, 6.0)], prompt=lengths))


def test_each_edit_of_a_feature_sees_what_earlier_ones_left(params):
    def after(*edits):
        return logits(params, edits)

    close(after(clamp(4, 3.0), scale(4, 2.0)), after(clamp(4, 6.0)))
    close(after(scale(4, 2.0), clamp(4, 3.0)), after(clamp(4, 3.0)))
    close(after(add(4, 1.0), scale(4, 2.0)), after(scale(4, 2.0), add(4, 2.0)))
    close(after(clamp(4, 3.0), ablate(4)), after(ablate(4)))
    close(after(clamp(4, 3.0), add(4, 1.0)), after(clamp(4, 4.0)))
    assert abs(after(clamp(4, 4.0)) - after(clamp(4, 3.0))).max() > 1e-3


def test_edits_of_different_features_are_of_one_state(params):
    edits = [clamp(4, 3.0), scale(9, 2.0), ablate(0)]
    close(logits(params, edits), logits(params, edits[::-1]))


def test_all_features_taken_out_leave_what_the_dictionary_does_not_explain(params):
    own = dictionary()
    found = logits(params, [ablate(i) for i in range(FEATURES)], own=own)

    def rest(x):
        return x - encode(own, x) @ own.decoder_FxO

    close(found, by_hand(params, TOKENS, at=rest))


def test_the_edited_model_is_the_one_written_so(params):
    own, d = dictionary(), dictionary().decoder_FxO
    z = activations(params, own)
    i = busiest(z)

    def edited(x):
        f = jax.nn.relu(x @ own.encoder_DxF + own.encoder_bias_F[None, None])[..., [i]]
        return x + (5.0 - f) * d[i][None, None] - 2.0 * d[3][None, None]

    close(by_hand(params, TOKENS), run(APPLY, params, TOKENS))
    found = logits(params, [clamp(i, 5.0), add(3, -2.0)], own=own)
    close(found, by_hand(params, TOKENS, at=edited))


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoders_feature_is_read_in_one_place_and_written_in_another(
    params, skip
):
    own = dictionary(ACTIVATIONS["topk"])
    if skip:
        own = replace(own, skip_OxD=jnp.ones((WIDTH, WIDTH)))
    i = busiest(activations(params, own, READS))

    def edited(into, out):
        f = encode(own, into)[..., i : i + 1]
        return out + (5.0 - f) * own.decoder_FxO[i][None, None]

    options = {"own": own, "site": READS, "writes": WRITES}
    found = logits(params, [clamp(i, 5.0)], **options)
    close(found, by_hand(params, TOKENS, inside=edited))
    twice = logits(params, [clamp(i, 2.5), scale(i, 2.0)], **options)
    close(twice, found)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_steered_continuation_is_that_of_the_model_written_so(params, temperature):
    own, strength = dictionary(), 4.0
    d, lengths = (
        strength * own.decoder_FxO[3][None, None],
        jnp.asarray([len(x) for x in PROMPTS]),
    )

    def hand(params, tokens):
        new = jnp.arange(tokens.shape[1])[None] >= lengths[:, None]
        return by_hand(params, tokens, at=lambda x: x + jnp.where(new[..., None], d, 0))

    held = Steering(params, own, gathered([add(3, strength, GENERATED)], own), lengths)
    options = {"temperature": temperature, "key": jax.random.key(0)}
    found = generate(Steered(APPLY, SITE, SITE), held, PROMPTS, 6, **options)
    assert found == generate(hand, params, PROMPTS, 6, **options)
    assert found != generate(APPLY, params, PROMPTS, 6, **options)


def test_other_features_strengths_and_positions_compile_nothing_anew(params):
    own, traced = dictionary(), []

    @jax.jit
    def counting(held):
        traced.append(held)
        return Steered(APPLY, SITE, SITE)(held, TOKENS)

    def traces(*edits):
        lengths = jnp.asarray([3, 5, T])
        counting(Steering(params, own, gathered(edits, own), lengths))
        return len(traced)

    assert traces(add(3, 1.0), ablate(2)) == 1
    assert traces(clamp(5, -7.5, PROMPT), scale(0, 2.0, (-2, 4))) == 1
    assert traces(add(3, 1.0)) == 2


def test_equal_models_are_equal_once_steered():
    one, other = Steered(Apply(CONFIG), SITE, SITE), Steered(APPLY, SITE, SITE)
    assert one == other
    assert hash(one) == hash(other)
    assert one != replace(one, freeze_attention=True)


def test_a_language_model_can_be_steered(params):
    own = dictionary()
    held = Steering(params, own, gathered([add(3, 4.0)], own))
    task = LanguageModel(Steered(APPLY, SITE, SITE))
    found = run(task.outputs, held, {"tokens": TOKENS})
    close(found, logits(params, [add(3, 4.0)]))


@pytest.mark.parametrize("freeze_attention", [False, True])
def test_documents_in_one_row_are_steered_as_if_alone(params, freeze_attention):
    own = dictionary()
    held = Steering(params, own, gathered([clamp(3, 4.0)], own))
    task = LanguageModel(Steered(APPLY, SITE, SITE, freeze_attention))
    segments = jnp.asarray([[1] * 3 + [2] * (T - 3)])
    row = {"tokens": TOKENS[:1], "segments": segments}
    found = run(task.outputs, held, row)
    close(found[:, :3], run(task.outputs, held, {"tokens": TOKENS[:1]})[:, :3])
    close(found[:, 3:], run(task.outputs, held, {"tokens": TOKENS[:1, 3:]}))


def test_frozen_attention_looks_where_it_did(params):
    def looking(params, tokens) -> Any:
        """Returns a value's attention to others, and what it makes of them."""
        x = checkpoint_name(params[tokens], "value")
        pattern = jax.nn.softmax(x @ x.mT, axis=-1)
        pattern = checkpoint_name(pattern[:, None], "attention_pattern")
        return pattern, pattern[:, 0] @ x

    table = jnp.asarray(np.random.default_rng(5).normal(size=(V, WIDTH)))
    own = dictionary()
    held = Steering(table, own, gathered([add(3, 2.0, (2, 4))], own))
    free = Steered(looking, cases.SITE, cases.SITE)
    pattern, _ = looking(table, TOKENS)
    stays, out = replace(free, freeze_attention=True)(held, TOKENS)
    np.testing.assert_array_equal(stays, pattern)
    inside = (np.arange(T) >= 2) & (np.arange(T) <= 4)
    edited = (
        table[TOKENS] + inside[None, :, None] * 2.0 * own.decoder_FxO[3][None, None]
    )
    close(out, pattern[:, 0] @ edited)
    moves, _ = free(held, TOKENS)
    assert abs(moves - pattern).max() > 1e-3


def test_frozen_attention_is_that_of_every_block(params):
    own = dictionary()
    held = Steering(params, own, gathered([add(3, 4.0)], own))
    frozen = Steered(APPLY, SITE, SITE, freeze_attention=True)
    nothing = held._replace(edits=gathered([add(3, 0.0)], own))
    close(run(frozen, nothing, TOKENS), run(APPLY, params, TOKENS))
    # At the first position there is nothing to look at but itself.
    free = logits(params, [add(3, 4.0)])
    found = run(frozen, held, TOKENS)
    close(found[:, 0], free[:, 0])
    assert abs(found - free)[:, 1:].max() > 1e-3


def test_attention_that_has_no_site_can_not_be_frozen():
    source = cases.model(np.random.default_rng(0).normal(size=(V, WIDTH)))
    own = dictionary()
    held = Steering(source.params, own, gathered([ablate(0)], own))
    frozen = Steered(cases.apply, cases.SITE, cases.SITE, freeze_attention=True)
    with pytest.raises(ValueError, match="no site 'attention_pattern'"):
        frozen(held, TOKENS)


def test_strengths_in_units_of_the_maximum_are_multiples_of_it():
    maximum = np.asarray([2.0, 0.5, 0.0])
    edits = [add(0, 3.0, PROMPT), clamp(1, -4.0), scale(2, 2.0), ablate(2)]
    wanted = [add(0, 6.0, PROMPT), clamp(1, -2.0), scale(2, 2.0), ablate(2)]
    assert in_units(edits, maximum) == wanted
    with pytest.raises(ValueError, match="Feature 2 was never on"):
        in_units([add(2, 1.0)], maximum)


@pytest.mark.parametrize("freeze_attention", [False, True])
def test_a_comparison_holds_both_texts_and_what_steering_costs(
    params, freeze_attention
):
    own, edits = dictionary(), [clamp(3, 4.0, GENERATED), add(5, 2.0, (-1, -1))]
    task = LanguageModel(APPLY, CONFIG.context)
    model = Steered(APPLY, SITE, SITE, freeze_attention)
    lengths = jnp.asarray([len(x) for x in PROMPTS])
    held = Steering(params, own, gathered(edits, own), lengths)
    found = compare(task, model, held._replace(prompt_B=None), PROMPTS, 5)
    assert found.plain == generate(APPLY, params, PROMPTS, 5)
    assert found.steered == generate(model, held, PROMPTS, 5)
    assert found.plain != found.steered
    whole = [[*x, *y] for x, y in zip(PROMPTS, found.plain, strict=True)]
    filled = jnp.asarray([x + [0] * (10 - len(x)) for x in whole])
    clean, other = (
        np.asarray(jax.nn.softmax(run(f, x, filled)), np.float64)
        for f, x in ((APPLY, params), (model, held))
    )
    for i, (prompt, tokens) in enumerate(zip(PROMPTS, whole, strict=True)):
        terms, costs = [], []
        for t in range(len(prompt), len(tokens)):
            p, q = clean[i, t - 1], other[i, t - 1]
            terms.append((p * np.log(p / q)).sum())
            costs.append(np.log(p[tokens[t]] / q[tokens[t]]))
        close(found.kl[i], np.mean(terms))
        close(found.cost[i], np.mean(costs))
        assert found.kl[i] > 0


def test_what_changes_nothing_costs_nothing(params):
    task = LanguageModel(APPLY, CONFIG.context)
    model = Steered(APPLY, SITE, SITE)
    held = Steering(params, dictionary(), gathered([scale(3, 1.0)], dictionary()))
    found = compare(task, model, held, PROMPTS, 4)
    assert found.plain == found.steered
    close([*found.kl, *found.cost], 0)


def test_what_can_not_be_steered_is_refused(params):
    own, task = dictionary(), LanguageModel(APPLY, CONFIG.context)
    model = Steered(APPLY, SITE, SITE)
    with pytest.raises(ValueError, match="Nothing is edited"):
        gathered([], own)
    for feature in (-1, FEATURES):
        with pytest.raises(
            ValueError, match=f"no feature {feature}: .* has 20, 0 to 19"
        ):
            gathered([add(feature, 1.0)], own)
    held = Steering(params, own, gathered([ablate(0)], own))
    with pytest.raises(ValueError, match="17 tokens; the model's context is 16"):
        compare(task, model, held, PROMPTS, 12)
    nowhere = Steered(APPLY, Address("resid", 3), Address("resid", 3))
    with pytest.raises(ValueError, match=r"no site 'resid\.3'"):
        nowhere(Steering(params, own, gathered([ablate(0)], own)), TOKENS)
