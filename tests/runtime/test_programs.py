"""What one process compiled the next one reads; without a folder all goes on."""

import json
import os
import subprocess
import sys
import time

import pytest

from influence.runtime.programs import VARIABLE, chosen

PROGRAM = """
import json
import warnings
warnings.simplefilter("error")
import jax
import jax.numpy as jnp
from influence.runtime.programs import keep_programs

found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
folder = keep_programs()
value = jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.full((16, 16), 0.25))
hits = found.count("/jax/compilation_cache/cache_hits")
misses = found.count("/jax/compilation_cache/cache_misses")
print(json.dumps([str(folder), float(value), hits, misses]))
"""


def environment(**given):
    """Returns this process's variables with some set, and no choice made yet."""
    taken = {VARIABLE, "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"}
    own = {k: x for k, x in os.environ.items() if k not in taken}
    return own | {"JAX_PLATFORMS": "cpu"} | given


def started(**given):
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.Popen(
        command, env=environment(**given), stdout=subprocess.PIPE, text=True
    )


def ended(process):
    said, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(said)


def test_a_second_process_compiles_nothing(tmp_path):
    together = [started(INFLUENCE_CACHE=str(tmp_path)) for _ in range(2)]
    first, other = (ended(x) for x in together)
    assert first[3] + other[3] > 0
    assert other[:2] == first[:2]
    _, value, hits, misses = ended(started(INFLUENCE_CACHE=str(tmp_path)))
    assert (value, misses) == (first[1], 0)
    assert hits > 0


def test_what_was_written_by_half_is_compiled(tmp_path):
    folder, value, _, _ = ended(started(INFLUENCE_CACHE=str(tmp_path)))
    programs = [*tmp_path.rglob("*-cache")]
    assert programs
    for path in programs:
        path.write_bytes(path.read_bytes()[:100])
    again = ended(started(INFLUENCE_CACHE=str(tmp_path)))
    assert again[:2] == [folder, value]


def test_what_is_old_is_deleted(tmp_path):
    ended(started(INFLUENCE_CACHE=str(tmp_path)))
    (path, *_) = tmp_path.rglob("*-cache")
    long_ago = time.time() - 10**7
    os.utime(path, (long_ago, long_ago))
    _, _, _, misses = ended(started(INFLUENCE_CACHE=str(tmp_path)))
    assert misses == 1


def test_no_folder_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for given in [
        {"INFLUENCE_CACHE": "off"},
        {"INFLUENCE_CACHE": str(tmp_path / "file")},
        {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")},
    ]:
        folder, *_ = ended(started(HOME=str(tmp_path / "home"), **given))
        assert folder == "None"
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"HOME": "/home/a"}, "/home/a/.cache/influence"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "/cache"}, "/cache/influence"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "cache"}, "/home/a/.cache/influence"),
        ({"HOME": "/home/a", VARIABLE: "/own"}, "/own"),
    ],
)
def test_the_folder_is_the_user_s_cache_unless_named(given, expected):
    folder = chosen(given)
    assert folder is not None
    assert folder.parents[1].as_posix() == expected


def test_the_suite_keeps_nothing_in_the_user_s_cache():
    assert chosen(os.environ) is None


TABLES = {"xarray", "pandas", "scipy", "zarr", "datasets"}
"""Each takes as long as all of the package: they are for results, which come late."""


@pytest.mark.parametrize(
    ("module", "later"),
    [
        ("influence", {*TABLES, "flax", "tyro"}),
        ("influence.runtime.cli", {*TABLES, "flax", "orbax", "faiss", "plotly"}),
    ],
)
def test_importing_brings_nothing_that_is_needed_later(module, later):
    command = f"import {module}, sys; print([*sys.modules])"
    said = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    ).stdout
    modules = {x.strip("' \n[]").split(".")[0] for x in said.split(",")}
    assert "influence" in modules
    assert not modules & later
