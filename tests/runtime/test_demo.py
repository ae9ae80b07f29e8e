"""The demo's path, from text to page, on a model too small to have learned much."""

import json
import re
import subprocess
import sys

import jax
import pytest
import xarray as xr
from rich.console import Console

from influence.model.config import Config
from influence.model.train import Recipe
from influence.runtime import formats
from influence.runtime.demo import Size, demo

TINY = Size(8, Config(512, 64, 16, 24, 2, 2), Recipe(20, 16, 1e-2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        return demo(
            tmp_path_factory.mktemp("demo") / "out", 0, TINY, Console(quiet=True)
        )


def test_everything_is_written_and_whole(run):
    names = {"curvature.safetensors", "scores.zarr", "check.json", "report.html"}
    assert set(run.manifest["artifacts"]) == names
    assert {x.name for x in run.folder.iterdir()} == names | {"manifest.json"}
    curvature = run.read("curvature.safetensors", formats.read_curvature)
    assert curvature.sequences == run.manifest["corpus"]["sequences"]
    assert {x.name.split(".")[0] for x in curvature.layers} == {"blocks"}
    assert len(curvature.layers) == 7


def test_the_check_is_of_six_queries(run):
    rows = json.loads(run.path("check.json").read_text())
    assert len(rows) == 6
    assert all(set(x) == {"query", "predicted", "top", "random", "bm25"} for x in rows)


def test_scores_sum_and_say_what_they_are(run):
    scores = xr.open_zarr(run.path("scores.zarr"))
    assert scores["layer_score"].dims == ("query", "train", "layer")
    assert scores.sizes["layer"] == 14
    assert scores.sizes["train"] == run.manifest["corpus"]["sequences"]
    total = scores["score"].load()
    # Sums of fourteen float32 numbers, in another order.
    tolerance = 1e-5 * float(abs(scores["layer_score"]).max())
    assert float(abs(scores["layer_score"].sum("layer") - total).max()) < tolerance
    shown = total.sel(train=scores["shown"].values).values
    tokens = scores["token_score"].sum("token").values
    assert abs(tokens - shown).max() < 1e-3 * abs(shown).max()
    assert scores.attrs["unit"] == "nats per added copy"
    assert scores.attrs["n_train"] == scores.sizes["train"]


def test_the_manifest_says_from_what(run):
    manifest = run.manifest
    assert re.fullmatch("[0-9a-f]{64}", manifest["corpus"]["sha256"])
    assert manifest["corpus"]["python"].startswith(f"{sys.version_info.major}.")
    assert manifest["seed"] == 0
    assert manifest["packages"].keys() >= {"influence", "jax"}
    assert manifest["seconds"].keys() >= {"training", "covariances", "scores"}


def influence_command(*arguments):
    command = [sys.executable, "-m", "influence.runtime.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line_says_errors_in_sentences(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    for arguments, said in (
        (["--fast", "--size", "large"], "exclude each other"),
        (["--out", str(tmp_path)], "holds no run"),
    ):
        done = influence_command("demo", *arguments)
        assert done.returncode == 1
        assert said in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr


def test_the_command_line_explains_itself():
    done = influence_command("demo", "--help")
    assert done.returncode == 0
    assert "--fast" in done.stdout
    assert "checks the answers by retraining" in done.stdout
