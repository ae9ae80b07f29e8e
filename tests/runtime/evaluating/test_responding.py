"""What the command says of responses is what the floor below makes of them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import influence
from influence.runtime import formats
from influence.runtime.evaluating.options import Pbrf
from influence.runtime.evaluating.responding import respond
from influence.runtime.run import showing
from influence.runtime.run.asking import query
from influence.runtime.run.options import Scan, Status
from influence.runtime.run.scanning import scan
from influence.truth.correlation import pearson
from influence.truth.pbrf import Held, Until, pbrf
from tests.runtime.evaluating import make
from tests.runtime.run import make as runs
from tests.runtime.run.make import QUIET

MANY = 1000

FEW = {"sequences": 6, "at_once": 4, "tolerance": 1e-3, "save_every": 0.0}


def damped(folder, own, damping=10.0):
    """Copies a run whose questions are solved with so much damping."""
    runs.copied(folder)
    query(replace(runs.asked(folder), damping=damping), QUIET, own)
    # A copy of one of 25 sequences is no small change of a random model.
    scan(Scan(folder / "run", batch=4, n_train=MANY), QUIET, own)


@pytest.fixture(scope="module")
def responded(tmp_path_factory):
    """Returns the folder of a run, its model, and what its responses are."""
    folder, own = tmp_path_factory.mktemp("responded"), make.models()
    damped(folder, own)
    return folder, own, respond(Pbrf(folder / "run", **FEW), QUIET, own)


@pytest.mark.slow  # tests/truth/test_pbrf.py has the laws
def test_a_run_is_held_beside_the_responses_of_its_own_damping(responded):
    folder, own, found = responded
    ids = found.responses["train"].values
    assert len(ids) == 6
    bench = opened(folder, own)
    packed = bench.corpus.packed
    places = np.flatnonzero(np.isin(packed.ids, ids))
    truth = pbrf(
        bench.model.task,
        bench.model.params,
        formats.read_curvature(folder / "run" / "model" / "curvature.safetensors"),
        bench.measurements,
        bench.job.batches(packed.take(places), 4),
        Held(bench.job.batches(packed, 4), influence.Relative(10.0), MANY),
        until=Until(1e-3),
    )
    np.testing.assert_allclose(found.responses["response"], truth, rtol=1e-6)
    own_scores = bench.scores.sel(train=ids)
    assert (
        found.agreement["scores"].interval
        == pearson(own_scores, found.responses["response"]).interval
    )
    # What is solved to the end predicts best: all that is missing is curvature of the
    # response itself.
    assert found.agreement["converged"].interval.value > 0.99
    kept = json.loads((folder / "run" / "truth" / "pbrf.json").read_text())
    assert kept["mean"]["scores"]["value"] == found.agreement["scores"].interval.value
    assert [x["query"] for x in kept["questions"]] == ["first", "second"]


def opened(folder, own):
    from influence.runtime.evaluating.scored import opened_scored

    return opened_scored(folder / "run", QUIET, own)


@pytest.mark.slow  # of the same long run
def test_responses_are_kept_and_only_their_judgement_is_stale_with_other_scores(
    responded, tmp_path
):
    folder, own, first = responded
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    told = Pbrf(tmp_path / "run", **FEW)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*zarr/*")}
    again = respond(told, QUIET, own)
    assert again.responses.identical(first.responses)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert showing.status(Status(tmp_path / "run"), QUIET, own)
    query(replace(runs.asked(tmp_path), damping=10.0, rank=1), QUIET, own)
    scan(Scan(tmp_path / "run", batch=4, n_train=MANY), QUIET, own)
    assert stale(tmp_path, own) == {"PBRF"}
    later = respond(told, QUIET, own)
    assert later.responses.identical(first.responses)
    assert later.agreement["scores"].interval != first.agreement["scores"].interval


def stale(folder, own):
    console = Console(record=True, width=200)
    showing.status(Status(folder / "run"), console, own)
    lines = console.export_text().splitlines()
    return {x.split("│")[1].strip() for x in lines if "│ stale" in x}


def test_what_will_be_done_is_said_before_and_what_came_of_it_after(tmp_path):
    own = make.models()
    damped(tmp_path, own)
    console = Console(record=True, width=120)
    respond(Pbrf(tmp_path / "run", **FEW, held=10), console, own)
    said = console.export_text()
    assert "12: with 1 copies more and less of 6 of 25 sequences" in said
    assert "damping 10 × the mean eigenvalue" in said
    assert "predictions on 10 sequences" in said
    for word in ("first", "second", "mean", "solved to the end"):
        assert word in said


def test_where_nothing_is_minimised_it_is_an_error_and_nothing_is_kept(tmp_path):
    own = make.models()
    damped(tmp_path, own, 0.01)
    for _ in range(2):  # The second goes on from what the first has saved.
        with pytest.raises(ValueError, match="After 1 evaluations none of 6 sequences"):
            respond(Pbrf(tmp_path / "run", **FEW, evaluations=1), QUIET, own)
    assert not (tmp_path / "run" / "truth" / "responses.zarr").exists()


@pytest.mark.slow  # what has no minimum is found in tests/truth/test_pbrf.py
def test_sequences_without_a_minimum_are_left_out_and_said_to_be(tmp_path):
    # A copy of one of 300: without that of some sequences there is no minimum.
    own = make.models()
    runs.copied(tmp_path)
    query(replace(runs.asked(tmp_path), damping=10.0), QUIET, own)
    scan(Scan(tmp_path / "run", batch=4, n_train=300), QUIET, own)
    console = Console(record=True, width=1000)
    told = {**FEW, "evaluations": 100, "sequences": 8, "tolerance": 0.01}
    found = respond(Pbrf(tmp_path / "run", **told), console, own)
    lost = int(np.isnan(found.responses["response"]).all("query").sum())  # pyright: ignore
    assert 0 < lost < 6
    assert f"{lost} of 8 sequences are left out" in console.export_text()
    assert np.isfinite(found.agreement["scores"].interval).all()
    less = respond(Pbrf(tmp_path / "run", **told, copies=0.01), QUIET, own)
    assert np.isfinite(less.responses["response"]).all()
