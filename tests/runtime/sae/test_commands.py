"""The commands on dictionaries, on a tiny decoder of token ids."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from influence.interpret import training
from influence.runtime.dictionaries.folders import open_dictionary
from influence.runtime.run.asking import query
from influence.runtime.run.fitting import fit
from influence.runtime.run.options import Fit, Query, Report, Scan
from influence.runtime.run.scanning import scan
from influence.runtime.run.showing import report
from influence.runtime.sae.browsing import browse
from influence.runtime.sae.judging import judge
from influence.runtime.sae.linking import link
from influence.runtime.sae.options import Eval, Features, Link
from influence.runtime.sae.training import features_of, train
from tests.runtime.sae import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a dictionary and its control, and a run that was scanned."""
    folder = tmp_path_factory.mktemp("sae")
    make.trained(folder, control=True)
    read, own = make.reads(folder), make.models()
    run = folder / "run"
    fit(
        Fit(run, "my own", read.data, read.packing, batch=16),
        make.QUIET,
        own,
    )
    questions = folder / "questions.jsonl"
    questions.write_text('{"prompt": [1, 2, 3], "completion": [4]}\n')
    query(Query(run, queries=questions), make.QUIET, own)
    scan(Scan(run, batch=16), make.QUIET, own)
    return folder


def dictionary(folder):
    return str(folder / "sae" / "dictionary")


def test_what_was_trained_says_what_it_is(folder):
    stored = open_dictionary(dictionary(folder))
    own = make.models()["model"]
    assert stored.about.site == "resid.1"
    assert stored.about.kind == "batchtopk"
    assert stored.about.model_digest == own.digest
    assert stored.dictionary.width == 64
    assert stored.about.facts["variance_explained"] > 0.5
    assert len(stored.about.facts["maximum"]) == 64


def test_a_second_time_nothing_is_trained(folder, monkeypatch):
    before = open_dictionary(dictionary(folder)).dictionary.encoder_DxF
    monkeypatch.setattr(training, "fold", None)
    train(make.options(folder, control=True), make.QUIET, make.models())
    after = open_dictionary(dictionary(folder)).dictionary.encoder_DxF
    np.testing.assert_array_equal(before, after)


def test_training_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch):
    made = training.fold

    def stopping(*args, **rest):
        fold, count = made(*args, **rest), iter(range(100))

        def update(state, batch):
            if next(count) == 3:
                raise KeyboardInterrupt
            return fold.update(state, batch)

        return fold._replace(update=update)

    options = make.options(tmp_path, control=True, save_every=0.0)
    own = replace(options, read=make.reads(folder))
    monkeypatch.setattr(training, "fold", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(own, make.QUIET, make.models())
    monkeypatch.setattr(training, "fold", made)
    train(own, make.QUIET, make.models())
    whole, stopped = (open_dictionary(dictionary(x)) for x in (folder, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, whole.dictionary, stopped.dictionary)


@pytest.mark.slow  # tests/interpret/test_training.py has the law
def test_several_are_trained_in_one_pass(tmp_path):
    options = make.options(
        tmp_path, site=("resid.1", "blocks.1.hook_resid_post"), width=("2x", "24")
    )
    train(replace(options, tokens=2_000), make.QUIET, make.models())
    found = sorted(x.parent.name for x in (tmp_path / "sae").glob("*/cfg.json"))
    assert found == [
        "resid.1-16-batchtopk",
        "resid.1-24-batchtopk",
        "resid_final.0-16-batchtopk",
        "resid_final.0-24-batchtopk",
    ]


@pytest.mark.slow  # tests/interpret/test_training.py has the laws
def test_a_transcoder_is_trained_and_judged(tmp_path):
    options = make.options(tmp_path, site=("mlp_in.1",), writes=("mlp_out.1",))
    train(replace(options, skip=True), make.QUIET, make.models())
    stored = open_dictionary(dictionary(tmp_path))
    assert stored.about.writes == "mlp_out.1"
    assert stored.dictionary.skip_OxD is not None
    read = make.reads(tmp_path)
    found = judge(Eval(dictionary(tmp_path), read), make.QUIET, make.models())
    # So short a training explains a third; nothing learned would explain nothing.
    assert found["model"].variance_explained > 0.2


def test_a_dictionary_is_judged_beside_its_control(folder):
    out = folder / "numbers.json"
    options = Eval(dictionary(folder), make.reads(folder), out=out)
    found = judge(options, make.QUIET, make.models())
    said = json.loads(out.read_text())
    assert said.keys() == {"model", "control"}
    assert said["model"]["l0"] == found["model"].l0
    assert 1 < found["model"].l0 < 8


def test_a_page_has_every_feature_and_what_caused_it(folder):
    out = folder / "features.html"
    options = Features(
        dictionary(folder),
        make.reads(folder),
        out,
        run=folder / "run",
        causes=3,
        neuronpedia=folder / "neuronpedia",
        circuit_tracer=folder / "circuits",
    )
    album = browse(options, make.QUIET, make.models())
    assert [x.index for x in album.cards] == list(range(64))
    caused = [x for x in album.cards if x.causes is not None]
    often = sorted(album.cards, key=lambda x: -x.density)[:3]
    assert {x.index for x in caused} == {x.index for x in often}
    assert all(x.text for card in caused for x in card.causes or ())
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list((folder / "neuronpedia").glob("*.json"))
    assert (folder / "circuits" / "features" / "layer_1.bin").is_file()


def test_a_run_is_linked_to_features(folder):
    options = Link(folder / "run", dictionary(folder), top=10, level=1.0, shown=4)
    (found,) = link(options, make.QUIET, make.models()).values()
    assert len(found.raises) == len(found.tokens) == 4
    assert [abs(x.effect) for x in found.through] == sorted(
        (abs(x.effect) for x in found.through), reverse=True
    )
    page = report(Report(folder / "run"), make.QUIET, make.models())
    assert "Features × sequences" in page.read_text(encoding="utf-8")


def test_a_feature_is_asked_about(folder, tmp_path):
    stored = open_dictionary(dictionary(folder))
    often = int(np.argmax(stored.about.facts["density"]))
    read, own = make.reads(folder), make.models()
    run = tmp_path / "run"
    fit(Fit(run, "my own", read.data, read.packing, batch=16), make.QUIET, own)
    asked = Query(run, sae=dictionary(folder), feature=(often,))
    ledger = query(asked, make.QUIET, own)
    scan(Scan(run, batch=16), make.QUIET, own)
    (said,) = json.loads(ledger.stages["queries of model"]["inputs"]["questions"])
    assert said["name"] == f"feature {often}"
    assert len(said["feature"]["places"]) == 16
    report(Report(run), make.QUIET, own)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"site": ("resid.7",)}, "no site 'resid.7'"),
        ({"site": ("attention_pattern.0",)}, "not a vector for each token"),
        ({"width": ("wide",)}, "no number of features"),
        ({"k": 65}, "k is 65, and the dictionary has 64"),
        ({"site": ()}, "give a --site"),
        ({"writes": ("mlp_out.1", "mlp_out.0")}, "Give each site of a transcoder"),
        ({"hold_out": 0.001}, "held out: 0"),
        ({"site": ("blocks.0.ln2.hook_normalized",)}, "scale"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    changes, said, tmp_path
):
    with pytest.raises(ValueError, match=said):
        train(make.options(tmp_path, **changes), make.QUIET, make.models())


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "ids.jsonl").write_text("")
    with pytest.raises(ValueError, match="no documents"):
        train(make.options(tmp_path), make.QUIET, make.models())


def test_a_dictionary_of_another_model_is_refused(folder):
    options = Eval(dictionary(folder), make.reads(folder))
    with pytest.raises(ValueError, match="Give the weights"):
        judge(options, make.QUIET, make.models(seed=1))


def test_questions_about_features_have_to_be_whole(folder):
    run, own = folder / "run", make.models()
    with pytest.raises(ValueError, match="both --sae"):
        query(Query(run, feature=(3,)), make.QUIET, own)
    with pytest.raises(ValueError, match="no feature 99"):
        query(Query(run, sae=dictionary(folder), feature=(99,)), make.QUIET, own)


@pytest.mark.parametrize(("word", "count"), [("8x", 64), ("5", 5)])
def test_widths_are_numbers_or_multiples(word, count):
    assert features_of(word, 8) == count
