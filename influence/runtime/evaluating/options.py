"""What `influence evaluate` is told: one record each, shown by `--help`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from influence.runtime.run.options import Folder
from influence.truth.retraining import Protocol, resampled, same_seed

Word = Literal["same-seed", "resampled"]

DROP = {"same-seed": 0.01, "resampled": 0.5}
"""The share of sequences each protocol leaves out if nothing is said."""


@dataclass(frozen=True)
class Lds:
    """Judges a run's scores by retraining without random sequences.

    Attributes:
      run: The run folder, scanned to its end.
      recipe: A TOML file that says how the run's model was trained.
      protocol: `same-seed`: only what is left out changes; or `resampled`: averaged
        over other seeds.
      subsets: How many sets of sequences are left out.
      drop: Which share of the sequences each set is; 0.01, or 0.5 if resampled.
      repeats: Seeds each set is trained with if resampled.
      draw: The seed the sets are drawn by.
      at_once: Trainings side by side.
      save_every: Seconds between saves, or more if saving takes over 2 % of the time.
    """

    run: Folder
    recipe: Path
    protocol: Word = "same-seed"
    subsets: int = 100
    drop: float | None = None
    repeats: int = 5
    draw: int = 0
    at_once: int = 1
    save_every: float = 60.0


@dataclass(frozen=True)
class Pbrf:
    """Holds a run's scores beside what they are the derivative of.

    That is the proximal Bregman response: nothing is retrained, and no recipe needed.

    Attributes:
      run: The run folder, scanned to its end.
      sequences: How many sequences' responses are found; they are drawn at random.
      held: How many sequences' predictions are held in place; all if left out.
      copies: How many copies of a sequence more and less; fewer than one are nearer to
        a derivative.
      tolerance: How much of an objective's slope may be left.
      evaluations: Of an objective, at most.
      draw: The seed both are drawn by.
      at_once: Responses found side by side.
      save_every: Seconds between saves, or more if saving takes over 2 % of the time.
    """

    run: Folder
    sequences: int = 20
    held: int | None = None
    copies: float = 1.0
    tolerance: float = 0.01
    evaluations: int = 500
    draw: int = 0
    at_once: int = 4
    save_every: float = 60.0


@dataclass(frozen=True)
class Removal:
    """Removes a query's top sequences, more and more of them, and trains again.

    Attributes:
      run: The run folder, scanned to its end.
      recipe: A TOML file that says how the run's model was trained.
      query: Which question, by number or name.
      top: How many sequences are removed at most.
      draw: The seed random sequences are drawn by.
      at_once: Trainings side by side.
      save_every: Seconds between saves, or more if saving takes over 2 % of the time.
    """

    run: Folder
    recipe: Path
    query: str
    top: int = 50
    draw: int = 0
    at_once: int = 1
    save_every: float = 60.0


@dataclass(frozen=True)
class Methods:
    """Judges methods on a training of one's own: the table.

    Attributes:
      experiment: A TOML file: data, model, recipe, protocol, methods.
      out: The folder to write to; named after the file if left out.
      save_every: Seconds between saves, or more if saving takes over 2 % of the time.
    """

    experiment: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None
    save_every: float = 60.0


def protocol_of(
    word: Word, subsets: int, drop: float | None, repeats: int, draw: int, seed: int
) -> Protocol:
    """Returns the protocol that options name, for a model of some seed.

    Raises:
      ValueError: if nothing or everything would be left out.
    """
    share = DROP[word] if drop is None else drop
    if word == "same-seed":
        return same_seed(subsets, share, seed=seed, draw=draw)
    found = resampled(subsets, share, repeats=repeats, draw=draw)
    return replace(found, seeds=tuple(seed + x for x in found.seeds))
