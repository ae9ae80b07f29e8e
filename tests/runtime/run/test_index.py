"""An index finds what a scan finds, however it came about."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from influence.attribution import countsketch
from influence.runtime.coding import width_of
from influence.runtime.lookup import KINDS
from influence.runtime.models import given
from influence.runtime.run import showing
from influence.runtime.run.asking import questions
from influence.runtime.run.codes import CodeStream, log_at
from influence.runtime.run.fitting import fit
from influence.runtime.run.found import found
from influence.runtime.run.indexing import codes_at, index
from influence.runtime.run.job import opened_job
from influence.runtime.run.ledger import opened
from influence.runtime.run.options import Index, Scan, Search, Status
from influence.runtime.run.scanning import scan
from influence.runtime.run.searching import opened_index, search
from tests import cases
from tests.runtime.run import make
from tests.runtime.run.make import QUIET

ROUNDING = 1e-9  # float64: the same products, in batches of other sizes


def indexed(folder, own, **changed):
    """Indexes a run, in small batches, saved after each; returns the vectors."""
    options = Index(folder / "run", batch=4, save_every=0.0, size=64)
    index(replace(options, **changed), QUIET, own)
    return codes_at(job_of(folder, own), "texts").read_bytes()


def job_of(folder, own):
    return opened_job(opened(folder / "run"), QUIET, own)


def asked(folder, **changed) -> Search:
    return replace(
        Search(folder / "run", queries=folder / "questions.jsonl"), **changed
    )


def test_a_search_with_room_for_everything_is_a_scan(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    indexed(tmp_path, own)
    answer = search(asked(tmp_path, rescore=23), QUIET, own)
    results = found(job_of(tmp_path, own))
    expected = results.total()
    order = expected["train"].values.tolist()
    assert sorted(answer.total["train"].values.tolist()) == sorted(order)
    np.testing.assert_allclose(answer.total.sel(train=order), expected, atol=ROUNDING)
    np.testing.assert_allclose(
        answer.layers.sel(train=order), results.layers(order), atol=ROUNDING
    )
    total = answer.total.sel(train=answer.shares["train"])
    np.testing.assert_allclose(answer.shares.sum("token"), total, atol=ROUNDING)
    assert answer.total.attrs["n_train"] == expected.attrs["n_train"]


def test_long_vectors_rank_as_scores_do(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    indexed(tmp_path, own, size=512)
    few = search(asked(tmp_path, rescore=5), QUIET, own)
    expected = found(job_of(tmp_path, own)).total()
    for query in expected["query"].values:
        best = expected.sel(query=query).to_series().nlargest(3).index
        assert {*best} <= {*few.total["train"].values}
    assert few.total.sizes["train"] < expected.sizes["train"]


@pytest.mark.parametrize("lines", [1, 2])
def test_an_index_that_was_killed_goes_on_to_the_same_bytes(tmp_path, lines):
    make.copied(tmp_path)
    own = make.models()
    whole = indexed(tmp_path, own)
    path = codes_at(job_of(tmp_path, own), "texts")
    said = log_at(path).read_text().splitlines(keepends=True)
    assert len(said) >= 3  # which rows depend on what, the first batch, the last
    log_at(path).write_text("".join(said[:lines]) + said[lines][:20])
    path.write_bytes(whole[: len(whole) // 2] + b"torn")
    ledger = opened(tmp_path / "run")
    entry = ledger.stages["index of texts"] | {"finished": False}
    ledger.run.note(stages={**ledger.stages, "index of texts": entry})
    assert indexed(tmp_path, own) == whole
    assert log_at(path).read_text().splitlines()[:lines] == [
        x.rstrip("\n") for x in said[:lines]
    ]


def test_an_index_grows_by_corpora(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    more = make.corpus(tmp_path, n=11, seed=5, name="more")
    own_bytes = indexed(tmp_path, own)
    assert indexed(tmp_path, own, data=(str(more),)) == own_bytes
    answer = search(asked(tmp_path, rescore=34), QUIET, own)
    both = (str(tmp_path / "texts.jsonl"), str(more))
    scan(Scan(tmp_path / "run", data=both, batch=4), QUIET, own)
    expected = found(job_of(tmp_path, own)).total()
    order = expected["train"].values.tolist()
    np.testing.assert_allclose(answer.total.sel(train=order), expected, atol=ROUNDING)


def with_long_sides():
    """Returns a model whose hidden layer is three times as wide as its stream."""

    def apply(params, tokens_BxT):
        x = params["embed"][tokens_BxT]
        x = x + jnp.tanh(x @ params["up"]) @ params["down"]
        return x @ params["head"]

    shapes = {
        "embed": (cases.V, 4),
        "up": (4, 12),
        "down": (12, 4),
        "head": (4, cases.V),
    }
    like = {k: jax.ShapeDtypeStruct(x, jnp.float64) for k, x in shapes.items()}
    params = cases.randomised(like, jnp.float64)
    return {"model": given(apply, params, vocabulary=cases.V, context=cases.T)}


def test_vectors_of_leading_directions_are_asked_as_they_were_made(tmp_path):
    own = with_long_sides()
    make.everything(tmp_path, make.corpus(tmp_path), own)
    both = indexed(tmp_path, own)
    assert indexed(tmp_path, own, sides="leading") != both
    job, told = job_of(tmp_path, own), asked(tmp_path)
    searcher = opened_index(job)
    solved = searcher.solve(told, questions(told.asked))
    turned = -np.asarray(countsketch.asked(searcher.sketch, solved), np.float32)
    expected = found(job).total()
    (part,) = searcher.parts
    hits = part.find(turned, part.rows)
    for i, query in enumerate(expected["query"].values):
        products = np.empty(part.rows)
        products[hits.places[i]] = hits.products[i]
        # Of every number a sign is kept, which leaves 0.93 and 0.76. A question turned
        # on both sides, unlike the sequences, has 0.81 and 0.26.
        assert np.corrcoef(products, expected.sel(query=query))[0, 1] > 0.6


def test_no_more_signs_are_kept_than_there_are_weights(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    kept = indexed(tmp_path, own, size=1000)
    searcher = opened_index(job_of(tmp_path, own))
    weights = sum(x.lam_OxI.size for x in searcher.curvature.blocks.values())
    (part,) = searcher.parts
    # 8 times the prime below the eighth of them.
    assert 1000 < 0.95 * weights < part.made["length"] <= weights
    assert len(kept) == part.rows * width_of(part.made["length"])


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_with_room_for_every_number_products_are_scores(tmp_path, kind):
    make.copied(tmp_path)
    own = make.models()
    kept = indexed(tmp_path, own, size=100_000, kind=kind)
    job, told = job_of(tmp_path, own), asked(tmp_path)
    searcher = opened_index(job)
    (part,) = searcher.parts
    assert len(kept) == part.rows * width_of(part.made["length"], 8)
    solved = searcher.solve(told, questions(told.asked))
    turned = -np.asarray(countsketch.asked(searcher.sketch, solved), np.float32)
    hits = part.find(turned, part.rows)
    expected = found(job).total()
    for i, query in enumerate(expected["query"].values):
        products = np.empty(part.rows)
        products[hits.places[i]] = hits.products[i] / part.rows
        # A step is 1 / 127 of the largest of 1,088 numbers, some 4 standard deviations,
        # and rounding 1 / √12 of a step: 0.009 of a number, and of products no more.
        np.testing.assert_allclose(
            products, expected.sel(query=query), atol=0.01 * products.std()
        )


@pytest.mark.parametrize("changed", [{"size": 80}, {"damping": 0.2}, {"sides": "both"}])
def test_corpora_indexed_otherwise_are_not_asked_together(tmp_path, changed):
    make.copied(tmp_path)
    own = make.models()
    more = make.corpus(tmp_path, n=11, seed=5, name="more")
    indexed(tmp_path, own, sides="leading")
    indexed(tmp_path, own, **{"sides": "leading", "data": (str(more),), **changed})
    with pytest.raises(ValueError, match="other --bytes, --damping or --sides"):
        search(asked(tmp_path), QUIET, own)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"ivfpq"}))
def test_every_kind_can_be_asked(tmp_path, kind):
    make.copied(tmp_path)
    own = make.models()
    indexed(tmp_path, own, kind=kind)
    answer = search(asked(tmp_path, rescore=3, out=tmp_path / "a.html"), QUIET, own)
    assert answer.total.sizes["query"] == 2
    page = (tmp_path / "a.html").read_text()
    assert all(x in page for x in ("first", "second", "texts:", "by an index"))
    assert "every training sequence" not in page
    assert showing.status(Status(tmp_path / "run"), QUIET, own)


def test_what_is_not_good_enough_is_refused(tmp_path):
    make.copied(tmp_path)
    own = make.models()
    with pytest.raises(FileNotFoundError, match="no index yet. Run `influence index"):
        search(asked(tmp_path), QUIET, own)
    with pytest.raises(ValueError, match="9 bytes are too few"):
        indexed(tmp_path, own, size=9)
    with pytest.raises(ValueError, match="nothing to compress"):
        indexed(tmp_path, own, kind="ivfpq")
    with pytest.raises(ValueError, match="--rescore 0 makes no sense"):
        search(asked(tmp_path, rescore=0), QUIET, own)
    indexed(tmp_path, own)
    with pytest.raises(ValueError, match="is a folder"):
        search(asked(tmp_path, out=tmp_path), QUIET, own)


def test_a_damaged_or_stale_index_is_not_asked(tmp_path):
    path = make.copied(tmp_path)
    own = make.models()
    codes = codes_at(job_of(tmp_path, own), "texts")
    whole = bytearray(indexed(tmp_path, own))
    whole[7] ^= 1
    codes.write_bytes(whole)
    with pytest.raises(ValueError, match="sequences 0 to 4 are not what was written"):
        search(asked(tmp_path), QUIET, own)
    console = Console(record=True, width=200)
    assert not showing.status(Status(tmp_path / "run"), console, own)
    assert "sequences 0 to 4" in console.export_text()
    whole[7] ^= 1
    codes.write_bytes(whole)
    search(asked(tmp_path), QUIET, own)
    fit(make.options(tmp_path, path, seed=3), QUIET, own)
    with pytest.raises(ValueError, match="other curvature.*--data texts=") as said:
        search(asked(tmp_path), QUIET, own)
    assert str(path) in str(said.value)
    with pytest.raises(ValueError, match="--damping -1.0 makes no sense"):
        indexed(tmp_path, own, damping=-1.0)


def test_a_stream_says_what_is_missing(tmp_path):
    stream = CodeStream(tmp_path / "x.codes", 2, 5, 2, "key", 0.0)
    assert stream.open() == 0
    stream.add(np.ones((2, 2), np.uint8))
    with pytest.raises(ValueError, match="has 2 sequences, not 5"):
        stream.finish()
    again = CodeStream(tmp_path / "x.codes", 2, 5, 2, "key", 0.0)
    assert again.open() == 1
    other = CodeStream(tmp_path / "x.codes", 2, 5, 2, "another", 0.0)
    assert other.open() == 0
