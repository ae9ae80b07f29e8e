"""Formats are told apart by their files; what is written appears whole."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from influence.runtime.dictionaries import folders, saelens
from influence.runtime.dictionaries.stored import About, Stored
from tests.runtime.dictionaries import cases, test_gemma_scope, test_sparsify

STORED = Stored(cases.random("topk"), About("resid.2", kind="topk"))


def test_every_format_is_told_by_its_files(tmp_path):
    scope = tmp_path / "gemma-scope-2b-pt-res" / "layer_20"
    test_gemma_scope.written(scope)
    test_sparsify.written(tmp_path / "layers.5")
    for place, kind in (
        (cases.GOLDEN / "saelens" / "batchtopk", "batchtopk"),
        (cases.GOLDEN / "dictionary_learning" / "AutoEncoder", "standard"),
        (tmp_path / "layers.5", "topk"),
        (scope, "jumprelu"),
    ):
        assert folders.open_dictionary(str(place)).about.kind == kind
        assert folders.open_dictionary(place).about.kind == kind


def test_folders_without_a_dictionary_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no dictionary: none of sae_weights"):
        folders.open_dictionary(str(tmp_path))
    test_sparsify.written(tmp_path / "run" / "layers.5")
    with pytest.raises(ValueError, match=r"in folders: run/layers\.5\. Name one"):
        folders.open_dictionary(str(tmp_path))
    (tmp_path / "other.pt").write_bytes(b"\x80\x02}.")
    with pytest.raises(ValueError, match=r"other\.pt is a pickle of an unknown kind"):
        folders.open_dictionary(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        folders.open_dictionary(str(tmp_path / "nowhere"))
    for place in ("one", "owner/../name", "owner/name/../../x"):
        with pytest.raises(FileNotFoundError):
            folders.open_dictionary(place)


@pytest.fixture(name="hub")
def _hub(tmp_path, monkeypatch):
    """Returns where the hub's copy of `owner/name` lies, without a way to the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept, commit = tmp_path / "models--owner--name", "ab" * 20
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    return kept / "snapshots" / commit


def test_a_folder_inside_a_repository_is_found(hub):
    test_sparsify.written(hub / "run" / "layers.5")
    about = folders.open_dictionary("owner/name/run/layers.5").about
    assert (about.site, about.model) == ("resid.6", "run")
    with pytest.raises(FileNotFoundError, match="no dictionary in 'run/layers.6'"):
        folders.open_dictionary("owner/name/run/layers.6")
    with pytest.raises(FileNotFoundError, match="no dictionary of that name could be"):
        folders.open_dictionary("owner/nothing")


def test_a_repository_of_one_dictionary_is_found(hub):
    shutil.copytree(cases.GOLDEN / "saelens" / "topk", hub)
    assert folders.open_dictionary("owner/name").about.site == "resid.2"


def test_what_is_saved_opens(tmp_path):
    folders.save(tmp_path / "new" / "one", STORED)
    again = folders.open_dictionary(str(tmp_path / "new" / "one"))
    cases.same(again.dictionary, STORED.dictionary)
    assert again.about == STORED.about


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for replace in (False, True):
        with pytest.raises(FileExistsError, match="There is something"):
            folders.save(tmp_path, STORED, replace=replace)
    assert [x.name for x in tmp_path.iterdir()] == ["notes.txt"]


def test_a_dictionary_is_replaced_and_what_is_beside_it_stays(tmp_path):
    place = tmp_path / "one"
    folders.save(place, STORED)
    folders.save(place / "control", STORED)
    other = Stored(cases.random("gated"), STORED.about)
    with pytest.raises(FileExistsError):
        folders.save(place, other)
    folders.save(place, other, replace=True)
    kind = type(folders.open_dictionary(place).dictionary.activation)
    assert kind is type(other.dictionary.activation)
    cases.same(folders.open_dictionary(place / "control").dictionary, STORED.dictionary)


def test_nothing_is_left_of_what_could_not_be_written(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saelens, "save_file", full)
    with pytest.raises(OSError, match="could not be written"):
        folders.save(Path(tmp_path) / "one", STORED)
    assert not list(tmp_path.iterdir())
