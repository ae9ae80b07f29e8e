"""Read from the disk or held in memory: the same batches, the same numbers."""

import jax
import numpy as np
import pytest
import xarray as xr

import influence
from influence.attribution.lexical import candidates
from influence.model.examples import keys
from influence.model.task import Empirical, LanguageModel
from influence.runtime.corpus.pack import pack
from influence.runtime.corpus.packed import check_packed, read_packed
from influence.runtime.corpus.plan import Plan, apart, joined
from influence.runtime.corpus.source import open_source
from tests import cases
from tests.model.test_documents import attentive, random_params
from tests.runtime.corpus import make

T = 6
rng = np.random.default_rng(0)
DOCUMENTS = [rng.integers(0, cases.V, n).tolist() for n in (5, 2, 13, 1, 6, 3, 8, 4)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = make.write(tmp_path_factory.mktemp("s"), "a.jsonl", "ids", DOCUMENTS)
    return open_source(path, column="ids")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    return pack(source, None, tmp_path_factory.mktemp("p") / "joined", Plan(T, 0))


@pytest.fixture(scope="module")
def by_document(source, tmp_path_factory):
    plan = Plan(T, None, cuts=apart)
    return pack(source, None, tmp_path_factory.mktemp("p") / "apart", plan)


def in_memory(packed):
    tokens = [packed.tokens_at(i).tolist() for i in range(len(packed))]
    return influence.sequences(tokens, list(packed.ids))


@pytest.mark.parametrize("which", ["packed", "by_document"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_batches_are_those_of_the_sequences_in_memory(which, size, request):
    corpus = request.getfixturevalue(which)
    found, expected = corpus.batches(size), in_memory(corpus).batches(size)
    assert len(found) == len(expected)
    assert found.ids == list(expected.ids)
    for x, y in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, x, y)
    assert len(list(found)) == len(found)  # And again.


def rows(batches, key):
    return np.concatenate([x.inputs[key][x.real_B] for x in batches])


@pytest.mark.parametrize("key", ["tokens", "counts", "segments"])
def test_the_stream_does_not_depend_on_the_size_of_batches(packed, key):
    whole = rows(packed.batches(100, segments=True), key)
    for size in (1, 2, 3, 5):
        np.testing.assert_array_equal(
            rows(packed.batches(size, segments=True), key), whole
        )


def test_segments_number_the_documents_of_a_row(packed):
    segments = rows(packed.batches(4, segments=True), "segments")
    for name, row in zip(packed.ids, segments, strict=True):
        expected = [
            i for i, x in enumerate(packed.pieces_of(name), 1) for _ in range(x.tokens)
        ]
        assert row.tolist() == expected + [0] * (T - len(expected))
    counts = rows(packed.batches(4, segments=True), "counts")
    np.testing.assert_array_equal(counts, segments > 0)


def test_a_separator_is_its_document_s_last_label(packed):
    (batch,) = packed.batches(100, segments=True)
    task = LanguageModel(attentive)
    labels, counts = task.labels(batch.inputs), np.asarray(task.counts(batch.inputs))
    # The second document, [?, ?, 0], and the first of the third share the second row.
    first, *_ = packed.pieces_of(packed.ids[1])
    assert (first.row, first.tokens) == (1, 3)
    np.testing.assert_array_equal(counts[1], [1, 1, 0, 1, 1, 0])
    assert labels[1, 1] == 0


@pytest.mark.parametrize("places", [[0], [4, 1, 1], [6, 5, 4, 3, 2, 1, 0]])
def test_some_are_the_same_some_of_all(packed, places):
    some = packed.take(places)
    assert some.ids == [packed.ids[i] for i in places]
    for key in ("tokens", "segments"):
        np.testing.assert_array_equal(
            rows(some.batches(2, segments=True), key),
            rows(packed.batches(2, segments=True), key)[places],
        )
    for i, name in enumerate(some.ids):
        assert some.place_of(name) == places.index(places[i])
        assert some.pieces_of(name) == packed.pieces_of(name)
    again = some.take([len(places) - 1])
    assert again.ids == [packed.ids[places[-1]]]
    with pytest.raises(ValueError, match="no sequence 'a:7:3' among these"):
        some.place_of("a:7:3")
    with pytest.raises(IndexError):
        packed.take([len(packed)])


def test_names_are_a_sequence_of_which_none_is_kept(packed):
    names, kept = packed.ids, list(packed.ids)
    assert len(names) == len(packed) == len(kept)
    assert names == kept
    assert names == packed.ids
    assert names != [*kept[:-1], "other"]
    assert names != kept[:-1]
    assert names != "a"
    assert names[-1] == kept[-1]
    assert list(names[2:5]) == kept[2:5]
    assert list(reversed(names)) == kept[::-1]
    assert kept[3] in names
    with pytest.raises(IndexError):
        names[len(kept)]
    (batch,) = packed.batches(100)
    np.testing.assert_array_equal(batch.key_Bx2, keys(kept))


def test_a_batch_of_none_is_refused(packed):
    with pytest.raises(ValueError, match="at least one sequence, not 0"):
        packed.batches(0)


def test_a_scan_of_candidates_is_the_scan_of_everything_on_them(packed):
    task, params = LanguageModel(attentive), random_params()
    batches = packed.batches(3, segments=True)
    curvature = influence.fit(task, params, batches, labels=Empirical())
    asked = influence.completions(task, {"q": ([1, 2], [3])})
    query = influence.query(curvature, params, asked)
    whole = influence.scan(task, params, query, batches).layers
    found = candidates({"q": [1, 2, 3]}, batches, 4)
    assert 0 < len(found.union) <= 4
    some = packed.take(found.union)
    few = influence.scan(
        task, params, query, some.batches(2, segments=True), n_train=found.n_train
    ).layers
    # Sums over batches of another size.
    xr.testing.assert_allclose(
        few, whole.sel(train=list(some.ids)), rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("cuts", [joined, apart])
def test_a_finished_corpus_is_opened_as_it_was_packed(source, tmp_path, cuts):
    packed = pack(source, None, tmp_path / "p", Plan(T, 0, cuts=cuts))
    found = read_packed(tmp_path / "p")
    check_packed(tmp_path / "p")
    assert found.ids == packed.ids
    assert (found.context, found.length) == (T, packed.length)
    tokens, expected = (rows(x.batches(3), "tokens") for x in (found, packed))
    np.testing.assert_array_equal(tokens, expected)
