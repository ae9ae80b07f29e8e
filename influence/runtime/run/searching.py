"""`influence search`: a new question's most influential sequences, without a pass."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from rich.console import Console

from influence.attribution import countsketch
from influence.attribution.query import Query
from influence.attribution.query import query as solve
from influence.attribution.scan import axis, reader
from influence.attribution.tokens import token_scores
from influence.runtime import formats
from influence.runtime.corpus.packed import Packed
from influence.runtime.lookup import KINDS, Codes, Lookup
from influence.runtime.models import Model
from influence.runtime.report import page
from influence.runtime.run import solving
from influence.runtime.run.asking import Question, measurements, questions
from influence.runtime.run.batching import halving
from influence.runtime.run.codes import check_codes
from influence.runtime.run.fitting import curvature_of, fitted
from influence.runtime.run.found import Found
from influence.runtime.run.indexing import codes_at, codes_of, lookup_at, sketch_of
from influence.runtime.run.job import MODEL, Corpus, Job, Models, opened_job
from influence.runtime.run.ledger import opened
from influence.runtime.run.options import Search, check_numbers
from influence.runtime.run.paging import Pages
from influence.runtime.run.printing import extremes, print_rankings
from influence.runtime.store import atomic, check_file


class Answer(NamedTuple):
    """What a search found.

    Attributes:
      asked: the questions.
      total: `(query, train)`, exact, of all that was looked up.
      layers: `(query, train, layer)`, the same layer by layer.
      shares: `(query, train, token)`, of the sequences that are shown.
      texts: of those, by name.
      seconds: what took how long.
    """

    asked: list[Question]
    total: xr.DataArray
    layers: xr.DataArray
    shares: xr.DataArray
    texts: Mapping[str, str]
    seconds: Mapping[str, float]


def search(
    options: Search, console: Console | None = None, given: Models | None = None
) -> Answer:
    """Asks a run's index, and scores exactly what it finds.

    Args:
      options: what is asked.
      console: where to show what was found; the terminal.
      given: models by role instead of opening them, as for `fit`.

    Raises:
      FileNotFoundError: if nothing was indexed.
      ValueError: if a question is not good enough, or something changed since.

    Example:
      >>> from influence.runtime.run.indexing import index
      >>> from influence.runtime.run.options import Index, Search
      >>> from influence.runtime.run.searching import search
      >>> _ = index(Index(done, size=64), quiet, own)
      >>> found = search(Search(done, queries=questions, top=2), quiet, own)
      >>> found.total.dims, found.shares.dims
      (('query', 'train'), ('query', 'train', 'token'))
    """
    check_numbers(options)
    if options.out is not None:
        check_file(options.out)
    asked = questions(options.asked)
    job = opened_job(opened(options.run), console, given)
    searcher = opened_index(job)
    answer = searcher.answer(options, asked)
    print_rankings(job.console, asked, answer.total, answer.texts, options.top)
    took = ", ".join(f"{k} {_clock(x)}" for k, x in answer.seconds.items())
    job.say(f"{took}.")
    if options.out is not None:
        pages = Pages(searcher.results, searcher.model, asked)
        made = pages.findings(answer.total, answer.layers, answer.shares)
        with atomic(options.out) as temporary:
            formats.write_text(page.render(made))(temporary)
        job.say(f"The page: {options.out}")
    return answer


@dataclass(frozen=True)
class _Part:
    """The index of one corpus."""

    corpus: Corpus
    codes: Codes
    find: Lookup
    entry: Mapping[str, Any]


@dataclass
class Searcher:
    """A run's index, loaded: it can be asked again and again.

    Attributes:
      job: the run's.
      model: the run's.
      parts: the index of every corpus.
      files: the curvature's artifacts.
    """

    job: Job
    model: Model
    parts: list[_Part]
    files: list[str]
    _seconds: dict[str, float] = field(default_factory=dict)

    @property
    def results(self) -> Found:
        """Returns the corpora that were indexed."""
        return Found(self.job, {x.corpus.source.name: x.corpus for x in self.parts})

    @property
    def rows(self) -> int:
        """Returns how many sequences were indexed."""
        return sum(len(x.codes) for x in self.parts)

    def answer(self, options: Search, asked: list[Question]) -> Answer:
        """Returns what there is to say to some questions."""
        self._seconds.clear()
        with self._timed("gradients and solutions"):
            solved = self.solve(options, asked)
        n_train = options.n_train or self.rows
        layers = []
        for part, places in self.candidates(solved, options.rescore):
            chosen = part.corpus.packed.take(places)
            with self._timed(f"scoring {len(places):,} sequences exactly"):
                exact = self._exact(solved, chosen, part, n_train)
            layers.append(exact)
        whole: Any = xr.concat(layers, "train", combine_attrs="override")
        total = whole.sum("layer").assign_attrs(whole.attrs)
        shown = extremes(total, max(options.top, page.SHOWN))
        with self._timed(f"splitting {len(shown)} of them over tokens"):
            shares = self._shares(solved, shown, n_train)
        texts = self.results.texts(extremes(total, options.top))
        return Answer(asked, total, whole, shares, texts, dict(self._seconds))

    def solve(self, options: Search, asked: list[Question]) -> Query:
        """Returns the questions, solved for."""
        curvature = curvature_of(self.job, self.files)
        own = self.job.corpus(self.model)
        solver = solving.solver_of(
            self.job, MODEL, self.model, own, curvature, options.asked
        )
        measured = measurements(self.model, asked)
        return solve(curvature, self.model.params, measured, solver=solver)

    def candidates(self, query: Query, each: int) -> Iterator[tuple[_Part, np.ndarray]]:
        """Yields where in each corpus the sequences are that are worth a closer look.

        Args:
          query: the questions, solved for.
          each: how many of either sign for each question, of all corpora.
        """
        curvature = curvature_of(self.job, self.files)
        entry = self.parts[0].entry
        sketch = sketch_of(entry, curvature)
        # A score is minus the product.
        v_QxK = -np.asarray(countsketch.asked(sketch, query), np.float32)
        with self._timed("looking up"):
            found = [_best(self.parts, v_QxK, each), _best(self.parts, -v_QxK, each)]
        for place, part in enumerate(self.parts):
            here = np.concatenate([x[1][x[0] == place] for x in found])
            if len(here):
                yield part, np.unique(here)

    def _exact(
        self, query: Query, chosen: Packed, part: _Part, n_train: int
    ) -> xr.DataArray:
        """Returns the scores of some sequences, layer by layer."""
        read = reader(self.model.task, self.model.params, query)

        def scored(size: int) -> np.ndarray:
            batches = self.job.batches(chosen, size)
            rows = [np.asarray(read(x))[np.asarray(x.real_B)] for x in batches]
            return np.concatenate(rows).transpose(1, 0, 2)

        values = halving(scored, self._size(part, chosen), self._smaller)
        found = query.scores(
            values, chosen.ids, n_train, layer=axis(query, by_layer=True)
        )
        return found.assign_attrs(candidates="an index")

    def _shares(self, query: Query, ids: Sequence[str], n_train: int) -> xr.DataArray:
        """Returns the scores of some sequences, token by token."""
        found = []
        for part in self.parts:
            name = part.corpus.source.name
            own = [x for x in ids if x.rsplit(":", 2)[0] == name]
            if own:
                places = sorted(map(part.corpus.packed.place_of, own))
                chosen = part.corpus.packed.take(places)
                batches = self.job.batches(chosen, self._size(part, chosen))
                found.append(
                    token_scores(
                        self.model.task,
                        self.model.params,
                        query,
                        batches,
                        n_train=n_train,
                    )
                )
        whole: Any = xr.concat(found, "train", join="outer", fill_value=0.0)
        return whole

    def _smaller(self, size: int) -> None:
        self.job.say(f"The device's memory is too small: on with batches of {size}.")

    def _size(self, part: _Part, chosen: Packed) -> int:
        return min(int(part.entry["inputs"]["batch"]), len(chosen))

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        took = time.perf_counter() - begun
        self._seconds[what] = self._seconds.get(what, 0.0) + took


def opened_index(job: Job) -> Searcher:
    """Returns a run's index, loaded.

    Raises:
      FileNotFoundError: if nothing was indexed to its end.
      ValueError: if something changed since, or is damaged.
    """
    model = job.model(MODEL)
    files = fitted(job, MODEL, model, job.corpus(model))
    artifacts = job.ledger.run.manifest["artifacts"]
    now = {
        **job.common(model.digest),
        "curvature": " ".join(artifacts[x]["sha256"] for x in files),
    }
    parts = []
    for name, entry in job.ledger.stages.items():
        if name.startswith("index of ") and entry["finished"]:
            parts.append(_opened(job, entry, now))
    if not parts:
        raise FileNotFoundError(
            f"The run in {job.folder} has no index yet. Run `influence index "
            f"{job.folder}` first."
        )
    made = {(x.entry["length"], x.entry["inputs"]["damping"]) for x in parts}
    if len(made) > 1:
        raise ValueError(
            "The corpora were not indexed alike: some with other --bytes or --damping. "
            f"Run `influence index {job.folder}` with the same for each."
        )
    return Searcher(job, model, parts, files)


def _opened(job: Job, entry: Mapping[str, Any], now: Mapping[str, str]) -> _Part:
    """Returns the index of a corpus.

    Raises:
      ValueError: if something changed since, or is damaged.
    """
    name = entry["corpus"]
    kind = job.ledger.needed(f"look-up of {name}", "index")["kind"]
    now = {**now, "corpus": job.ledger.stages[f"corpus {name}"]["key"]}
    changed = sorted(k for k, x in now.items() if entry["inputs"][k] != x)
    if changed:
        raise ValueError(
            f"The index of {name} was made with other {', '.join(changed)}. Run "
            f"`influence index {job.folder}` again."
        )
    check_codes(codes_at(job, name))
    codes = codes_of(job, name)
    place = lookup_at(name, kind)
    made = KINDS[kind].make and job.ledger.run.read(place, lambda path: path)
    return _Part(job.reopened(name), codes, KINDS[kind].open(codes, made), entry)


def _best(
    parts: Sequence[_Part], v_QxK: np.ndarray, each: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns of which part, and where in it, the best of every question are."""
    hits = [x.find(v_QxK, each) for x in parts]
    products = np.concatenate([x.products for x in hits], axis=1)
    places = np.concatenate([x.places for x in hits], axis=1)
    whose = np.repeat(np.arange(len(hits)), [x.places.shape[1] for x in hits])
    order = np.argsort(-products, axis=1, kind="stable")[:, :each]
    chosen = np.take_along_axis(places, order, axis=1)
    real = chosen >= 0
    return whose[order][real], chosen[real]


def _clock(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
