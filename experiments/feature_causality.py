"""Does removing a feature's most influential sequences weaken the feature?

    python -m experiments.feature_causality

A dictionary of the truth bench's language model is trained and then held fixed. Ten of
its living features are drawn before anything about them is looked at. For each, the
engine ranks the training sequences by their influence on the feature's pre-activation
at the tokens of held-out text where it is on; the model is trained again without the
first of them, without as many random ones, and without as many that have the feature on
as much. What is compared is the feature's mean activation on the held-out text, always
by the same dictionary.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from experiments.dictionaries import CHUNK, Subject, language
from experiments.results import Claim, figure, table, write
from experiments.tasks import LITTLE
from influence import fit, query, scan
from influence.curvature.solvers import ConjugateGradients
from influence.fold import run
from influence.interpret.dictionary import Dictionary, encode
from influence.interpret.kinds import BatchTop
from influence.interpret.learning import Aim, Schedule
from influence.interpret.link import Activities, Activity, activities, activity
from influence.interpret.source import Source
from influence.linalg.damping import Relative
from influence.model.examples import Examples
from influence.model.train import Training
from influence.types import Params

STATEMENT = (
    "Removing the sequences with the most influence on a feature weakens it more than "
    "removing as many random ones, or as many in which it is on as much"
)


GAO: dict[str, Any] = {
    "rate": 2e-4 * (2**14 / (8 * LITTLE.config.width)) ** 0.5,
    "decay": 0.2,
    "dead_after": 38_400,
    "auxiliary": 1 / 32,
    "clip": 1.0,
}
"""Gao et al.'s rate, and weight of dead features' learning: here none dies."""


@dataclass(frozen=True)
class Options:
    """What is removed.

    Attributes:
      features: how many are drawn.
      removed: how many sequences are left out, of 1,024.
      draws: of random sequences, and of sequences that have the feature on as much.
      rarest: the least share of held-out tokens at which a feature that may be drawn
        is on.
      steps: of the dictionary's training.
      k: features of a token that are on.
      seed: of all that is drawn.
    """

    features: int = 10
    removed: int = 51
    draws: int = 5
    rarest: float = 0.005
    steps: int = 600
    k: int = 24
    seed: int = 0


def main(options: Options) -> None:
    """Draws features, and trains without what they owe the most to."""
    setting, subject = language(options.seed)
    aim = Aim(subject.site, 8 * subject.width, BatchTop(options.k))
    schedule = Schedule(options.steps, **GAO)
    trained = subject.train({"own": aim}, schedule, options.seed)
    dictionary = trained["own"].dictionary
    rng = np.random.default_rng(options.seed)
    held = _activities(subject.source, subject, dictionary, subject.held)
    share_F = held.on_NxF.sum(0) / held.tokens_N.sum()
    alive = np.flatnonzero(share_F >= options.rarest)
    chosen = np.sort(rng.choice(alive, options.features, replace=False))
    training = setting.training
    scores = _scores(subject, dictionary, training, [int(i) for i in chosen])
    own = _activities(subject.source, subject, dictionary, training.examples)
    removals = []
    randoms = [
        rng.choice(len(training.examples), options.removed, replace=False)
        for _ in range(options.draws)
    ]
    for row, feature in zip(scores, chosen, strict=True):
        top = np.argsort(-row)[: options.removed]
        alike = _alike(own.sum_NxF[:, feature], top, options.draws, rng)
        removals.append([top, *alike])
    drops = _drops(options, subject, dictionary, training, chosen, removals, randoms)
    _report(options, subject, drops, share_F[chosen])


def _activities(
    source: Source, subject: Subject, dictionary: Dictionary, examples: Examples
) -> Activities:
    return run(activities(source, dictionary, subject.site), examples.batches(CHUNK))


def _measured(
    subject: Subject, dictionary: Dictionary, features: list[int]
) -> dict[str, Activity]:
    """Returns the mean pre-activation where each feature is on, in text held out."""
    inputs = subject.held.inputs
    batch = next(iter(subject.held.batches(len(subject.held))))
    rows, keep = subject.source.values((subject.site,), subject.source.params, batch)
    z = np.asarray(encode(dictionary, rows[subject.site])) * np.asarray(keep)[:, None]
    shape = inputs["tokens"].shape
    return {
        str(i): activity(
            subject.source.task,
            dictionary,
            subject.site,
            i,
            inputs,
            (z[:, i] > 0).reshape(shape) / np.asarray(keep).sum(),
        )
        for i in features
    }


def _scores(
    subject: Subject, dictionary: Dictionary, training: Training, features: list[int]
) -> np.ndarray:
    """Returns the influence of training sequences on features, `[features, N]`."""
    task, params = training.task, subject.source.params
    batches = training.examples.batches(CHUNK)
    curvature = fit(task, params, batches, layers="blocks.*")
    solver = ConjugateGradients(task, batches, Relative(10.0), steps=5)
    asked = query(
        curvature, params, _measured(subject, dictionary, features), solver=solver
    )
    return scan(task, params, asked, batches).total.values


def _alike(
    sum_N: np.ndarray, top: np.ndarray, draws: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Returns sequences in which a feature is on as much as in the top ones.

    Each time, for every top sequence one of the ten others whose summed activation is
    nearest to its own, none twice.
    """
    others = np.setdiff1d(np.arange(len(sum_N)), top)
    found = []
    for _ in range(draws):
        left, own = others.copy(), []
        for i in rng.permutation(top):
            nearest = np.argsort(np.abs(sum_N[left] - sum_N[i]), kind="stable")[:10]
            place = rng.choice(nearest)
            own.append(left[place])
            left = np.delete(left, place)
        found.append(np.array(own))
    return found


def _drops(
    options: Options,
    subject: Subject,
    dictionary: Dictionary,
    training: Training,
    features: np.ndarray,
    removals: list[list[np.ndarray]],
    randoms: list[np.ndarray],
) -> list[dict]:
    """Returns, by feature, how much its mean activation falls with each removal."""
    sets = [x for each in removals for x in each] + randoms
    weights = np.ones((1 + len(sets), len(training.examples)))
    for row, places in zip(weights[1:], sets, strict=True):
        row[places] = 0
    many = training.many(weights, [options.seed] * len(weights), 4)
    means = np.array(
        [
            _mean(subject, dictionary, jax.tree.map(lambda x, i=i: x[i], many))
            for i in range(len(weights))
        ]
    )
    drops, rows, each = means[0] - means[1:], [], 1 + options.draws
    for n, feature in enumerate(features):
        own = drops[n * each : (n + 1) * each, feature]
        rows.append(
            {
                "feature": int(feature),
                "activation": float(means[0, feature]),
                "top": float(own[0]),
                "random": drops[len(features) * each :, feature].tolist(),
                "activation_matched": own[1:].tolist(),
            }
        )
    return rows


def _mean(subject: Subject, dictionary: Dictionary, params: Params) -> np.ndarray:
    """Returns features' mean activations in text held out, `[F]`."""
    source = Source(subject.source.task, params)
    found = _activities(source, subject, dictionary, subject.held)
    return found.sum_NxF.sum(0) / found.tokens_N.sum()


def _report(
    options: Options, subject: Subject, rows: list[dict], share: np.ndarray
) -> None:
    kinds = ("random", "activation_matched")
    held = [all(x["top"] > np.mean(x[kind]) for kind in kinds) for x in rows]
    beyond = [all(x["top"] > max(x[kind]) for kind in kinds) for x in rows]
    for x, part in zip(rows, share, strict=True):
        x["density"] = float(part)
    claims = [
        Claim(
            STATEMENT,
            f"{sum(held)} of {len(rows)} features against the mean of the draws, "
            f"{sum(beyond)} against each of them",
            sum(held) >= 0.8 * len(rows),
        )
    ]
    write(
        "feature_causality",
        seed=options.seed,
        settings=options,
        rows=rows,
        claims=claims,
    )
    with figure("feature_causality") as (panel,):
        at = np.arange(len(rows))
        scale = np.array([x["activation"] for x in rows])
        for name, marker in (
            ("top", "o"),
            ("random", "x"),
            ("activation_matched", "+"),
        ):
            values = np.array([np.ravel(x[name]) for x in rows]) / scale[:, None]
            places = np.repeat(at, values.shape[1])
            panel.plot(places, values.ravel(), marker, label=name.replace("_", "-"))
        panel.axhline(0, color="#7a7a7a", linewidth=0.8)
        panel.set_xticks(at, [str(x["feature"]) for x in rows])
        panel.set_xlabel("feature")
        panel.set_ylabel("share of its mean activation that is lost")
        panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    Console().print(table(claims))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
