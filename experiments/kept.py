"""Scores that were made once and are kept, with what they cost."""

import hashlib
from pathlib import Path

import jax
import numpy as np
import xarray as xr

from influence.runtime import formats
from influence.runtime.evaluating.scoring import costed
from influence.truth.methods import Score
from influence.truth.subject import Subject

KRONFLUENCE = "ekfac, kronfluence"
"""The name of the scores that `methods_kronfluence.py` makes."""


def folder(task: str) -> Path:
    """Returns where a task's scores and retrainings are kept if nobody says."""
    return Path("runs") / f"methods_{task}"


def place(subject: Subject, name: str, work: Path) -> Path:
    """Returns where a method's scores of a subject's measurements are kept.

    Named after the model's weights, so that those of another model are not taken for
    them.
    """
    state = hashlib.sha256("\n".join([name, *subject.measurements]).encode())
    for x in jax.tree.leaves(subject.params):
        state.update(np.asarray(x).tobytes())
    return work / "scores" / f"{state.hexdigest()[:12]}.zarr"


def scored(
    subject: Subject, name: str, score: Score, work: Path, *, warm: bool = False
) -> xr.DataArray:
    """Returns a method's scores with what they cost, as they were kept if they were.

    Args:
      subject: what is asked about.
      name: of the method.
      score: the method.
      work: where scores are kept.
      warm: whether only what is compiled already is timed.
    """
    if not place(subject, name, work).exists():
        write(subject, name, work, costed(subject, score, warm=warm))
    return read(subject, name, work)


def write(subject: Subject, name: str, work: Path, scores: xr.DataArray) -> None:
    """Keeps a method's scores."""
    path = place(subject, name, work)
    path.parent.mkdir(parents=True, exist_ok=True)
    formats.write_scores(scores.to_dataset(name="score"))(path)


def read(subject: Subject, name: str, work: Path) -> xr.DataArray:
    """Returns a method's scores as they were kept."""
    return formats.read_scores(place(subject, name, work)).score.load()
