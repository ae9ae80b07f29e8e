"""Every notebook runs from its first cell to its last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

LONGEST = 12
"""Lines of a cell: what takes more belongs into the library."""


def cells(path: Path, kind: str) -> list[str]:
    said = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(x["source"]) for x in said["cells"] if x["cell_type"] == kind]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Returns where what one notebook compiled is kept for the next."""
    return str(tmp_path_factory.mktemp("programs"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda x: x.stem)
def test_a_notebook_runs(path, programs):
    # In a process of its own: a reader has neither our float64 nor our strictness.
    code = "import matplotlib\nmatplotlib.use('Agg')\n" + "\n".join(cells(path, "code"))
    environment = {k: x for k, x in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_COMPILATION_CACHE_DIR"] = programs
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda x: x.stem)
def test_a_notebook_is_more_prose_than_code(path):
    prose, code = cells(path, "markdown"), cells(path, "code")
    assert len(prose) >= len(code)
    own = [x for x in code if "import" not in x]
    assert max(len(x.splitlines()) for x in own) <= LONGEST


def test_there_are_notebooks():
    assert {"features", "per_layer_influence"} <= {x.stem for x in NOTEBOOKS}
