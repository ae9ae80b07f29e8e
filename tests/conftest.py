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

import jax  # noqa: E402

# Modules compile much of what others did: what a process compiled is kept for the next.
# A folder for each, so that none reads what another is writing.
kept = tempfile.TemporaryDirectory(prefix="compiled-")
jax.config.update("jax_compilation_cache_dir", kept.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

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

    A run that keeps all of them is aborted by the compiler near its end.
    """
    yield
    jax.clear_caches()
