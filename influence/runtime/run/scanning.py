"""`influence scan`: every training sequence's score, streamed to the disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from influence.attribution import top
from influence.attribution.lexical import candidates
from influence.attribution.query import Query
from influence.attribution.scan import axis, reader
from influence.attribution.scores import told
from influence.attribution.tokens import token_scores
from influence.runtime import formats
from influence.runtime.corpus.packed import Packed, PackedBatches
from influence.runtime.driver import rest
from influence.runtime.mesh import laid_out, one_device
from influence.runtime.models import Model
from influence.runtime.processes import check_alone, led, several
from influence.runtime.run.asking import asked, queries_file, question_tokens
from influence.runtime.run.batching import Measured, halving
from influence.runtime.run.corpora import corpora
from influence.runtime.run.fitting import fitted
from influence.runtime.run.job import GB, MODEL, Job, Models, clock, opened_job
from influence.runtime.run.keeping import Keep, candidates_of, extremes, keep_of
from influence.runtime.run.kept import named, scores_at, shares_at
from influence.runtime.run.ledger import Ledger, Stage, locked, opened
from influence.runtime.run.options import Scan, check_numbers
from influence.runtime.run.packing import Corpus
from influence.runtime.run.parts import Walk, forgotten, parts_of, score_parts
from influence.runtime.run.stream import Names, Stream, read_scores
from influence.types import Batch

SHOWN = 5
"""Of how many sequences of either sign the shares of tokens are kept, each query."""


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

    Example:
      >>> from influence.runtime.run.options import Scan
      >>> from influence.runtime.run.scanning import scan
      >>> ledger = scan(Scan(done, candidates="bm25:4", keep="totals"), quiet, own)
      >>> ledger.stages["scores of corpus"]["inputs"]["candidates"]
      'bm25:4'
    """
    check_numbers(options)
    keep_of(options.keep, 0)
    candidates_of(options.candidates)
    with locked(options.run):
        ledger = opened(options.run)
        job = opened_job(ledger, console, given, laid_out(options.mesh))
        if (options.keep or "").startswith("top"):
            check_alone("Keeping only the top of a scan (say --keep layers or totals)")
        own = job.model(MODEL)
        fitted_to = job.corpus(own)
        _check_alike(job)
        found = corpora(job, own, options.data, fitted_to)
        rows = sum(len(x.packed) for x in found)
        job.note("scanned", corpora=[x.source.name for x in found])
        for role in job.roles:
            model = own if role == MODEL else job.model(role)
            fitted(job, role, model, fitted_to)
            query = _asked(job, role, model)
            for corpus in found:
                _Scanning(job, role, model, query, corpus, rows, options).all()
    return ledger


def _check_alike(job: Job) -> None:
    """Raises unless all models of a run were asked the same in the same way.

    Raises:
      FileNotFoundError: if one was not asked.
      ValueError: if they were asked differently.
    """
    entries = [job.ledger.needed(f"queries of {x}", "query") for x in job.roles]
    own, apart = entries[0]["inputs"], ("weights", "curvature", "batch")
    for role, entry in zip(job.roles, entries, strict=True):
        odd = [k for k, x in entry["inputs"].items() if own.get(k) != x]
        if changed := sorted({*odd} - {*apart}):
            raise ValueError(
                f"The model and the {role} were asked with other {', '.join(changed)}. "
                f"Run `influence query {job.folder}` again, to its end."
            )


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
    found = job.ledger.run.read(queries_file(role), formats.read_query)
    return found if job.layout is None else job.layout.shard(found)


@dataclass(frozen=True)
class _Scanning:
    """The scan of one corpus under one model of a run; all have so many rows."""

    job: Job
    role: str
    model: Model
    query: Query
    corpus: Corpus
    rows: int
    options: Scan

    @property
    def n_train(self) -> int:
        """Returns how many sequences the model was trained on."""
        return self.options.n_train or self.rows

    def all(self) -> None:
        """Scores what is to be scored, unless that was done, and the top's tokens."""
        keep, batch = self._keep(), self._batch()
        smaller = partial(self.job.smaller, self._batch_note)
        stage = self._stage(keep, batch.size)
        if not self.job.ledger.finished(stage, self.path):
            self.job.show(f"scan {self.name}", self._plan(keep, batch))
            self.job.begin(stage)
            done = halving(partial(self._scores, keep), batch.size, smaller)
            self.job.ledger.finish(done.stage, checksum=done.checksum)
        led("forgetting what was said of scores", partial(forgotten, self.path))
        self._tokens()

    @property
    def name(self) -> str:
        """Returns what the scan is called."""
        return named(self.role, self.corpus.source.name)

    @property
    def path(self) -> Path:
        """Returns where the scores are."""
        return scores_at(self.job, self.role, self.corpus.source.name)

    def _stage(self, keep: Keep, size: int) -> Stage:
        inputs = {
            **self.job.common(self.model.digest),
            "queries": self._queries,
            "corpus": self.corpus.digest,
            "candidates": str(self.options.candidates),
            "keep": str(keep),
            "n_train": str(self.n_train),
            "batch": str(size),
        }
        if keep.top is not None and self.role != MODEL:
            inputs["kept"] = self.job.ledger.stages[self._model_scores]["checksum"]
        return Stage(f"scores of {self.name}", inputs, self._about)

    @property
    def _about(self) -> dict[str, str]:
        return {"role": self.role, "corpus": self.corpus.source.name}

    @property
    def _queries(self) -> str:
        """Returns the checksum of the queries."""
        artifacts = self.job.ledger.run.manifest["artifacts"]
        return artifacts[queries_file(self.role)]["sha256"]

    @property
    def _model_scores(self) -> str:
        """Returns the stage of the model's own scores of the corpus."""
        return f"scores of {named(MODEL, self.corpus.source.name)}"

    @cached_property
    def _chosen(self) -> Packed:
        """Returns the sequences that are scored: all of them, or candidates."""
        each = candidates_of(self.options.candidates)
        if each is None:
            return self.corpus.packed
        words = {}
        for question in asked(self.job):
            prompt, rest_ = question_tokens(self.model, question, question.completion)
            words[question.name] = [*prompt, *rest_]
        batches = self.corpus.packed.batches(256)
        found = candidates(words, batches, each, run=self.job.driver.run)
        if not len(found.union):
            raise ValueError(
                f"No sequence of {self.name} shares a token with a question, so there "
                "are no candidates. Scan without."
            )
        return self.corpus.packed.take(found.union)

    def _keep(self) -> Keep:
        """Returns what is kept: as the options say, or as there is room for."""
        layers = axis(self.query, by_layer=True)
        return keep_of(
            self.options.keep, 4 * len(self.query.names) * len(layers) * self.rows
        )

    def _scores(self, keep: Keep, size: int) -> "_Done":
        """Streams scores to the disk."""
        stage, chosen = self._stage(keep, size), self._chosen
        if keep.top is not None:
            chosen = self._top(stage, keep.top, size)
        read = reader(
            self.model.task, self.model.params, self.query, by_layer=keep.layers
        )
        batches = self.job.batches(chosen, size)
        stream = self._stream(stage, chosen, keep, size)
        if several() or parts_of(stream):
            whole = self._in_parts(stream, chosen, read, size)
        else:
            done = stream.open()
            with self.job.driver.watched(f"scores of {self.name}", batches) as advance:
                advance(done)
                for rows in self._rows(read, batches, done):
                    stream.add(rows)
                    advance(1)
            whole = stream.finish()
        self._mind(stream.odd)
        self.job.forget(stage)
        return _Done(stage, whole)

    def _mind(self, odd: list[str]) -> None:
        """Says whose scores are not finite."""
        if odd:
            self.job.say(
                f"Mind: the scores of {len(odd)} sequences are not finite, as of "
                f"{odd[0]}, and are in no ranking. Their gradients overflow: fit in a "
                "wider --dtype, or leave them out of the corpus."
            )

    def _rows(self, read: Any, batches: PackedBatches, done: int) -> Iterator[Any]:
        """Yields the scores of each batch's sequences, `[B, Q, layers]`."""
        layout = self.job.layout
        if layout is None:
            for batch in rest(batches, done):
                yield np.asarray(read(batch))[np.asarray(batch.real_B)] / self.n_train
        else:
            for part in layout.parts(batches, done, batches.size):
                found = layout.own(read(layout.spread(part)))
                yield found[np.asarray(part.real_B)] / self.n_train

    def _in_parts(self, stream: Stream, chosen: Packed, read: Any, size: int) -> str:
        """Scores what is left with other processes, or in one what they have left."""
        layout = self.job.layout or one_device()

        def score(part: Batch) -> np.ndarray:
            return layout.own(read(layout.spread(part))) / self.n_train

        return score_parts(
            stream,
            partial(Walk, layout, self.job.batches, chosen, size),
            score,
            partial(self.job.driver.watched, f"scores of {self.name}"),
        )

    def _top(self, stage: Stage, each: int, size: int) -> Packed:
        """Returns the sequences that are kept; under a base, those of the model."""
        if self.role != MODEL:
            scores = scores_at(self.job, MODEL, self.corpus.source.name)
            with read_scores(scores) as found:
                ids = [str(x) for x in found["train"].values]
            places = map(self.corpus.packed.place_of, ids)
            return self.corpus.packed.take(sorted(places))
        read = reader(self.model.task, self.model.params, self.query, by_layer=False)
        fold = top.fold(read, len(self.query.names), each)
        run = self.job.saving(stage, self.options.save_every)
        return self._chosen.take(run(fold, self.job.batches(self._chosen, size)))

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

    @property
    def _batch_note(self) -> str:
        return f"batch of the scan of {self.name}"

    def _batch(self) -> Measured:
        """Returns how large batches are."""
        read = reader(self.model.task, self.model.params, self.query)

        def work(batches: PackedBatches) -> None:
            next(self._rows(read, batches, 0))

        return self.job.batch(
            self._batch_note,
            f"{self._queries} {self.corpus.digest} {self.options.candidates}",
            self.options.batch,
            self._chosen,
            work,
        )

    def _plan(self, keep: Keep, batch: Measured) -> dict[str, str]:
        """Returns what will be done and what it will cost, in words."""
        chosen = self._chosen
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

    def _tokens(self) -> None:
        """Splits the scores of every query's most extreme sequences over tokens.

        In batches of a size of their own, if those of the scan are too large for it:
        with others the scan would have to be made again.
        """
        note, size = f"batch of the tokens of {self.name}", self._batch().size
        known = self.job.noted(note).get("size", size)
        halving(self._split, min(size, known), partial(self.job.smaller, note))

    def _split(self, size: int) -> None:
        scores = self.job.ledger.stages[f"scores of {self.name}"]["checksum"]
        stage = Stage(f"tokens of {self.name}", {"scores": scores}, self._about)
        name = shares_at(self.role, self.corpus.source.name)
        if self.job.ledger.finished(stage, self.job.folder / name):
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
        made = formats.write_scores(shares.to_dataset())
        led(f"writing {name}", lambda: self.job.ledger.run.write(name, made))
        self.job.ledger.finish(stage)


class _Done(NamedTuple):
    """A stage that came to its end, and the checksum of its scores."""

    stage: Stage
    checksum: str
