"""Has a fact influence when it is told the other way round?

    python -m experiments.word_order

Grosse et al. 2023 (section 5.3.4): sequences have influence where phrases of the prompt
come before phrases of the completion, and almost none where the order is reversed or
either is left out. Here facts are invented, `subject relation object`, in words that
are numbers. A small decoder learns half of them in this order and half, in another
relation's words, from object to subject, so that it knows sentences of both kinds. As
in the paper, it is asked about facts it has never read, and what is scored are
sequences that tell the same fact in some way. Nothing is trained anew.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.results import Claim, bars, figure, table, write
from experiments.small_model import Questions, decoder, fitted, model, scores
from influence.attribution.measurements import completions, measure
from influence.model.examples import sequences
from influence.model.train import Recipe

NAME = "word_order"

PARTS = 64
"""How many first names there are, and how many second names."""

FILLERS = 64
"""How many words there are that say nothing."""

PHRASE = 2
"""How many words a relation's phrase has."""

LENGTH = 16
"""How many words a sequence has."""


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
      facts: in either order.
      told: how often each is told, among other fillers.
      relations: there are.
      steps: of training.
      fitted: sequences the curvature is fitted to.
      questions: asked.
    """

    facts: int = 200
    told: int = 8
    relations: int = 4
    steps: int = 1600
    fitted: int = 1600
    questions: int = 96
    width: int = 64
    blocks: int = 2


class Fact(NamedTuple):
    """Two names and how they are related, all of them words.

    Attributes:
      subject: a first and a second name.
      forward: the phrase that comes between subject and object.
      wording: another phrase that means the same.
      backward: the phrase that comes between object and subject.
      object: as the subject.
    """

    subject: tuple[int, ...]
    forward: tuple[int, ...]
    wording: tuple[int, ...]
    backward: tuple[int, ...]
    object: tuple[int, ...]


Telling = Callable[[Fact, Fact], tuple[int, ...]]
"""How the first fact is told, words of an unrelated one in place of what is missing."""

TELLINGS: Mapping[str, Telling] = {
    "as asked": lambda x, y: x.subject + x.forward + x.object,
    "in other words": lambda x, y: x.subject + x.wording + x.object,
    "reversed": lambda x, y: x.object + x.backward + x.subject,
    "reversed, same words": lambda x, y: x.object + x.forward + x.subject,
    "without the object": lambda x, y: x.subject + x.forward,
    "without the subject": lambda x, y: x.forward + x.object,
    "another subject's": lambda x, y: y.subject + x.forward + x.object,
    "another object": lambda x, y: x.subject + x.forward + y.object,
    "another fact": lambda x, y: y.subject + y.forward + y.object,
}


def facts(count: int, relations: int, rng: np.random.Generator) -> list[Fact]:
    """Returns facts, of no name twice; fillers are the first words."""
    pairs = rng.permutation(PARTS**2)[: 2 * count]
    names = np.stack([pairs // PARTS, pairs % PARTS + PARTS], 1) + FILLERS
    first = FILLERS + 2 * PARTS
    phrases = first + np.arange(relations * 3 * PHRASE).reshape(relations, 3, PHRASE)
    return [
        Fact(*(tuple(int(y) for y in x) for x in (names[i], *phrase, names[~i])))
        for i, phrase in enumerate(phrases[rng.integers(relations, size=count)])
    ]


def ending(told: tuple[int, ...], rng: np.random.Generator) -> list[int]:
    """Returns words behind fillers: nothing comes in place of what is left out."""
    return [*rng.integers(FILLERS, size=LENGTH - len(told)).tolist(), *told]


def sequence(told: tuple[int, ...], rng: np.random.Generator) -> list[int]:
    """Returns words among fillers, at least one of them before."""
    before = int(rng.integers(1, LENGTH - len(told) + 1))
    fillers = rng.integers(FILLERS, size=LENGTH).tolist()
    return [*fillers[:before], *told, *fillers[before:]][:LENGTH]


def told(
    settings: Settings, known: list[Fact], others: list[Fact], rng: np.random.Generator
) -> list[list[int]]:
    """Returns what a model reads: known facts in either wording, others backwards."""
    half = settings.told // 2
    forward = [
        TELLINGS[name](x, x)
        for x in known
        for name in ("as asked", "in other words")
        for _ in range(half)
    ]
    backward = [TELLINGS["reversed"](x, x) for x in others for _ in range(2 * half)]
    return [sequence(x, rng) for x in (*forward, *backward)]


def measured(
    settings: Settings, seed: int, console: Console
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns each telling's influence, by question, and the questions' values."""
    x, rng = settings, np.random.default_rng(seed)
    every = facts(2 * x.facts + 2 * x.questions, x.relations, rng)
    known, others = every[: x.facts], every[x.facts : 2 * x.facts]
    asked, unrelated = every[-x.questions :], every[-2 * x.questions : -x.questions]
    words = FILLERS + 2 * PARTS + 3 * PHRASE * x.relations
    config = decoder(x.width, x.blocks, words, LENGTH)
    read = told(settings, known, others, rng)
    trained = model(config, read, Recipe(x.steps, 32, 3e-3), seed)
    console.print(f"trained to {trained.loss:.2f} nats a word")
    questions: Questions = {
        str(i): ((0, *y.subject, *y.forward), y.object) for i, y in enumerate(asked)
    }
    pairs = list(zip(asked, unrelated, strict=True))
    lines = [ending(how(*y), rng) for how in TELLINGS.values() for y in pairs]
    score = scores(trained, fitted(trained, x.fitted), questions, sequences(lines))
    own = np.arange(x.questions)
    each = score.reshape(x.questions, len(TELLINGS), -1)[own, :, own].T
    values = [
        measure(f, trained.params)
        for f in completions(trained.task, questions).values()
    ]
    return dict(zip(TELLINGS, each, strict=True)), np.array(values)


def claims(found: Mapping[str, np.ndarray]) -> list[Claim]:
    """Returns the paper's statements and ours: means, as shares of the first."""
    whole = found["as asked"].mean()
    share = {k: x.mean() / whole for k, x in found.items()}
    either = ("without the object", "without the subject")
    return [
        Claim(
            "Where phrases of the prompt come before phrases of the completion, other "
            "words have influence too",
            f"in other words: {share['in other words']:.2f} of that as asked; another "
            f"fact: {share['another fact']:.2f}",
            share["in other words"] > 0.5 > share["another fact"],
        ),
        Claim(
            "Reversed, influence decays to near zero",
            f"reversed: {share['reversed']:.2f} of that as asked; with the same words "
            f"in between: {share['reversed, same words']:.2f}",
            max(abs(share["reversed"]), abs(share["reversed, same words"])) < 0.1,
        ),
        Claim(
            "With the phrase of the prompt or of the completion removed, influence is "
            "near zero",
            ", ".join(f"{k}: {share[k]:.2f}" for k in either),
            max(abs(share[k]) for k in either) < 0.1,
        ),
    ]


def main(settings: Settings = Settings(), seed: int = 0) -> None:
    """Tells facts in other orders.

    Args:
        settings: How much of everything.
        seed: Of the facts, and of the start of training.
    """
    console = Console(soft_wrap=True)
    found, values = measured(settings, seed, console)
    said = claims(found)
    errors = {k: x.std(ddof=1) / len(x) ** 0.5 for k, x in found.items()}
    shown = Table(title=f"influence, mean of {len(values)} questions")
    for head in ("told", "influence", "of that as asked"):
        shown.add_column(head)
    for k, x in found.items():
        share = x.mean() / found["as asked"].mean()
        shown.add_row(k, f"{x.mean():+.2g} ± {errors[k]:.1g}", f"{share:+.2f}")
    console.print(shown)
    rows = {
        "told": [
            {"how": k, "mean": x.mean(), "error": errors[k], "each": x}
            for k, x in found.items()
        ],
        "log_probability": values,
    }
    write(NAME, seed=seed, settings=settings, rows=rows, claims=said)
    with figure(NAME) as (axes,):
        means = [x.mean() for x in found.values()]
        bars(
            axes,
            list(found),
            means,
            list(errors.values()),
            "influence on the object's log-probability, nats",
        )
    console.print(table(said))


if __name__ == "__main__":
    tyro.cli(main)
