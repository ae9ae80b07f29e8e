"""A tiny model, a corpus of its token ids, and the commands of a run on them."""

import atexit
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from influence.runtime.models import Model, given
from influence.runtime.run.asking import query
from influence.runtime.run.fitting import fit
from influence.runtime.run.options import Data, Fit, Packing, Query, Scan
from influence.runtime.run.scanning import scan
from influence.runtime.store import Run
from tests import cases

QUIET = Console(quiet=True)

QUESTIONS = (
    {"name": "first", "prompt": [1, 2], "completion": [3]},
    {"name": "second", "prompt": [4], "completion": [5, 6]},
)


def models(seed=0, dtype=jnp.float64) -> dict[str, Model]:
    """Returns a tiny decoder, given as a run's model."""
    apply, params = cases.MAKERS["raw-loop"](bias=True, dtype=dtype)
    params = cases.randomised(params, dtype)
    params["head"] = params["head"] * (1 + seed)
    own = given(apply, params, vocabulary=cases.V, context=cases.T)
    return {"model": own}


def corpus(folder, n=23, seed=0, name="texts"):
    """Writes a corpus of random token ids; returns where."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, cases.V, rng.integers(2, 9)).tolist() for _ in range(n)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"ids": x}) + "\n" for x in rows))
    return path


def options(folder, path, **changed) -> Fit:
    """Returns the options of a fit in small batches, saved after every one."""
    fitted = Fit(
        run=folder / "run",
        model="given",
        data=Data(str(path), text_column="ids"),
        packing=Packing(context=cases.T, separator="none", apart=True),
        layers=("*",),
        batch=4,
        save_every=0.0,
    )
    return replace(fitted, **changed)


def asked(folder) -> Query:
    """Returns the options of a query, its questions in a file."""
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in QUESTIONS))
    return Query(run=folder / "run", queries=path)


@cache
def finished() -> Path:
    """Returns a folder with a corpus and a run on it that is finished, to be copied."""
    folder = Path(mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    everything(folder, corpus(folder), models())
    return folder


def copied(folder) -> Path:
    """Copies a corpus and a finished run on it into a folder; returns the corpus.

    The run is told where its corpus is now.
    """
    shutil.copytree(finished(), folder, dirs_exist_ok=True)
    path = folder / "texts.jsonl"
    run = Run(folder / "run")
    about = run.manifest["fit"]
    about["data"]["data"] = str(path)
    stages = run.manifest["stages"]
    stages["corpus texts"]["data"] = about["data"]
    run.note(fit=about, stages=stages)
    return path


def everything(folder, path, own, **changed):
    """Fits, asks and scans; returns the ledger."""
    fit(options(folder, path, **changed), QUIET, own)
    query(asked(folder), QUIET, own)
    return scan(Scan(folder / "run", batch=4, save_every=0.0), QUIET, own)
