"""`influence search`: a new question's most influential sequences, without a pass."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from rich.console import Console

from influence.attribution import countsketch
from influence.attribution.countsketch import CountSketch
from influence.attribution.query import Query
from influence.attribution.query import query as solve
from influence.attribution.scan import axis, reader
from influence.attribution.scores import summed
from influence.attribution.tokens import token_scores
from influence.curvature.operator import Curvature
from influence.runtime import formats
from influence.runtime.lookup import KINDS, Lookup
from influence.runtime.models import Model
from influence.runtime.report import page
from influence.runtime.run import solving
from influence.runtime.run.asking import Question, measurements, questions
from influence.runtime.run.batching import halving
from influence.runtime.run.codes import check_codes
from influence.runtime.run.fitting import curvature_of, fitted
from influence.runtime.run.found import Found
from influence.runtime.run.indexing import codes_at, codes_of, lookup_at, noted
from influence.runtime.run.job import MODEL, Job, Models, opened_job
from influence.runtime.run.ledger import opened
from influence.runtime.run.options import Search, check_numbers
from influence.runtime.run.packing import Corpus
from influence.runtime.run.paging import Pages
from influence.runtime.run.printing import print_rankings
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


class Part(NamedTuple):
    """The index of one corpus.

    Attributes:
      corpus: the sequences.
      rows: how many there are.
      find: looks their vectors up.
      batch: how many of them are read at a time.
      made: what the vectors were made with, as it is noted.
    """

    corpus: Corpus
    rows: int
    find: Lookup
    batch: int
    made: Mapping[str, Any]


@dataclass(frozen=True)
class Searcher:
    """A run's index, loaded: it can be asked again and again.

    Attributes:
      job: the run's.
      model: the run's.
      fitted_to: the corpus of the fit.
      curvature: as fitted.
      sketch: what makes questions as short as sequences are.
      parts: the index of every corpus.
    """

    job: Job
    model: Model
    fitted_to: Corpus
    curvature: Curvature
    sketch: CountSketch
    parts: list[Part]

    @property
    def results(self) -> Found:
        """Returns the corpora that were indexed."""
        return Found(self.job, {x.corpus.source.name: x.corpus for x in self.parts})

    def answer(self, options: Search, asked: list[Question]) -> Answer:
        """Returns what there is to say to some questions."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "gradients and solutions"):
            solved = self.solve(options, asked)
        with _timed(seconds, "looking up"):
            found = self.candidates(solved, options.rescore)
        n_train = options.n_train or sum(x.rows for x in self.parts)
        count = sum(len(places) for _, places in found)
        with _timed(seconds, f"scoring {count:,} sequences exactly"):
            exact = [self._exact(solved, *x, n_train) for x in found]
        layers: Any = xr.concat(exact, "train", combine_attrs="override")
        total = summed(layers)
        shown = page.shown(total, max(options.top, page.SHOWN))
        with _timed(seconds, f"splitting {len(shown)} of them over tokens"):
            shares = self._shares(solved, shown, n_train)
        texts = self.results.texts(page.shown(total, options.top))
        return Answer(asked, total, layers, shares, texts, seconds)

    def solve(self, options: Search, asked: list[Question]) -> Query:
        """Returns the questions, solved for."""
        solver = solving.solver_of(
            self.job, MODEL, self.model, self.fitted_to, self.curvature, options.asked
        )
        measured = measurements(self.model, asked)
        return solve(self.curvature, self.model.params, measured, solver=solver)

    def candidates(self, query: Query, each: int) -> list[tuple[Part, np.ndarray]]:
        """Returns where in each corpus the sequences are that are worth a closer look.

        Args:
          query: the questions, solved for.
          each: how many of either sign for each question, of all corpora.
        """
        # A score is minus the product.
        v_QxK = -np.asarray(countsketch.asked(self.sketch, query), np.float32)
        found = [_best(self.parts, v_QxK, each), _best(self.parts, -v_QxK, each)]
        here = [
            np.unique(np.concatenate([at[whose == number] for whose, at in found]))
            for number in range(len(self.parts))
        ]
        return [x for x in zip(self.parts, here, strict=True) if len(x[1])]

    def _exact(
        self, query: Query, part: Part, places: np.ndarray, n_train: int
    ) -> xr.DataArray:
        """Returns the scores of some sequences, layer by layer."""
        read = reader(self.model.task, self.model.params, query)
        chosen = part.corpus.packed.take(places)

        def scored(size: int) -> np.ndarray:
            batches = self.job.batches(chosen, size)
            rows = [np.asarray(read(x))[np.asarray(x.real_B)] for x in batches]
            return np.concatenate(rows).transpose(1, 0, 2)

        values = halving(scored, min(part.batch, len(chosen)), self._smaller)
        found = query.scores(
            values, chosen.ids, n_train, layer=axis(query, by_layer=True)
        )
        return found.assign_attrs(candidates="an index")

    def _shares(self, query: Query, ids: Sequence[str], n_train: int) -> xr.DataArray:
        """Returns the scores of some sequences, token by token."""
        found = []
        for part in self.parts:
            name, packed = part.corpus.source.name, part.corpus.packed
            own = [x for x in ids if x.rsplit(":", 2)[0] == name]
            if own:
                chosen = packed.take(sorted(map(packed.place_of, own)))
                batches = self.job.batches(chosen, min(part.batch, len(chosen)))
                task, params = self.model.task, self.model.params
                found.append(
                    token_scores(task, params, query, batches, n_train=n_train)
                )
        whole: Any = xr.concat(found, "train", join="outer", fill_value=0.0)
        return whole

    def _smaller(self, size: int) -> None:
        self.job.say(f"The device's memory is too small: on with batches of {size}.")


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Notes how long something takes."""
    begun = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - begun


def opened_index(job: Job) -> Searcher:
    """Returns a run's index, loaded.

    Raises:
      FileNotFoundError: if nothing was indexed to its end.
      ValueError: if something changed since, or is damaged.
    """
    model = job.model(MODEL)
    fitted_to = job.corpus(model)
    files = fitted(job, MODEL, model, fitted_to)
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
    ways = [(x.made["length"], x.made["inputs"]) for x in parts]
    if len({(length, x["damping"], x["sides"]) for length, x in ways}) > 1:
        raise ValueError(
            "The corpora were not indexed alike: some with other --bytes, --damping or "
            f"--sides. Run `influence index {job.folder}` with the same for each."
        )
    curvature = curvature_of(job, files)
    sketch = noted(parts[0].made, curvature).sketch
    return Searcher(job, model, fitted_to, curvature, sketch, parts)


def _opened(job: Job, entry: Mapping[str, Any], now: Mapping[str, str]) -> Part:
    """Returns the index of a corpus.

    Raises:
      ValueError: if something changed since, or is damaged.
    """
    name = entry["corpus"]
    kind = job.ledger.needed(f"look-up of {name}", "index")["kind"]
    now = {**now, "corpus": job.ledger.stages[f"corpus {name}"]["key"]}
    changed = sorted(k for k, x in now.items() if entry["inputs"][k] != x)
    if changed:
        place = job.data_of(name)[0].data
        raise ValueError(
            f"The index of {name} was made with other {', '.join(changed)}. Run "
            f"`influence index {job.folder} --data {name}={place}` again."
        )
    check_codes(codes_at(job, name))
    codes = codes_of(job, name)
    place = lookup_at(name, kind)
    made = KINDS[kind].make and job.ledger.run.read(place, lambda path: path)
    find, batch = KINDS[kind].open(codes, made), int(entry["inputs"]["batch"])
    return Part(job.reopened(name), len(codes), find, batch, entry)


def _best(
    parts: Sequence[Part], v_QxK: np.ndarray, each: int
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
