"""Has a text influence on questions in another language?

    python -m experiments.language_flip

Grosse et al. 2023 (section 5.3.4): translated into Mandarin, an influential English
sequence loses influence by an order of magnitude or more. Here the other language is a
cipher: every token of a text has a word of its own there. A small decoder reads pieces
of Python's sources in one language, other pieces in the other, and pairs, in either
order: half a piece and then its translation, so that it could learn that both mean the
same. It is asked to go on with pieces it has read in neither; what is scored are those
pieces themselves, in either language or with one half in each.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.results import Claim, bars, figure, table, write
from experiments.small_model import (
    Model,
    continuations,
    decoder,
    fitted,
    model,
    read,
    scores,
)
from influence.attribution.measurements import completions, measure
from influence.model.examples import sequences
from influence.model.train import Recipe

NAME = "language_flip"

VOCABULARY = 512
"""Of one language."""

SEQUENCES: tuple[str, ...] = (
    "the same",
    "prompt flipped",
    "completion flipped",
    "translated",
    "unrelated",
    "unrelated, translated",
)
"""What is scored, told by how it differs from the question."""


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
      sequences: in either language alone.
      pairs: of half a sequence and its translation.
      steps: of training.
      fitted: sequences the curvature is fitted to.
      questions: asked in either language.
    """

    sequences: int = 1500
    pairs: int = 3000
    steps: int = 900
    fitted: int = 1500
    questions: int = 24
    context: int = 48
    width: int = 128
    blocks: int = 2


def translated(tokens: np.ndarray, cipher_V: np.ndarray) -> np.ndarray:
    """Returns tokens of the first language in the second."""
    return VOCABULARY + cipher_V[tokens]


def corpus(settings: Settings, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what is read, and pieces that are not: `[2, M, T]`, by language."""
    x = settings
    cipher_V = np.random.default_rng(seed).permutation(VOCABULARY)
    train = 2 * x.sequences + x.pairs
    found = read(VOCABULARY, x.context, train, 2 * x.questions)
    alone, other, paired = np.split(found.train_NxT, [x.sequences, 2 * x.sequences])
    half = paired[:, : x.context // 2]
    both = [half, translated(half, cipher_V)]
    first, second = (np.concatenate(y, 1) for y in (both, both[::-1]))
    pairs = np.concatenate([first[::2], second[1::2]])
    held = found.held_MxT
    return (
        np.concatenate([alone, translated(other, cipher_V), pairs]),
        np.stack([held, translated(held, cipher_V)]),
    )


def flipped(held_2xMxT: np.ndarray, language: int, half: int) -> list[np.ndarray]:
    """Returns what is scored for questions in a language, in the order of `SEQUENCES`.

    The first half of all pieces are asked about, the second are unrelated to them.
    """
    same, other = held_2xMxT[language], held_2xMxT[1 - language]
    count = len(same) // 2
    return [
        same[:count],
        np.concatenate([other[:count, :half], same[:count, half:]], 1),
        np.concatenate([same[:count, :half], other[:count, half:]], 1),
        other[:count],
        same[count:],
        other[count:],
    ]


def measured(
    settings: Settings, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Returns influence, by question in either language, and what is understood."""
    x = settings
    tokens_NxT, held_2xMxT = corpus(settings, seed)
    config = decoder(x.width, x.blocks, 2 * VOCABULARY, x.context)
    trained = model(config, tokens_NxT, Recipe(x.steps, 32, 3e-3), seed)
    curvature, half = fitted(trained, x.fitted), x.context // 2
    found = []
    for language, tokens_MxT in enumerate(held_2xMxT):
        questions = continuations(tokens_MxT, x.questions, half)
        lines = np.concatenate(flipped(held_2xMxT, language, half))
        score = scores(trained, curvature, questions, sequences(list(lines)))
        own = np.arange(x.questions)
        found.append(score.reshape(x.questions, len(SEQUENCES), -1)[own, :, own].T)
    each = dict(zip(SEQUENCES, np.concatenate(found, 1), strict=True))
    return each, understood(trained, held_2xMxT, half)


def understood(trained: Model, held_2xMxT: np.ndarray, half: int) -> dict[str, float]:
    """Returns the loss of pieces, alone and translated before, in nats a token."""
    first, second = held_2xMxT[:, :, :half]
    lines = {
        "alone": np.concatenate([*held_2xMxT]),
        "after its translation": np.concatenate(
            [np.concatenate(x, 1) for x in ((first, second), (second, first))]
        ),
    }
    found = {}
    for name, x in lines.items():
        asked = completions(trained.task, continuations(x, len(x), half))
        values = [measure(f, trained.params) for f in asked.values()]
        found[name] = -float(np.mean(values)) / (x.shape[1] - half)
    return found


def claims(found: Mapping[str, np.ndarray]) -> list[Claim]:
    """Returns the paper's statements and ours."""
    mean = {k: float(x.mean()) for k, x in found.items()}
    error = {k: float(x.std(ddof=1) / len(x) ** 0.5) for k, x in found.items()}
    left = mean["translated"] > 2 * error["translated"]
    ratio = f"{mean['the same'] / mean['translated']:.1f}" if left else "unbounded"
    apart = found["translated"] - found["unrelated, translated"]
    beyond = apart.mean() / (apart.std(ddof=1) / len(apart) ** 0.5)
    return [
        Claim(
            "Translated, a sequence loses influence by an order of magnitude or more",
            f"{mean['the same']:.2g} ± {error['the same']:.1g} in the question's "
            f"language, {mean['translated']:.2g} ± {error['translated']:.1g} in the "
            f"other; their ratio is {ratio}",
            bool(mean["the same"] >= 10 * mean["translated"]),
        ),
        Claim(
            "Some influence is left in another language, in large models; at 810M next "
            "to none",
            f"translated, a sequence has {mean['translated']:.2g}, an unrelated one in "
            f"that language {mean['unrelated, translated']:.2g}; they are "
            f"{beyond:.1f} standard errors apart",
            bool(beyond > 2),
        ),
    ]


def main(settings: Settings = Settings(), seed: int = 0) -> None:
    """Translates.

    Args:
        settings: How much of everything.
        seed: Of the cipher, and of the start of training.
    """
    console = Console(soft_wrap=True)
    found, nats = measured(settings, seed)
    for name, x in nats.items():
        console.print(f"a piece {name}: {x:.2f} nats a token")
    said = claims(found)
    errors = {k: x.std(ddof=1) / len(x) ** 0.5 for k, x in found.items()}
    shown = Table(title=f"influence, mean of {len(found['the same'])} questions")
    for head in ("sequence", "influence"):
        shown.add_column(head)
    for k, x in found.items():
        shown.add_row(k, f"{x.mean():+.2g} ± {errors[k]:.1g}")
    console.print(shown)
    scored = [
        {"sequence": k, "mean": x.mean(), "error": errors[k], "each": x}
        for k, x in found.items()
    ]
    rows = {"sequences": scored, "nats_a_token": nats}
    write(NAME, seed=seed, settings=settings, rows=rows, claims=said)
    with figure(NAME) as (axes,):
        means = [x.mean() for x in found.values()]
        bars(
            axes,
            list(found),
            means,
            list(errors.values()),
            "influence on the completion's log-probability, nats",
        )
    console.print(table(said))


if __name__ == "__main__":
    tyro.cli(main)
