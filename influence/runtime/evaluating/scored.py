"""A run that has scores: what is judged."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xarray as xr
from rich.console import Console

from influence.attribution.measurements import Measurement
from influence.runtime.models import Model
from influence.runtime.run.asking import Question, asked, measurements
from influence.runtime.run.found import found
from influence.runtime.run.job import MODEL, Job, Models, opened_job
from influence.runtime.run.ledger import Stage, opened
from influence.runtime.run.packing import Corpus


@dataclass(frozen=True)
class Scored:
    """A run that has scores.

    Attributes:
      job: the run.
      model: what it is of.
      corpus: what the model was trained on.
      scores: `(query, train)`, of all that was scanned.
    """

    job: Job
    model: Model
    corpus: Corpus
    scores: xr.DataArray

    @cached_property
    def questions(self) -> list[Question]:
        """Returns what the run was asked."""
        return asked(self.job)

    @cached_property
    def measurements(self) -> Mapping[str, Measurement]:
        """Returns what is measured: what was asked."""
        return measurements(self.model, self.questions)

    def stage(self, name: str, **inputs: str) -> Stage:
        """Returns a stage of the truth, of everything that all truth depends on."""
        tokenizer = self.model.tokenizer
        told = self.job.ledger.stages[f"queries of {MODEL}"]["inputs"]["questions"]
        whole = {
            **self.job.common(self.model.digest),
            "corpus": self.corpus.digest,
            "tokenizer": tokenizer.sha256 if tokenizer else "none",
            "questions": told,
            **inputs,
        }
        return Stage(name, whole, {"role": MODEL, "corpus": self.corpus.source.name})

    @property
    def checksum(self) -> dict[str, str]:
        """Returns the checksum of the scores, as an input."""
        name = f"scores of {self.corpus.source.name}"
        return {"scores": self.job.ledger.stages[name]["checksum"]}


def opened_scored(run: Path, console: Console | None, given: Models | None) -> Scored:
    """Returns a run that has scores.

    Raises:
      FileNotFoundError: if it has none.
    """
    job = opened_job(opened(run), console, given)
    results = found(job)
    own = job.model(MODEL)
    corpus = job.corpus(own)
    return Scored(job, own, corpus, results.total().transpose("query", "train"))
