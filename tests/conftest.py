"""Float64, and nothing converted or broadcast in silence."""

import os
import tempfile
from collections import Counter

# The models here are tiny, and most of the time would be XLA's compiling them: half of
# it goes without optimisation and without the newer, slower emitters of fused loops.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)

# Nor do commands that tests start leave anything in the user's cache.
os.environ["INFLUENCE_CACHE"] = "off"

# Tests compile much of what others did, so it is kept for all processes of a run: one
# that reads what another is still writing warns, and compiles for itself.
kept = tempfile.TemporaryDirectory(prefix="compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", kept.name)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import pytest  # noqa: E402

LONGEST = {"test_notebooks.py", "test_responding.py", "test_demo.py"}
"""Of few tests, which take long: begun last they would be waited for."""


def pytest_collection_modifyitems(items):
    """Files with most tests come first, behind those that take longest."""
    counts = Counter(x.path for x in items)
    items.sort(key=lambda x: (x.path.name not in LONGEST, -counts[x.path]))


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_go_with_their_module():
    """Every compiled program holds memory maps, of which Linux grants a process 65530.

    A run that keeps all of them is aborted by the compiler near its end; one that keeps
    half holds gigabytes, and takes longer.
    """
    yield
    jax.clear_caches()
