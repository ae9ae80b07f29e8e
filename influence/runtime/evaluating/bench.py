"""A run to be judged by training again: its model's training as a function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from influence.attribution.measurements import measure
from influence.model.examples import Examples
from influence.model.train import Training
from influence.model.transformer import Apply, Decoder
from influence.runtime import formats
from influence.runtime.evaluating.scored import Scored, opened_scored
from influence.runtime.models import Model, open_model
from influence.runtime.recipes import Trained, check_batch
from influence.runtime.run.job import BASE, Job, Models
from influence.runtime.run.ledger import Stage
from influence.runtime.run.packing import Corpus
from influence.truth.smoothness import metasmoothness
from influence.types import Params, named_leaves

SCRATCH = "scratch"

BASELINE = "truth/baseline.json"


@dataclass(frozen=True)
class Bench(Scored):
    """A run to be judged by training again.

    Attributes:
      trained: how the model was trained.
      start: what is known of where training begins: a checksum.
      training: the same as a function.
      every: seconds between two saves.
    """

    trained: Trained
    start: str
    training: Training
    every: float

    def stage(self, name: str, **inputs: str) -> Stage:
        """Returns a stage of the truth, of everything that retraining depends on."""
        trained = {
            "recipe": str(self.trained.recipe),
            "start": self.start,
            "seed": str(self.trained.seed),
        }
        return super().stage(name, **trained, **inputs)

    def baseline(self) -> Mapping[str, Any]:
        """Returns what a retraining with everything measures, and how smooth it is.

        Trained and kept unless it was: `measured` and the run's `own`, in the order of
        the questions, and `metasmoothness`.
        """
        stage = self.stage("baseline")
        ledger = self.job.ledger
        if not ledger.finished(stage, self.job.folder / BASELINE):
            self.job.begin(stage)
            training, seed = self.training, self.trained.seed
            ones = np.ones(len(training.examples))
            driver = self.job.driver
            with driver.stage("retraining with everything"):
                again = jax.block_until_ready(training(ones, seed))
            with driver.stage("metasmoothness, nine trainings"):
                smooth = metasmoothness(training, seed)
            made = {
                "metasmoothness": smooth,
                "own": self._measured(self.model.params),
                "measured": self._measured(again),
            }
            # Of what is not finite there is no truth, and JSON.
            _check_finite(made)
            ledger.run.write(BASELINE, formats.write_json(made))
            seconds = driver.seconds["metasmoothness, nine trainings"] / 9
            self.job.note("retraining", seconds=seconds)
            ledger.finish(stage)
        return ledger.run.read(BASELINE, formats.read_json)

    def _measured(self, params: Params) -> list[float]:
        return [measure(f, params) for f in self.measurements.values()]


def opened_bench(
    run: Path,
    trained: Trained,
    every: float,
    console: Console | None,
    given: Models | None,
) -> Bench:
    """Returns a run to be judged.

    Raises:
      FileNotFoundError: if it has no scores.
      ValueError: if its scores are not of all it was trained on, or the recipe is not
        its model's.
    """
    scored = opened_scored(run, console, given)
    job, own, corpus = scored.job, scored.model, scored.corpus
    _check_whole(job, corpus)
    check_batch(trained, len(corpus.packed))
    known, start = _start(job, own, trained)
    whole = next(iter(job.batches(corpus.packed, len(corpus.packed))))
    examples = Examples(whole.inputs, tuple(corpus.packed.ids))
    training = Training(own.task, trained.recipe, examples, start)
    return Bench(job, own, corpus, scored.scores, trained, known, training, every)


def _check_whole(job: Job, corpus: Corpus) -> None:
    """Raises unless every sequence that the model was trained on was scored."""
    name, scanned = corpus.source.name, job.noted("scanned")["corpora"]
    again = f"Run `influence scan {job.folder}` without"
    if scanned != [name]:
        raise ValueError(
            f"The run's scores are of {', '.join(scanned)}; its model is trained again "
            f"on {name}. {again} --data."
        )
    said = job.ledger.stages[f"scores of {name}"]["inputs"]
    if said["candidates"] != "None":
        raise ValueError(
            f"The run's scan was of the candidates {said['candidates']} only. What is "
            f"left out is drawn from all {len(corpus.packed)} sequences, so all have "
            f"to be scored. {again} --candidates."
        )
    if "top=None" not in said["keep"]:
        raise ValueError(
            "Of the run's scores only the highest and lowest were kept. What is left "
            f"out is drawn from all {len(corpus.packed)} sequences. {again} "
            "--keep top:N."
        )


def _start(
    job: Job, own: Model, trained: Trained
) -> tuple[str, Callable[[int], Params]]:
    """Returns where training begins, and what that is known by.

    Raises:
      ValueError: if it is not known, or is of another architecture.
    """
    place = trained.start
    if place == SCRATCH:
        dtype = jax.tree.leaves(own.params)[0].dtype
        return SCRATCH, scratch(own.task.apply, dtype)
    if place == BASE and BASE not in job.roles:
        raise ValueError(
            'The recipe says from = "base", and the run has no base. Say "scratch", or '
            "the folder of the model that training began with."
        )
    options = job.options
    if place in job.given or place == BASE:
        begun = job.model(place)
    else:
        begun = open_model(place, dtype=options.dtype, merge=options.merge)
    shapes, other = (
        {k: (x.shape, str(x.dtype)) for k, x in named_leaves(y.params).items()}
        for y in (own, begun)
    )
    if shapes != other:
        odd = [k for k in {**shapes, **other} if shapes.get(k) != other.get(k)]
        raise ValueError(
            f"Training can't begin with {place}: its {odd[0]} is {other.get(odd[0])}, "
            f"the run's {shapes.get(odd[0])}, and so {len(odd)} of its parameters. "
            "Name a model of the same architecture and type."
        )
    return begun.digest, lambda seed: begun.params


def scratch(
    apply: Callable[..., Any], dtype: Any = np.float32
) -> Callable[[int], Params]:
    """Returns a decoder's random weights, from a seed.

    Raises:
      ValueError: if the model is another function, or has adapters.
    """
    if not isinstance(apply, Apply):
        raise ValueError(
            "The model is a function of your own, whose random weights are not known. "
            'Give what training began with as a model, {"start": given(…)}, and say '
            'from = "start".'
        )
    if apply.config.adapters:
        raise ValueError(
            "The model has adapters; from scratch what they are beside would be random "
            "as well. Name the folder of the model that training began with."
        )

    def start(seed: int) -> Params:
        return nnx.split(Decoder(apply.config, rngs=nnx.Rngs(seed), dtype=dtype))[1]

    return start


def _check_finite(made: Mapping[str, Any]) -> None:
    bad = [k for k, x in made.items() if not np.isfinite(x).all()]
    if bad:
        raise ValueError(
            f"Of the retraining with everything {', '.join(bad)} is not finite: "
            f"{made[bad[0]]}. Is the recipe the model's? Lower its rate."
        )
