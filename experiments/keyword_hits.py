"""Do the sequences with most influence have the query's word in them?

    python -m experiments.keyword_hits

Grosse et al. 2023 (section 5.1) ask a model of 810 million parameters about inflation:
36 of the 50 most influential of 100,000 sequences have a keyword by EK-FAC, 10 by
gradient products. Here a small decoder reads Python's sources and is asked to go on
with files it has not read, from a word in them that is rare. Words are drawn, not
chosen: identifiers, those of a range of frequencies that stand far enough inside a
piece of a held-out file.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tyro
from rich.console import Console

from experiments.results import Claim, figure, table, write
from experiments.small_model import (
    Corpus,
    Questions,
    by_method,
    decoder,
    fitted,
    model,
    read,
)
from influence.model.train import Recipe

NAME = "keyword_hits"

WORD = re.compile(r"[A-Za-z_]{6,}")

TOP = 50

BEFORE, AFTER = 16, 12
"""How many tokens a prompt and a completion have."""


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
      sequences: to train on, and to rank.
      steps: of training.
      fitted: sequences the curvature is fitted to.
      words: asked about.
      share: of sequences a word is in, at most; in `TOP` at least.
    """

    sequences: int = 6000
    steps: int = 700
    fitted: int = 1500
    words: int = 24
    share: float = 0.03
    vocabulary: int = 1024
    context: int = 64
    width: int = 128
    blocks: int = 2


class Asked(NamedTuple):
    """A word, how many sequences have it, and the question it begins the answer of."""

    word: str
    share: float
    question: tuple[list[int], list[int]]


def asked(corpus: Corpus, settings: Settings, seed: int) -> list[Asked]:
    """Returns words of held-out pieces, and what to ask."""
    found = [set(WORD.findall(corpus.text(x))) for x in corpus.train_NxT]
    counts = Counter(x for words in found for x in words)
    most = settings.share * len(found)
    rare = {x for x, n in counts.items() if TOP <= n <= most}
    words: dict[str, Asked] = {}
    for tokens in corpus.held_MxT:
        for word in sorted(rare & set(WORD.findall(corpus.text(tokens))) - set(words)):
            at = begins(corpus, tokens, word)
            if BEFORE <= at <= len(tokens) - AFTER:
                pair = tokens[at - BEFORE : at].tolist(), tokens[at:][:AFTER].tolist()
                words[word] = Asked(word, counts[word] / len(found), pair)
                break
    drawn = np.random.default_rng(seed).permutation(sorted(words))[: settings.words]
    return [words[str(x)] for x in drawn]


def begins(corpus: Corpus, tokens: np.ndarray, word: str) -> int:
    """Returns the place of the token in which a word first begins."""
    ends = next(i for i in range(1, len(tokens) + 1) if word in corpus.text(tokens[:i]))
    return next(i for i in range(ends)[::-1] if word in corpus.text(tokens[i:ends]))


def hits(has_QxN: np.ndarray, score_QxN: np.ndarray) -> np.ndarray:
    """Returns how many of each query's top sequences have its word."""
    top = np.argsort(-score_QxN, axis=1, kind="stable")[:, :TOP]
    return np.take_along_axis(has_QxN, top, axis=1).sum(1)


def claims(found: dict[str, np.ndarray], chance: float) -> list[Claim]:
    """Returns the paper's statement and ours."""
    mean = {k: x.mean() for k, x in found.items()}
    apart = found["EK-FAC"] - found["gradient products"]
    error = apart.std(ddof=1) / np.sqrt(len(apart))
    more = int((apart > 0).sum())
    return [
        Claim(
            "EK-FAC's top 50 have the query's keyword more often than those of "
            "gradient products: 36 of 50 against 10 of 50 (inflation, 810M)",
            f"{mean['EK-FAC']:.1f} against {mean['gradient products']:.1f} of {TOP}, "
            f"the mean of {len(apart)} words; {apart.mean():.1f} ± {error:.1f} more, "
            f"more for {more}; BM25 {mean['BM25']:.1f}, chance {chance:.1f}",
            bool(apart.mean() > 2 * error),
        )
    ]


def draw(words: list[Asked], found: dict[str, np.ndarray]) -> None:
    """Draws every word's hits."""
    order = np.argsort(found["EK-FAC"])
    with figure(NAME, height=5) as (axes,):
        for (name, x), marker in zip(found.items(), "os^", strict=True):
            axes.plot(x[order], np.arange(len(order)), marker, label=name)
        axes.set_yticks(np.arange(len(order)), [words[i].word for i in order])
        axes.set(xlabel=f"of the top {TOP}, with the word", xlim=(-1, TOP + 1))
        axes.grid(axis="x")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3)


def main(settings: Settings = Settings(), seed: int = 0) -> None:
    """Counts keywords.

    Args:
        settings: How much of everything.
        seed: Of the start of training, and of the words.
    """
    console = Console(soft_wrap=True)
    x = settings
    corpus = read(x.vocabulary, x.context, x.sequences, held=1000)
    config = decoder(x.width, x.blocks, x.vocabulary, x.context)
    trained = model(config, corpus.train_NxT, Recipe(x.steps, 32, 3e-3), seed)
    console.print(f"trained to {trained.loss:.2f} nats a token")
    words = asked(corpus, settings, seed)
    questions: Questions = {x.word: x.question for x in words}
    each = by_method(trained, fitted(trained, x.fitted), questions)
    texts = [corpus.text(x) for x in corpus.train_NxT]
    has_QxN = np.array([[x.word in text for text in texts] for x in words])
    found = {k: hits(has_QxN, score) for k, score in each.items()}
    said = claims(found, TOP * has_QxN.mean())
    rows = [
        {"word": x.word, "share": x.share} | {k: y[i] for k, y in found.items()}
        for i, x in enumerate(words)
    ]
    about = {"trained_to": trained.loss, "top": TOP}
    rows = {"words": rows, **about}
    write(NAME, seed=seed, settings=settings, rows=rows, claims=said)
    draw(words, found)
    console.print(table(said))


if __name__ == "__main__":
    tyro.cli(main)
