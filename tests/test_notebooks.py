"""Every notebook runs from its first cell to its last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

BARELY = """
from dataclasses import replace
from influence.runtime import demo
demo.FAST = replace(demo.FAST, recipe=replace(demo.FAST.recipe, steps=8))
"""
"""Training is most of what a notebook takes, and none of what it shows how to write."""

LONGEST = 12
"""Lines of a cell: what takes more belongs into the library."""


def cells(path: Path, kind: str) -> list[str]:
    said = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(x["source"]) for x in said["cells"] if x["cell_type"] == kind]


def run(path: Path, before: str = ""):
    # In a process of its own: a reader has neither our float64 nor our strictness.
    first = "import matplotlib\nmatplotlib.use('Agg')\n"
    code = first + before + "\n".join(cells(path, "code"))
    environment = {k: x for k, x in os.environ.items() if k != "XLA_FLAGS"}
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
    run(path, BARELY)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda x: x.stem)
def test_a_notebook_runs_as_it_is(path):
    run(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda x: x.stem)
def test_a_notebook_is_more_prose_than_code(path):
    prose, code = cells(path, "markdown"), cells(path, "code")
    assert len(prose) >= len(code)
    own = [x for x in code if "import" not in x]
    assert max(len(x.splitlines()) for x in own) <= LONGEST


def test_there_are_notebooks():
    assert {"features", "per_layer_influence"} <= {x.stem for x in NOTEBOOKS}
