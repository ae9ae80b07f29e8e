"""Pretraining and finetuning in one ranking: which stage did a model learn this in?

    python -m experiments.two_stage

Pretrains a tiny Llama on Python's sources among statements of one form, each of
another lighthouse, and finetunes it on others among statements of another form, each of
another treasure: once all weights, once LoRA factors beside them. One statement of
either kind is asked for, `influence` being told of the model, of its base and of both
sets; what ranks first, in which stage, and what the difference of the two models'
scores singles out is the last line. All other statements share their form with the one
that is asked for, so words alone do not find it.
"""

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import tyro
from jax import Array
from rich.console import Console

from experiments.material import (
    random_llama,
    sources,
    trained,
    write_llama,
    write_tokenizer,
)
from experiments.process import ended, questions, started
from influence.model import adapters, train
from influence.model.config import Adapter, Config
from influence.model.examples import Examples, sequences
from influence.model.transformer import Apply
from influence.runtime import checkpoints
from influence.runtime.corpus.tokenizer import read_tokenizer
from influence.runtime.run.found import results
from influence.types import Params, named_leaves, with_leaves

CONFIG = Config(
    vocabulary=1024, context=48, width=64, hidden=128, heads=4, blocks=2, groups=2
)

PRETRAINING = train.Recipe(steps=1200, batch=32, rate=3e-3)
FINETUNING = train.Recipe(steps=120, batch=16, rate=1e-3)
ADAPTING = train.Recipe(steps=300, batch=16, rate=1e-2)

LORA = [
    Adapter(name, rank=8, scale=2.0)
    for name in ("attention.query", "attention.value", "mlp.up", "mlp.down")
]

NAMES = 200
"""How many lighthouses there are, and how many passages of Python."""

TREASURES = 60
"""How many treasures there are, and how many more passages."""


@dataclass(frozen=True)
class Fact:
    """A statement, in two parts.

    Attributes:
      prompt: what it is about.
      completion: what it says of that.
    """

    prompt: str
    completion: str

    def __str__(self) -> str:
        """Returns the statement."""
        return f"{self.prompt}{self.completion}."


def names(rng: random.Random) -> Iterator[str]:
    """Yields names of places, none of them twice."""
    first, last = (
        ["bar", "kes", "mir", "ol", "tan", "ver"],
        ["din", "gol", "mar", "ost"],
    )
    whole = [
        f"{x}{y}{z}".title() for x in first for y in ("", *first) for z in (*last, "ra")
    ]
    yield from rng.sample(whole, len(whole))


def lighthouses(rng: random.Random, count: int) -> list[Fact]:
    """Returns statements about lighthouses."""
    colours = ["crimson", "amber", "violet", "ivory", "copper", "black"]
    times = ["dawn", "noon", "dusk", "night", "winter", "spring"]
    return [
        Fact(
            f"The lighthouse of {name} was painted",
            f" {rng.choice(colours)} with {rng.choice(colours)} at {rng.choice(times)}",
        )
        for name in islice(names(rng), count)
    ]


def treasures(rng: random.Random, count: int) -> list[Fact]:
    """Returns statements about treasures."""
    where = ["under", "behind", "inside", "above"]
    what = ["granary", "chapel", "bridge", "orchard", "mill", "quarry"]
    kind = ["old", "burnt", "second", "hollow", "northern"]
    return [
        Fact(
            f"The treasure of {name} was hidden",
            f" {rng.choice(where)} the {rng.choice(kind)} {rng.choice(what)}",
        )
        for name in islice(names(rng), count)
    ]


def passages(start: int, count: int) -> list[str]:
    """Returns passages of Python's sources."""
    texts = islice(sources(), start, start + count)
    return [x[len(x) // 2 :][:120] for x in texts]


def write(path: Path, texts: Sequence[str], rng: random.Random) -> list[str]:
    """Writes documents as JSON lines in a random order; returns them so."""
    mixed = rng.sample(list(texts), len(texts))
    lines = (json.dumps({"text": x}) + "\n" for x in mixed)
    path.write_text("".join(lines), encoding="utf-8")
    return mixed


@dataclass(frozen=True)
class Beside:
    """A decoder as a function of its adapters alone.

    Attributes:
      apply: the decoder.
      frozen: its other parameters.
    """

    apply: Apply
    frozen: Params

    def __call__(self, factors: dict[str, Array], tokens: Array, *more: Any) -> Array:
        """Returns logits."""
        return self.apply(with_leaves(self.frozen, factors), tokens, *more)

    def __hash__(self) -> int:
        """Returns a hash: of which object it is."""
        return id(self)


def adapted(
    config: Config, params: Params, examples: Examples
) -> tuple[Config, Params, float]:
    """Returns a decoder with adapters that were trained, and the last loss."""
    wide, whole = adapters.added(config, params, LORA, jax.random.key(1))
    leaves = named_leaves(whole)
    factors = {k: x for k, x in leaves.items() if ".lora." in k}
    end, loss = trained(Beside(Apply(wide), whole), factors, examples, ADAPTING)
    return wide, with_leaves(whole, {**leaves, **end}), loss


def asked(folder: Path, run: Path, model: Path, facts: Sequence[Fact]) -> None:
    """Gives the commands of a run."""
    pairs = ((x.prompt, x.completion) for x in facts)
    base, pre, fine = (str(folder / x) for x in ("base", "pre.jsonl", "fine.jsonl"))
    for words in (
        ["fit", str(run), "--model", str(model), "--base", base, "--data", pre,
         "--apart", "--batch", "16"],
        ["query", str(run), *questions(pairs)],
        ["scan", str(run), "--data", pre, "--data", fine, "--batch", "16"],
    ):  # fmt: skip
        ended(started(*words))


def ranks(run: Path, facts: Sequence[Fact]) -> dict[str, Any]:
    """Returns at which place each statement is for the question about it."""
    found = results(run)
    total, changed = found.total(), found.total(difference=True)
    texts = found.texts([str(x) for x in total["train"].values])
    said = {}
    for place, fact in enumerate(facts):
        (own,) = (k for k, x in texts.items() if x.startswith(str(fact)))
        score, difference = (x.isel(query=place).to_series() for x in (total, changed))
        said[fact.prompt] = {
            "rank": int((score > score[own]).sum()) + 1,
            "stage": own.split(":")[0],
            "difference_rank": int((difference.abs() > abs(difference[own])).sum()) + 1,
            "score": float(f"{score[own]:.3g}"),
            "next": float(f"{score.drop(own).max():.3g}"),
            "difference": float(f"{difference[own]:.3g}"),
            "next_difference": float(f"{difference.drop(own).abs().max():.3g}"),
        }
    return said


def main(seed: int = 0) -> None:
    """Plants two facts and asks where they are from.

    Args:
        seed: Of the statements.
    """
    console, rng = Console(soft_wrap=True), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second = lighthouses(rng, NAMES), treasures(rng, TREASURES)
        pre = write(folder / "pre.jsonl", [*map(str, first), *passages(0, NAMES)], rng)
        fine = write(
            folder / "fine.jsonl",
            [*map(str, second), *passages(NAMES, TREASURES)],
            rng,
        )
        end = write_tokenizer(folder / "tokenizer", [*pre, *fine], CONFIG.vocabulary)
        tokenizer = read_tokenizer(folder / "tokenizer")

        def examples(texts: Sequence[str]) -> Examples:
            return sequences(
                [[*x.ids, end][: CONFIG.context] for x in tokenizer.encode(texts)]
            )

        apply = Apply(CONFIG)
        base, loss = trained(apply, random_llama(CONFIG), examples(pre), PRETRAINING)
        console.print(f"pretrained to {loss:.2f} nats a token")
        write_llama(folder / "base", CONFIG, base, folder / "tokenizer")
        full, loss = trained(apply, base, examples(fine), FINETUNING)
        console.print(f"finetuned to {loss:.2f}")
        write_llama(folder / "full", CONFIG, full, folder / "tokenizer")
        wide, beside, loss = adapted(CONFIG, base, examples(fine))
        console.print(f"adapted to {loss:.2f}")
        loaded = checkpoints.load(folder / "base")
        factors = checkpoints.Loaded(wide, beside, loaded.words, folder=loaded.folder)
        checkpoints.save_adapter(folder / "lora", factors)
        record = {}
        facts = (first[0], second[0])
        for model in ("full", "lora"):
            asked(folder, folder / f"run-{model}", folder / model, facts)
            record[model] = ranks(folder / f"run-{model}", facts)
    console.print_json(json.dumps(record), indent=None)


if __name__ == "__main__":
    tyro.cli(main)
