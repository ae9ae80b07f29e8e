"""What a run folder says it has, it has, whole."""

import json
import subprocess
import sys
from textwrap import dedent

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import influence
from influence.attribution.corpus import reweighted, without
from influence.attribution.forms import Joint, Whitened
from influence.model.task import Empirical
from influence.runtime import formats, store
from tests import cases


@pytest.fixture
def run(tmp_path):
    return store.Run.create(tmp_path / "run", {"job": "test"})


def test_an_artifact_is_written_read_and_in_the_manifest(run):
    run.write("note.txt", formats.write_text("x <é>\n"))
    assert run.read("note.txt", lambda path: path.read_text("utf-8")) == "x <é>\n"
    assert run.manifest["job"] == "test"
    assert set(run.manifest["artifacts"]) == {"note.txt"}
    assert sorted(x.name for x in run.folder.iterdir()) == ["manifest.json", "note.txt"]


def test_a_changed_byte_is_found_and_named(run):
    path = run.write("note.txt", formats.write_text("abc"))
    path.write_text("abd")
    with pytest.raises(ValueError, match=r"note\.txt is not what the run wrote"):
        run.read("note.txt", lambda path: path.read_text())


def test_what_was_not_finished_is_not_there(run):
    def fails(path):
        path.write_text("half")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        run.write("note.txt", fails)
    with pytest.raises(FileNotFoundError, match="no finished 'note.txt'"):
        run.read("note.txt", lambda path: path.read_text())
    assert [x.name for x in run.folder.iterdir()] == ["manifest.json"]


def test_a_disk_that_fills_up_leaves_nothing_and_says_so(run):
    run.write("before.txt", formats.write_text("as it was"))
    script = """
        import resource, signal, sys
        from pathlib import Path
        from influence.runtime import formats, store

        # The system refuses to let a file grow further, as a full disk does.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        run = store.Run(Path(sys.argv[1]))
        for name in ("after.txt", "before.txt"):
            try:
                run.write(name, formats.write_text("x" * 1_000_000))
            except OSError as error:
                sys.stderr.write(str(error) + "\\n")
    """
    command = [sys.executable, "-c", dedent(script), str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{run.path('after.txt')} could not be written" in done.stderr
    assert "Free some space" in done.stderr
    assert sorted(x.name for x in run.folder.iterdir()) == [
        "before.txt",
        "manifest.json",
    ]
    assert run.read("before.txt", lambda path: path.read_text()) == "as it was"


def test_a_new_run_forgets_what_an_old_one_finished(run):
    run.write("note.txt", formats.write_text("old"))
    again = store.Run.create(run.folder, {"job": "again"})
    with pytest.raises(FileNotFoundError, match="no finished"):
        again.read("note.txt", lambda path: path.read_text())


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="is not empty and holds no run"):
        store.Run.create(tmp_path, {})
    with pytest.raises(FileExistsError, match="is a file"):
        store.Run.create(tmp_path / "thesis.tex", {})


def test_scores_come_back_as_they_were(run):
    scores = xr.Dataset(
        {"score": (("query", "train"), np.arange(6.0).reshape(2, 3))},
        coords={"query": ["a", "é"], "train": ["x:1", "x:2", "y:1"]},
        attrs={"unit": "nats"},
    )
    run.write("scores.zarr", formats.write_scores(scores))
    found = run.read("scores.zarr", formats.read_scores)
    np.testing.assert_array_equal(found["score"], scores["score"])
    assert found["train"].values.tolist() == ["x:1", "x:2", "y:1"]
    assert found["query"].values.tolist() == ["a", "é"]
    assert found.attrs == {"unit": "nats"}
    (chunk,) = [x for x in run.path("scores.zarr").rglob("c/0/0")]
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"scores\.zarr is not what the run wrote"):
        run.read("scores.zarr", formats.read_scores)


@pytest.mark.parametrize("name", cases.thinned(["raw-scan", "nnx-loop"], ["raw-scan"]))
def test_a_curvature_comes_back_as_it_was(run, name):
    case = cases.case(cases.MAKERS[name], True)
    batches = case.examples.batches(3)
    layers = ["*", "embedding:*", "scale:*"]
    curvature = influence.fit(
        case.task, case.params, batches, layers=layers, labels=Empirical()
    )
    run.write("curvature.safetensors", formats.write_curvature(curvature))
    found = run.read("curvature.safetensors", formats.read_curvature)
    assert found.layers == curvature.layers
    assert (found.positions, found.sequences) == (curvature.positions, 7)
    v = {k: jnp.ones(x.lam_OxI.shape) for k, x in curvature.blocks.items()}
    for k, x in found.solve(v).items():
        np.testing.assert_array_equal(x, curvature.solve(v)[k])


@pytest.mark.parametrize("compress", [None, Whitened(3), Joint(3)])
def test_queries_come_back_as_they_were(run, compress):
    case = cases.case(cases.MAKERS["raw-scan"], True)
    batches = case.examples.batches(7)
    curvature = influence.fit(case.task, case.params, batches, labels=Empirical())
    asked = influence.completions(case.task, {"é": ([1, 2], [3]), "b": ([4], [5])})
    query = influence.query(curvature, case.params, asked, compress=compress)
    run.write("query.safetensors", formats.write_query(query))
    back = run.read("query.safetensors", formats.read_query)
    assert back.layers == query.layers
    assert (back.names, back.facts, back.about) == (
        query.names,
        query.facts,
        query.about,
    )
    found, expected = (
        influence.scan(case.task, case.params, x, batches).layers for x in (back, query)
    )
    xr.testing.assert_identical(found, expected)


def test_a_corpus_is_written_with_the_weights_it_should_have(run):
    scores = xr.DataArray(
        [[3.0, -1.0, 2.0], [0.0, 5.0, 1.0]],
        coords={"query": ["a", "b"], "train": ["x", "y", "z"]},
    )
    rows = [{"id": i, "text": f"text of {i}"} for i in ("x", "y", "z")]
    out = without(rows, scores, each=1)
    run.write("corpus.jsonl", formats.write_corpus(out))
    lines = run.path("corpus.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(x) for x in lines] == [{"id": "z", "text": "text of z"}]
    weighted = reweighted(rows, scores.sel(query="a"), weight=4.0, share=1 / 3)
    assert [x["weight"] for x in weighted] == [4.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="no score for 'w'"):
        without([{"id": "w"}], scores, each=1)
