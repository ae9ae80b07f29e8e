"""Scores that were made once and are kept, with what they cost."""

import hashlib
import time
from pathlib import Path
from typing import NamedTuple

import jax
import xarray as xr

from experiments.memory import forget_peak, peak
from influence.runtime import formats
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
    """Returns where a method's scores of a subject's measurements are kept."""
    words = "\n".join([name, *subject.measurements])
    digest = hashlib.sha256(words.encode()).hexdigest()[:12]
    return work / "scores" / f"{digest}.zarr"


def scored(subject: Subject, name: str, score: Score, work: Path) -> Scored:
    """Returns a method's scores and what they cost, as they were kept if they were.

    Timed without what was compiled before: everybody compiles for themselves.
    """
    path = place(subject, name, work)
    if not path.exists():
        jax.clear_caches()
        forget_peak()
        begun = time.monotonic()
        found = score(subject)
        cost = {"seconds": time.monotonic() - begun, "megabytes": peak()}
        found = found.drop_vars([x for x in found.coords if x not in found.dims])
        kept = found.rename("score").assign_attrs(found.attrs | cost | {"name": name})
        path.parent.mkdir(parents=True, exist_ok=True)
        formats.write_scores(xr.Dataset({"score": kept}))(path)
    return read(subject, name, work)


def read(subject: Subject, name: str, work: Path) -> Scored:
    """Returns a method's scores as they were kept."""
    kept = formats.read_scores(place(subject, name, work)).score.load()
    return Scored(kept, kept.attrs["seconds"], kept.attrs["megabytes"])
