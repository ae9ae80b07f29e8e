"""Mislabelled examples have influence on themselves: are they found by it?

    python -m experiments.mislabelled

Trains a perceptron on handwritten digits of which a tenth has a wrong label, ranks the
training examples by self-influence, and counts how many of the wrong ones are among the
first: with EK-FAC, without curvature, and by loss alone. Three seeds.
"""

from dataclasses import dataclass, replace

import numpy as np
import tyro
import xarray as xr
from rich.console import Console

from experiments.results import Claim, figure, table, write
from experiments.tasks import TASKS
from influence.attribution.measurements import likelihoods, together
from influence.attribution.self_influence import self_influence
from influence.curvature.diagonal import identity
from influence.curvature.ekfac import fit
from influence.linalg.damping import Absolute
from influence.model.examples import Examples
from influence.truth.detection import detected

STATEMENT = (
    "CIFAR-10 with 10 % wrong labels: EK-FAC's self-influence finds 80 % in the top "
    "10 % and 97 % in the top 20 % (kronfluence's README)"
)

METHODS = ("EK-FAC", "gradient norm", "loss")


@dataclass(frozen=True)
class Options:
    """What is trained.

    Attributes:
      flipped: which share of the labels is wrong.
      seeds: how many times.
    """

    flipped: float = 0.1
    seeds: int = 3


def main(options: Options) -> None:
    """Finds the wrong labels."""
    curves = [_curves(options.flipped, seed) for seed in range(options.seeds)]
    mean = {name: np.mean([x[name] for x in curves], axis=0) for name in METHODS}
    n = len(mean["loss"])
    rows = [
        {
            "method": name,
            **{
                f"found in the first {share:.0%}": float(
                    mean[name][round(share * n) - 1]
                )
                for share in (0.1, 0.2, 0.3)
            },
            "least": float(min(x[name][round(0.2 * n) - 1] for x in curves)),
            "most": float(max(x[name][round(0.2 * n) - 1] for x in curves)),
        }
        for name in METHODS
    ]
    tenth, fifth = (rows[0][f"found in the first {share}"] for share in ("10%", "20%"))
    claims = [
        Claim(
            STATEMENT,
            f"digits: {tenth:.0%} in the top 10 %, {fifth:.0%} in the top 20 %",
            tenth >= 0.8 and fifth >= 0.97,
        )
    ]
    write("mislabelled", seed=0, settings=options, rows=rows, claims=claims)
    with figure("mislabelled") as (panel,):
        for name in METHODS:
            panel.plot(np.arange(1, n + 1) / n, mean[name], label=name)
        panel.plot([0, 1], [0, 1], color="#7a7a7a", linestyle=":", label="chance")
        panel.set_xlabel("share of the examples looked at")
        panel.set_ylabel("share of the wrong labels found")
        panel.legend()
    Console().print(table(claims))


def _curves(flipped: float, seed: int) -> dict[str, np.ndarray]:
    """Returns, by method, the share found after each example looked at."""
    setting = TASKS["digits"](None, seed)
    examples = setting.training.examples
    rng = np.random.default_rng(seed)
    wrong = np.zeros(len(examples), bool)
    wrong[rng.choice(len(wrong), round(flipped * len(wrong)), replace=False)] = True
    label = np.asarray(examples.inputs["label"])
    other = (label + rng.integers(1, 10, len(label))) % 10
    inputs = {**examples.inputs, "label": np.where(wrong, other, label)}
    training = replace(setting.training, examples=Examples(inputs, examples.ids))
    params = training(np.ones(len(wrong)), seed)
    batches, task = training.examples.batches(100), training.task
    own = {
        "EK-FAC": self_influence(task, params, fit(task, params, batches), batches),
        "gradient norm": self_influence(
            task,
            params,
            identity(task, params, batches),
            batches,
            inverse=Absolute(0.0),
        ),
    }
    values = together(likelihoods(task, training.examples).values())
    loss = xr.DataArray(-np.asarray(values(params)), dims="train")
    return {
        name: detected(x, wrong).values for name, x in {**own, "loss": loss}.items()
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
