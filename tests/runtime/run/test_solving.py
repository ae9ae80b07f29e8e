"""What the options of a query say is what solves for its questions."""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import influence
from influence.curvature.diagonal import diagonal
from influence.curvature.unrolled import Unrolled, adam_scale
from influence.runtime import formats
from influence.runtime.evaluating.scored import opened_scored
from influence.runtime.run.asking import query
from influence.runtime.run.options import Query, Scan
from influence.runtime.run.scanning import scan
from influence.runtime.run.solving import damped_by, effort
from tests.runtime.run import make
from tests.runtime.run.make import QUIET

FOLLOWED = {"adamw": "rate = 0.01", "sgd": 'rate = 0.5\noptimizer = "sgd"'}


def recipe(folder, optimizer):
    path = folder / "recipe.toml"
    said = f'steps = 30\nbatch = 5\nfrom = "scratch"\n{FOLLOWED[optimizer]}\n'
    path.write_text(said)
    return path


@pytest.mark.parametrize("optimizer", FOLLOWED)
def test_training_is_followed_as_its_recipe_says(tmp_path, optimizer):
    make.copied(tmp_path)
    own = make.models()
    told = recipe(tmp_path, optimizer)
    asked = replace(
        make.asked(tmp_path), solver="unrolled", recipe=told, steps=3, solve_on=12
    )
    query(asked, QUIET, own)
    scan(Scan(tmp_path / "run", batch=4), QUIET, own)
    opened = opened_scored(tmp_path / "run", QUIET, own)
    job, model, packed = opened.job, opened.model, opened.corpus.packed
    curvature = formats.read_curvature(
        tmp_path / "run" / "model" / "curvature.safetensors"
    )
    drawn = np.random.default_rng(0).choice(len(packed), 12, replace=False)
    some = packed.take(np.sort(drawn))
    batches = job.batches(some, 4)
    labels = sum(len(some.tokens_at(i)) - 1 for i in range(12)) / 12
    squares = diagonal(model.task, model.params, batches)
    # A cosine after a warm-up over 2 of 30 steps.
    rates = [0, 0.5, *(0.5 * (1 + np.cos(np.pi * np.arange(28) / 28)))]
    far, scale = (
        (0.01 * sum(rates), adam_scale(squares, 5))
        if optimizer == "adamw"
        else (0.5 * sum(rates) / labels, {})
    )
    solver = Unrolled(model.task, batches, far, scale, 3)
    solved = influence.query(
        curvature, model.params, opened.measurements, solver=solver
    )
    known = influence.scan(model.task, model.params, solved, job.batches(packed, 4))
    # The schedule is in float32.
    np.testing.assert_allclose(opened.scores, known.total, rtol=1e-5)
    assert "training unrolled" in opened.scores.attrs["solver"]


def test_what_is_solved_again_depends_on_what_the_recipe_says(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    told = recipe(tmp_path, "sgd")
    asked = replace(make.asked(tmp_path), solver="unrolled", recipe=told, steps=2)
    query(asked, QUIET, own)
    file = tmp_path / "run" / "model" / "queries.safetensors"
    before = file.stat().st_mtime_ns
    told.write_text(told.read_text() + "# the same\n")
    query(asked, QUIET, own)
    assert file.stat().st_mtime_ns == before
    told.write_text(told.read_text().replace("steps = 30", "steps = 60"))
    console = Console(record=True, width=200)
    query(asked, console, own)
    assert file.stat().st_mtime_ns > before
    assert "as far as 60 steps of rate 0.5 go" in console.export_text()


WRONG = {
    "no recipe": ({"solver": "unrolled"}, "follows training: say how"),
    "another solver": ({"solver": "cg", "recipe": True}, "--solver cg does not ask"),
    "a damping": (
        {"solver": "unrolled", "recipe": True, "damping": 0.1},
        "0.1 and --solver unrolled exclude each other",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_do_not_go_together_are_an_error_before_anything(tmp_path, name):
    make.copied(tmp_path)
    changed, words = WRONG[name]
    if "recipe" in changed:
        changed = {**changed, "recipe": recipe(tmp_path, "sgd")}
    with pytest.raises(ValueError, match=words):
        query(replace(make.asked(tmp_path), **changed), QUIET, make.models())


def test_a_recipe_that_is_not_there_is_an_error(tmp_path):
    make.copied(tmp_path)
    gone = tmp_path / "gone.toml"
    asked = replace(make.asked(tmp_path), solver="unrolled", recipe=gone)
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.toml"):
        query(asked, QUIET, make.models())


def test_scores_without_a_damping_have_no_responses(tmp_path):
    make.copied(tmp_path)
    own, told = make.models(), recipe(tmp_path, "sgd")
    query(
        replace(make.asked(tmp_path), solver="unrolled", recipe=told, steps=2),
        QUIET,
        own,
    )
    with pytest.raises(ValueError, match="solved by unrolled, which has no damping"):
        damped_by(opened_job(tmp_path, own))


def opened_job(folder, own):
    from influence.runtime.run.job import opened_job
    from influence.runtime.run.ledger import opened

    return opened_job(opened(folder / "run"), QUIET, own)


def test_the_eigenbasis_looks_at_no_sequences():
    assert effort(Query("run", solve_on=7, steps=3)) == (0, 0)  # pyright: ignore
    assert effort(Query("run", solver="cg", solve_on=7)) == (7, 5)  # pyright: ignore
