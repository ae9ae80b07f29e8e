"""The table of methods is what the floor below judges, on data of one's own."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from influence.model.train import AdamW
from influence.runtime.evaluating.comparing import compare
from influence.runtime.evaluating.experiment import read_experiment
from influence.runtime.evaluating.options import Methods
from influence.runtime.formats import read_scores
from influence.truth.lds import lds
from influence.truth.methods import METHODS, TRAJECTORY
from tests.runtime.run import make as runs
from tests.runtime.run.make import QUIET

SAID = {
    None: {"queries": 3, "methods": ["gradient dot", "bm25", "random"]},
    "data": {"text": "songs.txt", "sequences": 12},
    "model": {
        "vocabulary": 260,
        "context": 8,
        "width": 8,
        "hidden": 8,
        "heads": 2,
        "blocks": 1,
    },
    "recipe": {"steps": 6, "batch": 4, "rate": 0.05},
    "protocol": {"subsets": 4, "drop": 0.2, "at_once": 2},
}


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # adamw mixes types
        yield


def experiment(folder, part=None, **changed):
    """Writes an experiment, one of its tables changed; what is None is left out."""
    words = ("la lo li lu " * 40 + "\n").encode()
    (folder / "songs.txt").write_bytes(words)
    lines = []
    for name, table in SAID.items():
        said = {**table, **changed} if name == part else table
        lines += [f"[{name}]"] * (name is not None)
        lines += [f"{k} = {json.dumps(x)}" for k, x in said.items() if x is not None]
    path = folder / "table.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow  # docs/truth.md compares as well
def test_a_table_is_kept_and_is_not_made_again(tmp_path):
    path = experiment(tmp_path)
    console = Console(record=True, width=200)
    rows = compare(Methods(path, save_every=0.0), console)
    kept = json.loads((tmp_path / "table" / "methods.json").read_text())
    assert kept == [x._asdict() for x in rows]
    assert {x.method for x in rows} == set(SAID[None]["methods"])
    assert all(x.low <= x.lds <= x.high for x in rows)
    assert rows == sorted(rows, key=lambda x: -x.lds)
    truth = read_scores(tmp_path / "table" / "truth.zarr")
    assert dict(truth.measured.sizes) == {"subset": 4, "seed": 1, "query": 3}
    scores = read_scores(tmp_path / "table" / "scores" / "random.zarr").score
    (row,) = (x for x in rows if x.method == "random")
    assert row.lds == lds(scores, truth).interval.value
    assert "random" in console.export_text()
    assert compare(Methods(path), QUIET) == rows


@pytest.mark.slow  # docs/truth.md compares as well
def test_an_experiment_of_a_run_has_its_sequences(tmp_path):
    runs.copied(tmp_path)
    path = experiment(tmp_path, "data", text=None, run="run")
    text = path.read_text().replace('"vocabulary": 260', "")
    lines = [x for x in text.splitlines() if "vocabulary" not in x]
    path.write_text("\n".join(x for x in lines if "context" not in x))
    compare(Methods(path, out=tmp_path / "out"), QUIET, runs.models())
    truth = read_scores(tmp_path / "out" / "truth.zarr")
    names = [str(x) for x in truth["train"].values]
    assert len(names) == 12
    assert all(x.startswith("texts:") for x in names)
    asked = {str(x) for x in truth["query"].values}
    assert len(asked) == 3
    assert asked.isdisjoint(names)
    np.testing.assert_array_equal(truth.weight.sum("train"), 10)


def test_all_methods_apply_but_those_that_need_what_the_recipe_has_not(tmp_path):
    said = read_experiment(experiment(tmp_path, methods=None))
    assert said.trained.recipe.optimizer == AdamW()
    left = set(METHODS) - set(said.methods)
    assert left == {k for k, x in METHODS.items() if x.needs == TRAJECTORY}
    text = experiment(tmp_path, methods=None).read_text()
    path = tmp_path / "smooth.toml"
    path.write_text(text.replace("[recipe]", "[recipe]\nroot = 1e-8"))
    assert read_experiment(path).methods == tuple(METHODS)


WRONG = {
    "methods in .* has 'magic', which is none. They are 'metagradients'": (
        None,
        {"methods": ["ekfac", "magic"]},
    ),
    "metagradients in .* Say root = 1e-8": (None, {"methods": ["metagradients"]}),
    "name some, each once": (None, {"methods": ["ekfac", "ekfac"]}),
    "says question, which means nothing": (None, {"question": 3}),
    "does not say queries": (None, {"queries": None}),
    "queries = 0 .* makes no sense. Give 1 at least": (None, {"queries": 0}),
    r"\[data\] of .* says both text and run": ("data", {"run": "run"}),
    r"\[data\] of .* says neither text and run": ("data", {"text": None}),
    "there is nothing at .*nowhere.txt": ("data", {"text": "nowhere.txt"}),
    r"\[model\] of .* does not say width": ("model", {"width": None}),
    "too small for a byte-level tokenizer": ("model", {"vocabulary": 100}),
    "its decoder is of random weights": ("recipe", {"from": "base"}),
    r"\[recipe\] of .* says epochs": ("recipe", {"epochs": 3}),
    "drop = 1.5 .* makes no sense. Give less than 1": ("protocol", {"drop": 1.5}),
    "'half' in .* is no protocol. Say one of same-seed": ("protocol", {"name": "half"}),
    "too few to train on 12, in batches of 20": ("recipe", {"batch": 20}),
    "too few to train on 1000": ("data", {"sequences": 1000}),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_an_experiment_can_not_say_is_said(tmp_path, said):
    part, changed = WRONG[said]
    path = experiment(tmp_path, part, **changed)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        compare(Methods(path), QUIET)
