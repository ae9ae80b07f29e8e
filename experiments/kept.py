"""Scores that were made once and are kept, with what they cost."""

import hashlib
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import xarray as xr

from experiments.memory import forget_peak, peak
from influence.runtime import formats
from influence.truth import methods
from influence.truth.methods import Score, Subject

KRONFLUENCE = "ekfac, kronfluence"
"""The name of the scores that `methods_kronfluence.py` makes."""


class Scored(NamedTuple):
    """A method's scores, and what they cost."""

    scores: xr.DataArray
    seconds: float
    megabytes: float


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
) -> Scored:
    """Returns a method's scores and what they cost, as they were kept if they were.

    Args:
      subject: what is asked about.
      name: of the method.
      score: the method.
      work: where scores are kept.
      warm: whether to do it twice and time the second time, when everything is
        compiled: where compiling takes longer than what is timed.
    """
    path = place(subject, name, work)
    if not path.exists():
        for _ in range(1 + warm):
            forget_peak()
            begun = time.monotonic()
            found = _converged(score, subject)
        cost = {"seconds": time.monotonic() - begun, "megabytes": peak()}
        found = found.drop_vars([x for x in found.coords if x not in found.dims])
        kept = found.rename("score").assign_attrs(found.attrs | cost | {"name": name})
        path.parent.mkdir(parents=True, exist_ok=True)
        formats.write_scores(xr.Dataset({"score": kept}))(path)
    return read(subject, name, work)


def _converged(score: Score, subject: Subject) -> xr.DataArray:
    """Returns scores; such as rank nothing of a method that diverges."""
    try:
        return score(subject)
    except ValueError as error:
        if "diverged" not in str(error):
            raise
        return 0 * methods.chance(subject)


def read(subject: Subject, name: str, work: Path) -> Scored:
    """Returns a method's scores as they were kept."""
    kept = formats.read_scores(place(subject, name, work)).score.load()
    return Scored(kept, kept.attrs["seconds"], kept.attrs["megabytes"])
