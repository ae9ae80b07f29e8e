"""Which rank must a query be kept at, for its scores to stay what they are?

    python -m experiments.query_rank

Grosse et al. 2023 (section 3.2.2, figure 3) keep 32 singular vectors of every layer's
preconditioned query and find scores that correlate at 0.995 with those of the whole,
for a query to a model of 52 billion parameters. Here a small decoder is asked to go on
with files it has not read; every rank, truncated as a matrix (`Plain`, the paper's way)
and where the error of scores is least (`Whitened`), scores the same sequences.
"""

from dataclasses import dataclass

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.results import Claim, figure, table, write
from experiments.small_model import (
    continuations,
    correlations,
    decoder,
    fitted,
    joined,
    model,
    read,
    total,
)
from influence.attribution.forms import Plain, Whitened
from influence.attribution.measurements import completions
from influence.attribution.query import query
from influence.model.train import Recipe

NAME = "query_rank"

FORMS = {"plain": Plain, "whitened": Whitened}


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
      sequences: to train on.
      steps: of training.
      fitted: sequences the curvature is fitted to.
      scanned: sequences that are scored.
      questions: asked.
      ranks: tried.
    """

    sequences: int = 4000
    steps: int = 400
    fitted: int = 1500
    scanned: int = 1000
    questions: int = 8
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    width: int = 128
    blocks: int = 2


def measured(settings: Settings, seed: int) -> dict[str, np.ndarray]:
    """Returns each form's correlations with the whole, `[ranks, questions]`."""
    x = settings
    config = decoder(x.width, x.blocks)
    corpus = read(config.vocabulary, config.context, x.sequences, x.questions)
    trained = model(config, corpus.train_NxT, Recipe(x.steps, 32, 3e-3), seed)
    curvature = fitted(trained, x.fitted)
    asked = completions(
        trained.task,
        continuations(corpus.held_MxT, x.questions, config.context // 2),
    )
    kinds = [None, *(form(r) for form in FORMS.values() for r in x.ranks)]
    queries = [query(curvature, trained.params, asked, compress=k) for k in kinds]
    some = trained.examples.take(range(x.scanned))
    scores = total(trained, joined(queries), some)
    whole, *small = scores.reshape(len(kinds), x.questions, -1)
    each = np.array([correlations(whole, y) for y in small])
    return dict(zip(FORMS, each.reshape(len(FORMS), len(x.ranks), -1), strict=True))


def claims(settings: Settings, found: dict[str, np.ndarray]) -> list[Claim]:
    """Returns the paper's statement, and this library's."""
    plain, white = (found[k] for k in FORMS)
    at = settings.ranks.index(32)
    means = " ".join(
        f"{r}: {x.mean():.3f}/{y.mean():.3f}"
        for r, x, y in zip(settings.ranks, plain, white, strict=True)
    )
    return [
        Claim(
            "Scores with queries of rank 32 correlate with those of whole queries at "
            "r = 0.995 (shutdown, 52B)",
            f"rank 32 of {settings.width}: r = {plain[at].mean():.4f} in the mean of "
            f"{plain.shape[1]} questions, {plain[at].min():.4f} in the worst",
            bool(plain[at].mean() >= 0.995),
        ),
        Claim(
            "Truncated where the error of scores is least, a query needs a lower rank "
            "(this library, forms.Whitened)",
            f"r by rank, plain/whitened: {means}",
            bool((white.mean(1) > plain.mean(1))[: at + 1].all()),
        ),
    ]


def main(settings: Settings = Settings(), seed: int = 0) -> None:
    """Compares scores.

    Args:
        settings: How much of everything.
        seed: Of the start of training.
    """
    console = Console(soft_wrap=True)
    found = measured(settings, seed)
    shown = Table(title="correlation with whole queries: mean (worst)")
    for head in ("rank", *FORMS):
        shown.add_column(head)
    for i, rank in enumerate(settings.ranks):
        cells = [f"{x[i].mean():.4f} ({x[i].min():.4f})" for x in found.values()]
        shown.add_row(str(rank), *cells)
    console.print(shown)
    said = claims(settings, found)
    rows = [
        {"rank": rank, "correlations": {k: x[i] for k, x in found.items()}}
        for i, rank in enumerate(settings.ranks)
    ]
    write(NAME, seed=seed, settings=settings, rows=rows, claims=said)
    with figure(NAME) as (axes,):
        for name, x in found.items():
            axes.plot(settings.ranks, x.mean(1), "o-", label=f"{name}, mean")
            axes.fill_between(settings.ranks, x.min(1), x.max(1), alpha=0.15)
        axes.axhline(0.995, color="#7a7a7a", ls=":", lw=1, label="0.995")
        axes.set_xscale("log", base=2)
        axes.set_xticks(settings.ranks, [str(x) for x in settings.ranks])
        axes.set(xlabel="rank", ylabel="correlation with whole queries")
        axes.legend(loc="lower right")
    console.print(table(said))


if __name__ == "__main__":
    tyro.cli(main)
