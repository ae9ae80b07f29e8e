"""Are passages that were planted in the corpus what has most influence on them?

    python -m experiments.planted_passages

Grosse et al. 2023 (section 5.3.3) ask models to go on with quotes they know by heart:
the hundred most influential sequences all have the quote in them. Here passages of
files that are otherwise left out are planted 1, 4 and 16 times among Python's sources,
each time elsewhere in another sequence, and a small decoder is asked to go on with
them. `recall` is the share of a passage's `k` sequences among the first `k`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.results import Claim, figure, table, write
from experiments.small_model import (
    Model,
    Questions,
    by_method,
    decoder,
    fitted,
    model,
    read,
)
from influence.attribution.measurements import completions, measure
from influence.model.train import Recipe

NAME = "planted_passages"


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
      sequences: to train on, and to rank.
      steps: of training.
      fitted: sequences the curvature is fitted to.
      copies: how often passages are planted.
      each: how many passages are planted so often.
      prompt: how many tokens of a passage are given.
      completion: how many more it has.
    """

    sequences: int = 3000
    steps: int = 900
    fitted: int = 1500
    copies: tuple[int, ...] = (1, 4, 16)
    each: int = 6
    prompt: int = 8
    completion: int = 16
    width: int = 128
    blocks: int = 2


class Passage(NamedTuple):
    """A passage and the sequences it was planted in."""

    tokens: np.ndarray
    places: np.ndarray


Shares = dict[str, float]
"""By method."""


class Row(NamedTuple):
    """What came of a passage.

    Attributes:
      copies: how often it was planted.
      nats: the model's loss of its completion, a token.
      recall: by method.
      unbroken: by method, the share of `copies` before the first sequence without it.
    """

    copies: int
    nats: float
    recall: Shares
    unbroken: Shares


def planted(
    settings: Settings, train_NxT: np.ndarray, held_MxT: np.ndarray, seed: int
) -> tuple[np.ndarray, list[Passage]]:
    """Returns sequences with passages in them, never two in one."""
    rng = np.random.default_rng(seed)
    length = settings.prompt + settings.completion
    found, free = train_NxT.copy(), iter(rng.permutation(len(train_NxT)))
    passages = []
    for copies, tokens in zip(
        np.repeat(settings.copies, settings.each), held_MxT, strict=True
    ):
        places = np.array([next(free) for _ in range(copies)])
        for place in places:
            start = rng.integers(found.shape[1] - length + 1)
            found[place, start : start + length] = tokens[:length]
        passages.append(Passage(tokens[:length], places))
    return found, passages


def recall(score_N: np.ndarray, places: np.ndarray) -> float:
    """Returns which share of `k` places is among the `k` that score highest."""
    top = np.argsort(-score_N, kind="stable")[: len(places)]
    return float(np.isin(places, top).mean())


def unbroken(score_N: np.ndarray, places: np.ndarray) -> float:
    """Returns which share of places comes before all others."""
    other = np.delete(score_N, places).max()
    return float((score_N[places] > other).mean())


def rows(settings: Settings, trained: Model, passages: list[Passage]) -> Iterator[Row]:
    """Yields what comes of every passage."""
    at = settings.prompt
    questions: Questions = {
        str(i): (x.tokens[:at].tolist(), x.tokens[at:].tolist())
        for i, x in enumerate(passages)
    }
    each = by_method(trained, fitted(trained, settings.fitted), questions)
    asked = completions(trained.task, questions)
    for i, (x, f) in enumerate(zip(passages, asked.values(), strict=True)):
        nats = -measure(f, trained.params) / settings.completion
        shares = (
            {k: share(score[i], x.places) for k, score in each.items()}
            for share in (recall, unbroken)
        )
        yield Row(len(x.places), nats, *shares)


def means(found: list[Row], of: Callable[[Row], Shares]) -> dict[int, Shares]:
    """Returns the means of passages planted equally often."""
    return {
        k: {
            name: float(np.mean([of(x)[name] for x in found if x.copies == k]))
            for name in found[0].recall
        }
        for k in sorted({x.copies for x in found})
    }


def told(mean: dict[int, Shares]) -> str:
    """Returns means in words."""
    return "; ".join(
        f"{k} times: " + ", ".join(f"{name} {y:.2f}" for name, y in x.items())
        for k, x in mean.items()
    )


def claims(found: list[Row]) -> list[Claim]:
    """Returns the paper's statement and ours."""
    whole, first = (means(found, attrgetter(x)) for x in ("recall", "unbroken"))
    apart = np.array(
        [x.recall["EK-FAC"] - x.recall["gradient products"] for x in found]
    )
    error = apart.std(ddof=1) / len(apart) ** 0.5
    return [
        Claim(
            "The most influential sequences of a quote known by heart (top 100) all "
            "have it in them, at every size",
            f"share of its sequences before the first without it: {told(first)}",
            min(x["EK-FAC"] for x in first.values()) >= 0.95,
        ),
        Claim(
            "Planted k times, a passage is in the k most influential sequences (recall "
            "near 1; our own bar)",
            f"recall: {told(whole)}",
            min(x["EK-FAC"] for x in whole.values()) >= 0.95,
        ),
        Claim(
            "EK-FAC finds more of them than gradient products do (what section 5.1 "
            "says of keywords)",
            f"recall higher by {apart.mean():.3f} ± {error:.3f} over all passages",
            bool(apart.mean() > 2 * error),
        ),
    ]


def draw(found: list[Row]) -> None:
    """Draws both shares."""
    with figure(NAME, columns=2) as panels:
        for axes, of in zip(panels, ("recall", "unbroken"), strict=True):
            mean = means(found, attrgetter(of))
            for i, name in enumerate(found[0].recall):
                places = np.arange(len(mean)) + 0.25 * (i - 1)
                axes.bar(places, [x[name] for x in mean.values()], 0.23, label=name)
            axes.set_xticks(range(len(mean)), [str(k) for k in mean])
            axes.set(xlabel="times planted", ylim=(0, 1.02))
        panels[0].set(ylabel="share of a passage's sequences", title="in the top k")
        panels[1].set(title="before the first without it")
        panels[1].figure.legend(
            *panels[0].get_legend_handles_labels(), ncols=3, loc="outside upper center"
        )


def main(settings: Settings = Settings(), seed: int = 0) -> None:
    """Plants passages and asks for them.

    Args:
        settings: How much of everything.
        seed: Of the start of training, and of where passages are planted.
    """
    console = Console(soft_wrap=True)
    x = settings
    config = decoder(x.width, x.blocks)
    count = len(x.copies) * x.each
    corpus = read(config.vocabulary, config.context, x.sequences, count)
    tokens, passages = planted(x, corpus.train_NxT, corpus.held_MxT, seed)
    trained = model(config, tokens, Recipe(x.steps, 32, 3e-3), seed)
    console.print(f"trained to {trained.loss:.2f} nats a token")
    found = list(rows(settings, trained, passages))
    mean = means(found, attrgetter("recall"))
    shown = Table(title="recall of planted sequences")
    for head in ("planted", "nats a token", *found[0].recall):
        shown.add_column(head)
    for k, y in mean.items():
        nats = np.mean([x.nats for x in found if x.copies == k])
        shown.add_row(str(k), f"{nats:.2f}", *(f"{z:.2f}" for z in y.values()))
    console.print(shown)
    said = claims(found)
    record = {"passages": [x._asdict() for x in found], "trained_to": trained.loss}
    write(NAME, seed=seed, settings=settings, rows=record, claims=said)
    draw(found)
    console.print(table(said))


if __name__ == "__main__":
    tyro.cli(main)
