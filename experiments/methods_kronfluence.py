"""Does an independent EK-FAC score a judged task's model as this package does?

    python -m experiments.methods_kronfluence --task digits|concrete|language
        [--path FILE] [--work DIR] [--table JSON]

Trains the task's model as `methods.py` does, writes it in PyTorch, and has kronfluence
(`[peers]`) score the test bank's measurements: same weights, layers, sequences and
damping, 0.1 of each matrix's mean eigenvalue. The scores, in this package's sign and
unit, are kept in `--work` where `methods.py` finds them, a row "ekfac, kronfluence".

Compared with this package's own EK-FAC, by what labels the Fisher is fitted with:

* *sampled*: one draw, the default of both. Each draws its own.

and, of tiny models, for which it takes no minutes:

* *data*: those in the data. Nothing is drawn; the two should differ by rounding alone.
* *redrawn*: one draw, this package against itself: how much the draw matters.
* *16 draws*: each with so many; kronfluence is given the data as often.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import tyro
import xarray as xr
from rich.console import Console

from experiments.alike import compared
from experiments.kept import KRONFLUENCE, folder, scored
from experiments.peers import needed
from experiments.results import FOLDER, Claim, plain, table, write
from experiments.tasks import TASKS, subject_of, trained
from experiments.torch_tasks import (
    Judged,
    asked,
    difference,
    distribution,
    linear,
    points,
    twin,
)
from influence.attribution.scores import labelled
from influence.model.task import Empirical, Sampled
from influence.truth import methods
from influence.truth.subject import Subject

torch = needed("torch", "peers")
analyzer = needed("kronfluence.analyzer", "peers")
arguments = needed("kronfluence.arguments", "peers")

DRAWS, MANY = 16, "16 draws"
"""How many draws leave less to chance, and what they are called."""

SAME, ROUNDING = 0.98, 1e-3
"""From which correlation on scores are the same but for draws of labels; up to which
relative error they are but for rounding."""


@dataclass(frozen=True)
class Options:
    """What is scored.

    Attributes:
      task: what is trained.
      path: the data, where it comes with no library.
      work: where scores are kept; `runs/methods_TASK` by default.
      table: where correlations are written, beside those of other tasks.
      seed: of the split of the data, of the model, and of kronfluence's labels.
    """

    task: Literal["digits", "diabetes", "concrete", "language", "language-large"]
    path: Path | None = None
    work: Path | None = None
    table: Path = FOLDER / "methods_kronfluence.json"
    seed: int = 0


def main(options: Options) -> None:
    """Scores, compares, and writes how the two compare."""
    logging.disable(logging.WARNING)
    console, work = Console(), options.work or folder(options.task)
    setting = TASKS[options.task](options.path, options.seed)
    params = trained(setting, options.seed)
    subject = subject_of(setting, options.seed, params, "test")
    far = difference(setting.training.task, params, asked(subject))
    console.print(f"{options.task}: outputs differ by {far:.1e} at most")

    theirs = scored(subject, KRONFLUENCE, kronfluence, work)
    # PyTorch takes memory here: no row of the table.
    ours = scored(subject, f"ekfac, beside {KRONFLUENCE}", methods.ekfac, work)
    row = {
        "seed": options.seed,
        "sequences": len(setting.training.examples),
        "measurements": len(subject.measurements),
        "layers": setting.layers,
        "outputs": far,
        "sampled": compared(theirs, ours),
        "seconds": {
            "kronfluence": theirs.attrs["seconds"],
            "here": ours.attrs["seconds"],
        },
        "megabytes": {
            "kronfluence": theirs.attrs["megabytes"],
            "here": ours.attrs["megabytes"],
        },
    }
    row |= _draws(subject, ours) if setting.tiny else {}
    console.print(table(_written(options, {options.task: row})))


def _draws(subject: Subject, ours: xr.DataArray) -> dict[str, Any]:
    """Returns how alike scores are with no, with other and with more draws of labels.

    Args:
      subject: what is scored.
      ours: this package's scores with one draw.
    """
    data = kronfluence(subject, use_empirical_fisher=True)
    many = kronfluence(subject, draws=DRAWS)
    return {
        "data": compared(data, methods.ekfac(subject, labels=Empirical())),
        "redrawn": compared(methods.ekfac(subject, labels=Sampled(seed=1)), ours),
        MANY: compared(many, methods.ekfac(subject, labels=Sampled(draws=DRAWS))),
    }


def kronfluence(subject: Subject, *, draws: int = 1, **factors: Any) -> xr.DataArray:
    """Returns kronfluence's scores, in this package's sign and unit.

    Its raw number is `∇Lᵀ (G + damping)⁻¹ ∇L`, of a query's and a sequence's loss: of a
    log-probability the sign changes twice, and only `1/N` is missing.

    Args:
      subject: what is scored.
      draws: how many times labels are drawn.
      factors: `FactorArguments` to change.
    """
    training = subject.training
    train, queries = (
        torch.utils.data.TensorDataset(*points(training.task, x))
        for x in (training.examples.inputs, asked(subject))
    )
    model = twin(training.task, subject.params)
    own = Judged(distribution(training.task), linear(model, subject.layers))
    torch.manual_seed(subject.seed)
    with tempfile.TemporaryDirectory() as place:
        engine = analyzer.Analyzer(
            "judged",
            analyzer.prepare_model(model, own),
            own,
            cpu=True,
            disable_tqdm=True,
            output_dir=place,
        )
        settings = {"covariance_max_examples": None, "lambda_max_examples": None}
        engine.fit_all_factors(
            "fitted",
            torch.utils.data.ConcatDataset([train] * draws),
            per_device_batch_size=subject.batch,
            factor_args=arguments.FactorArguments("ekfac", **settings, **factors),
        )
        engine.compute_pairwise_scores(
            "scores",
            "fitted",
            query_dataset=queries,
            train_dataset=train,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=subject.batch,
            # None is kronfluence's name for 0.1 of the mean eigenvalue.
            score_args=arguments.ScoreArguments(damping_factor=None),
        )
        raw = engine.load_pairwise_scores("scores")["all_modules"].numpy()
    dims = {"query": list(subject.measurements), "train": list(training.examples.ids)}
    about = {"method": f"EK-FAC of kronfluence {version('kronfluence')}"}
    return labelled(raw, dims, len(train), about.items())


def _written(options: Options, new: dict[str, Any]) -> list[Claim]:
    """Writes a task's row beside those of other tasks; returns what they all say."""
    path, rows = options.table, plain(new)
    if path.exists():
        rows = {**json.loads(path.read_text(encoding="utf-8"))["rows"], **rows}
    claims = [y for name, x in sorted(rows.items()) for y in _claims(name, x)]
    settings = {
        "damping": "0.1 × mean eigenvalue of each matrix",
        "kronfluence": version("kronfluence"),
        "torch": version("torch"),
    }
    write(
        path.stem,
        seed=options.seed,
        settings=settings,
        rows=rows,
        claims=claims,
        folder=path.parent,
    )
    return claims


def _claims(name: str, row: dict[str, Any]) -> Iterator[Claim]:
    found = {k: row[k]["pearson"] for k in ("sampled", "redrawn", MANY) if k in row}
    yield Claim(
        f"{name}: with one draw of labels each, kronfluence's EK-FAC scores and this "
        f"package's correlate above {SAME:g}",
        ", ".join(f"{k} {x:.4f}" for k, x in found.items()),
        found["sampled"] > SAME,
    )
    if "data" in row:
        error = row["data"]["relative error"]
        yield Claim(
            f"{name}: with the labels in the data, kronfluence's EK-FAC and this "
            f"package's give the same scores up to rounding, {ROUNDING:g}",
            f"{error:.1e}",
            error < ROUNDING,
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
