"""`influence sae features`: a page about what each feature of a dictionary is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from influence.attribution.query import query
from influence.attribution.scan import scan
from influence.attribution.scores import rankings
from influence.curvature.operator import Curvature
from influence.interpret import features
from influence.interpret.card import Album, Band, Card, Cause, Example
from influence.interpret.features import Survey, Words
from influence.interpret.link import Activity
from influence.model.sites import Address
from influence.runtime.corpus.packed import Packed
from influence.runtime.corpus.texts import texts
from influence.runtime.dictionaries.folders import open_dictionary
from influence.runtime.dictionaries.stored import Stored
from influence.runtime.models import Model
from influence.runtime.report.feature_exports import circuit_tracer, neuronpedia
from influence.runtime.report.features import render
from influence.runtime.run.featuring import PEAKS, measured_at, peaks
from influence.runtime.run.fitting import curvature_of, fitted
from influence.runtime.run.job import MODEL, Job, Models, opened_job
from influence.runtime.run.ledger import opened
from influence.runtime.run.options import check_numbers
from influence.runtime.run.packing import Corpus
from influence.runtime.sae.options import Features
from influence.runtime.sae.reading import Reading, check_stored, read_once
from influence.runtime.sae.spelling import spelt
from influence.runtime.store import atomic, check_file

TOP, BANDS, EACH = 8, 4, 4
"""Examples at the top, bands of strength below it, and examples of each."""

TOGETHER = 2e9
"""Bytes that the queries of features that are asked for together may take."""

LENSED = 8
"""Sequences over which promoted tokens are averaged."""

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
    check_file(options.out)
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
    shown.print(f"The page: {options.out}", markup=False, soft_wrap=True)
    return album


class _Examples(NamedTuple):
    """Places at which features are on, and what features do around them."""

    value_FxK: np.ndarray
    sequence_FxK: np.ndarray
    token_FxK: np.ndarray
    window_FxKxW: np.ndarray


@dataclass(frozen=True)
class _Browsing:
    """A dictionary that is looked at."""

    options: Features
    reading: Reading
    stored: Stored

    @cached_property
    def site(self) -> Address:
        return self.reading.site(self.stored.about.site)

    @cached_property
    def packed(self) -> Packed:
        """Returns the sequences that are looked at."""
        return self.reading.some(self.options.sequences, self.options.seed)

    @cached_property
    def survey(self) -> Survey:
        """Returns where features are on in them."""
        fold = features.survey(
            self.reading.source,
            self.stored.dictionary,
            self.site,
            top=max(TOP, PEAKS),
            drawn=BANDS * EACH * 2,
            scale=self._scale(),
            seed=self.options.seed,
        )
        return self._run(fold)

    @cached_property
    def spelling(self) -> list[str]:
        """Returns the text of every token."""
        model = self.reading.model
        return spelt(model.tokenizer, range(model.vocabulary))

    def _run(self, fold: Any) -> Any:
        return self.reading.job.driver.run(fold, self.reading.batches(self.packed))

    def _scale(self) -> float:
        """Returns about how large activations are: half the length of what is read."""
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
        survey, examples, words = self.survey, self._examples(), self._words()
        places, cosines = features.nearest(self.stored.dictionary)
        for i in range(self.stored.dictionary.width):
            bins = np.flatnonzero(survey.counts_FxE[i])
            first, last = (bins[0], bins[-1] + 1) if len(bins) else (0, 0)
            edges = survey.edges[first : last + 1] if len(bins) else ()
            yield Card(
                index=i,
                density=float(survey.density_F[i]),
                maximum=float(survey.maximum_F[i]),
                counts=tuple(int(x) for x in survey.counts_FxE[i][first:last]),
                edges=tuple(float(x) for x in edges),
                bands=tuple(self._bands(examples, i)),
                promoted=() if words is None else self._listed(*words[:2], i),
                suppressed=() if words is None else self._listed(*words[2:], i),
                nearest=tuple(
                    zip(places[i].tolist(), cosines[i].tolist(), strict=True)
                ),
                causes=ranked.get(i),
            )

    def _words(self) -> Words | None:
        batch = next(iter(self.reading.batches(self.packed)))
        inputs = {k: x[:LENSED] for k, x in batch.inputs.items()}
        return features.words(self.reading.source, self.stored.dictionary, inputs)

    def _listed(
        self, ids_FxK: np.ndarray, by_FxK: np.ndarray, i: int
    ) -> tuple[tuple[str, float], ...]:
        """Returns a feature's tokens, and by how much it changes their logits."""
        pairs = zip(ids_FxK[i].tolist(), by_FxK[i].tolist(), strict=True)
        return tuple((self.spelling[id_], by) for id_, by in pairs)

    def _examples(self) -> _Examples:
        """Returns where features are on, at the top and drawn, and what is around."""
        both = zip(self.survey.top[:3], self.survey.drawn[:3], strict=True)
        value, sequence, token = (
            np.concatenate([top[:, :TOP], drawn], axis=1) for top, drawn in both
        )
        fold = features.windows(
            self.reading.source,
            self.stored.dictionary,
            self.site,
            sequence,
            token,
            self.options.around,
        )
        return _Examples(value, sequence, token, self._run(fold))

    def _bands(self, examples: _Examples, i: int) -> Iterator[Band]:
        """Yields a feature's examples by strength, the strongest first."""
        value = examples.value_FxK[i]
        tops = [k for k in range(TOP) if value[k] > 0]
        if tops:
            yield Band("top", tuple(self._example(examples, i, k) for k in tops))
        strength = value / max(float(self.survey.maximum_F[i]), 1e-12)
        for band in reversed(range(BANDS)):
            low, high = band / BANDS, (band + 1) / BANDS
            own = [k for k in range(TOP, len(value)) if low < strength[k] <= high]
            if own:
                shown = (self._example(examples, i, k) for k in own[:EACH])
                yield Band(f"{low:.0%} to {high:.0%} of the largest", tuple(shown))

    def _example(self, examples: _Examples, i: int, k: int) -> Example:
        """Returns one of a feature's examples, with the tokens around it."""
        window, row = examples.window_FxKxW[i, k], int(examples.sequence_FxK[i, k])
        here = np.flatnonzero(np.isfinite(window))
        first = int(examples.token_FxK[i, k]) - self.options.around + int(here[0])
        tokens = self.packed.tokens_at(row)[first : first + len(here)]
        return Example(
            self.packed.ids[row],
            first,
            tuple(self.spelling[int(x)] for x in tokens),
            tuple(window[here].tolist()),
        )

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
        """Returns a feature's mean pre-activation at its strongest tokens."""
        places = peaks(self.reading, self.packed, self.survey, feature)
        shape = PEAKS, self.packed.context
        about = self.reading.model, self.stored, self.site, feature
        return measured_at(*about, places, shape)


def _texts(corpus: Corpus, model: Model, ids: Sequence[str]) -> dict[str, str]:
    """Returns sequences' texts; token ids, if that is all they are."""
    packed = corpus.packed
    if model.tokenizer is None:
        rows = {x: packed.tokens_at(packed.place_of(x)) for x in ids}
        return {x: " ".join(map(str, row.tolist())) for x, row in rows.items()}
    found = texts(packed, corpus.source, ids, model.tokenizer)
    return {x: "".join(pieces) for x, pieces in found.items()}
