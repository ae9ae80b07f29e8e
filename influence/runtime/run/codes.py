"""Short vectors of a corpus on their way to the disk: a row of bytes a sequence.

    NAME.codes        the rows, one behind the other
    NAME.codes.jsonl  a line for each stretch of rows that is whole on the disk, with
                      the checksum of its bytes

What no line speaks of is cut off and made again.
"""

import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from influence.runtime.pace import Pace
from influence.runtime.run.log import committed, cut, say


@dataclass
class CodeStream:
    """Rows being written.

    Attributes:
      path: of the file.
      width: bytes a row.
      rows: how many there will be.
      batch: how many come at a time.
      key: of all that the rows depend on.
      every: seconds between two commits, or more if they take long.
    """

    path: Path
    width: int
    rows: int
    batch: int
    key: str
    every: float
    done: int = 0
    _held: list[np.ndarray] = field(default_factory=list)
    _pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        """Counts from now."""
        self._pace = Pace(self.every)

    @property
    def log(self) -> Path:
        """Returns the file that says what is whole."""
        return log_at(self.path)

    def open(self) -> int:
        """Begins, or goes on with what was begun; returns how many batches are whole.

        Raises:
          ValueError: if what is whole is damaged.
        """
        lines = committed(self.log)
        if lines and lines[0].get("key") == self.key and self.path.is_file():
            cut(self.log)
            self.done = lines[-1].get("stop", 0)
            check_codes(self.path)
            os.truncate(self.path, self.done * self.width)
        else:
            self.log.unlink(missing_ok=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
            say(self.log, {"key": self.key, "width": self.width})
        self._pace.begin()
        return -(-self.done // self.batch)

    def add(self, rows: np.ndarray) -> None:
        """Takes in one batch's rows, and commits them if it is time to."""
        self._held.append(rows)
        last = self.done + sum(map(len, self._held)) == self.rows
        if last or self._pace.due():
            self._commit()

    def finish(self) -> None:
        """Raises unless all rows are there, as they were written.

        Raises:
          ValueError: if something is damaged, or missing.
        """
        if self.done != self.rows:
            raise ValueError(f"{self.path} has {self.done} sequences, not {self.rows}.")
        check_codes(self.path)

    def _commit(self) -> None:
        begun = time.monotonic()
        rows = np.concatenate(self._held).tobytes()
        with self.path.open("r+b") as file:
            file.seek(self.done * self.width)
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        stop = self.done + len(rows) // self.width
        say(self.log, {"start": self.done, "stop": stop, "sha256": _digest(rows)})
        self._held, self.done = [], stop
        self._pace.saved(begun)


def log_at(path: Path) -> Path:
    """Returns where it is said what is whole of a file of rows."""
    return path.with_name(path.name + ".jsonl")


def check_codes(path: Path) -> None:
    """Raises if rows that were said to be whole are not what was written.

    Raises:
      ValueError: naming the first that are not.
    """
    lines = committed(log_at(path))
    if not lines or not path.is_file():
        raise ValueError(f"{path} is gone, or what was said of it. Index again.")
    width = lines[0]["width"]
    with path.open("rb") as file:
        for line in lines[1:]:
            rows = file.read((line["stop"] - line["start"]) * width)
            if _digest(rows) != line["sha256"]:
                raise ValueError(
                    f"{path}: the vectors of sequences {line['start']} to "
                    f"{line['stop']} are not what was written; their checksum differs. "
                    f"Restore them, or delete {path} to index again."
                )


def _digest(rows: bytes) -> str:
    return hashlib.sha256(rows).hexdigest()
