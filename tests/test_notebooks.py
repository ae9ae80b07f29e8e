"""Every notebook runs from its first cell to its last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

BARELY = """
from influence.model.config import Config
from influence.model.train import Recipe
from influence.runtime import demo
demo.FAST = demo.Size(2, Config(1024, 64, 32, 84, 4, 3), Recipe(8, 32, 5e-3))
"""
FEWER = {"steps=250": "steps=25", "batches=110": "batches=11"}
"""Text and training are most of what a notebook takes, and none of what it shows."""

LONGEST = 12
"""Lines of a cell: what takes more belongs into the library."""


def cells(path: Path, kind: str) -> list[str]:
    said = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(x["source"]) for x in said["cells"] if x["cell_type"] == kind]


def code(path: Path) -> str:
    first = "import matplotlib\nmatplotlib.use('Agg')\n"
    return first + "\n".join(cells(path, "code"))


def run(code: str, environment: dict[str, str]):
    # In a process of its own: a reader has neither our float64 nor our strictness.
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda x: x.stem)
def test_a_notebook_runs_on_a_model_that_has_hardly_learned(path):
    given = code(path)
    for long, short in FEWER.items():
        given = given.replace(long, short)
    run(BARELY + given, {**os.environ})


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda x: x.stem)
def test_a_notebook_runs_as_it_is(path):
    run(code(path), {k: x for k, x in os.environ.items() if k != "XLA_FLAGS"})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda x: x.stem)
def test_a_notebook_is_more_prose_than_code(path):
    prose, code = cells(path, "markdown"), cells(path, "code")
    assert len(prose) >= len(code)
    own = [x for x in code if "import" not in x]
    assert max(len(x.splitlines()) for x in own) <= LONGEST


def test_there_are_notebooks():
    assert {"features", "per_layer_influence"} <= {x.stem for x in NOTEBOOKS}
