"""The corpora a command is told to read."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from influence.runtime.models import Model
from influence.runtime.run.job import Job
from influence.runtime.run.options import Data
from influence.runtime.run.packing import Corpus


def corpora(job: Job, model: Model, said: Sequence[str], own: Corpus) -> list[Corpus]:
    """Returns what a command reads: the corpus of the fit, or those that are named.

    Args:
      job: the run's.
      model: whose tokens they are in.
      said: `PATH` or `NAME=PATH` of each.
      own: the corpus of the fit.

    Raises:
      ValueError: if two would have one name.
    """
    asked = [_named(job, x) for x in said]
    names = [job.source(*x).name for x in asked]
    for name, (data, _) in zip(names, asked, strict=True):
        taken = name == own.source.name and data.data != job.options.data.data
        if taken or names.count(name) > 1:
            raise ValueError(
                f"Two corpora are called {name!r}, and so would their sequences be. "
                f"Name {data.data} otherwise: --data NAME={data.data}."
            )
    return [job.pack(model, *x) for x in asked] or [own]


def _named(job: Job, said: str) -> tuple[Data, str | None]:
    """Returns a corpus of `PATH` or `NAME=PATH`, read as that of the fit is."""
    name, equals, place = said.partition("=")
    if not equals or Path(said).exists():
        name, place = "", said
    own = job.options.data
    if place == own.data:
        return own, name or None
    return replace(own, data=place, split=None, pattern="*"), name or None
