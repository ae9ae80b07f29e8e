"""Scores that were said to be whole are, wherever a process ends."""

import json

import numpy as np
import pytest

from influence.runtime.run.stream import Names, Stream, check_begun, read_scores

TRAIN, BATCH = 23, 4


def stream(folder, monkeypatch, each=2) -> Stream:
    """Returns a stream whose files hold so many batches, saved after every one."""
    row = 2 * 3 * np.dtype("float32").itemsize
    monkeypatch.setattr("influence.runtime.run.stream.CHUNK", each * BATCH * row)
    names = Names(
        query=("a", "b"),
        train=[str(i) for i in range(TRAIN)],
        layer=("x", "y", "z"),
        along={"kept": (1.0, 0.5)},
    )
    return Stream(folder / "s.zarr", names, {}, "float32", BATCH, "key", 0.0)


def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(TRAIN, 2, 3)).astype("float32")


def add(own: Stream, start: int, stop: int) -> None:
    for batch in range(start, stop):
        own._pace._since = -1e9  # a save is due
        own.add(rows()[batch * BATCH : (batch + 1) * BATCH])


@pytest.mark.parametrize("stopped", range(1, 6))
def test_no_batch_is_done_again_that_was_committed(tmp_path, monkeypatch, stopped):
    first = stream(tmp_path, monkeypatch)
    assert first.open() == 0
    add(first, 0, stopped)
    # The process ends while it writes what nothing speaks of yet.
    (tmp_path / "s.tail-99.npy").write_bytes(b"torn")
    with first.log.open("a") as file:
        file.write('{"start": 99')
    second = stream(tmp_path, monkeypatch)
    assert second.open() == stopped
    add(second, stopped, 6)
    second.finish()
    with read_scores(tmp_path / "s.zarr") as found:
        np.testing.assert_array_equal(
            found["layer_score"].transpose("train", "query", "layer"), rows()
        )
        np.testing.assert_array_equal(
            found["score"], rows().sum(-1, dtype=np.float64).astype("float32").T
        )
        assert found["train"].values.tolist() == [str(i) for i in range(TRAIN)]
    assert not list(tmp_path.glob("s.tail*"))


def test_whose_scores_are_no_numbers_is_known(tmp_path, monkeypatch):
    own = stream(tmp_path, monkeypatch)
    own.open()
    add(own, 0, 3)
    odd = rows()[3 * BATCH : 4 * BATCH]
    odd[1, 0, 2], odd[3] = np.nan, np.inf
    own.add(odd)
    assert own.odd == ["13", "15"]


def test_scores_for_something_else_are_not_gone_on_with(tmp_path, monkeypatch):
    first = stream(tmp_path, monkeypatch)
    first.open()
    add(first, 0, 3)
    second = stream(tmp_path, monkeypatch)
    second.key = "other"
    assert second.open() == 0


@pytest.mark.parametrize(
    "file", ["s.tail-12.npy", "s.log.jsonl", "s.zarr/score/c/0/0", "s.zarr/zarr.json"]
)
def test_what_is_damaged_is_not_gone_on_with(tmp_path, monkeypatch, file):
    first = stream(tmp_path, monkeypatch)
    first.open()
    add(first, 0, 3)
    check_begun(tmp_path / "s.zarr")
    whole = (tmp_path / file).read_bytes()
    middle = len(whole) // 2
    flipped = bytes([whole[middle] ^ 1])
    (tmp_path / file).write_bytes(whole[:middle] + flipped + whole[middle + 1 :])
    named = file.removesuffix("/c/0/0").removesuffix("/zarr.json").replace(".", r"\.")
    for read in (
        lambda: check_begun(tmp_path / "s.zarr"),
        stream(tmp_path, monkeypatch).open,
    ):
        with pytest.raises(ValueError, match=named):
            read()


def test_scores_are_written_before_they_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("influence.runtime.run.stream.HELD", 2)
    own = stream(tmp_path, monkeypatch, each=1)
    own._pace.every = 3600.0
    own.open()
    done = []
    for batch in range(4):
        own.add(rows()[batch * BATCH : (batch + 1) * BATCH])
        done.append(own.done)
    assert done == [0, 8, 8, 16]


def test_a_line_of_the_log_says_what_it_is_of(tmp_path, monkeypatch):
    first = stream(tmp_path, monkeypatch)
    first.open()
    add(first, 0, 3)
    last = json.loads(first.log.read_text().splitlines()[-1])
    assert (last["start"], last["stop"], last["tail"]) == (8, 8, "s.tail-12.npy")
