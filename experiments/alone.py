"""One stage of the engine in a process of its own, what comes before it made up.

Memory that earlier stages had and freed is not in the way then: what a stage takes is
how far its process grows beyond what was there. The machine's own rates are taken in
the same process, before and after, for whoever else uses the machine slows both.
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import influence
from experiments.contender import THREADS, Job, Stage, data, let_go, measured
from experiments.contender_influence import Engine
from influence.attribution.forms import Dense, Factored
from influence.attribution.query import Query
from influence.curvature.covariance import Covariances
from influence.curvature.eigenvalues import Bases
from influence.linalg.basis import Basis
from influence.linalg.kronecker import Kronecker
from influence.linalg.low_rank import truncated
from influence.runtime.allocator import keep_memory
from influence.runtime.memory import forget_peak, peak
from influence.runtime.planning.rates import Rates, measure

LEFT = {
    "covariance": ("moments",),
    "eigendecomposition": ("bases",),
    "eigenvalues": ("curvature",),
    "query": ("asking",),
}
"""What each stage leaves behind, and an earlier round of it has left."""


@dataclass(frozen=True)
class Taken:
    """What a stage took.

    Attributes:
      seconds: the fastest time on the clock.
      megabytes: the process's peak.
      grown: of these, beyond what was there when the stage began.
      rates: what the machine did meanwhile.
    """

    seconds: float
    megabytes: float
    grown: float
    rates: Rates


def taken(job: Job, stage: str, repetitions: int) -> Taken:
    """Returns what a stage takes in a process of its own."""
    os.environ |= dict.fromkeys(THREADS, str(job.threads))
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_taken, (job, stage, repetitions))


def _taken(job: Job, name: str, repetitions: int) -> Taken:
    engine, stage = prepared(job, name)
    stage.work()  # once, for all that has to be compiled
    for left in LEFT.get(name.partition(",")[0], ()):
        delattr(engine, left)
    let_go()  # Compiling leaves free memory behind, which would not be seen to grow.
    forget_peak()
    before = peak()
    most = measured(stage.work).peak_mb
    keep_memory()
    stage.work()
    rates, seconds = [measure()], []
    for _ in range(repetitions):
        seconds.append(measured(stage.work).seconds)
        rates.append(measure())
    between = Rates(*map(statistics.median, zip(*rates, strict=True)))
    return Taken(min(seconds), most, most - before, between)


def prepared(job: Job, name: str) -> tuple[Engine, Stage]:
    """Returns a stage whose forerunners left made-up values of the right shapes."""
    engine = Engine(job, data(job))
    low = name.endswith(f", rank {job.rank}")
    makers: dict[str, Callable[[], None]] = {
        "eigendecomposition": lambda: _moments(engine),
        "eigenvalues": lambda: _bases(engine),
        "query": lambda: _curvature(engine),
        "scan": lambda: _asking(engine, low),
    }
    for part, make in makers.items():
        if name.startswith(part):
            make()
    return engine, engine.stages()[name]


def _random(rng: np.random.Generator, *shape: int) -> Any:
    return jnp.asarray(rng.standard_normal(shape, np.float32))


def _moments(engine: Engine) -> None:
    rng = np.random.default_rng(0)

    def moments(size: int) -> tuple[Any, ...]:
        x = _random(rng, size, size)
        return (x @ x.T / size,)

    inputs = {x.reads: moments(x.columns) for x in engine.layers}
    gradients = {x.name: moments(x.outputs) for x in engine.layers}
    positions = dict.fromkeys(inputs, 1)
    engine.moments = Covariances(inputs, gradients, positions, 1)


def _bases(engine: Engine) -> None:
    def basis(size: int) -> Basis:
        return Basis((jnp.eye(size, dtype=jnp.float32),))

    inputs = {x.reads: basis(x.columns) for x in engine.layers}
    engine.bases = Bases(inputs, {x.name: basis(x.outputs) for x in engine.layers})


def _curvature(engine: Engine) -> None:
    _bases(engine)
    blocks = {
        x.name: Kronecker(
            engine.bases.inputs[x.reads],
            engine.bases.outputs[x.name],
            jnp.ones((x.outputs, x.columns), jnp.float32),
        )
        for x in engine.layers
    }
    engine.curvature = influence.Curvature(engine.layers, blocks, 0, 1, "made up")


def _asking(engine: Engine, low: bool) -> None:
    """Has queries of the right shape and rank asked, without solving for them."""
    rng, asked = np.random.default_rng(0), engine.job.queries
    forms: dict[str, Any] = {}
    for x in engine.layers:
        # One draw for all queries: the numbers do not matter, their making would show.
        h = _random(rng, 1, x.outputs, x.columns)
        if low:
            form = Factored(*truncated(h, engine.job.rank))
            forms[x.name] = jax.tree.map(lambda y: jnp.repeat(y, asked, 0), form)
        else:
            forms[x.name] = Dense(jnp.repeat(h, asked, 0))
    names = tuple(f"query {i}" for i in range(asked))
    engine.asking = Query(engine.layers, names, forms, (), (("made", "up"),))
