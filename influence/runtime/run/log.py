"""Logs that say what of a growing file is whole: a signed line for each stretch of it.

Who writes says a line when what it speaks of is on the disk; a process that ends loses
what it had not yet said so of. Half a line at the end is nobody's.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from influence.runtime.store import signed, unsigned


def say(log: Path, line: Mapping[str, Any]) -> None:
    """Adds a line to a log, on the disk when this returns."""
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(signed(line)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def committed(log: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a log.

    Raises:
      ValueError: if one was changed since.
    """
    if not log.is_file():
        return []
    *whole, _ = log.read_bytes().split(b"\n")
    return [unsigned(x, log) for x in whole]


def cut(log: Path) -> None:
    """Leaves nothing in a log behind its last whole line."""
    os.truncate(log, log.read_bytes().rfind(b"\n") + 1)
