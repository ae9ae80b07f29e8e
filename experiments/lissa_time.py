"""How long EK-FAC takes, and how long LiSSA, for 1, 10 and 100 questions.

    taskset -c 0 python -m experiments.lissa_time

Grosse et al. 2023 (section 5.1): EK-FAC is as accurate as LiSSA in at least an order of
magnitude less time, fitting its factors included, for 10 measurements; LiSSA's depth is
the number of training sequences. Here both solve the same questions to a small decoder.
Every step of LiSSA costs the same, so that some are timed and multiplied by the depth;
a sequence a step is the least its depth can cost, a batch a step what it takes to see
as little noise as EK-FAC does. Compiling is left out on both sides, and so are LiSSA's
search for a step size, and the gradients of the questions, which both need. Ten
questions share a step's forward pass, and a hundred are solved ten by ten. Seconds are
those of the processor, which on one core that nobody else uses are those on the clock.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax import Array
from rich.console import Console
from rich.table import Table

from experiments.results import Claim, figure, table, write
from experiments.small_model import (
    LAYERS,
    Model,
    continuations,
    decoder,
    model,
    read,
)
from influence.attribution.forms import dense
from influence.attribution.measurements import Measurement, completions
from influence.attribution.query import query
from influence.curvature.diagonal import identity
from influence.curvature.ekfac import fit
from influence.curvature.operator import Curvature, Gradients
from influence.curvature.solvers import Eigenbasis, LiSSA
from influence.linalg.damping import Absolute
from influence.model.train import Recipe

NAME = "lissa_time"


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
      sequences: to train on: EK-FAC is fitted to all, and LiSSA's depth is as great.
      steps: of training; what is timed does not depend on what was learned.
      questions: how many are solved for.
      timed: how many of LiSSA's steps are timed.
      together: how many questions LiSSA solves at once; a hundred at once would be
        slower than ten times ten, for they no longer fit in caches, or in memory.
      batches: how many sequences a step of LiSSA takes; EK-FAC takes the most of them.
    """

    sequences: int = 2000
    steps: int = 50
    questions: tuple[int, ...] = (1, 10, 100)
    timed: int = 8
    together: int = 10
    batches: tuple[int, ...] = (1, 32)
    width: int = 128
    blocks: int = 2


class Row(NamedTuple):
    """What some questions took, in seconds.

    Attributes:
      questions: how many.
      fit: of EK-FAC.
      solve: in its eigenbasis.
      lissa: by how many sequences a step takes, of all steps; most not carried out.
    """

    questions: int
    fit: float
    solve: float
    lissa: dict[int, float]

    def ratio(self, batch: int) -> float:
        """Returns how many times longer LiSSA takes."""
        return self.lissa[batch] / (self.fit + self.solve)


def seconds(work: Callable[[], object]) -> float:
    """Returns the processor time some work takes until its arrays are there."""
    start = time.process_time()
    jax.block_until_ready(work())
    return time.process_time() - start


def fitting(trained: Model, batch: int) -> tuple[Curvature, float]:
    """Returns EK-FAC, and how long it took when everything was compiled."""

    def fitted(count: int) -> Curvature:
        some = trained.examples.take(range(count)).batches(batch)
        return fit(trained.task, trained.params, some, layers=LAYERS)

    fitted(2 * batch)
    start = time.process_time()
    found = fitted(len(trained.examples))
    jax.block_until_ready(found.blocks)
    return found, time.process_time() - start


def solving(
    settings: Settings, trained: Model, curvature: Curvature, gradients: Gradients
) -> tuple[float, dict[int, float]]:
    """Returns what solving takes: in the eigenbasis, and with LiSSA by batch."""
    asked = len(next(iter(gradients.values())))
    some = {k: x[: settings.together] for k, x in gradients.items()}

    def lissa(batch: int, steps: int) -> object:
        batches = list(trained.examples.take(range(16 * batch)).batches(batch))
        solver = LiSSA(trained.task, batches, steps=steps)
        return solver(curvature, trained.params, some).solved

    def eigenbasis() -> object:
        return Eigenbasis()(curvature, trained.params, gradients).solved

    eigenbasis()
    found = {}
    groups = -(-asked // settings.together)
    for batch in settings.batches:
        lissa(batch, 1)
        short = seconds(lambda b=batch: lissa(b, 1))
        long = seconds(lambda b=batch: lissa(b, 1 + settings.timed))
        found[batch] = (long - short) / settings.timed * settings.sequences * groups
    return seconds(eigenbasis), found


def differentiated(
    trained: Model, asked: Mapping[str, Measurement]
) -> dict[str, Array]:
    """Returns the questions' gradients: where there is no curvature, the solutions."""
    batches = trained.examples.batches(1)
    none = identity(trained.task, trained.params, batches, layers=LAYERS)
    undamped = Eigenbasis(Absolute(0.0))
    found = query(none, trained.params, asked, solver=undamped)
    return {
        x.name: jnp.moveaxis(dense(found.forms[x.name]).h_QxOxI, len(x.stack), 0)
        for x in found.layers
    }


def rows(settings: Settings, seed: int) -> list[Row]:
    """Returns what each number of questions takes."""
    x = settings
    config = decoder(x.width, x.blocks)
    corpus = read(config.vocabulary, config.context, x.sequences, max(x.questions))
    trained = model(config, corpus.train_NxT, Recipe(x.steps, 32, 3e-3), seed)
    curvature, took = fitting(trained, max(x.batches))
    found = []
    for count in x.questions:
        asked = completions(
            trained.task,
            continuations(corpus.held_MxT, count, config.context // 2),
        )
        gradients = differentiated(trained, asked)
        solve, lissa = solving(settings, trained, curvature, gradients)
        found.append(Row(count, took, solve, lissa))
    return found


def claims(settings: Settings, found: list[Row]) -> list[Claim]:
    """Returns the paper's statement and ours, for each batch."""
    ten = next(x for x in found if x.questions == 10)
    return [
        Claim(
            "EK-FAC takes at least an order of magnitude less time than LiSSA for 10 "
            "measurements, fitting included",
            f"LiSSA of {settings.sequences:,} steps, {settings.timed} timed, {batch} "
            f"sequence{'s' if batch > 1 else ''} each: "
            + ", ".join(f"{x.ratio(batch):.3g} times" for x in found)
            + " as long for "
            + ", ".join(str(x.questions) for x in found)
            + " questions",
            ten.ratio(batch) >= 10,
        )
        for batch in settings.batches
    ]


def main(settings: Settings = Settings(), seed: int = 0) -> None:
    """Times both.

    Args:
        settings: How much of everything.
        seed: Of the start of training.
    """
    console = Console(soft_wrap=True)
    found = rows(settings, seed)
    shown = Table(title=f"seconds, {settings.sequences:,} sequences")
    heads = (
        "questions",
        "fit",
        "solve",
        *(f"LiSSA, {x} a step" for x in found[0].lissa),
    )
    for head in heads:
        shown.add_column(head)
    for x in found:
        cells = (x.fit, x.solve, *x.lissa.values())
        shown.add_row(str(x.questions), *(f"{y:,.3g}" for y in cells))
    console.print(shown)
    said = claims(settings, found)
    kept = [x._asdict() for x in found]
    write(NAME, seed=seed, settings=settings, rows=kept, claims=said)
    with figure(NAME) as (axes,):
        asked = [x.questions for x in found]
        axes.plot(asked, [x.fit + x.solve for x in found], "o-", label="EK-FAC")
        for batch in settings.batches:
            label = f"LiSSA, {batch} sequence{'s' if batch > 1 else ''} a step"
            axes.plot(asked, [x.lissa[batch] for x in found], "s-", label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(asked, [str(x) for x in asked])
        axes.set(xlabel="questions", ylabel="seconds")
        axes.legend(loc="upper left")
    console.print(table(said))


if __name__ == "__main__":
    tyro.cli(main)
