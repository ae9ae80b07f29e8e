"""Every method of this package, as a row of one table.

A method makes scores of a *subject*: a training that was carried out, its model, and
measurements. What it may look at is what it *needs*: the final weights alone, or more
of the training than one usually still has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

import jax
import numpy as np
import xarray as xr
from jax import Array

from influence.attribution import sketch
from influence.attribution.lexical import bm25
from influence.attribution.metagradients import metagradients
from influence.attribution.normalise import unit
from influence.attribution.self_influence import self_influence
from influence.attribution.unrolled import Metric, segments, source, tracin
from influence.curvature.covariance import Factors, PerSequence, PerToken
from influence.curvature.diagonal import diagonal, identity
from influence.curvature.kfac import kfac
from influence.curvature.operator import Curvature
from influence.curvature.solvers import (
    ConjugateGradients,
    Eigenbasis,
    Exact,
    LiSSA,
    Neumann,
)
from influence.curvature.unrolled import Unrolled, adam_scale
from influence.linalg.damping import Absolute, Damping, Relative
from influence.model.task import Labels, Sampled
from influence.model.trace import trace
from influence.truth.subject import Subject
from influence.types import Params

WEIGHTS = "final weights"
RECIPE = "final weights, recipe"
CHECKPOINTS = "checkpoints"
TRAJECTORY = "trajectory"
TRAININGS = "several trainings"
TEXT = "text"


EVERYTHING = ("*", "embedding:*", "scale:*", "shift:*")
"""Every kind of layer there is."""

PRODUCTS = 5120
"""What 20 steps of conjugate gradients on 256 sequences take, for a measurement."""


STEPS = 20
"""More products than this change little."""


Score = Callable[[Subject], xr.DataArray]
"""`subject -> scores`, `(query, train)`."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
      needs: what of the training it has to see.
      score: makes the scores.
      text: whether the examples have to be text.
    """

    needs: str
    score: Score
    text: bool = False


def ekfac(
    subject: Subject,
    *,
    factors: Factors = PerToken(),
    damping: Damping = Relative(),
    labels: Labels = Sampled(),
) -> xr.DataArray:
    """Returns the scores of EK-FAC, solved in its eigenbasis."""
    fitted = subject.fitted(factors=factors, labels=labels)
    return subject.scores(fitted, Eigenbasis(damping))


def gradients(subject: Subject) -> xr.DataArray:
    """Returns products of gradients."""
    return subject.scores(_none(subject, subject.params), Eigenbasis(Absolute(0.0)))


def cosine(subject: Subject) -> xr.DataArray:
    """Returns cosines of gradients."""
    none = _none(subject, subject.params)
    own = self_influence(
        subject.training.task,
        subject.params,
        none,
        subject.batches,
        inverse=Absolute(0.0),
        run=subject.run,
    )
    return unit(subject.scores(none, Eigenbasis(Absolute(0.0))), own)


def of_diagonal(subject: Subject, *, damping: Damping = Relative()) -> xr.DataArray:
    """Returns the scores of the Fisher's diagonal."""
    task, batches = subject.training.task, subject.batches
    found = diagonal(
        task, subject.params, batches, layers=subject.layers, run=subject.run
    )
    return subject.scores(found, Eigenbasis(damping))


def of_kfac(subject: Subject, *, damping: Damping = Relative()) -> xr.DataArray:
    """Returns the scores of K-FAC."""
    task, batches = subject.training.task, subject.batches
    found = kfac(task, subject.params, batches, layers=subject.layers, run=subject.run)
    return subject.scores(found, Eigenbasis(damping))


def cg(
    subject: Subject,
    *,
    damping: Damping = Relative(10.0),
    sequences: int = 256,
    steps: int = 20,
    factors: Factors = PerToken(),
) -> xr.DataArray:
    """Returns the scores of EK-FAC-preconditioned conjugate gradients.

    As bergson publishes them: on 256 sequences, in 20 steps.
    """
    curvature = subject.fitted(factors=factors)
    solver = ConjugateGradients(
        subject.training.task, subject.sample(sequences), damping, steps, 0.0
    )
    return subject.scores(curvature, solver)


def unrolled(
    subject: Subject, *, products: int = PRODUCTS, share: float = 1.0
) -> xr.DataArray:
    """Returns the scores of training followed from the final weights on.

    Args:
      subject: what is asked about.
      products: how many products with one sequence's Gauss–Newton matrix a measurement
        may take: as many as conjugate gradients do, over all sequences in fewer steps.
      share: how much of the distance that training went is followed.
    """
    training = subject.training
    task, recipe, n = training.task, training.recipe, len(training.examples)
    adaptive = recipe.optimizer.adaptive
    solver = Unrolled(
        task,
        subject.sample(min(n, products)),
        share * training.distance(0, recipe.steps),
        _metric(subject, subject.params) if adaptive else {},
        min(STEPS, max(1, products // n)),
    )
    return subject.scores(subject.fitted(), solver)


def covering(score: Score, layers: tuple[str, ...] = EVERYTHING) -> Score:
    """Returns a method that covers embeddings, scales and shifts as well."""

    def covered(subject: Subject) -> xr.DataArray:
        return score(subject._replace(layers=_present(subject, layers)))

    return covered


def astra(
    subject: Subject, *, damping: Damping = Relative(), rate: float = 0.1
) -> xr.DataArray:
    """Returns the scores of ASTRA: a Neumann series on small batches."""
    solver = Neumann(
        subject.training.task,
        subject.training.examples.batches(16),
        damping,
        steps=200,
        rate=rate,
    )
    return subject.scores(subject.fitted(), solver)


def lissa(subject: Subject, *, damping: Damping = Relative()) -> xr.DataArray:
    """Returns the scores of LiSSA: the series without a preconditioner."""
    solver = LiSSA(
        subject.training.task,
        subject.training.examples.batches(16),
        damping,
        steps=300,
    )
    return subject.scores(subject.fitted(), solver)


def exact(subject: Subject, *, damping: Damping = Relative()) -> xr.DataArray:
    """Returns the scores of the Gauss–Newton matrix itself, for tiny models."""
    solver = Exact(subject.training.task, list(subject.batches), damping)
    return subject.scores(subject.fitted(), solver)


def of_source(subject: Subject, *, count: int = 3, each: int = 2) -> xr.DataArray:
    """Returns the scores of SOURCE, in the optimizer's metric if it has one."""
    training = subject.training
    metric = Metric(partial(_metric, subject), subject.batches)
    return source(
        training.task,
        subject.params,
        segments(training, subject.seed, count=count, each=each),
        subject.measurements,
        subject.batches,
        subject.fitted,
        metric=metric if training.recipe.optimizer.adaptive else None,
        run=subject.run,
    )


def of_tracin(subject: Subject, *, checkpoints: int = 6) -> xr.DataArray:
    """Returns the scores of TracIn."""
    training = subject.training
    return tracin(
        training.task,
        segments(training, subject.seed, count=checkpoints, each=1),
        subject.measurements,
        subject.batches,
        partial(_none, subject),
        run=subject.run,
    )


def of_metagradients(subject: Subject) -> xr.DataArray:
    """Returns exact influence through training."""
    return metagradients(
        subject.training, subject.seed, subject.measurements, run=subject.run
    )


def logra(
    subject: Subject, *, rank: int = 16, leading: bool = False, unit: bool = False
) -> xr.DataArray:
    """Returns the scores of LoGra, or of TrackStar: projected gradients."""
    projection = (
        sketch.leading(subject.fitted(), rank)
        if leading
        else sketch.random(_none(subject, subject.params).layers, rank)
    )
    return sketch.logra(
        subject.training.task,
        subject.params,
        projection,
        subject.measurements,
        subject.batches,
        normalise=unit,
        run=subject.run,
    )


def trak(subject: Subject, *, rank: int = 8, models: int = 5) -> xr.DataArray:
    """Returns the scores of TRAK, averaged over models trained with other seeds."""
    return averaged(partial(_trak, rank=rank), models=models)(subject)


def averaged(score: Score, *, models: int = 5) -> Score:
    """Returns a method whose scores are averaged over models trained with other seeds.

    The subject's own is one of them.
    """

    def mean(subject: Subject) -> xr.DataArray:
        seeds = [subject.seed + i for i in range(1, models)]
        n = len(subject.training.examples)
        others = subject.training.many(np.ones((len(seeds), n)), seeds)
        found = [score(subject)]
        for i, seed in enumerate(seeds):
            params = jax.tree.map(lambda x, i=i: x[i], others)
            found.append(score(subject._replace(params=params, seed=seed)))
        return (reduce(lambda x, y: x + y, found) / models).assign_attrs(found[0].attrs)

    return mean


def lexical(subject: Subject) -> xr.DataArray:
    """Returns BM25's scores."""
    if subject.words is None:
        raise ValueError("BM25 is of text, and the examples are not.")
    tokens, asked = subject.words
    return bm25(asked, tokens, subject.training.examples.ids)


def chance(subject: Subject, *, seed: int = 0) -> xr.DataArray:
    """Returns random scores."""
    names, ids = list(subject.measurements), list(subject.training.examples.ids)
    values = np.random.default_rng(seed).normal(size=(len(names), len(ids)))
    return xr.DataArray(
        values, coords={"query": names, "train": ids}, dims=("query", "train")
    )


METHODS: dict[str, Method] = {
    "metagradients": Method(TRAJECTORY, of_metagradients),
    "source": Method(CHECKPOINTS, of_source),
    "tracin": Method(CHECKPOINTS, of_tracin),
    "unrolled": Method(RECIPE, unrolled),
    "unrolled, all layers": Method(RECIPE, covering(unrolled)),
    "cg": Method(WEIGHTS, cg),
    "cg, all layers": Method(WEIGHTS, covering(cg)),
    "ekfac, all layers": Method(WEIGHTS, covering(ekfac)),
    "astra": Method(WEIGHTS, astra),
    "lissa": Method(WEIGHTS, lissa),
    "ekfac": Method(WEIGHTS, ekfac),
    "ekfac, Shampoo's basis": Method(WEIGHTS, partial(ekfac, factors=PerSequence())),
    "ekfac, 16 draws": Method(WEIGHTS, partial(ekfac, labels=Sampled(draws=16))),
    "ekfac, 5 models": Method(TRAININGS, averaged(ekfac)),
    "kfac": Method(WEIGHTS, of_kfac),
    "diagonal": Method(WEIGHTS, of_diagonal),
    "gradient dot": Method(WEIGHTS, gradients),
    "gradient cosine": Method(WEIGHTS, cosine),
    "logra": Method(WEIGHTS, logra),
    "logra, leading": Method(WEIGHTS, partial(logra, leading=True)),
    "trackstar": Method(WEIGHTS, partial(logra, unit=True)),
    "trak, 5 models": Method(TRAININGS, trak),
    "bm25": Method(TEXT, lexical, text=True),
    "random": Method("nothing", chance),
}
"""By name, with this package's defaults."""


def _none(subject: Subject, params: Params) -> Curvature:
    """Returns no curvature, of the subject's layers."""
    return identity(
        subject.training.task, params, subject.batches, layers=subject.layers
    )


def _metric(subject: Subject, params: Params) -> dict[str, Array]:
    """Returns the root of the optimizer's metric, as a model tells it."""
    squares = diagonal(
        subject.training.task,
        params,
        subject.batches,
        layers=subject.layers,
        run=subject.run,
    )
    return adam_scale(squares, subject.training.recipe.batch)


def _present(subject: Subject, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the patterns whose kind of layer the model has."""
    inputs = next(iter(subject.batches)).inputs
    found = trace(subject.training.task.outputs, subject.params, inputs).layers
    kinds = {x.kind for x in found}
    return tuple(x for x in patterns if ":" not in x or x.split(":")[0] in kinds)


def _trak(subject: Subject, *, rank: int) -> xr.DataArray:
    # Another projection for every model: their errors average out as well.
    layers = _none(subject, subject.params).layers
    return sketch.trak(
        subject.training.task,
        subject.params,
        sketch.random(layers, rank, subject.seed),
        subject.measurements,
        subject.batches,
        run=subject.run,
    )
