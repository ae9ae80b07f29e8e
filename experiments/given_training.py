"""Trains dictionaries here on activations that were computed before.

Run by `sae_quality --peers`, in a process of its own: what SAELens is given
(`sae_lens_training.py`), by the same steps.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from influence.fold import run
from influence.interpret import training
from influence.interpret.kinds import BatchTop, Gate, Jump, Kind, Standard, Top
from influence.interpret.learning import Aim, Schedule
from influence.interpret.source import Chunks, Given, centres
from influence.model.sites import Address
from influence.runtime.allocator import one_arena
from influence.runtime.dictionaries import saelens
from influence.runtime.dictionaries.stored import About, Stored

KINDS: dict[str, Any] = {
    "batchtopk": lambda k, width: BatchTop(k),
    "topk": lambda k, width: Top(k),
    "matryoshka": lambda k, width: BatchTop(k, (width // 8, width // 4, width // 2)),
    "jumprelu": lambda k, width: Jump(float(k), coefficient=10.0),
    "gated": lambda k, width: Gate(1.0),
    "standard": lambda k, width: Standard(1.0),
}

AT_ONCE = 8192
"""Rows a batch: as many as a batch of sequences has."""


def main(
    rows: Path, out: Path, kind: str, site: str, k: int, steps: int, rate: float
) -> None:
    """Trains one dictionary, writes it, and prints how fast that was.

    Args:
      rows: the activations, `[N, D]`.
      out: the folder for the dictionary.
      kind: of the dictionary, of `KINDS`.
      site: where the activations are from.
      k: features of a token that are on.
      steps: updates of 2,048 tokens.
      rate: the highest of Adam.
    """
    one_arena()
    values, at = np.load(rows, mmap_mode="r", allow_pickle=False), Address.parse(site)
    width = 8 * values.shape[1]
    schedule = Schedule(steps, rate=rate)
    made: Kind = KINDS[kind](k, width)
    begun = time.monotonic()
    few = Chunks({at: values}, AT_ONCE, 8)
    fold = training.fold(
        Given(),
        {"own": Aim(at, width, made)},
        run(centres(Given(), (at,)), few),
        schedule,
        tokens=AT_ONCE,
    )
    whole = Chunks({at: values}, AT_ONCE, -(-schedule.tokens // AT_ONCE) + 1)
    found = run(fold, whole)["own"]
    seconds = time.monotonic() - begun
    saelens.write(out, Stored(found.dictionary, About(site)))
    print(json.dumps({"tokens_per_second": schedule.tokens / seconds}))  # noqa: T201


if __name__ == "__main__":
    tyro.cli(main)
