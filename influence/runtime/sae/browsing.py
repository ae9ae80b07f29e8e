"""`influence sae features`: a page about what each feature of a dictionary is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from influence.attribution.query import query
from influence.attribution.scan import scan
from influence.attribution.scores import rankings
from influence.curvature.operator import Curvature
from influence.interpret import features
from influence.interpret.card import Album, Band, Card, Cause, Example
from influence.interpret.features import Survey
from influence.interpret.link import Activity, activity
from influence.model.sites import Address
from influence.runtime.corpus.packed import Packed
from influence.runtime.corpus.texts import texts
from influence.runtime.dictionaries.folders import open_dictionary
from influence.runtime.dictionaries.stored import Stored
from influence.runtime.models import Model
from influence.runtime.report.feature_exports import circuit_tracer, neuronpedia
from influence.runtime.report.features import render
from influence.runtime.run.fitting import curvature_of, fitted
from influence.runtime.run.job import MODEL, Corpus, Job, Models, opened_job
from influence.runtime.run.ledger import opened
from influence.runtime.run.options import check_numbers
from influence.runtime.sae.options import Features
from influence.runtime.sae.reading import Reading, check_stored, read_once
from influence.runtime.sae.spelling import spelt
from influence.runtime.store import atomic

TOP, BANDS, EACH = 8, 4, 4
"""Examples at the top, bands of strength below it, and examples of each."""

PEAKS = 8
"""Of how many of its strongest tokens a feature's influences are asked for."""

TOGETHER = 2e9
"""Bytes that the queries of features that are asked for together may take."""

CAUSES = 6
"""Sequences of either sign that are listed for a feature."""


def browse(
    options: Features, console: Console | None = None, given: Models | None = None
) -> Album:
    """Writes a page about a dictionary, and returns what is on it.

    Args:
      options: of which dictionary, on what text.
      console: where to show what happens; the terminal if left out.
      given: the model, by the role `model`, instead of opening it.

    Raises:
      ValueError: if dictionary, model and run do not go together.
      FileNotFoundError: if something is not where the options say.
    """
    check_numbers(options)
    shown, models = console or Console(), given or {}
    stored = open_dictionary(options.sae)
    with read_once(options.read, shown, models) as reading:
        check_stored(stored, reading)
        work = _Browsing(options, reading, stored)
        ranked = None if options.run is None else work.causes_of(options.run, models)
        album = work.album(ranked or {})
    with atomic(options.out) as temporary:
        temporary.write_text(render(album), encoding="utf-8")
    if options.neuronpedia is not None:
        neuronpedia(album, options.neuronpedia)
    if options.circuit_tracer is not None:
        circuit_tracer(album, options.circuit_tracer, Address.parse(album.site).place)
    shown.print(f"The page: {options.out}", soft_wrap=True)
    return album


@dataclass
class _Browsing:
    """A dictionary that is looked at."""

    options: Features
    reading: Reading
    stored: Stored

    def __post_init__(self) -> None:
        self.site = self.reading.site(self.stored.about.site)
        self.packed = self.reading.some(self.options.sequences, self.options.seed)
        self.survey: Survey = self._run(
            features.survey(
                self.reading.source,
                self.stored.dictionary,
                self.site,
                top=max(TOP, PEAKS),
                drawn=BANDS * EACH * 2,
                scale=self._scale(),
                seed=self.options.seed,
            )
        )

    def _run(self, fold: Any) -> Any:
        return self.reading.job.driver.run(fold, self.reading.batches(self.packed))

    def _scale(self) -> float:
        """Returns about how large activations are: the length of what is read."""
        first = next(iter(self.reading.batches(self.packed)))
        source = self.reading.source
        rows, keep = source.values((self.site,), source.params, first)
        lengths = np.linalg.norm(np.asarray(rows[self.site])[np.asarray(keep)], axis=1)
        return float(np.median(lengths)) / 2

    def album(self, ranked: Mapping[int, tuple[Cause, ...]]) -> Album:
        """Returns the page's content.

        Args:
          ranked: the sequences that influenced some features most.
        """
        about, survey = self.stored.about, self.survey
        dead = int((survey.on_F == 0).sum())
        facts = [
            ("dictionary", self.options.sae),
            ("kind", about.kind),
            ("features", f"{self.stored.dictionary.width:,}, {dead:,} never on"),
            ("looked at", f"{int(survey.tokens):,} tokens"),
            ("on at a token", f"{survey.density_F.sum():.1f} features"),
        ]
        facts += [
            (name, f"{about.facts[key]:.4f}")
            for key, name in (
                ("variance_explained", "variance explained, held out"),
                ("ce_recovered", "cross-entropy recovered, held out"),
            )
            if key in about.facts
        ]
        return Album(facts, str(self.site), about.model, list(self._cards(ranked)))

    def _cards(self, ranked: Mapping[int, tuple[Cause, ...]]) -> Iterator[Card]:
        dictionary, survey = self.stored.dictionary, self.survey
        examples = self._examples()
        places, cosines = features.nearest(dictionary)
        promoted, suppressed = self._words()
        for i in range(dictionary.width):
            bins = np.flatnonzero(survey.counts_FxE[i])
            some = slice(bins[0], bins[-1] + 1) if len(bins) else slice(0, 0)
            edges = survey.edges[bins[0] : bins[-1] + 2] if len(bins) else ()
            yield Card(
                index=i,
                density=float(survey.density_F[i]),
                maximum=float(survey.maximum_F[i]),
                counts=tuple(int(x) for x in survey.counts_FxE[i][some]),
                edges=tuple(float(x) for x in edges),
                bands=tuple(examples(i)),
                promoted=promoted(i),
                suppressed=suppressed(i),
                nearest=tuple(
                    (int(a), float(b))
                    for a, b in zip(places[i], cosines[i], strict=True)
                ),
                causes=ranked.get(i),
            )

    def _words(self) -> tuple[Any, Any]:
        """Returns what each feature promotes and suppresses, as functions of it."""
        batch = next(iter(self.reading.batches(self.packed)))
        inputs = {k: x[:8] for k, x in batch.inputs.items()}
        found = features.words(self.reading.source, self.stored.dictionary, inputs)
        if found is None:
            return (lambda i: ()), (lambda i: ())
        tokenizer = self.reading.model.tokenizer

        def listed(ids: np.ndarray, by: np.ndarray) -> Any:
            return lambda i: tuple(
                (word, float(x))
                for word, x in zip(spelt(tokenizer, ids[i]), by[i], strict=True)
            )

        return (
            listed(found.promoted_FxK, found.up_FxK),
            listed(found.suppressed_FxK, found.down_FxK),
        )

    def _examples(self) -> Any:
        """Returns each feature's examples by strength, as a function of it."""
        survey, around = self.survey, self.options.around
        top, drawn = survey.top, survey.drawn
        places = [
            np.concatenate([a[:, :TOP], b], axis=1)
            for a, b in zip(top[:3], drawn[:3], strict=True)
        ]
        value, sequence, token = places
        seen = self._run(
            features.windows(
                self.reading.source,
                self.stored.dictionary,
                self.site,
                sequence,
                token,
                around,
            )
        )
        ids, tokens = self.packed.ids, _Tokens(self.packed)

        def example(i: int, k: int) -> Example:
            window = seen[i, k]
            here = np.flatnonzero(np.isfinite(window))
            first = int(token[i, k]) - around + int(here[0])
            row = tokens(int(sequence[i, k]))[first : first + len(here)]
            words = spelt(self.reading.model.tokenizer, row)
            return Example(
                ids[int(sequence[i, k])],
                first,
                tuple(words),
                tuple(float(x) for x in window[here][: len(words)]),
            )

        def bands(i: int) -> Iterator[Band]:
            strength = value[i] / max(float(survey.maximum_F[i]), 1e-12)
            tops = [k for k in range(TOP) if value[i, k] > 0]
            if tops:
                yield Band("top", tuple(example(i, k) for k in tops))
            rest = range(TOP, value.shape[1])
            for low in reversed(range(BANDS)):
                own = [
                    k for k in rest if low / BANDS < strength[k] <= (low + 1) / BANDS
                ][:EACH]
                if own:
                    name = (
                        f"{low / BANDS:.0%} to {(low + 1) / BANDS:.0%} of the largest"
                    )
                    yield Band(name, tuple(example(i, k) for k in own))

        return bands

    def causes_of(self, run: Path, given: Models) -> dict[int, tuple[Cause, ...]]:
        """Returns the training sequences of a run that influenced features most.

        Raises:
          ValueError: if the run is of another model.
          FileNotFoundError: if it has no curvature.
        """
        job = opened_job(opened(run), self.reading.job.console, given)
        model = job.model(MODEL)
        if model.digest != self.reading.model.digest:
            raise ValueError(
                f"The run in {run} is of another model than {self.options.read.model}. "
                "Give the model that the run was fitted to."
            )
        corpus = job.corpus(model)
        curvature = curvature_of(job, fitted(job, MODEL, model, corpus))
        often = np.argsort(-self.survey.on_F, kind="stable")[: self.options.causes]
        chosen = [int(i) for i in often if self.survey.on_F[i] > 0]
        entries = sum(
            x.columns * x.outputs * int(np.prod(x.stack)) for x in curvature.layers
        )
        each = int(max(1, min(64, TOGETHER // (8 * entries))))
        found: dict[int, tuple[Cause, ...]] = {}
        for at in range(0, len(chosen), each):
            found |= self._ranked(job, corpus, curvature, chosen[at : at + each])
        return found

    def _ranked(
        self, job: Job, corpus: Corpus, curvature: Curvature, chosen: Sequence[int]
    ) -> dict[int, tuple[Cause, ...]]:
        model, driver = self.reading.model, self.reading.job.driver
        asked = {str(i): self._measured(i) for i in chosen}
        solved = query(curvature, model.params, asked)
        size = job.noted(f"batch of {MODEL}")["size"]
        batches = job.batches(corpus.packed, size)
        total = scan(model.task, model.params, solved, batches, run=driver.run).total
        best = rankings(total, CAUSES), rankings(total, CAUSES, lowest=True)
        rows = [(*up, *reversed(tuple(down))) for up, down in zip(*best, strict=True)]
        ids = sorted({x.id for row in rows for x in row})
        said = _texts(corpus, model, ids)
        return {
            i: tuple(Cause(x.id, x.score, said[x.id]) for x in row)
            for i, row in zip(chosen, rows, strict=True)
        }

    def _measured(self, feature: int) -> Activity:
        """Returns the mean pre-activation at a feature's strongest tokens."""
        return at_peaks(
            self.reading, self.stored, self.site, self.packed, self.survey, feature
        )


def _texts(corpus: Corpus, model: Model, ids: Sequence[str]) -> dict[str, str]:
    """Returns sequences' texts; token ids, if that is all they are."""
    packed = corpus.packed
    if model.tokenizer is None:
        rows = {x: packed.tokens_at(packed.place_of(x)) for x in ids}
        return {x: " ".join(map(str, row.tolist())) for x, row in rows.items()}
    found = texts(packed, corpus.source, ids, model.tokenizer)
    return {x: "".join(pieces) for x, pieces in found.items()}


def at_peaks(
    reading: Reading,
    stored: Stored,
    site: Address,
    packed: Packed,
    survey: Survey,
    feature: int,
) -> Activity:
    """Returns a feature's mean pre-activation at its strongest tokens, a measurement.

    Args:
      reading: the model.
      stored: the dictionary.
      site: what it reads.
      packed: the sequences that were surveyed.
      survey: where features are on.
      feature: which.
    """
    value, sequence, token, _ = (x[feature] for x in survey.top)
    rows = sequence[:PEAKS]
    chosen = reading.job.batches(packed.take(rows), len(rows))
    batch = next(iter(chosen))
    weights = np.zeros(batch.inputs["tokens"].shape)
    on = value[:PEAKS] > 0
    weights[np.flatnonzero(on), token[:PEAKS][on]] = 1 / max(1, on.sum())
    return activity(
        reading.model.task, stored.dictionary, site, feature, batch.inputs, weights
    )


class _Tokens:
    """Sequences' token ids, by their place."""

    def __init__(self, packed: Packed):
        self.packed = packed

    def __call__(self, place: int) -> np.ndarray:
        """Returns the tokens of a sequence."""
        return self.packed.tokens_at(place)
