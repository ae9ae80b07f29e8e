"""Trains dictionaries here on activations that were computed before.

Run by `sae_quality --peers`, in a process of its own: what SAELens is given
(`sae_lens_training.py`), by the same steps.
"""

import json
import time
from typing import Any

import numpy as np
import tyro

from experiments.given import BATCH, Given
from influence.fold import run
from influence.interpret import source, training
from influence.interpret.kinds import BatchTop, Gate, Jump, Kind, Standard, Top
from influence.interpret.learning import Aim, Schedule
from influence.interpret.source import Chunks, centres
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


def main(given: Given) -> None:
    """Trains one dictionary, writes it, and prints how fast that was."""
    one_arena()
    values = np.load(given.rows, mmap_mode="r", allow_pickle=False)
    at, width = Address.parse(given.site), 8 * values.shape[1]
    schedule = Schedule(given.steps, BATCH, given.rate)
    kind: Kind = KINDS[given.kind](given.k, width)
    begun = time.monotonic()
    given_values, few = source.Given(), Chunks({at: values}, AT_ONCE, 8)
    centre, aims = run(centres(given_values, (at,)), few), {"own": Aim(at, width, kind)}
    fold = training.fold(given_values, aims, centre, schedule, tokens=AT_ONCE)
    whole = Chunks({at: values}, AT_ONCE, -(-schedule.tokens // AT_ONCE) + 1)
    found = run(fold, whole)["own"]
    seconds = time.monotonic() - begun
    saelens.write(given.out, Stored(found.dictionary, About(given.site)))
    print(json.dumps({"tokens_per_second": schedule.tokens / seconds}))  # noqa: T201


if __name__ == "__main__":
    main(tyro.cli(Given, description=__doc__))
