"""Training dictionaries: recovery, the buffer, gradients, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.fold import run
from influence.interpret import learning, training
from influence.interpret.buffer import Buffer, poured
from influence.interpret.dictionary import encode, reconstruct
from influence.interpret.kinds import BatchTop, Gate, Jump, Standard, Top, jump, step
from influence.interpret.learning import Aim, Schedule, begin
from influence.interpret.source import (
    Centre,
    Chunks,
    Epochs,
    Given,
    Source,
    centres,
)
from influence.model.sites import Address
from tests.interpret import cases

KINDS = {
    "topk": Top(3),
    "batchtopk": BatchTop(3),
    "matryoshka": BatchTop(3, (8, 24)),
    "jumprelu": Jump(3.0, coefficient=1.0),
    "jumprelu-tanh": Jump(coefficient=0.2),
    "standard": Standard(0.5),
    "gated": Gate(2.0),
}

WIDTH, FEATURES = 16, 32


def subject(seed: int = 0):
    directions, table = cases.sparse(FEATURES, WIDTH, 2000, 3, seed)
    return directions, cases.model(table), cases.examples(2000, 64, 33, seed)


def trained(source, data, aims, schedule, seed=0, chunk=16):
    sites = dict.fromkeys(y for x in aims.values() for y in (x.site, x.target))
    centre = cases.centred(source, data, *sites)
    tokens = chunk * data.inputs["tokens"].shape[1]
    fold = training.fold(source, aims, centre, schedule, tokens=tokens, seed=seed)
    batches = schedule.tokens // (tokens - chunk) + 2
    return run(fold, Epochs(data, chunk, batches, seed))


def test_values_computed_before_teach_what_the_model_does():
    _, source, data = subject()
    aim, schedule = Aim(cases.SITE, FEATURES, BatchTop(3)), Schedule(20, 256)
    read = trained(source, data, {"own": aim}, schedule)["own"].dictionary
    batches, rows = Epochs(data, 16, schedule.tokens // (16 * 32) + 2), []
    for batch in batches:
        values, keep = source.values([cases.SITE], source.params, batch)
        rows.append(np.asarray(values[cases.SITE])[np.asarray(keep)])
    centre = cases.centred(source, data)
    fold = training.fold(Given(), {"own": aim}, centre, schedule, tokens=16 * 33)
    chunks = Chunks({cases.SITE: np.concatenate(rows)}, len(rows[0]), len(rows))
    given = run(fold, chunks)["own"].dictionary
    # The same rows are shuffled alike: not a bit differs.
    np.testing.assert_array_equal(given.decoder_FxO, read.decoder_FxO)


def test_values_computed_before_come_again_and_again_and_whole():
    chunks = Chunks({cases.SITE: np.arange(10)[:, None]}, 4, 3)
    found = [x.inputs[str(cases.SITE)][:, 0].tolist() for x in chunks]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match="no values of image"):
        Given().values([Address("image")], None, next(iter(chunks)))
    with pytest.raises(ValueError, match="make no batches of 4"):
        Chunks({cases.SITE: np.zeros((3, 1))}, 4, 1)


def test_directions_that_make_up_the_data_are_recovered():
    directions, source, data = subject()
    aim = Aim(cases.SITE, FEATURES, BatchTop(3))
    schedule = Schedule(1500, 256, rate=1e-2)
    found = trained(source, data, {"own": aim}, schedule)["own"]
    cosine = directions @ np.asarray(found.dictionary.decoder_FxO).T
    # Of directions found the best match is close to 1; of random ones it is about 0.6.
    assert cosine.max(1).mean() >= 0.95
    assert found.steps == schedule.steps
    assert found.dead == 0


def test_every_kind_learns_and_ends_in_what_it_learned():
    _, source, data = subject()
    aims = {k: Aim(cases.SITE, FEATURES, x) for k, x in KINDS.items()}
    found = trained(source, data, aims, Schedule(400, 256, rate=1e-2))
    x = source.params["table"]
    spread = ((x - x.mean(0, keepdims=True)) ** 2).sum()
    for name, each in found.items():
        z = encode(each.dictionary, x)
        explained = 1 - ((x - reconstruct(each.dictionary, x)) ** 2).sum() / spread
        # Far above what 3 random directions of 32 explain, about 0.2.
        assert explained > 0.6, name
        # Half of the features are on if nothing makes them sparse.
        assert 1 <= float((z > 0).sum(1).mean()) < FEATURES / 2, name
        lengths = jnp.linalg.norm(each.dictionary.decoder_FxO, axis=1)
        np.testing.assert_allclose(lengths, 1, rtol=1e-9)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_reconstructs_what_it_does_not_read(skip):
    _, source, data = subject()
    aim = Aim(cases.SITE, 64, BatchTop(6), writes=Address("image"), skip=skip)
    made = trained(source, data, {"own": aim}, Schedule(400, 256, rate=1e-2))["own"]
    x = source.params["table"]
    y = jnp.tanh(x @ source.params["inner"])
    missed = y - reconstruct(made.dictionary, x)
    explained = 1 - (missed**2).sum() / ((y - y.mean(0, keepdims=True)) ** 2).sum()
    assert explained > 0.6
    assert (made.dictionary.skip_OxD is not None) == skip


def test_aligned_features_read_what_they_write():
    _, source, data = subject()
    aim = Aim(cases.SITE, FEATURES, BatchTop(3), aligned=True)
    made = trained(source, data, {"own": aim}, Schedule(100, 256))["own"].dictionary
    along = (made.encoder_DxF.T * made.decoder_FxO).sum(1)
    np.testing.assert_allclose(along, jnp.ones(FEATURES), rtol=1e-9)


def test_dictionaries_trained_together_are_those_trained_alone():
    _, source, data = subject()
    aims = {k: Aim(cases.SITE, FEATURES, KINDS[k]) for k in ("topk", "standard")}
    schedule = Schedule(20, 64)
    together = trained(source, data, aims, schedule)
    # Keys are drawn in the order of the aims: the first alone begins as it does here.
    alone = trained(source, data, {"topk": aims["topk"]}, schedule)
    a, b = (x["topk"].dictionary for x in (together, alone))
    # Two programs, each of which may add up in an order of its own.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10), a, b)
    assert (a.decoder_FxO != together["standard"].dictionary.decoder_FxO).any()


def test_the_buffer_holds_every_row_that_counts_once():
    rows = jnp.arange(40.0).reshape(20, 2)
    keep = jnp.asarray(np.random.default_rng(0).random(20) < 0.6)
    centre = Centre(jnp.zeros(2), jnp.asarray(1.0), jnp.asarray(40.0))
    keep = keep.at[19].set(True)  # of length above the limit: left out
    empty = Buffer(
        {cases.SITE: jnp.zeros((64, 2))},
        jnp.zeros((), jnp.int32),
        jax.random.key_data(cases.key(0)),
    )
    once = poured(empty, {cases.SITE: rows}, keep, {cases.SITE: centre})
    twice = poured(once, {cases.SITE: rows}, keep, {cases.SITE: centre})
    kept = rows[keep & (jnp.linalg.norm(rows, axis=1) <= 40)]
    assert len(kept) < keep.sum()
    for buffer, times in ((once, 1), (twice, 2)):
        assert buffer.filled == times * len(kept)
        found = np.asarray(buffer.rows[cases.SITE][: int(buffer.filled)])
        expected = np.tile(kept, (times, 1))
        np.testing.assert_array_equal(
            found[np.lexsort(found.T)], expected[np.lexsort(expected.T)]
        )
    assert (once.rows[cases.SITE][: len(kept)] != kept).any()


def test_the_order_of_the_buffer_does_not_change_the_expected_gradient():
    _, source, _ = subject()
    x = source.params["table"][:256]
    aim, schedule = Aim(cases.SITE, FEATURES, Top(3)), Schedule(1, 32)
    centre = {cases.SITE: Centre(jnp.zeros(WIDTH), jnp.ones(()), jnp.ones(()))}
    learned = begin(aim, centre, schedule, cases.key(1)).learned
    none = jnp.zeros(FEATURES, bool)

    def gradient(rows):
        def loss(learned):
            zero = jnp.zeros(())
            return learning.loss(aim, schedule, learned, rows, rows, zero, none)[0]

        return jax.grad(loss)(learned)["decoder_FxO"]

    means = []
    for seed in range(2):
        order = jax.random.permutation(cases.key(seed), len(x))
        parts = x[order].reshape(8, 32, WIDTH)
        means.append(jax.vmap(gradient)(parts).mean(0))
    np.testing.assert_allclose(means[0], means[1], atol=1e-12)
    np.testing.assert_allclose(means[0], gradient(x), atol=1e-12)


def test_thresholds_get_the_gradient_of_the_kernel():
    pre, threshold = jnp.array([[0.5, 1.04, 3.0]]), jnp.array([1.0, 1.0, 1.0])
    by_z = jax.grad(lambda t: jump(pre, t, 0.1).sum())(threshold)  # type: ignore
    by_on = jax.grad(lambda t: step(pre, t, 0.1).sum())(threshold)  # type: ignore
    np.testing.assert_allclose(by_z, [0, -10, 0])  # -threshold / bandwidth
    np.testing.assert_allclose(by_on, [0, -10, 0])  # -1 / bandwidth


def test_dead_features_learn_from_what_is_left():
    pre = jnp.asarray(np.random.default_rng(0).normal(size=(30, 8)))
    dead = jnp.arange(8) >= 5
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)))
    left = jnp.asarray(np.random.default_rng(2).normal(size=(30, 4)))

    def missed(pre, rows, left):
        return learning.revival(pre, dead, left, rows)

    slopes = jax.grad(missed, (0, 1, 2))(pre, rows, left)
    assert (slopes[0][:, :5] == 0).all()
    assert (slopes[0][:, 5:] != 0).any()
    assert (slopes[1][:5] == 0).all()
    assert (slopes[2] == 0).all()  # what is left is not differentiated


def test_few_dead_features_weigh_less():
    pre, rows = jnp.ones((3, 8)), jnp.zeros((8, 4))
    left = jnp.ones((3, 4))

    def weight(dead):
        return float(learning.revival(pre, jnp.arange(8) < dead, left, rows))

    # Nothing is explained, which weighs as all of the loss, 4, once 4 / 2 are dead.
    assert [weight(x) for x in (1, 2, 5)] == [2, 4, 4]


def test_a_rate_is_the_kinds_by_width():
    aim, other = (Aim(cases.SITE, FEATURES, x) for x in (Top(3), Standard()))
    said = Top(3).rate / (FEATURES / 2**14) ** 0.5

    def moved(aim, rate=None):
        schedule = Schedule(10, 32, rate, warmup=0.1)
        x = jax.random.normal(cases.key(1), (32, WIDTH))
        one = jnp.asarray(1.0)
        centre = {cases.SITE: Centre(jnp.zeros(WIDTH), one, one)}
        member = begin(aim, centre, schedule, cases.key(0))
        for done in (0, 1):  # the first update's rate is zero
            rows = {cases.SITE: x}
            member = learning.step(aim, schedule, member, jnp.asarray(done), rows)
        return float(jnp.abs(member.learned["bias_F"]).max())

    assert moved(aim) == pytest.approx(moved(aim, said), rel=1e-12)
    assert moved(other) != pytest.approx(moved(aim), rel=0.1)


def test_special_tokens_and_padding_are_not_read():
    _, source, _ = subject()
    data = cases.sequences([[1, 2, 3, 4], [5, 6]])
    fold = centres(replace(source, special=(3,)), (cases.SITE,))
    own = run(fold, data.batches(2))[cases.SITE]
    rows = source.params["table"][jnp.array([1, 2, 5])]
    np.testing.assert_allclose(own.mean_D, rows.mean(0), rtol=1e-12)


@pytest.mark.parametrize(
    ("aim", "said"),
    [
        (Aim(cases.SITE, 4, Top(5)), "k is 5, and the dictionary has 4"),
        (Aim(cases.SITE, 8, BatchTop(2, (4, 2))), "do not grow"),
        (Aim(cases.SITE, 8, Jump(9.0)), "9 features of a token should be on"),
        (Aim(cases.SITE, 8, Top(2), skip=True), "learn nothing else"),
    ],
)
def test_what_can_not_be_trained_is_refused(aim, said):
    _, source, data = subject()
    with pytest.raises(ValueError, match=said):
        trained(source, data, {"own": aim}, Schedule(1, 8))


def test_values_that_say_nothing_are_refused():
    _, source, data = subject()
    for value, said in ((jnp.nan, "are not finite"), (1.0, "are the same")):
        table = jnp.full_like(source.params["table"], value)
        odd = Source(source.task, {**source.params, "table": table})
        with pytest.raises(ValueError, match=said):
            cases.centred(odd, data)


def test_epochs_walk_over_everything_in_new_orders():
    _, _, data = subject()
    walk = Epochs(data, 16, 10)
    seen = [x.inputs["tokens"] for x in walk]
    assert len(seen) == len(walk) == 10
    first, second = np.concatenate(seen[:4]), np.concatenate(seen[4:8])
    assert (first != second).any()
    for own in (first, second):
        rows = {tuple(x) for x in own.tolist()}
        assert rows == {tuple(x) for x in data.inputs["tokens"].tolist()}


def test_a_dictionary_spread_over_devices_is_the_one_on_a_single_device():
    # The number of devices is settled when a process begins.
    found = []
    for count in (1, 4):
        flag = f"--xla_force_host_platform_device_count={count}"
        done = subprocess.run(
            [sys.executable, "-m", "tests.interpret.spread"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"},
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert [x["devices"] for x in found] == [1, 4]
    # Sums over features are added up in another order: float64 rounding, 20 updates.
    one, four = (np.array(x["decoder"]) for x in found)
    np.testing.assert_allclose(four, one, atol=1e-9)
