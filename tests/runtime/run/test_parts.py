"""Scores in parts are the scores, whoever wrote which and wherever they ended."""

import json
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest

from influence.runtime.corpus.pack import pack
from influence.runtime.corpus.packed import Packed
from influence.runtime.corpus.plan import Plan, apart
from influence.runtime.corpus.source import open_source
from influence.runtime.mesh import one_device
from influence.runtime.run.parts import (
    Walk,
    dealt_out,
    forgotten,
    left,
    parts_of,
    score_parts,
)
from influence.runtime.run.stream import Names, Stream, read_scores

TRAIN, BATCH = 23, 4


def stream(folder, monkeypatch, layers=("x", "y", "z"), train=None, name="s"):
    row = 2 * 3 * np.dtype("float32").itemsize
    monkeypatch.setattr("influence.runtime.run.stream.CHUNK", BATCH * row)
    chosen = range(TRAIN) if train is None else train
    names = Names(("a", "b"), [str(i) for i in chosen], layers, {"kept": (1.0, 0.5)})
    return Stream(folder / f"{name}.zarr", names, {}, "float32", BATCH, "key", 0.0)


def rows(layers=3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(TRAIN, 2, layers)).astype("float32")


def part(folder, monkeypatch, start, stop, whole, layers=("x", "y", "z")):
    """Writes a part of which so many sequences are whole."""
    own = stream(
        folder, monkeypatch, layers, range(start, stop), f"s.part-{start}-{stop}"
    )
    own.open()
    for at in range(start, start + whole, BATCH):
        own._pace._since = -1e9  # a save is due
        own.add(rows(max(1, len(layers)))[at : min(at + BATCH, start + whole)])
    return own


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A corpus whose sequences say which they are."""
    folder = tmp_path_factory.mktemp("packed")
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"ids": [i, i]}) + "\n" for i in range(TRAIN)))
    plan = Plan(context=2, separator=None, cuts=apart)
    return pack(open_source(path, column="ids"), None, folder / "packed", plan)


def joined(own, packed, depth=3) -> list[int]:
    """Scores what is left in one process; returns which sequences those were."""
    scored = []

    def score(batch):
        places = np.asarray(batch.inputs["tokens"])[:, 0]
        scored.extend(places[batch.real_B].tolist())
        return rows(depth)[places]

    score_parts(
        own,
        partial(Walk, one_device(), Packed.batches, packed, BATCH),
        score,
        lambda what: nullcontext(lambda steps: None),
    )
    return scored


CUTS = [
    [(0, 12, 8), (12, 23, 4)],
    [(0, 12, 12), (12, 23, 7)],
    [(0, 23, 0)],
    [(0, 8, 5), (5, 14, 9), (14, 23, 9)],
]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("begun", [0, 3])
@pytest.mark.parametrize("layers", [("x", "y", "z"), ()])
def test_what_is_whole_is_kept_and_the_rest_is_scored(
    tmp_path, monkeypatch, packed, cuts, begun, layers
):
    own, depth = stream(tmp_path, monkeypatch, layers), max(1, len(layers))
    own.open()
    if begun:
        own._pace._since = -1e9
        own.add(rows(depth)[:begun])
    for start, stop, whole in cuts:
        part(tmp_path, monkeypatch, start, stop, whole, layers)
    again = stream(tmp_path, monkeypatch, layers)
    done = {i for a, _, n in cuts for i in range(a, a + n)} | {*range(begun)}
    assert {i for x in left(again) for i in x} == {*range(TRAIN)} - done
    assert sorted(joined(again, packed, depth)) == sorted({*range(TRAIN)} - done)
    with read_scores(own.path) as found:
        total = rows(depth).sum(-1, dtype=np.float64).astype("float32").T
        np.testing.assert_array_equal(found["score"], total)
        assert found["train"].values.tolist() == [str(i) for i in range(TRAIN)]
        if layers:
            by_layer = found["layer_score"].transpose("train", "query", "layer")
            np.testing.assert_array_equal(by_layer, rows())
    forgotten(own.path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["s.zarr"]


def test_parts_of_other_scores_are_removed(tmp_path, monkeypatch, packed):
    part(tmp_path, monkeypatch, 0, 12, 8)
    other = stream(tmp_path, monkeypatch)
    other.key = "another"
    assert parts_of(other) == []
    assert sorted(joined(other, packed)) == [*range(TRAIN)]
    assert [x.start for x in parts_of(other)] == [0]


def test_a_flipped_byte_of_a_part_is_named(tmp_path, monkeypatch, packed):
    part(tmp_path, monkeypatch, 0, 12, 8)
    (file, *_) = sorted(
        x for x in tmp_path.glob("s.part-*/layer_score/c/**/*") if x.is_file()
    )
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(ValueError, match="part-0-12.zarr/layer_score"):
        joined(stream(tmp_path, monkeypatch), packed)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_sequence_is_in_one_lot(count):
    ranges = [range(2, 6), range(8, 14), range(20, 21)]
    lots = dealt_out(ranges, count)
    assert [i for lot in lots for x in lot for i in x] == [i for x in ranges for i in x]
    sizes = [sum(map(len, lot)) for lot in lots]
    assert max(sizes) == -(-sum(map(len, ranges)) // count)
