"""What comes out of a run is what the engine computes, however often it was stopped."""

import json
import os
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from rich.console import Console

import influence
from influence.attribution.self_influence import self_influence
from influence.runtime.models import given
from influence.runtime.run import showing
from influence.runtime.run.asking import query
from influence.runtime.run.fitting import curvature_of, fit
from influence.runtime.run.found import found
from influence.runtime.run.job import MODEL, Job, opened_job
from influence.runtime.run.keeping import extremes
from influence.runtime.run.kept import scores_at
from influence.runtime.run.ledger import begin, locked, opened
from influence.runtime.run.options import Query, Report, Scan, Show, Status
from influence.runtime.run.scanning import scan
from influence.runtime.run.stream import read_scores
from tests import cases
from tests.runtime.run import make
from tests.runtime.run.make import QUIET


def job_of(folder, own) -> Job:
    return opened_job(opened(folder / "run"), QUIET, own)


def scores(folder, own, **how):
    return found(job_of(folder, own)).total(**how)


def stages(folder):
    return opened(folder / "run").stages


def fresh(folder, own):
    """Returns the names of the stages that are finished and made from what there is."""
    job = job_of(folder, own)
    return {x.stage for x in showing.examined(job) if x.state == "finished"}


def damage(folder, own) -> str:
    """Returns what is said to be damaged."""
    console = Console(record=True, width=1000)
    try:
        assert not showing.status(Status(folder), console, own)
    except ValueError as error:  # of the manifest: there is no table without it
        return str(error)
    lines = console.export_text().splitlines()
    return "".join(x for x in lines if "damaged" in x)


def test_a_run_scores_what_the_engine_scores(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    model = own["model"]
    packed = found(job_of(tmp_path, own)).corpora["texts"].packed
    batches = packed.batches(4)
    curvature = influence.fit(model.task, model.params, batches)
    asked = influence.completions(
        model.task,
        {x["name"]: (x["prompt"], x["completion"]) for x in make.QUESTIONS},
    )
    queries = influence.query(curvature, model.params, asked)
    expected = influence.scan(model.task, model.params, queries, batches)
    with read_scores(scores_at(job_of(tmp_path, own), "model", "texts")) as kept:
        np.testing.assert_array_equal(kept["layer_score"], expected.layers)
        assert kept["train"].values.tolist() == list(packed.ids)
        assert kept["layer"].values.tolist() == expected.layers["layer"].values.tolist()
        assert kept.attrs["unit"] == expected.layers.attrs["unit"]
        assert kept["value"].values.tolist() == expected.layers["value"].values.tolist()


def test_what_is_finished_is_not_done_again(tmp_path):
    own, path = make.models(), make.copied(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.s*")}
    make.everything(tmp_path, path, own)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def changed_row(tmp_path, path, own):
    rows = path.read_text().splitlines()
    path.write_text("\n".join(['{"ids": [1, 1, 2]}', *rows[1:]]) + "\n")
    return own


def changed_weight(tmp_path, path, own):
    return make.models(seed=1)


def changed_question(tmp_path, path, own):
    options = replace(make.asked(tmp_path), damping=0.5)
    query(options, QUIET, own)
    return own


FRESH = {
    changed_row: set(),
    changed_weight: {"corpus texts"},
    changed_question: {"corpus texts", "curvature of model", "queries of model"},
}


@pytest.mark.parametrize("change", FRESH)
def test_a_change_makes_stale_what_depends_on_it_and_nothing_else(tmp_path, change):
    own, path = make.models(), make.copied(tmp_path)
    assert fresh(tmp_path, own) == set(stages(tmp_path))
    own = change(tmp_path, path, own)
    assert fresh(tmp_path, own) == FRESH[change]
    make.everything(tmp_path, path, own)
    assert fresh(tmp_path, own) == set(stages(tmp_path))


def test_stages_from_different_inputs_are_not_mixed(tmp_path):
    own, path = make.models(), make.copied(tmp_path)
    other = make.models(seed=1)
    with pytest.raises(ValueError, match="curvature of model was fitted with other we"):
        query(make.asked(tmp_path), QUIET, other)
    with pytest.raises(ValueError, match="fitted with other weights"):
        scan(Scan(tmp_path / "run"), QUIET, other)
    changed_row(tmp_path, path, own)
    with pytest.raises(ValueError, match="corpus texts is not what it was: data: "):
        scan(Scan(tmp_path / "run"), QUIET, own)


def test_candidates_get_the_scores_of_a_scan_of_everything(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    whole = scores(tmp_path, own)
    scan(Scan(tmp_path / "run", candidates="bm25:3", batch=4), QUIET, own)
    few = scores(tmp_path, own)
    assert 3 <= few.sizes["train"] <= 6
    # In other batches than before: equal but for rounding.
    expected = whole.sel(train=few["train"])
    np.testing.assert_allclose(few, expected, rtol=1e-11, atol=1e-16)
    assert few.attrs["n_train"] == whole.attrs["n_train"]


def test_the_top_of_a_scan_is_the_top_of_all_scores(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    whole = scores(tmp_path, own)
    scan(Scan(tmp_path / "run", keep="top:2", batch=4, save_every=0.0), QUIET, own)
    top = scores(tmp_path, own)
    for name in whole["query"].values:
        one, other = (x.sel(query=name).sortby(x.sel(query=name)) for x in (whole, top))
        for end in (slice(None, 2), slice(-2, None)):
            assert one["train"].values[end].tolist() == (
                other["train"].values[end].tolist()
            )
    assert top.sizes["train"] <= 8


def test_the_most_extreme_are_of_those_with_a_score():
    values = [[1.0, np.nan, 5.0, -4.0], [np.nan, np.nan, np.nan, 2.0]]
    score = xr.DataArray(values, {"train": list("abcd")}, ("query", "train"))
    assert extremes(score, 1) == {"c", "d"}
    assert extremes(score, 4) == {"a", "c", "d"}


def test_totals_alone_are_the_same_totals(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    whole = scores(tmp_path, own)
    scan(Scan(tmp_path / "run", keep="totals", batch=4), QUIET, own)
    # Two queries are scanned in forward mode if layers are not kept.
    np.testing.assert_allclose(scores(tmp_path, own), whole, rtol=1e-10, atol=1e-16)


def test_layers_fitted_in_groups_score_as_those_fitted_together(tmp_path):
    own, path = make.models(), make.copied(tmp_path)
    whole = scores(tmp_path, own)
    make.everything(tmp_path, path, own, memory=7e-6)
    groups = [x for x in stages(tmp_path) if x.startswith("curvature of model ")]
    assert len(groups) > 2
    # Another program rounds otherwise, and close eigenvalues make more of it.
    np.testing.assert_allclose(scores(tmp_path, own), whole, rtol=1e-8, atol=1e-16)
    job, model = job_of(tmp_path, own), own["model"]
    files = job.noted(f"curvature of {MODEL}")["files"]
    apart = curvature_of(job, files)
    batches = job.batches(job.corpus(model).packed, 4)
    found = [
        self_influence(model.task, model.params, x, batches)
        for x in (apart, apart.loaded())
    ]
    np.testing.assert_array_equal(found[0], found[1])


def test_too_little_memory_for_tokens_leaves_scores_as_they_are(tmp_path):
    plain, params = cases.MAKERS["raw-loop"](bias=True, dtype=jnp.float64)
    params = cases.randomised(params, jnp.float64)
    short = False

    def model():
        # A function of its own for every job: what was traced is not traced again.
        def apply(params, tokens_BxT):
            if short and len(tokens_BxT) > 2:
                raise MemoryError("Out of memory")
            return plain(params, tokens_BxT)

        return {"model": given(apply, params, vocabulary=cases.V, context=cases.T)}

    make.everything(tmp_path, make.corpus(tmp_path), model())
    before, short = stages(tmp_path), True
    assert before["scores of texts"]["inputs"]["batch"] == "4"
    shutil.rmtree(tmp_path / "run" / "model" / "tokens-texts.zarr")
    own = model()
    for _ in range(2):
        scan(Scan(tmp_path / "run", batch=4), QUIET, own)
        assert job_of(tmp_path, own).noted("batch of the tokens of texts")["size"] < 4
        assert stages(tmp_path) == before


def test_several_corpora_are_ranked_together(tmp_path):
    own, path = make.models(), make.copied(tmp_path)
    more = make.corpus(tmp_path, n=5, seed=1, name="more")
    both = (str(path), f"later={more}")
    scan(Scan(tmp_path / "run", data=both, batch=4), QUIET, own)
    total = scores(tmp_path, own)
    kinds = [x.split(":")[0] for x in total["train"].values]
    assert set(kinds) == {"texts", "later"}
    assert total.attrs["n_train"] == len(kinds)
    texts = found(job_of(tmp_path, own)).texts([x for x in total["train"].values[-2:]])
    assert all(texts.values())


def test_a_base_has_scores_of_its_own_and_a_difference(tmp_path):
    path = make.corpus(tmp_path)
    one, other = make.models()["model"], make.models(seed=1)["model"]
    make.everything(tmp_path, path, {"model": one, "base": other})
    both = {"model": one, "base": other}
    difference = scores(tmp_path, both, difference=True)
    own = scores(tmp_path, both)
    single = tmp_path / "single"
    single.mkdir()
    make.everything(single, path, {"model": other})
    expected = own - scores(single, {"model": other})
    np.testing.assert_array_equal(difference, expected)


def test_a_page_and_a_terminal_show_what_was_found(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    page = showing.report(Report(tmp_path / "run"), QUIET, own)
    total = scores(tmp_path, own)
    first = str(total["train"].values[int(np.argmax(total.values[0]))])
    assert first in page.read_text()
    console = Console(record=True, width=100)
    showing.show(Show(tmp_path / "run", query="1", top=2), console, own)
    text = console.export_text()
    assert first in text
    assert "second" not in text
    with pytest.raises(ValueError, match="no question 'third'"):
        showing.show(Show(tmp_path / "run", query="third"), QUIET, own)


def test_a_flipped_byte_is_found_and_named_wherever_it_is(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    folder = tmp_path / "run"
    assert showing.status(Status(folder), QUIET, own)
    files = [
        x
        for x in sorted(folder.rglob("*"))
        if x.is_file() and x.stat().st_size and x.name != ".lock"
    ]
    kinds = {x.relative_to(folder).parts[:2] for x in files}
    assert len(kinds) >= 5
    for file in files:
        whole = file.read_bytes()
        middle = len(whole) // 2
        file.write_bytes(
            whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        )
        artifacts = [x.name for x in (file, *file.parents) if x.suffix == ".zarr"]
        assert (artifacts or [file.name])[-1] in damage(folder, own), file
        file.write_bytes(whole)
    assert showing.status(Status(folder), QUIET, own)


def test_old_scores_are_not_shown_under_new_questions(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    asked = tmp_path / "other.jsonl"
    # What looks like rich's markup and is none, where it is said what changed.
    asked.write_text('{"name": "[/INST]", "prompt": [7], "completion": [8]}\n')
    console = Console(record=True, width=1000)
    query(Query(tmp_path / "run", queries=asked), console, own)
    assert '"name": "[/INST]"' in console.export_text()
    with pytest.raises(ValueError, match="are of other queries than the run now has"):
        scores(tmp_path, own)


BAD_QUESTIONS = {
    "token id 99": {"prompt": [1, 99], "completion": [2]},
    "completion of question '1' is .2.. A question is all": {
        "prompt": "text",
        "completion": [2],
    },
    "prompt of question '1' is 3. A question is all": {"prompt": 3, "completion": [2]},
    "instead of question '1' is empty": {
        "prompt": [1],
        "completion": [2],
        "instead": [],
    },
}


@pytest.mark.parametrize("said", BAD_QUESTIONS)
def test_a_bad_question_loses_nothing(tmp_path, said):
    make.copied(tmp_path)
    own = make.models()
    before = scores(tmp_path, own)
    asked = tmp_path / "bad.jsonl"
    asked.write_text(json.dumps(BAD_QUESTIONS[said]) + "\n")
    with pytest.raises(ValueError, match=said):
        query(Query(tmp_path / "run", queries=asked), QUIET, own)
    xr.testing.assert_identical(scores(tmp_path, own), before)


def test_bad_data_does_not_replace_what_was_packed(tmp_path):
    path = make.copied(tmp_path)
    own = make.models()
    whole = path.read_text()
    path.write_text(whole + '{"ids": []}\n')
    with pytest.raises(ValueError, match="'ids' is empty"):
        fit(make.options(tmp_path, path), QUIET, own)
    path.write_text(whole)
    assert showing.status(Status(tmp_path / "run"), QUIET, own)


@pytest.mark.parametrize(
    "made",
    [
        "corpora/texts",
        "model/curvature.safetensors",
        "model/queries.safetensors",
        "model/scores-texts.zarr",
        "model/tokens-texts.zarr",
    ],
)
def test_what_was_deleted_is_made_again(tmp_path, made):
    path = make.copied(tmp_path)
    own = make.models()
    before = scores(tmp_path, own)
    gone = tmp_path / "run" / made
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    make.everything(tmp_path, path, own)
    xr.testing.assert_identical(scores(tmp_path, own), before)


def test_a_fit_in_fewer_groups_takes_the_place_of_one_in_more(tmp_path):
    path, own = make.corpus(tmp_path), make.models()
    fit(make.options(tmp_path, path, memory=7e-6), QUIET, own)
    assert "curvature of model 2" in stages(tmp_path)
    make.everything(tmp_path, path, own)
    assert {x for x in stages(tmp_path) if "curvature" in x} == {"curvature of model"}
    files = {x.name for x in (tmp_path / "run" / "model").glob("curvature*")}
    assert files == {"curvature.safetensors"}
    assert showing.status(Status(tmp_path / "run"), QUIET, own)


def test_the_top_under_a_base_is_the_model_s(tmp_path):
    path = make.corpus(tmp_path, name="codebase")
    own = {**make.models(), "base": make.models(seed=1)["model"]}
    make.everything(tmp_path, path, own)
    whole = scores(tmp_path, own, difference=True)
    top = Scan(tmp_path / "run", batch=4, keep="top:2")
    scan(top, QUIET, own)
    kept = scores(tmp_path, own, difference=True)
    xr.testing.assert_equal(kept, whole.sel(train=kept["train"]))
    assert showing.status(Status(tmp_path / "run"), QUIET, own)
    assert showing.report(Report(tmp_path / "run"), QUIET, own).is_file()


def test_status_says_that_a_model_is_gone(tmp_path):
    make.copied(tmp_path)
    run = opened(tmp_path / "run").run
    run.note(fit={**run.manifest["fit"], "model": str(tmp_path / "nowhere")})
    console = Console(record=True, width=200)
    assert not showing.status(Status(tmp_path / "run"), console)
    said = console.export_text()
    assert "stale" in said
    assert "weights" in said


def test_what_another_process_is_writing_is_not_called_damaged(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    job = job_of(tmp_path, own)
    begun = {**stages(tmp_path)}
    begun["scores of texts"] = {**begun["scores of texts"], "finished": False}
    job.ledger.run.note(stages=begun)
    half = job.saves("scores of texts") / "pass" / "3.json"
    half.parent.mkdir(parents=True)
    half.write_text("{")
    with locked(tmp_path / "run"):
        found = {x.stage: x for x in showing.examined(job)}
        assert found["scores of texts"].state == "begun"
        assert f"process {os.getpid()} is at work" in found["scores of texts"].why
        assert not any(x.state == "damaged" for x in found.values())
    assert "3.json" in damage(tmp_path / "run", own)


def test_two_processes_do_not_share_a_folder(tmp_path):
    own, path = make.models(), make.corpus(tmp_path)
    with (
        locked(tmp_path / "run"),
        pytest.raises(BlockingIOError, match="is at work in"),
    ):
        fit(make.options(tmp_path, path), QUIET, own)


def test_a_folder_of_another_version_is_refused(tmp_path):
    begin(tmp_path / "run").run.note(influence="0.0.1")
    with pytest.raises(ValueError, match=r"was made by influence 0\.0\.1 \(format 1\)"):
        opened(tmp_path / "run")


def nothing_fitted(tmp_path, own, path):
    begin(tmp_path / "run")
    query(make.asked(tmp_path), QUIET, own)


def nothing_asked(tmp_path, own, path):
    fit(make.options(tmp_path, path), QUIET, own)
    scan(Scan(tmp_path / "run"), QUIET, own)


def no_run(tmp_path, own, path):
    query(make.asked(tmp_path), QUIET, own)


def prompt_alone(tmp_path, own, path):
    make.copied(tmp_path)
    query(Query(tmp_path / "run", prompt=("a",)), QUIET, own)


def no_question(tmp_path, own, path):
    make.copied(tmp_path)
    query(Query(tmp_path / "run"), QUIET, own)


def text_without_tokenizer(tmp_path, own, path):
    make.copied(tmp_path)
    query(Query(tmp_path / "run", prompt=("a",), completion=("b",)), QUIET, own)


def too_long(tmp_path, own, path):
    options = make.options(tmp_path, path)
    long = replace(options, packing=replace(options.packing, context=99))
    fit(long, QUIET, own)


def no_such_layer(tmp_path, own, path):
    fit(make.options(tmp_path, path, layers=("attention",)), QUIET, own)


def no_such_separator(tmp_path, own, path):
    options = make.options(tmp_path, path)
    fit(replace(options, packing=replace(options.packing, separator="99")), QUIET, own)


def no_candidates(tmp_path, own, path):
    make.copied(tmp_path)
    scan(Scan(tmp_path / "run", ("nowhere",), candidates="tfidf"), QUIET, own)


def keep_what(tmp_path, own, path):
    make.copied(tmp_path)
    scan(Scan(tmp_path / "run", ("nowhere",), keep="some"), QUIET, own)


def one_name_twice(tmp_path, own, path):
    path = make.copied(tmp_path)
    scan(Scan(tmp_path / "run", data=(str(path), str(path))), QUIET, own)


def the_fit_s_name(tmp_path, own, path):
    make.copied(tmp_path)
    (tmp_path / "other").mkdir()
    other = make.corpus(tmp_path / "other", seed=1)
    scan(Scan(tmp_path / "run", data=(str(other),)), QUIET, own)


def fewer_than_none(tmp_path, own, path):
    make.copied(tmp_path)
    scan(Scan(tmp_path / "run", n_train=-5), QUIET, own)


def short_base(tmp_path, own, path):
    model = own["model"]
    base = replace(model, context=cases.T - 1)
    try:
        fit(make.options(tmp_path, path), QUIET, {**own, "base": base})
    finally:
        assert list(stages(tmp_path)) == ["corpus texts"]  # before the long pass


def other_base(tmp_path, own, path):
    apply, params = cases.MAKERS["raw-loop"](bias=True, dtype=np.float64)
    base = given(apply, params, vocabulary=5, context=cases.T)
    fit(make.options(tmp_path, path), QUIET, {**own, "base": base})


REFUSED = {
    no_run: "There is no run in",
    nothing_fitted: "was not fitted",
    nothing_asked: "has no queries of model yet",
    prompt_alone: "1 prompts and 0 completions",
    no_question: "Nothing is asked",
    text_without_tokenizer: "no tokenizer, and question '1' is text",
    too_long: "context 99 is longer than the model's, 6",
    no_such_layer: "No layer matches 'attention'",
    no_such_separator: "separator '99' is none of the model's 11 token ids",
    no_candidates: "--candidates tfidf means nothing",
    keep_what: "--keep some means nothing",
    one_name_twice: "Two corpora are called 'texts'",
    the_fit_s_name: "Two corpora are called 'texts'",
    fewer_than_none: "--n-train -5 makes no sense. Give 1 at least",
    short_base: f"The base takes sequences of {cases.T - 1} tokens",
    other_base: "Model and base do not read alike: 11 and 5 token ids",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_can_not_be_done_is_said(tmp_path, wrong):
    own, path = make.models(), make.corpus(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=REFUSED[wrong]):
        wrong(tmp_path, own, path)


BAD_LINES = {
    '{"prompt": "a"}': "line 1, has no `prompt` and `completion`",
    "{": "line 1, is no JSON",
    '{"prompt": [1], "completion": [2], "why": 1}': "says why, which means nothing",
    '{"prompt": [], "completion": [2]}': "The prompt of question '1' is empty",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_of_questions_is_named(tmp_path, line):
    own = make.models()
    make.copied(tmp_path)
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    asked = Query(tmp_path / "run", queries=tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match=BAD_LINES[line]):
        query(asked, QUIET, own)
