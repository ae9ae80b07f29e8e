"""What the commands say of a run is what the floor below makes of it."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from influence.runtime.evaluating.bench import opened_bench
from influence.runtime.evaluating.judging import Judging, judge
from influence.runtime.evaluating.options import Lds, Removal, protocol_of
from influence.runtime.evaluating.removing import counts, remove
from influence.runtime.recipes import read_recipe
from influence.runtime.run import showing
from influence.runtime.run.asking import query
from influence.runtime.run.fitting import fit
from influence.runtime.run.options import Query, Scan, Status
from influence.runtime.run.scanning import scan
from influence.truth.lds import lds
from influence.truth.retraining import retrain
from tests.runtime.evaluating import make
from tests.runtime.run import make as runs
from tests.runtime.run.make import QUIET


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # adamw mixes types
        yield


SMALL = {"subsets": 6, "drop": 0.2, "save_every": 0.0}


def options(folder, **changed) -> Lds:
    told = changed.pop("recipe", None) or make.recipe(folder)
    return Lds(folder / "run", told, **{**SMALL, **changed})


def bench(folder, own):
    told = read_recipe(make.recipe(folder))
    return opened_bench(folder / "run", told, 0.0, QUIET, own)


def judging(folder, own) -> Judging:
    asked = options(folder)
    protocol = protocol_of("same-seed", 6, 0.2, 5, 0, 0)
    return Judging(bench(folder, own), asked, protocol)


def test_a_run_is_judged_by_what_the_floor_below_retrains(tmp_path):
    runs.copied(tmp_path)
    own = make.models()
    found = judge(options(tmp_path), QUIET, own)
    judged = judging(tmp_path, own)
    bench = judged.bench
    truth = retrain(bench.training, judged.protocol, bench.measurements)
    kept = judged.truth()
    for name in ("measured", "weight"):
        np.testing.assert_array_equal(kept[name], truth[name])
    assert kept.attrs == truth.attrs
    assert found.mean == lds(bench.scores, truth).interval
    assert list(found.each) == ["first", "second"]
    assert np.mean([x.value for x in found.each.values()]) == pytest.approx(
        found.mean.value
    )
    kept = json.loads((tmp_path / "run" / "truth" / "lds-same-seed.json").read_text())
    assert kept["mean"]["value"] == found.mean.value
    assert [x["query"] for x in kept["questions"]] == ["first", "second"]


class Killed(BaseException):
    """A process that ends."""


def dying(training, after):
    """Returns the same training, in a process that ends after some retrainings."""
    left = iter(range(after))

    def start(seed):
        if next(left, None) is None:
            raise Killed
        return training.start(seed)

    return replace(training, start=start)


@pytest.mark.parametrize("after", [1, 4])
def test_truth_that_was_killed_goes_on_to_the_same_bits(tmp_path, after):
    own = make.models()
    left, killed = tmp_path / "left", tmp_path / "killed"
    for folder in (left, killed):
        folder.mkdir()
        runs.copied(folder)
    judged = judging(killed, own)
    judged.bench.baseline()
    ends = replace(judged.bench, training=dying(judged.bench.training, after))
    with pytest.raises(Killed):
        replace(judged, bench=ends).truth()
    saved = killed / "run" / "saves" / "retrainings-by-same-seed"
    assert list(saved.glob("*/*.json"))
    again = judging(killed, own)
    # Of six retrainings one at least was saved, and is not done again.
    some = replace(again.bench, training=dying(again.bench.training, 5))
    resumed = replace(again, bench=some).truth()
    assert not saved.exists()
    xr.testing.assert_identical(resumed, judging(left, own).truth())


def test_what_is_judged_is_not_retrained_again(tmp_path):
    runs.copied(tmp_path)
    own = make.models()
    first = judge(options(tmp_path), QUIET, own)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*zarr/*")}
    again = judge(options(tmp_path), QUIET, own)
    assert again.each == first.each
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert showing.status(Status(tmp_path / "run"), QUIET, own)


def test_truth_is_stale_with_other_questions_and_its_judgement_with_other_scores(
    tmp_path,
):
    runs.copied(tmp_path)
    own = make.models()
    judge(options(tmp_path), QUIET, own)
    query(replace(runs.asked(tmp_path), damping=0.5), QUIET, own)
    scan(Scan(tmp_path / "run", batch=4), QUIET, own)
    assert stale(tmp_path, own) == {"LDS by same-seed"}
    asked = tmp_path / "others.jsonl"
    asked.write_text('{"prompt": [1], "completion": [2]}\n')
    query(Query(tmp_path / "run", queries=asked), QUIET, own)
    assert stale(tmp_path, own) >= {"baseline", "retrainings by same-seed"}


def stale(folder, own):
    console = Console(record=True, width=200)
    showing.status(Status(folder / "run"), console, own)
    lines = console.export_text().splitlines()
    return {x.split("│")[1].strip() for x in lines if "│ stale" in x}


def test_a_run_of_another_recipe_is_said_to_be_another_model(tmp_path):
    runs.copied(tmp_path)
    console = Console(record=True, width=1000)
    judge(options(tmp_path, drop=0.05), console, make.models())
    assert "the run's model is not what the recipe trains" in console.export_text()


@pytest.mark.slow  # trains a run of its own
def test_a_run_of_what_the_recipe_trains_is_not(tmp_path):
    path, own = runs.corpus(tmp_path), make.models()
    runs.copied(tmp_path)
    training = bench(tmp_path, own).training
    model = own["model"]
    params = training(np.ones(len(training.examples)), 0)
    own = {**own, "model": replace(model, params=params, digest="trained")}
    fit(runs.options(tmp_path, path), QUIET, own)
    query(runs.asked(tmp_path), QUIET, own)
    scan(Scan(tmp_path / "run", batch=4), QUIET, own)
    console = Console(record=True, width=1000)
    found = judge(options(tmp_path), console, own)
    assert found.likeness.alike
    assert found.likeness.off.max() < 1e-6
    assert "is not what the recipe trains" not in console.export_text()


def test_a_resampled_protocol_leaves_the_model_s_seed_out():
    assert protocol_of("resampled", 4, None, 3, 0, seed=2).seeds == (3, 4, 5)
    assert protocol_of("resampled", 4, None, 3, 0, seed=2).drop == 0.5
    assert protocol_of("same-seed", 4, None, 3, 0, seed=2).seeds == (2,)


def test_removal_predicts_minus_the_sum_of_what_is_removed(tmp_path):
    runs.copied(tmp_path)
    own = make.models()
    asked = Removal(tmp_path / "run", make.recipe(tmp_path), query="second", top=5)
    found = remove(asked, QUIET, own)
    scores = bench(tmp_path, own).scores.sel(query="second")
    assert found["count"].values.tolist() == counts(5) == [1, 2, 3, 4, 5]
    for ranking in ("top", "random", "bm25"):
        order = [str(x) for x in found.removed.sel(ranking=ranking).values]
        assert len(set(order)) == 5
        for count in (1, 5):
            expected = -scores.sel(train=order[:count]).sum()
            got = found.predicted.sel(ranking=ranking, count=count)
            assert float(got) == pytest.approx(float(expected))
    highest = scores.sortby(scores, ascending=False)["train"].values[:5].tolist()
    assert found.removed.sel(ranking="top").values.tolist() == highest
    assert (tmp_path / "run" / "truth" / "removal-2.zarr").is_dir()


def no_scores(folder, own):
    fit(runs.options(folder, runs.corpus(folder)), QUIET, own)
    query(runs.asked(folder), QUIET, own)
    judge(options(folder), QUIET, own)


def only_candidates(folder, own):
    runs.copied(folder)
    scan(Scan(folder / "run", candidates="bm25:3", batch=4), QUIET, own)
    judge(options(folder), QUIET, own)


def only_the_top(folder, own):
    runs.copied(folder)
    scan(Scan(folder / "run", keep="top:2", batch=4), QUIET, own)
    judge(options(folder), QUIET, own)


def of_another_corpus(folder, own):
    runs.copied(folder)
    more = runs.corpus(folder, n=5, seed=1, name="more")
    scan(Scan(folder / "run", data=(str(more),), batch=4), QUIET, own)
    judge(options(folder), QUIET, own)


def too_many_dropped(folder, own):
    runs.copied(folder)
    judge(options(folder, drop=1.5), QUIET, own)


def one_subset(folder, own):
    runs.copied(folder)
    judge(options(folder, subsets=1), QUIET, own)


def large_batch(folder, own):
    runs.copied(folder)
    judge(options(folder, recipe=make.recipe(folder, batch=99)), QUIET, own)


def no_base(folder, own):
    runs.copied(folder)
    told = make.recipe(folder, **{"from": "base"})
    judge(options(folder, recipe=told), QUIET, own)


def from_scratch(folder, own):
    runs.copied(folder)
    told = make.recipe(folder, **{"from": "scratch"})
    judge(options(folder, recipe=told), QUIET, own)


def another_start(folder, own):
    runs.copied(folder)
    start = own["start"]
    head = {**start.params, "head": start.params["head"][:, :5]}
    own = {**own, "start": replace(start, params=head)}
    judge(options(folder), QUIET, own)


def diverging(folder, own):
    runs.copied(folder)
    told = make.recipe(folder, rate=1e30, optimizer="sgd")
    judge(options(folder, recipe=told), QUIET, own)


def no_such_question(folder, own):
    runs.copied(folder)
    remove(Removal(folder / "run", make.recipe(folder), query="third"), QUIET, own)


def too_many_removed(folder, own):
    runs.copied(folder)
    asked = Removal(folder / "run", make.recipe(folder), query="1", top=15)
    remove(asked, QUIET, own)


REFUSED = {
    no_scores: "has no scores yet. Run `influence scan",
    only_candidates: "was of the candidates bm25:3 only",
    only_the_top: "only the highest and lowest were kept",
    of_another_corpus: "scores are of more; its model is trained again on texts",
    too_many_dropped: r"between 0 and 1 of the sequences can be left out, not 1\.5",
    one_subset: "--subsets 1 makes no sense. Give 2 at least",
    large_batch: "batches of 99 sequences; the corpus has 25",
    no_base: 'from = "base", and the run has no base',
    from_scratch: "random weights are not known",
    another_start: "can't begin with start: its head is",
    diverging: "is not finite: nan",
    no_such_question: "no question 'third'",
    too_many_removed: "--top 15 of 25 sequences .* Give 12 at most",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_can_not_be_judged_is_said(tmp_path, wrong):
    with pytest.raises((ValueError, FileNotFoundError), match=REFUSED[wrong]):
        wrong(tmp_path, make.models())
    assert not list(tmp_path.glob("run/truth/*"))
