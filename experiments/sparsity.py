"""How few sequences carry influence, and whether its tail is a power law.

    python -m experiments.sparsity

Grosse et al. 2023 (section 5.2.1): the top 1 % of sequences carry 12 to 52 % of all
positive influence of their queries (22B), and the top 500 of 5 million fit a power law
of exponent 1.99 to 4.34, which Kolmogorov and Smirnov's test does not reject. Here a
small decoder reads Python's sources once and is asked to go on with files it has not
read; every sequence it has read is scored. Tails are the top 500, for as many as the
paper looks at, and the top 0.1 %, for being as far out as we have any.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.results import Claim, figure, table, write
from experiments.small_model import (
    continuations,
    decoder,
    fitted,
    model,
    read,
    scores,
)
from experiments.tails import PowerLaw, power_law, top_share
from influence.model.train import Recipe

NAME = "sparsity"

BATCH = 64
"""How many sequences a step of training takes."""

PLAUSIBLE = 0.1
"""A power law is ruled out up to here (Clauset et al. 2009)."""


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
      sequences: read once, and scored.
      fitted: sequences the curvature is fitted to.
      questions: asked.
      top: the share of sequences whose share of influence is asked for.
      tails: how many sequences a tail has.
    """

    sequences: int = 60_000
    fitted: int = 2000
    questions: int = 8
    top: float = 0.01
    tails: tuple[int, ...] = (500, 60)
    context: int = 32
    width: int = 64
    blocks: int = 2


class Row(NamedTuple):
    """What there is to say of a question's scores.

    Attributes:
      question: its text.
      share: of positive influence, what the top has.
      tails: the power law of each.
    """

    question: str
    share: float
    tails: tuple[PowerLaw, ...]


def measured(settings: Settings, seed: int) -> tuple[np.ndarray, list[str], float]:
    """Returns the influence of all sequences, the questions, and the last loss."""
    x = settings
    config = decoder(x.width, x.blocks, context=x.context)
    corpus = read(config.vocabulary, x.context, x.sequences, x.questions)
    once = Recipe(x.sequences // BATCH, BATCH, 3e-3)
    trained = model(config, corpus.train_NxT, once, seed)
    questions = continuations(corpus.held_MxT, x.questions, x.context // 2)
    curvature = fitted(trained, x.fitted)
    found = scores(trained, curvature, questions, trained.examples)
    texts = [corpus.text(y) for y in corpus.held_MxT]
    return found.astype(np.float64), texts, trained.loss


def about(
    settings: Settings, scores_QxN: np.ndarray, questions: list[str], seed: int
) -> list[Row]:
    """Returns what there is to say of every question."""
    rng = np.random.default_rng(seed)
    return [
        Row(
            question,
            top_share(x, settings.top),
            tuple(power_law(np.sort(x)[-n:], rng) for n in settings.tails),
        )
        for question, x in zip(questions, scores_QxN, strict=True)
    ]


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Returns the paper's statements and ours."""
    shares = [x.share for x in rows]
    found = [
        Claim(
            f"The top {settings.top:.0%} of sequences carry 12 to 52 % of positive "
            "influence (22B)",
            f"{min(shares):.0%} to {max(shares):.0%} over {len(rows)} questions, "
            f"{settings.sequences:,} sequences; an even spread would be "
            f"{settings.top:.0%}",
            min(shares) >= 0.12 and max(shares) <= 0.52,
        )
    ]
    for i, n in enumerate(settings.tails):
        laws = [x.tails[i] for x in rows]
        exponents = [x.exponent for x in laws]
        fits = sum(x.plausible > PLAUSIBLE for x in laws)
        found.append(
            Claim(
                "Tails (top 500 of 5 million) are power laws of exponent 1.99 to 4.34, "
                "not rejected by Kolmogorov and Smirnov's test",
                f"top {n} of {settings.sequences:,}: exponents {min(exponents):.2f} to "
                f"{max(exponents):.2f}; not rejected for {fits} of {len(laws)}",
                fits == len(laws),
            )
        )
    return found


def draw(settings: Settings, scores_QxN: np.ndarray, rows: list[Row]) -> None:
    """Draws how influence adds up, and its tails with the laws of the longest."""
    with figure(NAME, columns=2) as (left, right):
        tail = settings.tails[0]
        for x, row in zip(scores_QxN, rows, strict=True):
            down = np.sort(x)[::-1]
            positive = down[down > 0]
            places = np.arange(1, len(positive) + 1)
            left.plot(places / len(x), positive.cumsum() / positive.sum(), lw=1)
            (line,) = right.plot(down[:tail], places[:tail] / len(x), ".", ms=2)
            ends = down[[0, tail - 1]]
            law = (ends / ends[1]) ** (1 - row.tails[0].exponent) * tail / len(x)
            right.plot(ends, law, color=line.get_color(), lw=0.8)
        left.axvline(settings.top, color="#7a7a7a", ls=":", lw=1)
        left.set(
            xscale="log", xlabel="share of sequences",
            ylabel="share of positive influence", title="one line a question",
        )  # fmt: skip
        right.set(
            xscale="log", yscale="log", xlabel="influence, nats",
            ylabel="share of sequences above", title=f"top {tail}, and power laws",
        )  # fmt: skip
        right.grid(axis="x")


def main(settings: Settings = Settings(), seed: int = 0) -> None:
    """Looks at how influence is spread.

    Args:
        settings: How much of everything.
        seed: Of the start of training, and of the samples of power laws.
    """
    console = Console(soft_wrap=True)
    found, questions, loss = measured(settings, seed)
    console.print(f"trained to {loss:.2f} nats a token")
    rows = about(settings, found, questions, seed)
    shown = Table(title=f"{found.shape[1]:,} sequences")
    for head in (f"top {settings.top:.0%}", *(f"tail of {n}" for n in settings.tails)):
        shown.add_column(head)
    for x in rows:
        tails = [
            f"{y.exponent:.2f} ± {y.error:.2f}, p {y.plausible:.2f}" for y in x.tails
        ]
        shown.add_row(f"{x.share:.1%}", *tails)
    console.print(shown)
    said = claims(settings, rows)
    kept = [x._asdict() | {"tails": [y._asdict() for y in x.tails]} for x in rows]
    record = {"questions": kept, "trained_to": loss}
    write(NAME, seed=seed, settings=settings, rows=record, claims=said)
    draw(settings, found, rows)
    console.print(table(said))


if __name__ == "__main__":
    tyro.cli(main)
