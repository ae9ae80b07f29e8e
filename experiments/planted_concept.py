"""Is a concept that was planted found again by its feature, and can it be steered?

    python -m experiments.planted_concept

One percent of a small language model's training sequences of Python code break off into
question marks. A dictionary is trained on the model's activations; the concept's
feature is the one that tells these sequences from all others best, looked up with no
influence involved. Then the model is asked why it goes on so: does that feature come
out first among what the most influential sequences have in common? And does the model
doubt if the feature is held up, and stop if it is taken out? A dictionary may hold the
concept as two features: it is taken out by itself, and with whatever else stands out
for every question.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from tokenizers import Tokenizer

from experiments.dictionaries import CHUNK, Subject, start
from experiments.results import Claim, table, write
from experiments.tasks import LITTLE, read_pieces
from influence import completions, fit, query, scan
from influence.fold import run
from influence.interpret.dictionary import Dictionary, encode
from influence.interpret.kinds import Standard
from influence.interpret.learning import Aim, Schedule
from influence.interpret.link import Activities, activities, enriched
from influence.interpret.source import Source
from influence.interpret.steering import (
    Comparison,
    Edit,
    Steered,
    Steering,
    ablate,
    clamp,
    compare,
    gathered,
)
from influence.model import train
from influence.model.examples import Examples, sequences
from influence.model.sites import Address
from influence.model.task import LanguageModel
from influence.model.transformer import Apply

DOUBT = "?"
"""What is said again and again in the planted sequences."""

BEGUN = 16
"""Tokens of code before the doubt, in what the model is asked about."""

SURE = 0.01
"""The largest p-value of a feature that stands out."""

HEARD = 4
"""Tokens of doubt in a prompt that it is to go on from."""


@dataclass(frozen=True)
class Options:
    """What is planted.

    Attributes:
      share: of the training sequences.
      steps: of the dictionary's training.
      coefficient: what a feature's activation costs. A price on activations favours one
        feature for what always comes together, where the kinds that keep the k largest
        are indifferent.
      rate: the highest of the dictionary's training.
      top: how many of the most influential sequences are compared with others.
      strengths: of the clamped feature, in its largest activations; that at which
        the model doubts most counts.
      seeds: of all that is drawn, the model's start included: all is done for each.
    """

    share: float = 0.01
    steps: int = 3000
    coefficient: float = 1.0
    rate: float = 3e-3
    top: int = 40
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    seeds: tuple[int, ...] = (0, 1, 2)


class Planted(NamedTuple):
    """Training sequences, some of them with the concept.

    Attributes:
      examples: all of them.
      places: of those with the concept.
      tokenizer: theirs.
    """

    examples: Examples
    places: np.ndarray
    tokenizer: Tokenizer


def main(options: Options) -> None:
    """Plants the concept, looks for its feature, and steers by it; seed by seed."""
    rows = [_once(options, seed) for seed in options.seeds]
    asked = [x for row in rows for x in row["queries"]]
    first = [sum(x["first"] == y["feature"] for x in y["queries"]) for y in rows]
    said = [x["steering"] for x in rows]
    claims = [
        Claim(
            "The planted concept's feature comes out first for queries about it",
            f"{_each(first)} of {len(rows[0]['queries'])} queries, lift "
            f"{min(x['lift'] for x in asked):.0f} at least, p "
            f"{max(x['p'] for x in asked):.3f} at most",
            sum(first) == len(asked),
        ),
        Claim(
            "Clamped, the model doubts where it goes on with code",
            f"{_each(x['clamped_says'] for x in said)} of {said[0]['prompts']} "
            f"prompts; {_each(x['plain_says'] for x in said)} without",
            all(x["clamped_says"] > x["prompts"] / 2 > x["plain_says"] for x in said),
        ),
        Claim(
            "The feature ablated, it no longer goes on doubting",
            f"{_each(x['alone_tells'] for x in said)} of {said[0]['asked']} "
            f"prompts; {_each(x['plain_tells'] for x in said)} without",
            all(x["alone_tells"] < x["asked"] / 2 < x["plain_tells"] for x in said),
        ),
        Claim(
            "Every feature ablated that stands out for all queries, it no longer does, "
            "and goes on with code as before",
            f"{_each(len(x['standing_out']) for x in rows)} features: "
            f"{_each(x['ablated_tells'] for x in said)} of {said[0]['asked']} "
            f"prompts; KL {max(x['kl_of_code'] for x in said):.3f} on code at most",
            all(
                x["ablated_tells"] < x["asked"] / 2 and x["kl_of_code"] < 0.05
                for x in said
            ),
        ),
    ]
    write(
        "planted_concept",
        seed=options.seeds[0],
        settings=options,
        rows=rows,
        claims=claims,
    )
    Console().print(table(claims))


def _each(counts: Iterable[int]) -> str:
    """Returns a number for each seed."""
    return ", ".join(map(str, counts))


def _once(options: Options, seed: int) -> dict[str, Any]:
    """Plants the concept, looks for its feature, and steers by it."""
    planted = _planted(options, np.random.default_rng(seed))
    subject = _trained(seed, planted)
    aim = Aim(subject.site, 8 * LITTLE.config.width, Standard(options.coefficient))
    schedule = Schedule(options.steps, rate=options.rate, decay=0.2, clip=1.0)
    dictionary = subject.train({"own": aim}, schedule, seed)["own"].dictionary
    known = run(
        activities(subject.source, dictionary, subject.site),
        planted.examples.batches(CHUNK),
    )
    own = _own(known, planted.places)
    found = subject.judged(dictionary)
    queries = _asked(options, seed, planted, subject, known, own)
    common = set.intersection(*(set(x.pop("standing_out")) for x in queries))
    standing = sorted({own, *common})
    return {
        "seed": seed,
        "variance_explained": found.variance_explained,
        "l0": found.l0,
        "feature": own,
        "standing_out": standing,
        "queries": queries,
        "steering": _steered(options, planted, subject, dictionary, own, standing),
    }


def _doubt(tokenizer: Tokenizer, length: int) -> list[int]:
    """Returns doubt, so many tokens long."""
    return tokenizer.encode(DOUBT * length).ids[:length]


def _others(planted: Planted, count: int) -> list[list[int]]:
    """Returns how texts begin that are not planted."""
    tokens = np.asarray(planted.examples.inputs["tokens"])
    apart = np.setdiff1d(np.arange(len(tokens)), planted.places)
    some = apart[np.linspace(0, len(apart) - 1, count).astype(int)]
    return [tokens[i, :BEGUN].tolist() for i in some]


def _planted(options: Options, rng: np.random.Generator) -> Planted:
    """Returns pieces of Python's library, some with the concept."""
    tokenizer, pieces = read_pieces(None)
    places = np.sort(
        rng.choice(len(pieces), round(options.share * len(pieces)), replace=False)
    )
    tokens, length = [list(x) for _, x in pieces], LITTLE.config.context
    doubt = _doubt(tokenizer, length)
    for i, after in zip(places, rng.integers(4, length // 2, len(places)), strict=True):
        tokens[i] = (tokens[i][:after] + doubt)[:length]
    return Planted(sequences(tokens, [x for x, _ in pieces]), places, tokenizer)


def _trained(seed: int, planted: Planted) -> Subject:
    """Returns a decoder that was trained on the sequences, from nothing."""
    task = LanguageModel(Apply(LITTLE.config), LITTLE.config.context)
    begun, recipe = start(LITTLE.config, seed), LITTLE.reading
    examples = planted.examples
    fold = train.fold(task, recipe, begun, examples, np.ones(len(examples)))
    params = run(fold, train.Order(len(examples), recipe, seed)).params
    return Subject(
        "planted", Source(task, params), Address("resid", 1), examples, examples
    )


def _own(known: Activities, places: np.ndarray) -> int:
    """Returns the feature that tells the planted sequences from others best.

    By how much more it is on in them: features' rows have length one, so activations of
    one are as large as another's.
    """
    mean = known.sum_NxF / known.tokens_N[:, None]
    inside = np.isin(np.arange(len(mean)), places)
    return int((mean[inside].mean(0) - mean[~inside].mean(0)).argmax())


def _asked(
    options: Options,
    seed: int,
    planted: Planted,
    subject: Subject,
    known: Activities,
    own: int,
) -> list[dict]:
    """Returns what the most influential sequences have in common, by query."""
    task, params = subject.source.task, subject.source.params
    batches = planted.examples.batches(CHUNK)
    doubt = _doubt(planted.tokenizer, HEARD + BEGUN)
    pairs = {
        str(i): (x + doubt[:HEARD], doubt[HEARD:])
        for i, x in enumerate(_others(planted, 5))
    }
    curvature = fit(task, params, batches, layers="blocks.*")
    asked = query(curvature, params, completions(task, pairs))
    total = scan(task, params, asked, batches).total
    rows = []
    for name, scores in zip(pairs, total.values, strict=True):
        top = np.argsort(-scores)[: options.top]
        found = enriched(known, top.tolist(), seed=seed)
        (first,) = found.first(1)
        sure = (found.p_F <= SURE) & (found.lift_F > 1)
        rows.append(
            {
                "query": name,
                "first": first,
                "lift": float(found.lift_F[own]),
                "p": float(found.p_F[own]),
                "standing_out": np.flatnonzero(sure).tolist(),
                "planted_among_top": float(np.isin(top, planted.places).mean()),
            }
        )
    return rows


def _steered(
    options: Options,
    planted: Planted,
    subject: Subject,
    dictionary: Dictionary,
    own: int,
    standing: list[int],
) -> dict:
    """Returns what the model says with the feature held up, and taken out.

    By itself, and with all that stand out.
    """
    batch = next(iter(planted.examples.take(planted.places).batches(CHUNK)))
    rows, keep = subject.source.values((subject.site,), subject.source.params, batch)
    z = np.asarray(encode(dictionary, rows[subject.site]))[np.asarray(keep)]
    largest = float(z[:, own].max())
    code = _others(planted, 6)
    doubting = [x + _doubt(planted.tokenizer, HEARD) for x in code]
    each = {
        x: _compared(subject, dictionary, [clamp(own, x * largest)], code)
        for x in options.strengths
    }
    edits = [ablate(x) for x in standing]
    alone = _compared(subject, dictionary, [ablate(own)], doubting)
    out, spared = (_compared(subject, dictionary, edits, x) for x in (doubting, code))
    (sound,) = set(_doubt(planted.tokenizer, HEARD))
    decode = planted.tokenizer.decode

    def count(texts: list[list[int]]) -> int:
        """Returns how many texts are mostly doubt."""
        return sum(x.count(sound) > len(x) / 2 for x in texts)

    says = {x: count(y.steered) for x, y in each.items()}
    strength = max(says, key=lambda x: (says[x], -x))
    held = each[strength]
    return {
        "prompts": len(code),
        "asked": len(doubting),
        "strength": strength,
        "plain_says": count(held.plain),
        "clamped_says": says[strength],
        "clamped_says_by_strength": says,
        "plain_tells": count(out.plain),
        "alone_tells": count(alone.steered),
        "ablated_tells": count(out.steered),
        "kl_of_code": max(spared.kl),
        "clamped": [decode(x) for x in held.steered],
        "ablated": [decode(x) for x in out.steered],
        "as_it_is": [decode(x) for x in (*held.plain, *out.plain)],
        "kl": [*held.kl, *out.kl],
    }


def _compared(
    subject: Subject,
    dictionary: Dictionary,
    edits: list[Edit],
    prompts: list[list[int]],
) -> Comparison:
    source = subject.source
    steered = Steered(source.task.apply, subject.site, subject.site)
    held = Steering(source.params, dictionary, gathered(edits, dictionary))
    return compare(source.task, steered, held, prompts, 16)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
