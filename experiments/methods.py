"""Every method on one task, judged by retraining: which scores are true?

    python -m experiments.methods --task TASK [--path FILE]

`TASK` is `digits`, `diabetes`, `concrete` (with `--path`), `language`, or
`language-large` for a machine with an accelerator (`experiments/tasks.py`).

Trains the task's model, retrains it without random subsets, and correlates what was
measured with what each method's scores predict (LDS). Two banks, of other subsets and
other measurements: on the *development* bank the settings of `CANDIDATES` are tried and
the best of each kind chosen; the *test* bank is looked at once, for the table.

Writes `experiments/results/methods_TASK.json`, a list of rows, and its figure;
`methods_TASK_setting.json` says how the task was trained and what was tried. Everything
that takes long is kept in `--work` and not done again.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import tyro
import xarray as xr
from rich.console import Console

from experiments import kept
from experiments.kept import KRONFLUENCE
from experiments.results import FOLDER, bars, figure, plain, write
from experiments.tasks import TASKS, Setting, subject_of, trained
from influence.attribution.metagradients import metagradients
from influence.fold import Run
from influence.linalg.damping import Relative
from influence.runtime import formats
from influence.runtime.driver import Driver
from influence.runtime.evaluating.scoring import shown
from influence.runtime.saves import Saves
from influence.truth import methods
from influence.truth.correlation import Correlation
from influence.truth.lds import ceiling, lds
from influence.truth.methods import METHODS, WEIGHTS, Method
from influence.truth.retraining import resampled, retrain, same_seed
from influence.truth.reweighting import contributions, reweight
from influence.truth.smoothness import metasmoothness
from influence.truth.subject import Subject
from influence.truth.table import Row, rows
from influence.types import Params


@dataclass(frozen=True)
class Options:
    """How the table is made.

    Attributes:
      task: what is trained.
      path: the data, where it comes with no library.
      work: where what takes long is kept; `runs/methods_TASK` by default.
      methods: the table's rows, if not all.
      subsets: how many subsets a bank leaves out.
      drop: which share of the sequences a subset is.
      seed: of the split of the data and of the model.
      peers: whether kronfluence is run first (`methods_kronfluence.py`); its scores are
        a row wherever they are kept.
    """

    task: Literal["digits", "diabetes", "concrete", "language", "language-large"]
    path: Path | None = None
    work: Path | None = None
    methods: tuple[str, ...] = ()
    subsets: int = 100
    drop: float = 0.01
    seed: int = 0
    peers: bool = False


class Bank(NamedTuple):
    """Some measurements, and what retraining makes of them.

    Attributes:
      subject: what methods are asked about.
      truth: by protocol.
    """

    subject: Subject
    truth: Mapping[str, xr.Dataset]


def main(options: Options) -> None:
    """Makes the table."""
    console = Console()
    setting = TASKS[options.task](options.path, options.seed)
    work = options.work or kept.folder(options.task)
    if options.peers:
        _start_peers(options, work)
    driver = Driver(console)
    params = trained(setting, options.seed)
    smooth = metasmoothness(setting.training, options.seed)
    console.print(f"metasmoothness {smooth:.3f}")
    development, test = (
        _bank(options, setting, params, driver, work, name)
        for name in ("development", "test")
    )
    tried, chosen = _choose(development, work, console, tiny=setting.tiny)
    table = {**METHODS, **_own(setting), **_peers(test.subject, work), **chosen}
    table["ekfac, reweighted"] = Method(RARE, _reweighted(development))
    table = {
        name: x
        for name, x in table.items()
        if (test.subject.words or not x.text)
        and (name in options.methods or not options.methods)
    }
    scored = {
        name: kept.scored(test.subject, name, x.score, work, warm=setting.tiny)
        for name, x in table.items()
    }
    needs = {name: x.needs for name, x in table.items()}
    found = [y for truth in test.truth.values() for y in rows(scored, needs, truth)]
    console.print(shown(found))
    ratios = {k: _ratios(scored, truth) for k, truth in test.truth.items()}
    _write(options, setting, params, smooth, test, found, tried, ratios)


def _bank(
    options: Options,
    setting: Setting,
    params: Params,
    driver: Driver,
    work: Path,
    name: str,
) -> Bank:
    """Returns a bank, retraining what was not retrained yet."""
    subject = subject_of(setting, options.seed, params, name)
    asked, draw = subject.measurements, 1 + (name == "test")
    protocols = [same_seed(options.subsets, options.drop, seed=options.seed, draw=draw)]
    if setting.resampled and name == "test":
        protocols.append(resampled(options.subsets, draw=draw))
    truth = {}
    for protocol in protocols:
        key = _key(setting, protocol, sorted(asked))
        path = work / f"{name} {protocol.name} {key}.zarr"
        if not path.exists():
            run = _saving(driver, work / "saves" / path.stem, key)
            found = retrain(
                setting.training, protocol, asked, at_once=setting.at_once, run=run
            )
            formats.write_scores(found)(path)
        truth[protocol.name] = formats.read_scores(path)
    return Bank(subject, truth)


def _saving(driver: Driver, folder: Path, key: str) -> Run:
    """Returns a driver that goes on where an earlier process ended."""
    return driver.saving(lambda name: Saves(folder / name, key, every=20))


def _key(setting: Setting, *about: object) -> str:
    """Returns a digest of all that scores or retrainings depend on."""
    training = setting.training
    data = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(training.data))
    words = repr((setting.name, training.recipe, about))
    return hashlib.sha256(words.encode() + data).hexdigest()[:12]


CANDIDATES: dict[str, dict[str, methods.Score]] = {
    "ekfac, chosen": {
        f"damping {x:g}": partial(methods.ekfac, damping=Relative(x))
        for x in (0.01, 0.1, 1.0)
    },
    "cg, chosen": {
        f"damping {x:g}, {n} sequences": partial(
            methods.cg,
            damping=Relative(x),
            sequences=n,
            steps=methods.PRODUCTS // n,
        )
        for x in (1.0, 10.0, 100.0)
        for n in (256, 1024)
    },
    "unrolled, chosen": {
        f"{x:g} of the distance": partial(methods.unrolled, share=x) for x in (1.0, 0.5)
    },
    "astra, chosen": {
        f"damping {x:g}, rate {y:g}": partial(
            methods.astra, damping=Relative(x), rate=y
        )
        for x in (1.0, 10.0)
        for y in (0.01, 0.1)
    },
    "lissa, chosen": {
        f"damping {x:g}": partial(methods.lissa, damping=Relative(x))
        for x in (10.0, 100.0)
    },
}
"""By kind, settings that are tried on the development bank: none dearer than
`methods.PRODUCTS`."""

RARE = "a few metagradients"

TUNING = 10
"""How many of the development bank's measurements choose."""

CALIBRATED = 8
"""How many of the development bank's measurements a reweighting is fitted to."""


def _choose(
    bank: Bank, work: Path, console: Console, *, tiny: bool
) -> tuple[list[dict], dict[str, Method]]:
    """Returns everything tried on the development bank, and the best of each kind.

    Of a decoder the best setting is tried with embeddings and norms covered as well; a
    perceptron has only matrices.
    """
    some = dict(list(bank.subject.measurements.items())[:TUNING])
    subject = bank.subject._replace(measurements=some)
    (truth,) = bank.truth.values()
    truth = truth.sel(query=list(some))
    tried, chosen = [], {}

    def attempt(kind: str, name: str, score: methods.Score) -> float:
        scored = kept.scored(subject, f"{kind}, {name}", score, work)
        found = lds(scored, truth)
        tried.append({"kind": kind, "setting": name, **_numbers(found)})
        console.print(f"{kind}, {name}: {found.interval}")
        return found.interval.value

    for kind, settings in CANDIDATES.items():
        found = {x: attempt(kind, x, score) for x, score in settings.items()}
        best = max(found, key=lambda x: found[x])
        score = settings[best]
        if not tiny:
            wider = methods.covering(score)
            if attempt(kind, f"{best}, all layers", wider) > found[best]:
                score = wider
        needs = METHODS[kind.removesuffix(", chosen")].needs
        chosen[kind] = Method(needs, score)
    return tried, chosen


def _own(setting: Setting) -> dict[str, Method]:
    """Returns the methods that are only for this task."""
    return {"exact": Method(WEIGHTS, methods.exact)} if setting.tiny else {}


def _start_peers(options: Options, work: Path) -> None:
    """Has kronfluence score the same model, in a process with PyTorch."""
    words = ["--task", options.task, "--work", str(work), "--seed", str(options.seed)]
    words += [] if options.path is None else ["--path", str(options.path)]
    command = [sys.executable, "-m", "experiments.methods_kronfluence", *words]
    subprocess.run(command, check=True)


def _peers(subject: Subject, work: Path) -> dict[str, Method]:
    """Returns kronfluence's EK-FAC, if it was run: its scores are read, not made."""
    if not kept.place(subject, KRONFLUENCE, work).exists():
        return {}
    return {
        KRONFLUENCE: Method(
            WEIGHTS, lambda subject: kept.read(subject, KRONFLUENCE, work)
        )
    }


def _reweighted(development: Bank) -> methods.Score:
    """Returns EK-FAC with a spectrum fitted to a handful of metagradients."""
    some = dict(list(development.subject.measurements.items())[:CALIBRATED])

    def score(subject: Subject) -> xr.DataArray:
        training, curvature = subject.training, subject.fitted()
        parts = partial(
            contributions,
            training.task,
            subject.params,
            curvature,
            batches=subject.batches,
        )
        exact = metagradients(training, subject.seed, some)
        return reweight(parts(some), exact)(parts(subject.measurements))

    return score


def _ratios(
    scored: Mapping[str, xr.DataArray], truth: xr.Dataset
) -> dict[str, dict[str, float]]:
    """Returns how many times EK-FAC's LDS each method of exact products reaches."""
    if "ekfac" not in scored:
        return {}
    plain = lds(scored["ekfac"], truth)
    exact = [x for x in scored if x.split(",")[0] in ("cg", "unrolled")]
    return {x: (lds(scored[x], truth) / plain)._asdict() for x in exact}


def _numbers(found: Correlation) -> dict[str, float]:
    return dict(zip(("lds", "low", "high"), found.interval, strict=True))


def _write(
    options: Options,
    setting: Setting,
    params: Params,
    smooth: float,
    bank: Bank,
    found: list[Row],
    tried: list[dict],
    ratios: dict[str, dict],
) -> None:
    """Writes the table, its figure, and how the task was trained."""
    name = f"methods_{options.task}"
    text = json.dumps([plain(x._asdict()) for x in found], indent=1, ensure_ascii=False)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    training = setting.training
    write(
        f"{name}_setting",
        seed=options.seed,
        settings={
            "recipe": repr(training.recipe),
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "sequences": len(training.examples),
            "measurements": len(bank.subject.measurements),
            "subsets": options.subsets,
            "drop": options.drop,
            "metasmoothness": smooth,
            "times ekfac": ratios,
            "ceiling": {k: ceiling(x) for k, x in bank.truth.items()},
            "spread": {
                k: float(x.measured.mean("seed").std("subset").mean())
                for k, x in bank.truth.items()
            },
        },
        rows=tried,
    )
    protocols = list(bank.truth)
    tallest = max(sum(x.protocol == p for x in found) for p in protocols)
    height = 0.8 + 0.2 * tallest
    with figure(name, columns=len(protocols), height=height) as axes:
        for panel, protocol in zip(axes, protocols, strict=True):
            own = [x for x in found if x.protocol == protocol]
            names = [f"{x.method} ({x.needs})" for x in own]
            values = np.array([x.lds for x in own])
            errors = [values - [x.low for x in own], [x.high for x in own] - values]
            bars(panel, names, values, errors, f"LDS, {protocol}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
