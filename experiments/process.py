"""Commands in processes of their own, looked at while they run. Linux only."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

INFLUENCE = (sys.executable, "-m", "influence.runtime.cli")
"""How the command line is started."""


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
      wall: seconds.
      cpu: seconds of processor time, of all threads.
      megabytes: of anonymous memory, at the peak.
    """

    wall: float
    cpu: float
    megabytes: float


def questions(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Returns prompts and completions as the command line takes them."""
    return [y for x in pairs for y in ("--prompt", x[0], "--completion", x[1])]


def started(*words: str) -> subprocess.Popen[str]:
    """Starts one of the engine's commands."""
    return subprocess.Popen(
        [*INFLUENCE, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def measured(*words: str) -> Cost:
    """Runs one of the engine's commands to its end.

    Raises:
      RuntimeError: if it failed, with what it said.
    """
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process, peak = started(*words), 0.0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.02)
    ended(process)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(
        wall=time.monotonic() - begun,
        cpu=used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        megabytes=peak,
    )


def ended(process: subprocess.Popen[str]) -> str:
    """Waits for a command; returns what it said.

    Raises:
      RuntimeError: if it failed, with what it said.
    """
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args} failed with {process.returncode}:\n{said}")
    return said


def anonymous(pid: int | None = None) -> float:
    """Returns a process's anonymous memory, in megabytes: what it has allocated."""
    status = Path(f"/proc/{pid or os.getpid()}/status")
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # it has ended
        return 0.0
    (kilobytes,) = [x.split()[1] for x in lines if x.startswith("RssAnon")] or [0]
    return int(kilobytes) / 1024
