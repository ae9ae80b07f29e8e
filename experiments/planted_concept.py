"""Is a concept that was planted found again by its feature, and can it be steered?

    python -m experiments.planted_concept

One percent of a small language model's training sequences of Python code are written
in capitals. A dictionary is trained on the model's activations; the concept's feature
is the one that tells these sequences from all others best, looked up with no influence
involved. Then the model is asked why it goes on in capitals: does that feature come out
first among what the most influential sequences have in common? And does the model write
in capitals if the feature is held up, and in small letters if it is taken out?
"""

from dataclasses import dataclass
from typing import NamedTuple

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
from influence.interpret.kinds import BatchTop
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

BEGUN = 16
"""Tokens of a sequence in capitals that are a prompt."""


@dataclass(frozen=True)
class Options:
    """What is planted.

    Attributes:
      share: of the training sequences.
      steps: of the dictionary's training.
      k: features of a token that are on.
      top: how many of the most influential sequences are compared with others.
      strengths: of the clamped feature, in its largest activations; that at which
        the model says most in capitals counts.
      seed: of all that is drawn.
    """

    share: float = 0.01
    steps: int = 600
    k: int = 24
    top: int = 40
    strengths: tuple[float, ...] = (2.0, 4.0, 8.0)
    seed: int = 0


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
    """Plants the concept, looks for its feature, and steers by it."""
    rng = np.random.default_rng(options.seed)
    planted = _planted(options, rng)
    subject = _trained(options, planted)
    dictionary = _dictionary(options, subject)
    known = run(
        activities(subject.source, dictionary, subject.site),
        planted.examples.batches(CHUNK),
    )
    own = _own(known, planted.places)
    rows = _asked(options, planted, subject, known, own)
    said = _steered(options, planted, subject, dictionary, own)
    first = sum(x["first"] == own for x in rows)
    claims = [
        Claim(
            "The planted concept's feature comes out first for queries about it",
            f"{first} of {len(rows)} queries, lift "
            f"{min(x['lift'] for x in rows):.0f} at least, p "
            f"{max(x['p'] for x in rows):.3f} at most",
            first == len(rows),
        ),
        Claim(
            "Clamped, the model goes on in capitals after small letters",
            f"{said['clamped_says']} of {said['prompts']} prompts; "
            f"{said['plain_says']} without",
            said["clamped_says"] > said["prompts"] / 2 > said["plain_says"],
        ),
        Claim(
            "Ablated, it no longer goes on in capitals after capitals",
            f"{said['ablated_tells']} of {said['asked']} prompts; "
            f"{said['plain_tells']} without",
            said["ablated_tells"] < said["asked"] / 2 < said["plain_tells"],
        ),
    ]
    write(
        "planted_concept",
        seed=options.seed,
        settings=options,
        rows={"feature": own, "queries": rows, "steering": said},
        claims=claims,
    )
    Console().print(table(claims))


def _shouted(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Returns a text in capitals."""
    return tokenizer.encode(tokenizer.decode(ids).upper()).ids


def _others(planted: Planted, count: int) -> list[list[int]]:
    """Returns texts that are not planted, in capitals."""
    tokens = np.asarray(planted.examples.inputs["tokens"])
    apart = np.setdiff1d(np.arange(len(tokens)), planted.places)
    some = apart[np.linspace(0, len(apart) - 1, count).astype(int)]
    return [_shouted(planted.tokenizer, tokens[i].tolist()) for i in some]


def _planted(options: Options, rng: np.random.Generator) -> Planted:
    """Returns pieces of Python's library, some of them in capitals."""
    tokenizer, pieces = read_pieces(None)
    places = np.sort(
        rng.choice(len(pieces), round(options.share * len(pieces)), replace=False)
    )
    tokens, length = [list(x) for _, x in pieces], LITTLE.config.context
    for i in places:
        tokens[i] = _shouted(tokenizer, tokens[i])[:length]
    return Planted(sequences(tokens, [x for x, _ in pieces]), places, tokenizer)


def _trained(options: Options, planted: Planted) -> Subject:
    """Returns a decoder that was trained on the sequences, from nothing."""
    task = LanguageModel(Apply(LITTLE.config), LITTLE.config.context)
    begun, recipe = start(LITTLE.config, options.seed), LITTLE.reading
    examples = planted.examples
    fold = train.fold(task, recipe, begun, examples, np.ones(len(examples)))
    params = run(fold, train.Order(len(examples), recipe, options.seed)).params
    site = Address("resid", 1)
    return Subject("planted", Source(task, params), site, examples, examples)


def _dictionary(options: Options, subject: Subject) -> Dictionary:
    aim = Aim(subject.site, 8 * LITTLE.config.width, BatchTop(options.k))
    trained = subject.train({"own": aim}, Schedule(options.steps), options.seed)
    return trained["own"].dictionary


def _own(known: Activities, places: np.ndarray) -> int:
    """Returns the feature that tells the planted sequences from others best.

    By the correlation of the share of tokens at which it is on with being planted.
    """
    rate = known.rate_NxF
    inside = np.zeros(len(rate))
    inside[places] = 1
    rate, inside = rate - rate.mean(0), inside - inside.mean()
    spread = np.maximum(rate.std(0), 1e-12)
    return int((inside @ rate / spread).argmax())


def _asked(
    options: Options,
    planted: Planted,
    subject: Subject,
    known: Activities,
    own: int,
) -> list[dict]:
    """Returns what the most influential sequences have in common, by query."""
    task, params = subject.source.task, subject.source.params
    batches = planted.examples.batches(CHUNK)
    pairs = {
        str(i): (x[:BEGUN], x[BEGUN : 2 * BEGUN])
        for i, x in enumerate(_others(planted, 5))
    }
    curvature = fit(task, params, batches, layers="blocks.*")
    asked = query(curvature, params, completions(task, pairs))
    total = scan(task, params, asked, batches).total
    rows = []
    for name, scores in zip(pairs, total.values, strict=True):
        top = np.argsort(-scores)[: options.top]
        found = enriched(known, top.tolist(), seed=options.seed)
        (first,) = found.first(1)
        rows.append(
            {
                "query": name,
                "first": first,
                "lift": float(found.lift_F[own]),
                "p": float(found.p_F[own]),
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
) -> dict:
    """Returns what the model says with the feature held up, and taken out."""
    batch = next(iter(planted.examples.take(planted.places).batches(CHUNK)))
    rows, keep = subject.source.values((subject.site,), subject.source.params, batch)
    z = np.asarray(encode(dictionary, rows[subject.site]))[np.asarray(keep)]
    largest = float(z[:, own].max())
    encode_ = planted.tokenizer.encode
    code = [
        encode_(x).ids for x in ("def close(self", "import ", "    return ", "if x")
    ]
    loud = [x[:BEGUN] for x in _others(planted, 6)]
    each = {
        x: _compared(subject, dictionary, clamp(own, x * largest), code)
        for x in options.strengths
    }
    out = _compared(subject, dictionary, ablate(own), loud)
    decode = planted.tokenizer.decode

    def count(texts: list[list[int]]) -> int:
        """Returns how many texts are mostly in capitals."""
        letters = [[y for y in decode(x) if y.isalpha()] for x in texts]
        return sum(sum(map(str.isupper, x)) > len(x) / 2 for x in letters)

    says = {x: count(y.steered) for x, y in each.items()}
    strength = max(says, key=lambda x: (says[x], -x))
    held = each[strength]
    return {
        "prompts": len(code),
        "asked": len(loud),
        "strength": strength,
        "plain_says": count(held.plain),
        "clamped_says": says[strength],
        "clamped_says_by_strength": says,
        "plain_tells": count(out.plain),
        "ablated_tells": count(out.steered),
        "clamped": [decode(x) for x in held.steered],
        "ablated": [decode(x) for x in out.steered],
        "as_it_is": [decode(x) for x in (*held.plain, *out.plain)],
        "kl": [*held.kl, *out.kl],
    }


def _compared(
    subject: Subject, dictionary: Dictionary, edit: Edit, prompts: list[list[int]]
) -> Comparison:
    source = subject.source
    steered = Steered(source.task.apply, subject.site, subject.site)
    held = Steering(source.params, dictionary, gathered([edit], dictionary))
    return compare(source.task, steered, held, prompts, 16)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
