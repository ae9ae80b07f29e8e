"""TOML files a person has written: what is said in them, and nothing else."""

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

LEAST = {
    "at_once": 1,
    "batch": 1,
    "blocks": 1,
    "context": 2,
    "decay": 0,
    "groups": 0,
    "heads": 1,
    "hidden": 1,
    "last": 0,
    "momentum": 0,
    "b2": 0,
    "queries": 1,
    "repeats": 1,
    "root": 0,
    "seed": 0,
    "draw": 0,
    "sequences": 2,
    "steps": 2,
    "subsets": 2,
    "vocabulary": 2,
    "warmup": 0,
    "width": 1,
}
"""The smallest values that make sense."""

ABOVE = {"clip": 0, "drop": 0, "rate": 0}
"""What values have to be larger than."""

BELOW = {"b2": 1, "drop": 1, "momentum": 1, "warmup": 1}
"""What values have to be smaller than."""

WORDS = {int: "a whole number", float: "a number", str: "text", list: "a list"}


def read_toml(path: Path) -> dict[str, Any]:
    """Returns what a TOML file says.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it can't be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Write one: docs/truth.md.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}.") from error


SIMPLE: dict[Any, type] = {
    **{x: x for x in (int, float, str, bool)},
    # A file has no word for None: it leaves the field out.
    float | None: float,
}
"""By the type of a record's field, that of the value a file has for it."""


def kinds(record: type) -> dict[str, type]:
    """Returns the types of a record's simple fields, by name."""
    return {x.name: SIMPLE[x.type] for x in fields(record) if x.type in SIMPLE}


def check_table(
    said: Mapping[str, Any],
    known: Mapping[str, type],
    needed: Collection[str],
    where: str,
) -> None:
    """Raises unless a table says what is needed, only what is known, and makes sense.

    Raises:
      ValueError: naming the key, its value and what may be said.
    """
    if odd := [x for x in said if x not in known]:
        raise ValueError(
            f"{where} says {', '.join(odd)}, which means nothing here. Known are "
            f"{', '.join(known)}."
        )
    if missing := [x for x in needed if x not in said]:
        raise ValueError(f"{where} does not say {', '.join(missing)}. Say it.")
    for name, value in said.items():
        kind = known[name]
        right = (int, float) if kind is float else kind
        if not isinstance(value, right) or isinstance(value, bool) != (kind is bool):
            raise ValueError(
                f"{name} = {value!r} in {where} is not {WORDS.get(kind, 'a yes or no')}"
                "."
            )
        _check_number(name, value, where)


def _check_number(name: str, value: Any, where: str) -> None:
    if name in LEAST and value < LEAST[name]:
        limit = f"{LEAST[name]} at least"
    elif name in ABOVE and not value > ABOVE[name]:
        limit = f"more than {ABOVE[name]}"
    elif name in BELOW and not value < BELOW[name]:
        limit = f"less than {BELOW[name]}"
    else:
        return
    raise ValueError(f"{name} = {value} in {where} makes no sense. Give {limit}.")
