"""What a run has found: its scores, whatever corpora and models they are of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rich.console import Console

from influence.runtime import formats
from influence.runtime.corpus.packed import Packed
from influence.runtime.corpus.texts import texts
from influence.runtime.run.asking import queries_file
from influence.runtime.run.job import BASE, MODEL, Job, Models, opened_job
from influence.runtime.run.kept import check_scores, named, scores_at, shares_at
from influence.runtime.run.ledger import opened
from influence.runtime.run.packing import Corpus
from influence.runtime.run.stream import LAYERS, SCORE, read_scores


@dataclass(frozen=True)
class Found:
    """A run's scores.

    Attributes:
      job: the run.
      corpora: those that were scanned, by name.
    """

    job: Job
    corpora: Mapping[str, Corpus]

    def total(self, *, difference: bool = False) -> xr.DataArray:
        """Returns `(query, train)` over all corpora, ids telling them apart.

        Args:
          difference: whether the model's scores minus the base's: what finetuning made
            of them, rather than what they are.

        Raises:
          ValueError: if there is no base, or scores are damaged.
        """
        return self._of_both(SCORE, difference, None)

    def layers(self, ids: list[str], *, difference: bool = False) -> xr.DataArray:
        """Returns `(query, train, layer)` of some sequences; one layer if none is kept.

        Args:
          ids: the sequences.
          difference: as for `total`.
        """
        return self._of_both(LAYERS, difference, ids)

    def shares(self, *, difference: bool = False) -> xr.DataArray:
        """Returns `(query, train, token)` of the most extreme sequences."""
        parts = []
        for name in self.corpora:
            own = self._shares(MODEL, name).to_dataset(name=SCORE)
            if difference:
                own = own - self._shares(BASE, name).to_dataset(name=SCORE)
            parts.append(own)
        return _joined(parts, SCORE, join="outer", fill_value=0.0)

    def texts(self, ids: list[str]) -> dict[str, str]:
        """Returns the source's own text of some sequences, by name."""
        tokenizer, found = self.job.tokenizer(), {}
        for name, corpus in self.corpora.items():
            own = [x for x in ids if x.rsplit(":", 2)[0] == name]
            if tokenizer is None:  # its rows are token ids, and that is all they are
                found |= {
                    x: " ".join(map(str, sequence_tokens(corpus.packed, x)))
                    for x in own
                }
                continue
            pieces = texts(corpus.packed, corpus.source, own, tokenizer)
            found |= {k: "".join(x) for k, x in pieces.items()}
        return found

    def _of_both(
        self, what: str, difference: bool, ids: list[str] | None
    ) -> xr.DataArray:
        own = self._of(MODEL, what, ids)
        if not difference:
            return own
        if BASE not in self.job.roles:
            raise ValueError(
                "The run has no base to take the difference from. Fit with --base."
            )
        other = self._of(BASE, what, ids)
        found = own - other.sel(train=own["train"])
        return found.assign_attrs(own.attrs, of="model minus base").rename(own.name)

    def _of(self, role: str, what: str, ids: list[str] | None) -> xr.DataArray:
        parts = []
        for name in self.corpora:
            path = scores_at(self.job, role, name)
            with read_scores(path) as found:
                kept = found[what if what in found else SCORE]
                if ids is not None:
                    here = np.isin(kept["train"].values, ids)
                    kept = kept.isel(train=np.flatnonzero(here))
                kept = kept.load().assign_attrs(found.attrs)
                parts.append(kept.to_dataset(name=what))
        whole = _joined(parts, what, combine_attrs="override")
        flat = what == LAYERS and "layer" not in whole.dims
        return whole.expand_dims(layer=["all"]) if flat else whole

    def _shares(self, role: str, corpus: str) -> xr.DataArray:
        name = shares_at(role, corpus)
        found = self.job.ledger.run.read(name, formats.read_scores)
        return found[SCORE]


def sequence_tokens(packed: Packed, id_: str) -> list[int]:
    """Returns the token ids of a sequence, from its name."""
    return packed.tokens_at(packed.place_of(id_)).tolist()


def _joined(parts: list[xr.Dataset], what: str, **options: Any) -> xr.DataArray:
    """Returns an array of several data sets, one behind the other along `train`."""
    whole: Any = xr.concat(parts, "train", **options)
    return whole[what]


def results(run: str | Path, given: Models | None = None) -> Found:
    """Returns what a run has found.

    Args:
      run: the run folder.
      given: models by role, if they were given to `fit`.

    Raises:
      FileNotFoundError: if nothing was scanned to its end.

    Example:
      >>> from influence.attribution.scores import rankings
      >>> from influence.runtime.run.found import results
      >>> found = results(done, own)
      >>> found.total().dims, list(found.corpora)
      (('query', 'train'), ['corpus'])
      >>> ((best, *_),) = rankings(found.total(), 3)
      >>> "1 2 3" in found.texts([best.id])[best.id]
      True
    """
    return found(opened_job(opened(Path(run)), Console(quiet=True), given))


def found(job: Job) -> Found:
    """Returns what a run has found, from its job.

    Raises:
      FileNotFoundError: if nothing was scanned to its end.
    """
    names = job.noted("scanned").get("corpora")
    if names is None:
        raise FileNotFoundError(
            f"The run in {job.folder} has no scores yet. Run `influence scan "
            f"{job.folder}` to its end."
        )
    made = []
    for role in job.roles:
        for name in names:
            made.append(_current(job, role, name))
            check_scores(job, role, name)
    if len({(x["n_train"], x["candidates"]) for x in made}) > 1:
        raise ValueError(
            "The corpora were not scanned alike. Run `influence scan "
            f"{job.folder}` again, to its end."
        )
    return Found(job, {name: job.reopened(name) for name in names})


def _current(job: Job, role: str, corpus: str) -> Mapping[str, str]:
    """Returns what the scores of a corpus were made from, if that is what there is.

    Raises:
      FileNotFoundError: if there are no scores, or they are not split over tokens yet.
      ValueError: if something else was asked since, or the corpus is another.
    """
    scan = named(role, corpus)
    entry = job.ledger.needed(f"scores of {scan}", "scan")
    shares = job.ledger.needed(f"tokens of {scan}", "scan")
    job.ledger.needed(f"queries of {role}", "query")
    now = {
        "queries": job.ledger.run.manifest["artifacts"][queries_file(role)]["sha256"],
        "corpus": job.ledger.stages[f"corpus {corpus}"]["key"],
    }
    odd = [k for k, x in now.items() if entry["inputs"][k] != x]
    if shares["inputs"]["scores"] != entry["checksum"]:
        odd.append("shares of tokens")
    if odd:
        raise ValueError(
            f"The scores of {scan} are of other {' and '.join(odd)} than the run now "
            f"has. Run `influence scan {job.folder}` again, to its end."
        )
    return entry["inputs"]
