"""`influence sae steer`: what a model says with features edited."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from influence.interpret import steering
from influence.interpret.steering import Comparison, Edit, Steered, Steering, compare
from influence.model.sites import Address
from influence.runtime.dictionaries.folders import open_dictionary
from influence.runtime.dictionaries.stored import Stored
from influence.runtime.models import Model, open_model
from influence.runtime.report.steering import Said, Trial, render
from influence.runtime.run.job import MODEL, Models
from influence.runtime.run.options import check_numbers
from influence.runtime.sae.options import Steer
from influence.runtime.sae.reading import check_sites, site_of
from influence.runtime.store import atomic, check_file

POSITIONS = {
    "all": steering.ALWAYS,
    "prompt": steering.PROMPT,
    "generated": steering.GENERATED,
}

ABLATED = "ablated"
WAYS = {"add": "added:", "clamp": "clamped to", "scale": "scaled by"}
"""What an edit is called on the page."""


def steer(
    options: Steer, console: Console | None = None, given: Models | None = None
) -> Comparison:
    """Shows what a model says with edits and without, and what they cost.

    Args:
      options: what is edited, and how.
      console: where to show it; the terminal if left out.
      given: the model, by the role `model`, instead of opening it.

    Raises:
      ValueError: if options, dictionary and model do not go together.
      FileNotFoundError: if something is not where the options say.
    """
    check_numbers(options)
    if options.out is not None:
        check_file(options.out)
    edits = _edits(options)
    stored = open_dictionary(options.sae)
    models = given or {}
    model = models.get(MODEL) or open_model(options.model, dtype=options.dtype)
    prompts = [_tokens(model, x) for x in options.prompt]
    if not prompts:
        raise ValueError("There is nothing to continue. Give a --prompt.")
    inputs = {"tokens": np.asarray([prompts[0]], np.int32)}
    site, writes = _sites(model, stored, inputs)
    check_sites(stored, model, inputs, site, writes)
    own = stored.dictionary
    steering.check_edits(edits, own)
    if options.units == "maximum":
        edits = steering.in_units(edits, _maximum(options, stored))
    said = partial(
        compare,
        model.task,
        Steered(model.task.apply, site, writes, options.freeze_attention),
        prompts=prompts,
        length=options.length,
        stop=model.tokenizer.eos if model.tokenizer else None,
        temperature=options.temperature,
        key=jax.random.key(options.seed),
    )

    def held(edits: Sequence[Edit]) -> Steering:
        return Steering(model.params, own, steering.gathered(edits, own))

    shown = console or Console()
    found = said(held(edits))
    _show(shown, options, model, found)
    if options.out is not None:
        each = {_spelled(options): found}
        out = [steering.ablate(x.feature, x.positions) for x in edits]
        if out != edits:
            each[ABLATED] = said(held(out))
        _write(options.out, options, model, stored, each)
        shown.print(f"The page: {options.out}", markup=False, soft_wrap=True)
    return found


def _spelled(options: Steer) -> str:
    """Returns what is done to features, in words."""
    given = {"add": options.add, "clamp": options.clamp, "scale": options.scale}
    for way, values in given.items():
        if values:
            numbers = ", ".join(f"{x:g}" for x in values)
            largest = options.units == "maximum" and way != "scale"
            return f"{WAYS[way]} {numbers}{' × its largest' if largest else ''}"
    return ABLATED


def _write(
    path: Path,
    options: Steer,
    model: Model,
    stored: Stored,
    each: Mapping[str, Comparison],
) -> None:
    """Writes a page of what the model says, by edit."""
    plain = next(iter(each.values())).plain
    facts = [
        ("model", options.model),
        ("dictionary", options.sae),
        ("site", stored.about.site),
        ("features", ", ".join(map(str, options.feature))),
        ("positions", options.positions),
        ("temperature", f"{options.temperature:g}"),
    ]
    trials = [
        Trial(
            prompt,
            _text(model, plain[i]),
            [
                Said(name, _text(model, x.steered[i]), x.kl[i], x.cost[i])
                for name, x in each.items()
            ],
        )
        for i, prompt in enumerate(options.prompt)
    ]
    with atomic(path) as temporary:
        text = render(options.model, facts, trials)
        temporary.write_text(text, encoding="utf-8")


def _sites(model: Model, stored: Stored, inputs: dict) -> tuple[Address, Address]:
    """Returns what the dictionary reads and writes in the model."""
    site = site_of(model, inputs, stored.about.site)
    if stored.about.writes is None:
        return site, site
    return site, site_of(model, inputs, stored.about.writes)


def _edits(options: Steer) -> list[Edit]:
    """Returns the edits that the options name.

    Raises:
      ValueError: if features and strengths can't be paired.
    """
    given = [x for x in (options.add, options.clamp, options.scale) if x]
    count = len(options.feature)
    if not count:
        raise ValueError("No feature is named. Give --feature and its number.")
    if len(given) > 1 or (given and len(given[0]) not in (1, count)):
        raise ValueError(
            f"{count} features and {sum(map(len, given))} strengths were given. Give "
            "one of --add, --clamp and --scale, once for all features or once for each."
        )
    where = _positions(options.positions)
    if not given:
        return [steering.ablate(i, where) for i in options.feature]
    make = (
        steering.add
        if options.add
        else steering.clamp
        if options.clamp
        else steering.scale
    )
    (values,) = given
    each = values * count if len(values) == 1 else values
    pairs = zip(options.feature, each, strict=True)
    return [make(i, x, where) for i, x in pairs]


def _positions(text: str) -> tuple[int, int]:
    if text in POSITIONS:
        return POSITIONS[text]
    first, colon, last = text.partition(":")
    try:
        found = int(first), int(last if colon else first)
    except ValueError:
        found = (1, 0)
    if found[0] > found[1]:
        raise ValueError(
            f"--positions {text} names no positions. Give all, prompt, generated, or "
            "the first and the last, counted from the end of the prompt: -3:-1."
        )
    return found


def _maximum(options: Steer, stored: Stored) -> np.ndarray:
    """Returns features' largest activations, as the dictionary's folder knows them."""
    said = stored.about.facts.get("maximum")
    if said is None and (options.add or options.clamp):
        raise ValueError(
            f"{options.sae} does not say how large its features' activations get. Give "
            "--units absolute, and strengths in units of activations."
        )
    return np.asarray(said if said is not None else np.ones(stored.dictionary.width))


def _tokens(model: Model, prompt: str) -> list[int]:
    """Returns a prompt's token ids; without a tokenizer it is them, in words."""
    if model.tokenizer is not None:
        return list(model.tokenizer.encode([prompt])[0].ids)
    words = prompt.split()
    if not words or not all(x.isdecimal() for x in words):
        raise ValueError(
            f"The model has no tokenizer, and the prompt {prompt!r} is text. Give "
            "token ids, or put a tokenizer.json into the model's folder."
        )
    return [int(x) for x in words]


def _text(model: Model, ids: list[int]) -> str:
    if model.tokenizer is None:
        return " ".join(map(str, ids))
    return model.tokenizer.tokenizer.decode(ids, skip_special_tokens=False)


def _show(console: Console, options: Steer, model: Model, found: Comparison) -> None:
    for i, prompt in enumerate(options.prompt):
        table = Table(title=escape(prompt), title_justify="left", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        table.add_row("as it is", escape(_text(model, found.plain[i])))
        table.add_row("steered", escape(_text(model, found.steered[i])))
        table.add_row(
            "cost",
            f"KL {found.kl[i]:.3f}, cross-entropy {found.cost[i]:+.3f} nats a token "
            "of what it says as it is",
        )
        console.print(table)
