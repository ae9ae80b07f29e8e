"""A pass that is stopped anywhere goes on to the same bits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from influence.attribution.lexical import candidates
from influence.curvature.ekfac import fit
from influence.runtime.driver import Driver
from influence.runtime.saves import Saves
from tests import cases


class Stopped(Exception):
    """A process that ends."""


class Stopping:
    """Batches that end the process at one of them."""

    def __init__(self, batches, at):
        self.batches, self.at = batches, at
        self.ids = batches.ids

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for i, batch in enumerate(self.batches):
            if i == self.at:
                raise Stopped
            yield batch


def folds(tmp_path, every=0.0):
    driver = Driver(Console(quiet=True))
    return driver.saving(lambda name: Saves(tmp_path / name, "key", every))


def leaves(curvature):
    return {
        f"{name}/{i}": np.asarray(x)
        for name, block in curvature.blocks.items()
        for i, x in enumerate(
            [*block.inputs.blocks, *block.outputs.blocks, block.lam_OxI]
        )
    }


def test_a_fit_stopped_in_every_pass_ends_in_the_same_bits(tmp_path):
    task, params, examples = cases.case(cases.MAKERS["raw-scan"], bias=True)
    batches = examples.batches(2)
    expected = leaves(fit(task, params, batches))
    begun = 0

    def run(fold, batches):
        # Two walks each stop one batch later, so that every pass is stopped twice.
        nonlocal begun
        begun += 1
        stop = {1: 1, 2: 3}.get(begun)
        return folds(tmp_path)(fold, Stopping(batches, stop) if stop else batches)

    for name in ("covariances", "eigenvalues"):
        begun = 0

        def in_one(fold, batches, name=name):
            own = run if fold.name == name else folds(tmp_path)
            return own(fold, batches)

        for _ in range(2):
            with pytest.raises(Stopped):
                fit(task, params, batches, run=in_one)
    found = leaves(fit(task, params, batches, run=folds(tmp_path)))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x)


def test_a_heap_of_growing_arrays_is_saved_as_well(tmp_path):
    examples = cases.texts(30)
    asked = {"one": [1, 2, 3], "two": [4, 5]}
    batches = examples.batches(3)
    expected = candidates(asked, batches, 4)
    for at in (2, 5):
        stopped = itertools.count()

        def run(fold, batches, at=at, stopped=stopped):
            second = next(stopped) == 1
            own = Stopping(batches, at) if second else batches
            return folds(tmp_path)(fold, own)

        with pytest.raises(Stopped):
            candidates(asked, batches, 4, run=run)
    found = candidates(asked, batches, 4, run=folds(tmp_path))
    for x, y in zip(found.places, expected.places, strict=True):
        np.testing.assert_array_equal(x, y)


STATE = ({"a": jnp.arange(3.0)}, jnp.uint32(4))


def test_only_the_last_state_is_kept_and_only_a_whole_one_used(tmp_path):
    saves = Saves(tmp_path / "pass", "key", 0.0)
    for done in (1, 2):
        saves.write(STATE, done)
    half = tmp_path / "pass" / "3"
    half.mkdir()
    (half / "torn").write_text("half")
    saved = Saves(tmp_path / "pass", "key", 0.0).latest(STATE)
    assert saved is not None
    assert saved.done == 2
    np.testing.assert_array_equal(saved.state[0]["a"], STATE[0]["a"])
    assert saved.state[1].dtype == STATE[1].dtype
    assert sorted(x.name for x in (tmp_path / "pass").iterdir()) == ["2", "2.json"]


def test_a_state_that_is_written_again_is_never_half_there(tmp_path, monkeypatch):
    saves = Saves(tmp_path / "pass", "key", 0.0)
    saves.write(STATE, 2)
    monkeypatch.setattr("influence.runtime.saves.checksum", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the process ends before the note
        saves.write(STATE, 2)
    monkeypatch.undo()
    assert Saves(tmp_path / "pass", "key", 0.0).latest(STATE) is None


def test_another_pass_s_state_is_not_used(tmp_path):
    Saves(tmp_path, "one", 0.0).write(STATE, 1)
    assert Saves(tmp_path, "other", 0.0).latest(STATE) is None


def test_a_damaged_state_is_named(tmp_path):
    Saves(tmp_path, "key", 0.0).write(STATE, 7)
    file = next(x for x in (tmp_path / "7").rglob("*") if x.is_file())
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"7 is not what was saved: its checksum"):
        Saves(tmp_path, "key", 0.0).latest(STATE)


def test_saving_waits_until_it_is_worth_its_time(tmp_path):
    saves = Saves(tmp_path, "key", 3600.0)
    assert not saves.due()
    saves = Saves(tmp_path, "key", 0.0)
    assert saves.due()
    saves.write(STATE, 1)  # takes milliseconds, and work of fifty times as long is due
    assert not saves.due()
