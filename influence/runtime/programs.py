"""Programs that are compiled once, not anew by every process.

Of a short run, most of the time is XLA's compiling. What one process compiled is kept
in a folder, and the next one reads it there. The folder is `INFLUENCE_CACHE`, or
`influence` in the user's cache; `INFLUENCE_CACHE=off` keeps nothing. Who has set JAX's
own `JAX_COMPILATION_CACHE_DIR` has chosen already, and nothing is touched.

A program that is not there, or that a killed process wrote by half, is compiled; a
folder that can't be written is not used. Neither is an error. What is older than a
month is deleted, so the folder does not grow for ever.
"""

import hashlib
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax

VARIABLE = "INFLUENCE_CACHE"
"""The environment's name for the folder, or for keeping nothing."""

OFF = "off"

KEPT = 30 * 24 * 3600
"""Seconds until a program is deleted: those of former versions are never asked for."""

UNREADABLE = "Error (reading|writing) persistent compilation cache entry"
"""What JAX says of a program it can't read or write, and compiles."""


def keep_programs() -> Path | None:
    """Has JAX keep what it compiles; returns the folder, or None if there is none.

    For programs of one's own; the command line does so by itself.

    Example:
      >>> from influence.runtime.programs import keep_programs
      >>> folder = keep_programs()
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return None
    folder = chosen(os.environ)
    if folder is None or not _writable(folder):
        return None
    _forget(folder, time.time() - KEPT)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # On a CPU hundreds of small programs take most of the time, each of them little.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    warnings.filterwarnings("ignore", message=UNREADABLE)
    return folder


def chosen(environment: Mapping[str, str]) -> Path | None:
    """Returns the folder that some environment variables name, or None.

    A program fits the processor it was compiled for, so each kind has a folder: a home
    may be on several machines.

    Example:
      >>> from influence.runtime.programs import chosen
      >>> chosen({"INFLUENCE_CACHE": "/elsewhere"}).parent.as_posix()
      '/elsewhere/programs'
      >>> chosen({"INFLUENCE_CACHE": "off"}) is None
      True
    """
    own, cache = environment.get(VARIABLE), environment.get("XDG_CACHE_HOME")
    if own == OFF:
        return None
    # A relative XDG_CACHE_HOME is to be ignored, says its specification.
    if own:
        base = Path(own).expanduser()
    elif cache and Path(cache).is_absolute():
        base = Path(cache, "influence")
    elif home := environment.get("HOME") or environment.get("USERPROFILE"):
        base = Path(home, ".cache", "influence")
    else:
        return None
    return base / "programs" / _processor()


def _processor() -> str:
    """Returns a short name of what this machine's processor understands."""
    said = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # only Linux has it
        lines = []
    told = [x for x in lines if x.startswith(("model name", "flags", "Features"))]
    return hashlib.sha256("\n".join([said, *sorted(set(told))]).encode()).hexdigest()[
        :12
    ]


def _writable(folder: Path) -> bool:
    """Makes a folder; returns whether files can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _forget(folder: Path, before: float) -> None:
    """Deletes programs written before some time."""
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < before:
                path.unlink()
        except OSError:  # another process was first, or it is not ours to delete
            continue
