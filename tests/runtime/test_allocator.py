"""A process that keeps its memory does not give back what it frees."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import numpy as np
from influence.runtime.allocator import keep_memory

def resident():
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) for x in file if x.startswith("VmRSS"))

if sys.argv[1] == "keep":
    assert keep_memory()
array = np.ones(1 << 24)
before = resident()
del array
print(before - resident())
"""


def given_back(how: str) -> int:
    """Returns how many kB of 128 MB a process gives back as it frees them."""
    program = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(program, capture_output=True, check=True).stdout)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the GNU C library is what is told"
)
def test_memory_is_kept():
    assert given_back("not") > 100_000
    assert given_back("keep") < 1_000
