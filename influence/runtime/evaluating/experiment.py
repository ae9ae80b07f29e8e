"""An experiment file: what is trained, on what, and which methods are judged by it.

    queries = 30                   # held-out sequences, asked about
    methods = ["ekfac", "cg"]      # all that apply if left out

    [data]
    text = "corpus.jsonl"          # or run = "RUN": the corpus of a run
    sequences = 1000               # to train on; all others if left out

    [model]                        # a decoder, its weights random
    vocabulary = 512               # of a tokenizer trained on the text; not with a run
    context = 48                   # not with a run
    width = 48
    hidden = 96
    heads = 4
    blocks = 2

    [recipe]                       # as in a recipe file, without `from`
    steps = 128
    batch = 64
    rate = 1e-2

    [protocol]
    name = "same-seed"             # or "resampled": drop = 0.5, repeats = 5
    subsets = 100
    drop = 0.01
    at_once = 4                    # trainings side by side

Paths are relative to the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from influence.model.train import AdamW
from influence.runtime.evaluating.bench import SCRATCH
from influence.runtime.evaluating.options import Word, protocol_of
from influence.runtime.recipes import Trained, recipe_of
from influence.runtime.tables import check_table, read_toml
from influence.truth.methods import METHODS, TRAJECTORY
from influence.truth.retraining import Protocol

TABLES = ("data", "model", "recipe", "protocol")

SIZES = {"width": int, "hidden": int, "heads": int, "blocks": int}

OF_TEXT = {"vocabulary": int, "context": int}
"""What a run's corpus says by itself."""

ALPHABET = 257
"""The smallest vocabulary of a byte-level tokenizer that joins anything."""


@dataclass(frozen=True)
class Experiment:
    """What methods are judged on.

    Attributes:
      text: a corpus as `fit` takes it; None if it is a run's.
      run: a run folder; None if it is a text.
      column: of the corpus, with the documents.
      sequences: how many are trained on; None for all that are not asked about.
      queries: how many are held out, and asked about.
      sizes: of the decoder.
      trained: how it is trained.
      protocol: what is left out.
      at_once: trainings side by side.
      methods: which are judged.
    """

    text: Path | None
    run: Path | None
    column: str
    sequences: int | None
    queries: int
    sizes: Mapping[str, int]
    trained: Trained
    protocol: Protocol
    at_once: int
    methods: tuple[str, ...]


def read_experiment(path: Path) -> Experiment:
    """Returns what an experiment file says.

    Raises:
      FileNotFoundError: if there is none, or no data where it says.
      ValueError: if it says something that means nothing, or not enough.

    Example:
      >>> from influence.runtime.evaluating.experiment import read_experiment
      >>> said = read_experiment(table)
      >>> said.methods, said.protocol.subsets
      (('ekfac', 'gradient dot'), 4)
    """
    said, where = read_toml(path), str(path)
    whole = {"queries": int, "methods": list, **dict.fromkeys(TABLES, dict)}
    check_table(said, whole, ("queries", "data", "model", "recipe"), where)
    data, protocol = said["data"], said.get("protocol", {})
    known = {"text": str, "run": str, "text_column": str, "sequences": int}
    check_table(data, known, (), f"[data] of {where}")
    trained = _recipe(said["recipe"], f"[recipe] of {where}")
    chosen, at_once = _protocol(protocol, trained.seed, f"[protocol] of {where}")
    text, run = _places(data, path)
    return Experiment(
        text=text,
        run=run,
        column=data.get("text_column", "text"),
        sequences=data.get("sequences"),
        queries=said["queries"],
        sizes=_sizes(said["model"], run is None, f"[model] of {where}"),
        trained=trained,
        protocol=chosen,
        at_once=at_once,
        methods=_methods(said.get("methods"), trained, where),
    )


def _places(data: Mapping[str, Any], path: Path) -> tuple[Path | None, Path | None]:
    if ("text" in data) == ("run" in data):
        raise ValueError(
            f"[data] of {path} says {'both' if 'text' in data else 'neither'} text "
            "and run. Say one: a corpus, or a run folder that has one."
        )
    found = [path.parent / data[x] if x in data else None for x in ("text", "run")]
    for place in found:
        if place is not None and not place.exists():
            raise FileNotFoundError(f"[data] of {path}: there is nothing at {place}.")
    return found[0], found[1]


def _recipe(said: Mapping[str, Any], where: str) -> Trained:
    begun = said.get("from", SCRATCH)
    if begun != SCRATCH:
        raise ValueError(
            f'from = {begun!r} in {where}: its decoder is of random weights. Say "'
            f'{SCRATCH}", or leave it out.'
        )
    return recipe_of({**said, "from": SCRATCH}, where)


def _protocol(said: Mapping[str, Any], seed: int, where: str) -> tuple[Protocol, int]:
    numbers = dict.fromkeys(("subsets", "repeats", "draw", "at_once"), int)
    check_table(said, {"name": str, "drop": float, **numbers}, (), where)
    word = said.get("name", "same-seed")
    if word not in get_args(Word):
        raise ValueError(
            f"name = {word!r} in {where} is no protocol. Say one of "
            f"{', '.join(get_args(Word))}."
        )
    protocol = protocol_of(
        word,
        said.get("subsets", 100),
        said.get("drop"),
        said.get("repeats", 5),
        said.get("draw", 0),
        seed,
    )
    return protocol, said.get("at_once", 1)


def _sizes(said: Mapping[str, Any], of_text: bool, where: str) -> dict[str, int]:
    known = {**SIZES, **OF_TEXT} if of_text else SIZES
    check_table(said, known, known, where)
    if said.get("vocabulary", ALPHABET) < ALPHABET:
        raise ValueError(
            f"vocabulary = {said['vocabulary']} in {where} is too small for a "
            f"byte-level tokenizer. Give {ALPHABET} at least."
        )
    return dict(said)


def _methods(said: list[Any] | None, trained: Trained, where: str) -> tuple[str, ...]:
    """Returns which methods are judged: those named, or all that apply."""
    optimizer = trained.recipe.optimizer
    rough = isinstance(optimizer, AdamW) and optimizer.root == 0
    if said is None:
        return tuple(
            k for k, x in METHODS.items() if not (rough and x.needs == TRAJECTORY)
        )
    if odd := [x for x in said if x not in METHODS]:
        raise ValueError(
            f"methods in {where} has {', '.join(map(repr, odd))}, which is none. They "
            f"are {', '.join(map(repr, METHODS))}."
        )
    if not said or len(set(said)) < len(said):
        raise ValueError(f"methods = {said} in {where}: name some, each once.")
    if rough and (sharp := [x for x in said if METHODS[x].needs == TRAJECTORY]):
        raise ValueError(
            f"{sharp[0]} in {where} differentiates training, which AdamW makes no "
            "smooth function of its data. Say root = 1e-8 in [recipe], or leave it out."
        )
    return tuple(said)
