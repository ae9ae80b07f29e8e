"""`influence scan`: every training sequence's score, streamed to the disk."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import xarray as xr
from rich.console import Console

from influence.attribution import top
from influence.attribution.lexical import candidates
from influence.attribution.query import Query
from influence.attribution.scan import axis, reader
from influence.attribution.scores import told
from influence.attribution.tokens import token_scores
from influence.runtime import formats
from influence.runtime.corpus.packed import Packed
from influence.runtime.driver import rest
from influence.runtime.models import Model
from influence.runtime.run.asking import (
    QUESTIONS,
    Question,
    opened_job,
    queries_file,
    tokens_of,
)
from influence.runtime.run.batching import (
    Measured,
    fastest,
    halving,
    sizes,
    timed,
)
from influence.runtime.run.fitting import fitted
from influence.runtime.run.job import GB, MODEL, Corpus, Job, Models, clock
from influence.runtime.run.ledger import Ledger, Stage, locked, opened
from influence.runtime.run.options import Data, Scan
from influence.runtime.run.stream import Names, Stream, forget, read_scores
from influence.runtime.store import checksum

LARGEST = 4 * GB
"""How many bytes of scores by layer are kept if nothing is said."""

SHOWN = 5
"""Of how many sequences of either sign the shares of tokens are kept, each query."""


class Keep(NamedTuple):
    """What of the scores is kept.

    Attributes:
      layers: whether by layer, or only totals.
      top: of how many sequences of either sign a query; None for all.
    """

    layers: bool
    top: int | None = None


def scan(
    options: Scan, console: Console | None = None, given: Models | None = None
) -> Ledger:
    """Scores a run's corpora for its questions, or goes on with what was begun.

    Args:
      options: what is scanned, and what is kept.
      console: where to show what will be done, and what happens; the terminal.
      given: models by role instead of opening them, as for `fit`.

    Raises:
      ValueError: if the options do not go together, or something changed since the
        questions were solved for.
      FileNotFoundError: if nothing was asked yet.
    """
    with locked(options.run):
        ledger = opened(options.run)
        job = opened_job(ledger, console, given)
        for role in job.roles:
            model = job.model(role)
            own = job.corpus(model, job.options.data)
            fitted(job, role, model, own)
            query = _asked(job, role, model)
            corpora = _corpora(job, model, options, own)
            n_train = options.n_train or sum(len(x.packed) for x in corpora)
            for corpus in corpora:
                _Scanning(job, role, model, query, corpus, n_train, options).all()
            said = {"corpora": [x.source.name for x in corpora], "n_train": n_train}
            job.note("scanned", **said, data=list(options.data))
    return ledger


def _asked(job: Job, role: str, model: Model) -> Query:
    """Returns a role's queries.

    Raises:
      FileNotFoundError: if nothing was asked.
      ValueError: if the model or its curvature changed since.
    """
    entry = job.ledger.needed(f"queries of {role}", "query")
    artifacts = job.ledger.run.manifest["artifacts"]
    files = job.noted(f"curvature of {role}")["files"]
    now = {
        **job.common(model.digest),
        "curvature": " ".join(artifacts[x]["sha256"] for x in files),
    }
    changed = sorted(k for k, x in now.items() if entry["inputs"][k] != x)
    if changed:
        raise ValueError(
            f"The queries of {role} were solved with other {', '.join(changed)}. Run "
            f"`influence query {job.folder}` again."
        )
    return job.ledger.run.read(queries_file(role), formats.read_query)


def _corpora(job: Job, model: Model, options: Scan, own: Corpus) -> list[Corpus]:
    """Returns what is scanned: the corpus of the fit, or those that are named.

    Raises:
      ValueError: if two would have one name.
    """
    found = [job.pack(model, *_named(job, x)) for x in options.data] or [own]
    names = [x.source.name for x in found]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two corpora are called {max(names, key=names.count)!r}, and so would "
            "their sequences be. Name them apart: --data NAME=PATH."
        )
    return found


def _named(job: Job, said: str) -> tuple[Data, str | None]:
    """Returns a corpus of `PATH` or `NAME=PATH`, read as that of the fit is."""
    name, _, place = said.rpartition("=")
    own = job.options.data
    if place == own.data:
        return own, name or None
    return replace(own, data=place, split=None, pattern="*"), name or None


def data_of(job: Job, corpus: str) -> tuple[Data, str | None]:
    """Returns what a corpus that was scanned is read from, and its name if given."""
    scanned = job.noted("scanned")
    given = dict(zip(scanned.get("corpora", ()), scanned.get("data", ()), strict=False))
    return _named(job, given[corpus]) if corpus in given else (job.options.data, None)


@dataclass(frozen=True)
class _Scanning:
    """The scan of one corpus under one model of a run."""

    job: Job
    role: str
    model: Model
    query: Query
    corpus: Corpus
    n_train: int
    options: Scan

    def all(self) -> None:
        """Scores what is to be scored, unless that was done, and the top's tokens."""
        chosen, keep = self._chosen(), self._keep()
        batch = self._batch(chosen)
        stage = self._stage(keep, batch.size)
        if not self.job.ledger.finished(stage):
            self.job.show(f"scan {self.name}", self._plan(chosen, keep, batch))
            self.job.begin(stage)
            done = halving(
                lambda size: self._scores(self._stage(keep, size), chosen, keep, size),
                batch.size,
                self._smaller,
            )
            self.job.ledger.finish(done.stage, checksum=done.checksum)
        forget(self.path)
        self._tokens(chosen, batch.size)

    @property
    def name(self) -> str:
        """Returns what the scan is called."""
        return named(self.role, self.corpus.source.name)

    @property
    def path(self) -> Path:
        """Returns where the scores are."""
        return scores_at(self.job, self.role, self.corpus.source.name)

    def _stage(self, keep: Keep, size: int) -> Stage:
        artifacts = self.job.ledger.run.manifest["artifacts"]
        return Stage(
            f"scores of {self.name}",
            {
                **self.job.common(self.model.digest),
                "queries": artifacts[queries_file(self.role)]["sha256"],
                "corpus": self.corpus.digest,
                "candidates": str(self.options.candidates),
                "keep": str(keep),
                "n_train": str(self.n_train),
                "batch": str(size),
            },
        )

    def _chosen(self) -> Packed:
        """Returns the sequences that are scored: all of them, or candidates."""
        each = _candidates(self.options.candidates)
        if each is None:
            return self.corpus.packed
        asked = {}
        for row in self.job.ledger.run.read(QUESTIONS, formats.read_json):
            question = Question(**row)
            prompt, rest_ = tokens_of(self.model, question, question.completion)
            asked[question.name] = [*prompt, *rest_]
        batches = self.corpus.packed.batches(256)
        found = candidates(asked, batches, each, run=self.job.driver.run)
        if not len(found.union):
            raise ValueError(
                f"No sequence of {self.name} shares a token with a question, so there "
                "are no candidates. Scan without."
            )
        return self.corpus.packed.take(found.union)

    def _keep(self) -> Keep:
        """Returns what is kept: as the options say, or as there is room for."""
        said = self.options.keep
        if said is None:
            layers = axis(self.query, by_layer=True)
            need = 4 * len(self.query.names) * len(layers) * len(self.corpus.packed)
            return Keep(layers=need <= LARGEST)
        if said in ("layers", "totals"):
            return Keep(layers=said == "layers")
        word, _, count = said.partition(":")
        if word != "top" or not count.isdecimal() or int(count) < 1:
            raise ValueError(
                f"--keep {said} means nothing. Say `layers`, `totals` or `top:N`."
            )
        return Keep(layers=True, top=int(count))

    def _scores(self, stage: Stage, chosen: Packed, keep: Keep, size: int) -> "_Done":
        """Streams scores to the disk."""
        if keep.top is not None:
            read = reader(
                self.model.task, self.model.params, self.query, by_layer=False
            )
            fold = top.fold(read, len(self.query.names), keep.top)
            run = self.job.saving(stage, self.options.save_every)
            chosen = chosen.take(run(fold, self.job.batches(chosen, size)))
        read = reader(
            self.model.task, self.model.params, self.query, by_layer=keep.layers
        )
        batches = self.job.batches(chosen, size)
        stream = self._stream(stage, chosen, keep, size)
        done = stream.open()
        with self.job.driver.watched(f"scores of {self.name}", batches) as advance:
            advance(done)
            for batch in rest(batches, done):
                rows = np.asarray(read(batch))[np.asarray(batch.real_B)]
                stream.add(rows / self.n_train)
                advance(1)
        checksum = stream.finish()
        self.job.forget(stage)
        return _Done(stage, checksum)

    def _stream(self, stage: Stage, chosen: Packed, keep: Keep, size: int) -> Stream:
        first = next(iter(self.job.batches(chosen, 1)))
        read = reader(self.model.task, self.model.params, self.query)
        attrs = {
            **told(self.n_train, self.query.about),
            "corpus": self.corpus.source.name,
            "candidates": self.options.candidates or "all",
            "kept": "all" if keep.top is None else f"top {keep.top} of either sign",
            "batch": size,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return Stream(
            self.path,
            Names(
                query=self.query.names,
                train=chosen.ids,
                layer=axis(self.query, by_layer=True) if keep.layers else (),
                along=dict(self.query.facts),
            ),
            attrs,
            str(jax.eval_shape(read, first).dtype),
            size,
            stage.key,
            self.options.save_every,
        )

    def _batch(self, chosen: Packed) -> Measured:
        """Returns the batch size: of before, that of the options, or the fastest."""
        artifacts, asked = self.job.ledger.run.manifest["artifacts"], self.options.batch
        queries = artifacts[queries_file(self.role)]["sha256"]
        key, name = f"{queries} {self.corpus.digest} {asked}", f"batch of {self.name}"
        noted = self.job.noted(name)
        if noted.get("key") == key:
            return Measured(noted["size"], noted["seconds"])
        read = reader(self.model.task, self.model.params, self.query)

        def work(size: int) -> Callable[[], object]:
            batch = next(iter(self.job.batches(chosen, size)))
            return lambda: jax.block_until_ready(read(batch))

        with self.job.driver.stage("one batch, to know what all will take"):
            if asked is None:
                found = fastest(work, sizes(chosen.context, len(chosen)))
            else:
                found = timed(work, min(asked, len(chosen)))
        self.job.note(name, key=key, **found._asdict())
        return found

    def _smaller(self, size: int) -> None:
        """Notes that batches have to be smaller, so that the next process knows."""
        name = f"batch of {self.name}"
        self.job.say(f"The device's memory is too small: on with batches of {size}.")
        self.job.note(name, **{**self.job.noted(name), "size": size})

    def _plan(self, chosen: Packed, keep: Keep, batch: Measured) -> dict[str, str]:
        """Returns what will be done and what it will cost, in words."""
        layers = axis(self.query, by_layer=keep.layers)
        kept = len(chosen) if keep.top is None else 2 * keep.top
        need = 4 * len(self.query.names) * kept * (1 + len(layers))
        said = {
            "questions": f"{len(self.query.names)}",
            "sequences": f"{len(chosen):,} of {len(self.corpus.packed):,}",
            "tokens": f"{len(chosen) * chosen.context:,} at most",
            "kept": f"{need / GB:.3f} GB: totals"
            + (f" and {len(layers)} layers" if keep.layers else "")
            + (f" of the top {keep.top} of either sign" if keep.top else ""),
            "batch": f"{batch.size} sequences",
        }
        passes = 1 + 2 * keep.top / len(chosen) if keep.top else 1
        seconds = passes * batch.seconds * len(chosen) / batch.size
        return said | {"time": f"about {clock(seconds)}, from a timed batch"}

    def _tokens(self, chosen: Packed, size: int) -> None:
        """Splits the scores of every query's most extreme sequences over tokens."""
        stage = Stage(
            f"tokens of {self.name}",
            {"scores": self.job.ledger.stages[f"scores of {self.name}"]["checksum"]},
        )
        if self.job.ledger.finished(stage):
            return
        self.job.begin(stage)
        with read_scores(self.path) as found:
            ids = sorted(extremes(found["score"], SHOWN))
        places = sorted(self.corpus.packed.place_of(x) for x in ids)
        batches = self.job.batches(self.corpus.packed.take(places), size)
        shares = token_scores(
            self.model.task,
            self.model.params,
            self.query,
            batches,
            n_train=self.n_train,
            run=self.job.driver.named(stage.name),
        )
        name = shares_at(self.role, self.corpus.source.name)
        self.job.ledger.run.write(name, formats.write_scores(shares.to_dataset()))
        self.job.ledger.finish(stage)


class _Done(NamedTuple):
    """A stage that came to its end, and the checksum of its log."""

    stage: Stage
    checksum: str


def named(role: str, corpus: str) -> str:
    """Returns what a scan is called: its corpus, and its model if not the own."""
    return corpus if role == MODEL else f"{corpus} under {role}"


def check_scores(job: Job, role: str, corpus: str) -> None:
    """Raises if the scores of a corpus are not what was written.

    Raises:
      FileNotFoundError: if there are none.
      ValueError: if they changed since.
    """
    entry = job.ledger.needed(f"scores of {named(role, corpus)}", "scan")
    path = scores_at(job, role, corpus)
    if not path.is_dir() or checksum(path) != entry["checksum"]:
        raise ValueError(
            f"{path} is not what the run wrote: its checksum differs from the "
            "manifest's. Restore it, or delete it and scan again."
        )


def scores_at(job: Job, role: str, corpus: str) -> Path:
    """Returns where the scores of a corpus are."""
    return job.folder / role / f"scores-{corpus}.zarr"


def shares_at(role: str, corpus: str) -> str:
    """Returns the artifact with the shares of tokens of a corpus's top sequences."""
    return f"{role}/tokens-{corpus}.zarr"


def extremes(score: xr.DataArray, each: int) -> set[str]:
    """Returns the names of every query's highest and lowest sequences."""
    values = score.transpose("query", "train").values
    order = np.argsort(values, axis=1, kind="stable")
    places = np.unique(np.concatenate([order[:, :each], order[:, -each:]], axis=1))
    return {str(x) for x in score["train"].values[places]}


def _candidates(said: str | None) -> int | None:
    """Returns how many candidates a query has; None for all sequences.

    Raises:
      ValueError: if the words mean nothing.
    """
    if said is None:
        return None
    word, _, count = said.partition(":")
    if word != "bm25" or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"--candidates {said} means nothing. Say `bm25:N`, N > 0.")
    return int(count)
