"""`influence evaluate lds`: do a run's scores predict what retraining does?"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from influence.runtime import formats
from influence.runtime.evaluating.bench import Bench, opened_bench
from influence.runtime.evaluating.options import Lds, protocol_of
from influence.runtime.recipes import read_recipe
from influence.runtime.run.job import Models, clock
from influence.runtime.run.ledger import Stage, locked
from influence.runtime.run.options import check_numbers
from influence.truth.correlation import Interval
from influence.truth.lds import ceiling, lds
from influence.truth.likeness import Likeness, likeness
from influence.truth.retraining import Groups, Protocol, fold, labelled

SMOOTH = 0.5
"""Of a recipe with less metasmoothness it is said that derivatives mean little."""


class Judged(NamedTuple):
    """How true a run's scores are.

    Attributes:
      each: of every question, by name.
      mean: over questions.
      ceiling: what noise leaves for any score to reach.
      metasmoothness: of the recipe.
      likeness: of the run's model to what retraining with everything ends in.
    """

    each: dict[str, Interval]
    mean: Interval
    ceiling: float
    metasmoothness: float
    likeness: Likeness


def judge(
    options: Lds, console: Console | None = None, given: Models | None = None
) -> Judged:
    """Retrains a run's model without random sequences, and judges the run's scores.

    Args:
      options: the run, how its model was trained, and what is left out.
      console: where to show what will be done, what happens, and the table.
      given: models by role, as for `fit`; one may be what training began with.

    Raises:
      ValueError: if the recipe, the protocol and the run do not go together.
      FileNotFoundError: if the run has no scores.

    Example:
      >>> from influence.runtime.evaluating.judging import judge
      >>> from influence.runtime.evaluating.options import Lds
      >>> found = judge(Lds(done, how, subsets=10, drop=0.2), quiet, begun)
      >>> list(found.each), found.likeness.alike
      (['3'], True)
    """
    check_numbers(options)
    trained = read_recipe(options.recipe)
    protocol = protocol_of(
        *(options.protocol, options.subsets, options.drop),
        *(options.repeats, options.draw, trained.seed),
    )
    with locked(options.run):
        bench = opened_bench(options.run, trained, options.save_every, console, given)
        judging = Judging(bench, options, protocol)
        found = judging.judged()
        judging.show(found)
    return found


@dataclass(frozen=True)
class Judging:
    """A run's scores under a protocol."""

    bench: Bench
    options: Lds
    protocol: Protocol

    @property
    def stage(self) -> Stage:
        """Returns the stage of the ground truth."""
        word = self.options.protocol
        stage = self.bench.stage(
            f"retrainings by {word}",
            protocol=str(self.protocol),
            at_once=str(self.options.at_once),
        )
        return stage._replace(about={**stage.about, "protocol": word})

    def truth(self) -> xr.Dataset:
        """Returns what retrainings measured; retrains unless that was done."""
        bench, job, stage = self.bench, self.bench.job, self.stage
        name = f"truth/retrainings-{self.options.protocol}.zarr"
        if not job.ledger.finished(stage, job.folder / name):
            job.show("retrain", self._plan())
            job.begin(stage)
            n, at_once = len(bench.training.examples), self.options.at_once
            run = job.saving(stage, bench.every)
            passing = fold(bench.training, self.protocol, bench.measurements, at_once)
            found = run(passing, Groups(self.protocol, n, at_once))
            truth = labelled(
                self.protocol, bench.training, list(bench.measurements), found
            )
            job.ledger.run.write(name, formats.write_scores(truth))
            job.ledger.finish(stage)
        job.forget(stage)
        return job.ledger.run.read(name, formats.read_scores)

    def judged(self) -> Judged:
        """Returns how true the scores are, and keeps it in the run."""
        bench, ledger = self.bench, self.bench.job.ledger
        baseline, truth = bench.baseline(), self.truth()
        each = {
            x: lds(bench.scores.sel(query=[x]), truth.sel(query=[x])).interval
            for x in bench.measurements
        }
        found = Judged(
            each,
            lds(bench.scores, truth).interval,
            ceiling(truth),
            baseline["metasmoothness"],
            likeness(np.array(baseline["own"]), np.array(baseline["measured"]), truth),
        )
        word = self.options.protocol
        about = {**self.stage.about}
        inputs = {**bench.checksum, "retrainings": self.stage.key}
        stage = Stage(f"LDS by {word}", inputs, about)
        ledger.begin(stage)
        ledger.run.write(f"truth/lds-{word}.json", formats.write_json(_row(found)))
        ledger.finish(stage)
        return found

    def show(self, found: Judged) -> None:
        """Prints the table, and what there is to mind."""
        job, said = self.bench.job, self.protocol
        table = Table(
            title=f"Linear datamodelling score, {said.name}, {said.subsets} subsets "
            f"without {said.drop:.2%} of {len(self.bench.training.examples):,} "
            "sequences each",
            title_justify="left",
        )
        table.add_column("question", overflow="fold")
        for name in ("LDS", "95 %", "log p, nats", "retrained", "spread"):
            table.add_column(name, justify="right")
        baseline = self.bench.baseline()
        pairs = zip(baseline["own"], baseline["measured"], strict=True)
        rows = zip(found.each.items(), pairs, found.likeness.spread, strict=True)
        for (name, x), (own, again), spread in rows:
            numbers = f"{own:.4g}", f"{again:.4g}", f"{spread:.2g}"
            table.add_row(escape(name), f"{x.value:.3f}", _range(x), *numbers)
        table.add_section()
        table.add_row("mean", f"{found.mean.value:.3f}", _range(found.mean))
        job.console.print(table)
        job.say(
            f"Noise leaves {found.ceiling:.3f} to be reached. Metasmoothness of the "
            f"recipe: {found.metasmoothness:.3f} of 1."
        )
        for warning in self._warnings(found):
            job.say(f"Mind: {warning}")

    def _warnings(self, found: Judged) -> list[str]:
        off, spread = (float(np.median(x)) for x in found.likeness)
        said = []
        if not found.likeness.alike:
            said.append(
                "the run's model is not what the recipe trains. Retrained with "
                f"everything its answers are {off:.3g} nats off (median), more than "
                f"what leaving sequences out changes, {spread:.3g}. The scores are of "
                "another model than the one that was retrained: correct the recipe."
            )
        if found.metasmoothness < SMOOTH:
            said.append(
                f"training by this recipe is no smooth function of its data "
                f"({found.metasmoothness:.2f} of 1), so no derivative predicts it well."
            )
        return said

    def _plan(self) -> dict[str, str]:
        """Returns what will be done and what it will cost, in words."""
        bench, said = self.bench, self.protocol
        count = said.subsets * len(said.seeds)
        seconds = bench.job.noted("retraining").get("seconds", 0.0)
        baseline = bench.baseline()
        off = np.abs(np.subtract(baseline["own"], baseline["measured"]))
        return {
            "retrainings": f"{count}: {said.subsets} subsets, each with seeds "
            f"{', '.join(map(str, said.seeds))}",
            "left out": f"{said.drop:.2%} of {len(bench.training.examples):,} "
            "sequences",
            "recipe": f"{bench.trained.recipe}, from {bench.trained.start}",
            "likeness": f"retrained with everything, answers are {np.median(off):.3g} "
            "nats off (median) those of the run's model",
            "side by side": f"{self.options.at_once}",
            "time": f"about {clock(count * seconds)}, from those before",
        }


def _range(x: Interval) -> str:
    return f"{x.low:+.3f} to {x.high:+.3f}"


def _row(found: Judged) -> dict[str, Any]:
    """Returns a judgement as JSON has it."""
    off = zip(found.each.items(), *found.likeness, strict=True)
    return {
        "mean": found.mean._asdict(),
        "ceiling": found.ceiling,
        "metasmoothness": found.metasmoothness,
        "questions": [
            {"query": k, **x._asdict(), "off": float(a), "spread": float(b)}
            for (k, x), a, b in off
        ],
    }
