"""`influence evaluate methods`: every method on one training, judged by retraining."""

import re
from dataclasses import dataclass

import jax
import numpy as np
import xarray as xr
from rich.console import Console

from influence.attribution.measurements import likelihoods
from influence.model.task import LanguageModel
from influence.model.train import Training
from influence.model.transformer import Apply
from influence.runtime import formats
from influence.runtime.driver import Driver
from influence.runtime.evaluating.bench import scratch
from influence.runtime.evaluating.experiment import Experiment, read_experiment
from influence.runtime.evaluating.material import Material, material
from influence.runtime.evaluating.options import Methods
from influence.runtime.evaluating.scoring import costed, shown
from influence.runtime.run.job import Models, code
from influence.runtime.run.ledger import METHODS as JOB
from influence.runtime.run.ledger import Ledger, Stage, begin, locked
from influence.runtime.run.options import check_numbers
from influence.runtime.saves import Saves
from influence.truth.lds import ceiling
from influence.truth.methods import METHODS
from influence.truth.retraining import retrain
from influence.truth.smoothness import metasmoothness
from influence.truth.subject import Subject
from influence.truth.table import Row, rows

LAYERS = "blocks.*"


def compare(
    options: Methods, console: Console | None = None, given: Models | None = None
) -> list[Row]:
    """Trains a decoder, retrains it, and judges methods by it.

    Args:
      options: the experiment, and where to write to.
      console: where to show what happens, and the table.
      given: models by role, if the experiment is of a run that was given them.

    Returns:
      the table, the best method first; `methods.json` has the same.

    Raises:
      ValueError: if the experiment makes no sense.
      FileNotFoundError: if there is no experiment, or no data where it says.

    Example:
      >>> from influence.runtime.evaluating.comparing import compare
      >>> from influence.runtime.evaluating.options import Methods
      >>> rows = compare(Methods(table), quiet, own)
      >>> sorted(x.method for x in rows)
      ['ekfac', 'gradient dot']
    """
    check_numbers(options)
    experiment = read_experiment(options.experiment)
    out = options.out or options.experiment.with_suffix("")
    screen = console or Console()
    with locked(out):
        ledger = begin(out, JOB)
        made = material(ledger, experiment, given)
        comparing = _Comparing(ledger, experiment, made, screen, options.save_every)
        found = comparing.judged()
        written = [x._asdict() for x in found]
        ledger.run.write("methods.json", formats.write_json(written))
    screen.print(shown(found))
    kept = f"Kept: {out / 'methods.json'}"
    screen.print(kept, soft_wrap=True, highlight=False, markup=False)
    return found


@dataclass(frozen=True)
class _Comparing:
    """An experiment at work."""

    ledger: Ledger
    experiment: Experiment
    material: Material
    console: Console
    every: float

    @property
    def training(self) -> Training:
        """Returns how the decoder comes to be."""
        config, said = self.material.config, self.experiment
        task = LanguageModel(Apply(config), config.context)
        start = scratch(task.apply)
        return Training(task, said.trained.recipe, self.material.examples, start)

    def stage(self, name: str, **inputs: str) -> Stage:
        """Returns a stage, of everything that the subject depends on."""
        said, made = self.experiment, self.material
        whole = {
            "code": code(),
            "data": made.digest,
            "model": str(made.config),
            "recipe": str(said.trained),
            "at_once": str(said.at_once),
        }
        return Stage(name, {**whole, **inputs})

    def judged(self) -> list[Row]:
        """Returns the table; what was retrained and scored before is not again."""
        said, training = self.experiment, self.training
        seed, n = said.trained.seed, len(training.examples)
        driver = Driver(self.console)
        ones = np.ones((said.at_once, n))
        with driver.stage("training"):
            many = training.many(ones, [seed] * said.at_once, said.at_once)
            params = jax.block_until_ready(jax.tree.map(lambda x: x[0], many))
        asked = likelihoods(training.task, self.material.asked)
        tokens, others = self.material.tokens
        words = tokens, dict(zip(asked, others, strict=True))
        subject = Subject(training, seed, params, asked, words, LAYERS)
        self.console.print(
            f"{n:,} training sequences, {len(asked)} asked about; metasmoothness "
            f"{metasmoothness(training, seed):.3f}"
        )
        truth = self._truth(subject, driver)
        self.console.print(f"Noise leaves {ceiling(truth):.3f} to be reached.")
        found = {}
        for name in said.methods:
            scored = self._scored(subject, name, driver)
            if np.isfinite(scored.values).all():
                found[name] = scored
            else:
                self.console.print(f"Left out: {name}. Its scores are not finite.")
        if not found:
            raise ValueError("No method's scores are finite. Lower the recipe's rate.")
        return rows(found, {k: METHODS[k].needs for k in found}, truth)

    def _truth(self, subject: Subject, driver: Driver) -> xr.Dataset:
        """Returns what retrainings measured; retrains unless that was done."""
        run, protocol = self.ledger.run, self.experiment.protocol
        stage, name = self.stage("retrainings", protocol=str(protocol)), "truth.zarr"
        if not self.ledger.finished(stage, run.path(name)):
            self.ledger.begin(stage)
            saves = run.path("saves/retrainings")
            found = retrain(
                subject.training,
                protocol,
                subject.measurements,
                at_once=self.experiment.at_once,
                run=driver.saving(lambda _: Saves(saves, stage.key, self.every)),
            )
            run.write(name, formats.write_scores(found))
            self.ledger.finish(stage)
        return run.read(name, formats.read_scores)

    def _scored(self, subject: Subject, name: str, driver: Driver) -> xr.DataArray:
        """Returns a method's scores, with what they cost, unless they were kept."""
        run, stage = self.ledger.run, self.stage(f"scores of {name}")
        file = f"scores/{re.sub('[^a-z0-9]+', '-', name.lower())}.zarr"
        if not self.ledger.finished(stage, run.path(file)):
            self.ledger.begin(stage)
            with driver.stage(name):
                kept = costed(subject, METHODS[name].score)
            run.write(file, formats.write_scores(kept.to_dataset()))
            self.ledger.finish(stage)
        return run.read(file, formats.read_scores)["score"]
