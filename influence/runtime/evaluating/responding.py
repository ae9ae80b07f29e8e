"""`influence evaluate pbrf`: do a run's scores predict what they are derivatives of?"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from influence.attribution.query import query
from influence.attribution.scan import scan
from influence.curvature.diagonal import identity
from influence.curvature.operator import Curvature
from influence.curvature.solvers import ConjugateGradients, Eigenbasis, Solver
from influence.linalg.damping import Absolute, Relative
from influence.runtime import formats
from influence.runtime.corpus.packed import Packed
from influence.runtime.evaluating.options import Pbrf
from influence.runtime.evaluating.scored import Scored, opened_scored
from influence.runtime.run.fitting import curvature_of, fitted
from influence.runtime.run.job import MODEL, Models, clock
from influence.runtime.run.ledger import Stage, locked
from influence.runtime.run.options import check_numbers
from influence.runtime.run.packing import sample
from influence.runtime.run.solving import damped_by
from influence.truth.correlation import Correlation, pearson
from influence.truth.pbrf import Held, Until, pbrf

RESPONSES = "truth/responses.zarr"

RESPONSE = "response"

OWN, CONVERGED, PRODUCTS = "scores", "converged", "products"

TITLES = {
    OWN: "the run's scores",
    CONVERGED: "solved to the end",
    PRODUCTS: "gradient products",
}

AXES = ("query", "train")

LINEAR = 0.5
"""Below this correlation it is said that derivatives mean little."""

ENOUGH = 3
"""Fewer sequences than this tell nothing."""

STEPS = 200
"""Of conjugate gradients at most, where they are to converge."""


class Responded(NamedTuple):
    """How well scores agree with proximal Bregman responses.

    Attributes:
      responses: `response`, `nan` where an objective is not minimised, and the scores
        `converged` and `products`, `(query, train)`; `slope` along `train` is how much
        of an objective's slope is left.
      agreement: Pearson's correlations, of the run's `scores` as well.
      size: by query, the slope of responses on the run's scores: one if scores are as
        large as what they predict.
    """

    responses: xr.Dataset
    agreement: Mapping[str, Correlation]
    size: Mapping[str, float]


def respond(
    options: Pbrf, console: Console | None = None, given: Models | None = None
) -> Responded:
    """Finds proximal Bregman responses of a run's model, and judges its scores.

    Args:
      options: the run, and of how many sequences.
      console: where to show what will be done, what happens, and the table.
      given: models by role, as for `fit`.

    Raises:
      ValueError: if an objective is not minimised, or something changed since the fit.
      FileNotFoundError: if the run has no scores.

    Example:
      >>> from influence.runtime.evaluating.options import Pbrf
      >>> from influence.runtime.evaluating.responding import respond
      >>> found = respond(Pbrf(done, sequences=6, copies=0.1), quiet, own)
      >>> found.agreement["converged"].interval.value > 0.9
      True
    """
    check_numbers(options)
    with locked(options.run):
        responding = _Responding(opened_scored(options.run, console, given), options)
        found = responding.judged()
        responding.show(found)
    return found


@dataclass(frozen=True)
class _Responding:
    """A run's scores, and what they are derivatives of."""

    scored: Scored
    options: Pbrf

    @cached_property
    def files(self) -> list[str]:
        """Returns the artifacts with the curvature."""
        scored = self.scored
        return fitted(scored.job, MODEL, scored.model, scored.corpus)

    @cached_property
    def sequences(self) -> Packed:
        """Returns the sequences whose responses are found: some that were scored."""
        packed, known = self.scored.corpus.packed, self.scored.scores["train"].values
        ranked = packed.take(np.flatnonzero(np.isin(packed.ids, known)))
        return sample(ranked, self.options.sequences, self.options.draw)

    @cached_property
    def held(self) -> Packed:
        """Returns the sequences whose predictions are held in place."""
        packed, said = self.scored.corpus.packed, self.options.held
        return packed if said is None else sample(packed, said, self.options.draw)

    @property
    def stage(self) -> Stage:
        """Returns the stage of the responses."""
        artifacts = self.scored.job.ledger.run.manifest["artifacts"]
        names = ("sequences", "held", "copies", "tolerance", "evaluations")
        names += ("draw", "at_once")
        return self.scored.stage(
            "responses",
            curvature=" ".join(artifacts[x]["sha256"] for x in self.files),
            damping=str(damped_by(self.scored.job)),
            **{x: str(getattr(self.options, x)) for x in names},
        )

    def judged(self) -> Responded:
        """Returns how well the scores agree with responses; keeps it in the run."""
        job, responses = self.scored.job, self._responses()
        minimised = responses.dropna("train")
        _check_enough(minimised.sizes["train"], responses.sizes["train"])
        truth = minimised[RESPONSE]
        own = self.scored.scores.sel(train=truth["train"])
        scores = {OWN: own, **{x: minimised[x] for x in (CONVERGED, PRODUCTS)}}
        agreement = {k: pearson(x, truth) for k, x in scores.items()}
        size = {
            str(q): _slope(own.sel(query=q).values, truth.sel(query=q).values)
            for q in truth["query"].values
        }
        found = Responded(responses, agreement, size)
        inputs = {**self.scored.checksum, "responses": self.stage.key}
        stage = Stage("PBRF", inputs, self.stage.about)
        job.ledger.begin(stage)
        job.ledger.run.write("truth/pbrf.json", formats.write_json(_row(found)))
        job.ledger.finish(stage)
        return found

    def _responses(self) -> xr.Dataset:
        """Returns responses, and what other scores predict, unless they were kept."""
        job, stage = self.scored.job, self.stage
        if not job.ledger.finished(stage, job.folder / RESPONSES):
            curvature = curvature_of(job, self.files)
            job.show("proximal Bregman responses", self._plan(curvature))
            job.begin(stage)
            found = xr.Dataset(
                {RESPONSE: self._found(curvature, stage), **self._scores(curvature)}
            )
            job.ledger.run.write(RESPONSES, formats.write_scores(found))
            job.ledger.finish(stage)
        job.forget(stage)
        return job.ledger.run.read(RESPONSES, formats.read_scores)

    def _found(self, curvature: Curvature, stage: Stage) -> xr.DataArray:
        scored, options = self.scored, self.options
        job, model = scored.job, scored.model
        return pbrf(
            model.task,
            model.params,
            curvature,
            scored.measurements,
            job.batches(self.sequences, options.at_once),
            Held(
                job.batches(self.held, self._size),
                Relative(damped_by(job)),
                self._n_train,
                options.copies,
            ),
            until=Until(options.tolerance, options.evaluations),
            run=job.saving(stage, options.save_every),
        )

    def _scores(self, curvature: Curvature) -> dict[str, xr.DataArray]:
        """Returns what the same equation solved to its end predicts, and products."""
        scored, size = self.scored, self._size
        job, task, params = scored.job, scored.model.task, scored.model.params
        held = job.batches(self.held, size)
        names = tuple(x.name for x in curvature.layers)
        none = identity(task, params, held, layers=names)
        damping = Relative(damped_by(job))
        solvers: dict[str, tuple[Curvature, Solver]] = {
            CONVERGED: (
                curvature,
                ConjugateGradients(task, held, damping, steps=STEPS),
            ),
            PRODUCTS: (none, Eigenbasis(Absolute(0.0))),
        }
        found = {}
        for name, (curved, solver) in solvers.items():
            asked = query(curved, params, scored.measurements, solver=solver)
            batches = job.batches(self.sequences, size)
            scores = scan(
                task, params, asked, batches, n_train=self._n_train, by_layer=False
            ).total
            found[name] = scores.drop_vars([x for x in scores.coords if x not in AXES])
        return found

    @property
    def _size(self) -> int:
        return self.scored.job.noted(f"batch of {MODEL}")["size"]

    @property
    def _n_train(self) -> int:
        return int(self.scored.scores.attrs["n_train"])

    def _plan(self, curvature: Curvature) -> dict[str, str]:
        """Returns what will be done and what it will cost, in words."""
        n, held, options = len(self.sequences), len(self.held), self.options
        timed = self.scored.job.noted(f"batch of {MODEL}")
        each = 2 * n * held / timed["size"] * timed["seconds"]
        return {
            "responses": f"{2 * n}: with {options.copies:g} copies more and less of "
            f"{n} of {self.scored.scores.sizes['train']:,} sequences, drawn by seed "
            f"{options.draw}",
            "moving": f"{len(curvature.layers)} layers, damping "
            f"{damped_by(self.scored.job):g} × the mean eigenvalue, as the scores have",
            "held in place": f"predictions on {held:,} sequences",
            "time": f"at least {clock(each)} for each evaluation of all of them, in "
            f"float64; tens are needed, {options.evaluations} at most",
        }

    def show(self, found: Responded) -> None:
        """Prints the table, and what there is to mind."""
        job, n = self.scored.job, found.responses.sizes["train"]
        left = n - found.responses.dropna("train").sizes["train"]
        table = Table(
            title="Correlation with the proximal Bregman responses of "
            f"{n - left} sequences",
            title_justify="left",
        )
        table.add_column("question", overflow="fold")
        for name in (*TITLES.values(), "size"):
            table.add_column(name, justify="right")
        for name, size in found.size.items():
            each = (found.agreement[x].each.sel(query=name).item() for x in TITLES)
            table.add_row(escape(name), *(f"{x:.3f}" for x in each), f"{size:.3g}")
        table.add_section()
        table.add_row("mean", *(str(found.agreement[x].interval) for x in TITLES), "")
        job.console.print(table)
        job.say(
            "Size: how large responses are, in multiples of the run's scores, per copy."
        )
        if left:
            job.say(
                f"Mind: {left} of {n} sequences are left out: without "
                f"{self.options.copies:g} copies their objective has no minimum near, "
                "or was not found in so many evaluations. Ask for fewer --copies."
            )
        if found.agreement[CONVERGED].interval.value < LINEAR:
            job.say(
                "Mind: even the equation solved to its end predicts little here. So "
                "many copies are no small change at this damping, and no score that is "
                "a derivative can be held against it. Ask for fewer --copies."
            )


def _check_enough(minimised: int, asked: int) -> None:
    if minimised < ENOUGH:
        raise ValueError(
            f"Of {asked} sequences' objectives {minimised} were minimised, which is "
            f"too few to correlate: {ENOUGH} at least. Ask for fewer --copies, or for "
            "more --sequences or --evaluations."
        )


def _slope(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Returns the slope of a line through points; 0 if they are all at one place."""
    return float(np.polyfit(x_N, y_N, 1)[0]) if np.ptp(x_N) > 0 else 0.0


def _row(found: Responded) -> dict[str, object]:
    """Returns a judgement as JSON has it."""
    agreement = found.agreement.items()
    return {
        "mean": {k: x.interval._asdict() for k, x in agreement},
        "questions": [
            {
                "query": name,
                **{k: x.each.sel(query=name).item() for k, x in agreement},
                "size": size,
            }
            for name, size in found.size.items()
        ],
    }
