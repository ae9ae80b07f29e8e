"""What scores lose when covariances are cut into blocks along their diagonal.

    python -m experiments.block_factors

Grosse et al. 2023 (section 5.1 and appendix A) cut both covariances of every layer of
their largest model in two and report a slight decrease in correlation, without a
number. Here EK-FAC is fitted to a small decoder with 1, 2, 4 and 8 blocks a covariance
and asked to go on with files it has not read. To tell what a correlation of 0.99 means:
the same is done with whole factors and other sampled labels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.results import Claim, figure, table, write
from experiments.small_model import (
    Model,
    continuations,
    correlations,
    decoder,
    fitted,
    joined,
    model,
    read,
    total,
)
from influence.attribution.measurements import completions
from influence.attribution.query import query
from influence.curvature.covariance import PerToken
from influence.curvature.operator import Curvature
from influence.model.task import Sampled
from influence.model.train import Recipe

NAME = "block_factors"

OTHER = "other labels"
"""What the fit with other samples is called."""


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
      sequences: to train on.
      steps: of training.
      fitted: sequences the curvature is fitted to.
      scanned: sequences that are scored.
      questions: asked.
      blocks_per_factor: tried; the first is what the others are compared with.
    """

    sequences: int = 4000
    steps: int = 400
    fitted: int = 1500
    scanned: int = 1000
    questions: int = 8
    blocks_per_factor: tuple[int, ...] = (1, 2, 4, 8)
    width: int = 128
    blocks: int = 2


class Row(NamedTuple):
    """What came of one fit.

    Attributes:
      factors: how they were cut.
      megabytes: of eigenvectors.
      correlation_Q: of scores with the first fit's.
    """

    factors: str
    megabytes: float
    correlation_Q: np.ndarray


def measured(settings: Settings, seed: int) -> list[Row]:
    """Returns every fit, scores compared with those of the first."""
    x = settings
    config = decoder(x.width, x.blocks)
    corpus = read(config.vocabulary, config.context, x.sequences, x.questions)
    trained = model(config, corpus.train_NxT, Recipe(x.steps, 32, 3e-3), seed)
    fits = {
        str(n): fitted(trained, x.fitted, factors=PerToken(blocks=n))
        for n in x.blocks_per_factor
    }
    fits[OTHER] = fitted(trained, x.fitted, labels=Sampled(seed + 1))
    questions = continuations(corpus.held_MxT, x.questions, config.context // 2)
    scores = scored(trained, list(fits.values()), questions, x.scanned)
    return [
        Row(name, megabytes(fit), correlations(scores[0], y))
        for (name, fit), y in zip(fits.items(), scores, strict=True)
    ]


def scored(
    trained: Model, fits: list[Curvature], questions: dict, count: int
) -> np.ndarray:
    """Returns the scores of the first sequences with every fit, `[fits, Q, N]`."""
    asked = completions(trained.task, questions)
    queries = [query(fit, trained.params, asked) for fit in fits]
    some = trained.examples.take(range(count))
    return total(trained, joined(queries), some).reshape(len(fits), len(asked), -1)


def megabytes(curvature: Curvature) -> float:
    """Returns the size of all eigenvectors; those that layers share count once."""
    inputs = {x.reads: curvature.blocks[x.name].inputs for x in curvature.layers}
    outputs = {x.name: curvature.blocks[x.name].outputs for x in curvature.layers}
    return sum(x.nbytes for x in jax.tree.leaves([inputs, outputs])) / 1e6


def claims(rows: list[Row]) -> list[Claim]:
    """Returns the paper's statements and ours."""
    whole, *cut, other = rows
    half = next(x for x in cut if x.factors == "2")
    means = ", ".join(f"{x.factors}: {x.correlation_Q.mean():.3f}" for x in cut)
    return [
        Claim(
            "Factors cut in 2 blocks slightly decrease correlation (52B, no number)",
            f"r = {half.correlation_Q.mean():.4f} with whole factors; worst of "
            f"{len(half.correlation_Q)} questions {half.correlation_Q.min():.4f}; "
            f"other labels alone: {other.correlation_Q.mean():.4f}; "
            f"by blocks: {means}",
            bool(0.95 <= half.correlation_Q.mean() < 1),
        ),
        Claim(
            "Memory of factors is divided by the number of blocks",
            ", ".join(f"{x.factors}: {x.megabytes:.2f} MB" for x in (whole, *cut)),
            all(
                abs(x.megabytes * int(x.factors) / whole.megabytes - 1) < 0.02
                for x in cut
            ),
        ),
    ]


def draw(rows: list[Row]) -> None:
    """Draws correlation and memory."""
    *fits, other = rows
    names = [x.factors for x in fits]
    with figure(NAME, columns=2) as (left, right):
        for i, x in enumerate(fits):
            left.plot([i] * len(x.correlation_Q), x.correlation_Q, "o", color="#2f5d8a",
                      alpha=0.5)  # fmt: skip
        left.axhline(other.correlation_Q.mean(), color="#7a7a7a", ls=":", label=OTHER)
        left.set_xticks(range(len(fits)), names)
        left.set(xlabel="blocks a factor", ylabel="correlation with whole factors")
        left.legend(loc="lower left")
        right.bar(names, [x.megabytes for x in fits])
        right.set(xlabel="blocks a factor", ylabel="eigenvectors, MB")


def main(settings: Settings = Settings(), seed: int = 0) -> None:
    """Compares scores.

    Args:
        settings: How much of everything.
        seed: Of the start of training; the first of labels.
    """
    console = Console(soft_wrap=True)
    rows = measured(settings, seed)
    shown = Table(title="correlation with whole factors: mean (worst)")
    for head in ("blocks", "MB", "correlation"):
        shown.add_column(head)
    for x in rows:
        r = x.correlation_Q
        mean = f"{r.mean():.4f} ({r.min():.4f})"
        shown.add_row(x.factors, f"{x.megabytes:.2f}", mean)
    console.print(shown)
    said = claims(rows)
    kept = [x._asdict() for x in rows]
    write(NAME, seed=seed, settings=settings, rows=kept, claims=said)
    draw(rows)
    console.print(table(said))


if __name__ == "__main__":
    tyro.cli(main)
