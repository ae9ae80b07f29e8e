"""`influence features`: what a run's most influential sequences have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from influence.attribution.measurements import Likelihood
from influence.attribution.query import query
from influence.attribution.scan import scan
from influence.interpret.dictionary import encode
from influence.interpret.link import (
    Activities,
    Enrichment,
    Path,
    activities,
    enriched,
    pooled,
    through,
)
from influence.model.sites import Address
from influence.runtime import formats
from influence.runtime.corpus.packed import Packed
from influence.runtime.dictionaries.folders import open_dictionary
from influence.runtime.dictionaries.stored import Stored
from influence.runtime.models import Model
from influence.runtime.report.page import COLUMNS, shown
from influence.runtime.run.asking import asked, measurements
from influence.runtime.run.fitting import curvature_of, fitted
from influence.runtime.run.found import Found, found
from influence.runtime.run.job import MODEL, Job, Models, opened_job
from influence.runtime.run.ledger import locked, opened
from influence.runtime.run.options import check_numbers
from influence.runtime.run.packing import sample
from influence.runtime.sae.linked import FEATURES, PATHS, made_from
from influence.runtime.sae.options import Link
from influence.runtime.sae.reading import Reading, check_stored


class Row(NamedTuple):
    """A feature that a question's sequences have in common.

    Attributes:
      feature: which.
      lift: how many times as often it is on as in sequences alike.
      p: how often chance stands out as much by any feature.
      rate: the share of tokens at which it is on.
      base: the same in sequences alike.
    """

    feature: int
    lift: float
    p: float
    rate: float
    base: float


class Carried(NamedTuple):
    """Influence by the features that are on where it is carried.

    Attributes:
      feature: which.
      sum: the scores of the tokens at which it is on.
      tokens: how many these are.
    """

    feature: int
    sum: float
    tokens: int


class Passed(NamedTuple):
    """A feature that a question's influence goes through.

    Attributes:
      feature: which.
      effect: what the question's value would lose without it, to first order.
    """

    feature: int
    effect: float


@dataclass(frozen=True)
class Linked:
    """What features have to do with one question.

    Attributes:
      raises: what the sequences that raise it most have in common.
      lowers: what those that lower it most do.
      tokens: which kinds of token carry its influence.
      through: which features it goes through, the strongest first.
    """

    raises: list[Row]
    lowers: list[Row]
    tokens: list[Carried]
    through: list[Passed]


def link(
    options: Link, console: Console | None = None, given: Models | None = None
) -> dict[str, Linked]:
    """Says what features have to do with a run's questions, by question.

    Args:
      options: of which run, by which dictionary.
      console: where to show it; the terminal if left out.
      given: models by role instead of opening them, as for `fit`.

    Raises:
      ValueError: if run and dictionary do not go together.
      FileNotFoundError: if nothing was scanned.
    """
    check_numbers(options)
    with locked(options.run):
        job = opened_job(opened(options.run), console, given)
        results, model = found(job), job.model(MODEL)
        stored = open_dictionary(options.sae)
        corpus = job.corpus(model)
        reading = Reading(job, model, corpus.packed, corpus.digest)
        check_stored(stored, reading)
        work = _Linking(options, job, results, reading, stored)
        made = {x.name: work.of(x.name) for x in asked(job)}
        run = job.ledger.run
        said = {"of": made_from(job), **_plain(options, stored, made)}
        run.write(FEATURES, formats.write_json(said))
        run.write(PATHS, formats.write_scores(work.paths.to_dataset(name="score")))
        for name, each in made.items():
            _show(job.console, name, each)
        job.say("`influence report` shows them beside the layers.")
    return made


@dataclass(frozen=True)
class _Linking:
    """A run's questions and a dictionary."""

    options: Link
    job: Job
    results: Found
    reading: Reading
    stored: Stored

    @cached_property
    def site(self) -> Address:
        return self.reading.site(self.stored.about.site)

    @cached_property
    def total(self) -> xr.DataArray:
        return self.results.total()

    @cached_property
    def model(self) -> Model:
        return self.reading.model

    def of(self, name: str) -> Linked:
        """Returns what features have to do with a question."""
        return Linked(
            self._common(name, lowest=False),
            self._common(name, lowest=True),
            self._tokens(name),
            [Passed(x.feature, x.effect) for x in self._through[name]],
        )

    def _common(self, name: str, *, lowest: bool) -> list[Row]:
        """Returns the features that a question's sequences of one sign share."""
        places = _extreme(self.total.sel(query=name), self.options.top, lowest=lowest)
        if not len(places):
            return []
        ids, known = self._sampled
        where = {x: i for i, x in enumerate(ids)}
        chosen = [where[str(self.total["train"].values[i])] for i in places]
        options = self.options
        each: Enrichment = enriched(
            known, chosen, permutations=options.permutations, seed=options.seed
        )
        return [
            Row(
                i,
                float(each.lift_F[i]),
                float(each.p_F[i]),
                float(each.rate_F[i]),
                float(each.base_F[i]),
            )
            for i in each.first(options.shown, options.level)
        ]

    @cached_property
    def _sampled(self) -> tuple[list[str], Activities]:
        """Returns the sequences that are compared, and features' activities in them.

        All that are extreme for a question, and others that are drawn.
        """
        total = self.total
        extreme = {
            str(total["train"].values[i])
            for row in total
            for lowest in (False, True)
            for i in _extreme(row, self.options.top, lowest=lowest)
        }
        ids, parts = [], []
        fold = activities(self.reading.source, self.stored.dictionary, self.site)
        share = self.options.sequences / max(1, total.sizes["train"])
        for corpus in self.results.corpora.values():
            packed = corpus.packed
            count = max(1, round(share * len(packed)))
            drawn = sample(packed, count, self.options.seed)
            own = [x for x in extreme if x.rsplit(":", 2)[0] == packed.name]
            names = list(dict.fromkeys([*own, *drawn.ids]))
            some = packed.take([packed.place_of(x) for x in names])
            parts.append(self.job.driver.run(fold, self.reading.batches(some)))
            ids += names
        return ids, Activities(*(np.concatenate(x) for x in zip(*parts, strict=True)))

    def _tokens(self, name: str) -> list[Carried]:
        """Returns the features at whose tokens most influence is carried."""
        shares, on = self._shares
        scores = shares.sel(query=name).values
        found = pooled(scores, on)
        order = np.argsort(-np.abs(found.sum_F))[: self.options.shown]
        return [
            Carried(int(i), float(found.sum_F[i]), int(found.tokens_F[i]))
            for i in order
            if found.tokens_F[i]
        ]

    @cached_property
    def _shares(self) -> tuple[xr.DataArray, np.ndarray]:
        """Returns the shares of tokens of extreme sequences, and what is on there."""
        shares = self.results.shares()
        on = np.zeros(
            (
                shares.sizes["train"],
                shares.sizes["token"],
                self.stored.dictionary.width,
            ),
            bool,
        )
        rows = self._rows([str(x) for x in shares["train"].values])
        for place, (source, batch) in enumerate(rows):
            values, keep = source.values((self.site,), source.params, batch)
            z = np.asarray(encode(self.stored.dictionary, values[self.site]))
            z = (z > 0) & np.asarray(keep)[:, None]
            length = min(len(z), on.shape[1])
            on[place, :length] = z[:length]
        return shares, on

    def _rows(self, ids: Sequence[str]) -> Any:
        """Yields sequences one by one, as the model reads them."""
        for id_ in ids:
            packed = self._packed_of(id_)
            one = packed.take([packed.place_of(id_)])
            yield self.reading.source, next(iter(self.job.batches(one, 1)))

    def _packed_of(self, id_: str) -> Packed:
        return self.results.corpora[id_.rsplit(":", 2)[0]].packed

    @cached_property
    def _through(self) -> dict[str, list[Path]]:
        """Returns the features that each question's influence goes through."""
        known = measurements(self.model, asked(self.job))
        count, dictionary = self.options.shown, self.stored.dictionary
        return {
            name: through(x, self.model.params, dictionary, self.site, count)
            if isinstance(x, Likelihood)
            else []
            for name, x in known.items()
        }

    @cached_property
    def paths(self) -> xr.DataArray:
        """Returns the influence of shown sequences through features, nats.

        `(path, train)`; a path is a question and a feature.
        """
        curvature = curvature_of(
            self.job, fitted(self.job, MODEL, self.model, self.job.corpus(self.model))
        )
        measured = {
            f"{name}\0{x.feature}": x.measurement
            for name, paths in self._through.items()
            for x in paths
        }
        wanted = shown(self.total, COLUMNS)
        if not measured:
            return xr.DataArray(
                np.zeros((0, len(wanted))),
                {"path": [], "train": wanted},
                ("path", "train"),
            )
        solved = query(curvature, self.model.params, measured)
        parts = []
        for name in self.results.corpora:
            own = [x for x in wanted if x.rsplit(":", 2)[0] == name]
            if not own:
                continue
            packed = self.results.corpora[name].packed
            some = packed.take([packed.place_of(x) for x in own])
            parts.append(
                scan(
                    self.model.task,
                    self.model.params,
                    solved,
                    self.reading.batches(some),
                    n_train=int(self.total.attrs["n_train"]),
                    run=self.job.driver.named("influence through features"),
                ).total
            )
        return xr.concat(parts, "train").rename(query="path")


def _extreme(row: xr.DataArray, count: int, *, lowest: bool) -> np.ndarray:
    """Returns the places of the most extreme scores of one sign."""
    values = -row.values if lowest else row.values
    order = np.argsort(-values, kind="stable")[:count]
    return order[values[order] > 0]


def _plain(options: Link, stored: Stored, made: Mapping[str, Linked]) -> dict:
    """Returns what was found as JSON has it."""
    return {
        "dictionary": options.sae,
        "site": stored.about.site,
        "questions": {
            name: {
                kind: [_finite(x._asdict()) for x in getattr(each, kind)]
                for kind in ("raises", "lowers", "tokens", "through")
            }
            for name, each in made.items()
        },
    }


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row with None for a lift over nothing: JSON has no infinity."""
    return {k: None if x == np.inf else x for k, x in row.items()}


def _show(console: Console, name: str, found: Linked) -> None:
    console.rule(escape(name), align="left")
    for rows, what in (
        (found.raises, "in the sequences that raise it most"),
        (found.lowers, "in the sequences that lower it most"),
    ):
        table = Table(title=f"on more often {what}", title_justify="left")
        for head in ("feature", "lift", "p", "on at", "in their like"):
            table.add_column(head, justify="right")
        for x in rows:
            table.add_row(
                str(x.feature),
                f"{x.lift:.1f}",
                f"{x.p:.3f}",
                f"{x.rate:.1%} of tokens",
                f"{x.base:.1%}",
            )
        console.print(table if rows else f"No feature stands out {what}.")
    console.print(
        "Its influence is carried by tokens at which these are on: "
        + ", ".join(f"{x.feature} ({x.sum:+.2g} nats)" for x in found.tokens),
        highlight=False,
    )
    if found.through:
        console.print(
            "It goes through: "
            + ", ".join(f"{x.feature} ({x.effect:+.2g} nats)" for x in found.through),
            highlight=False,
        )
