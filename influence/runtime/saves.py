"""Half-done passes on the disk, so that a process may end at any moment.

    saves/STAGE/N/        the state after N batches, by orbax
    saves/STAGE/N.json    written behind it: of which pass, and its checksum

A state without the second is not whole and never looked at. The older state goes when
the newer is whole, so there is always one.
"""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from influence.runtime.pace import Pace
from influence.runtime.processes import agreed, led
from influence.runtime.store import atomic, checksum, signed, unsigned


class Saved(NamedTuple):
    """A pass, part way.

    Attributes:
      state: the fold's state.
      done: how many batches it has taken in.
    """

    state: Any
    done: int


@dataclass
class Saves:
    """Where one pass is saved.

    Attributes:
      folder: of this pass alone.
      key: of all that the pass depends on; what was saved under another is not used.
      every: seconds of work between two saves, or more if saving takes long.
    """

    folder: Path
    key: str
    every: float
    _pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        """Counts from now."""
        self._pace = Pace(self.every)

    def latest(self, like: Any) -> Saved | None:
        """Returns the pass as it was last saved, if it was.

        Args:
          like: a state of the same structure: that a pass begins with.

        Raises:
          ValueError: if what was saved is damaged, naming it.
        """
        led("clearing saves", self._clear)
        for about in reversed(self._whole()):
            said = unsigned(about.read_bytes(), about)
            if said["key"] == self.key:
                return Saved(self._read(about, said, like), said["done"])
        return None

    def due(self) -> bool:
        """Returns whether enough was done since the last save to be worth another.

        All processes have to ask for it.
        """
        return agreed(self._pace.due())

    def write(self, state: Any, done: int) -> None:
        """Saves the state after some batches, and forgets what was saved before.

        Every process writes what it has of the state.
        """
        begun, before = time.monotonic(), self._whole()
        leaves = jax.tree.leaves(state)
        kept = {str(i): x for i, x in enumerate(leaves) if np.size(x)}
        shapes = [[list(np.shape(x)), _kind(x)] for x in leaves]
        path = self.folder / str(done)
        led("forgetting a save", lambda: self._forget(self._about(done)))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), kept)
        led("noting a save", lambda: self._note(done, shapes, before))
        self._pace.saved(begun)

    def _note(self, done: int, shapes: list[Any], before: list[Path]) -> None:
        """Says that a state is whole, and removes those before it."""
        about = {
            "key": self.key,
            "done": done,
            "leaves": shapes,
            "sha256": checksum(self.folder / str(done)),
        }
        with atomic(self._about(done)) as temporary:
            temporary.write_text(json.dumps(signed(about)), encoding="utf-8")
        for old in before:
            if old != self._about(done):
                self._forget(old)

    def check(self) -> None:
        """Raises unless all that is saved of the pass is what was saved.

        Raises:
          ValueError: naming what is damaged.
        """
        for about in self._whole():
            _check(about, unsigned(about.read_bytes(), about))

    def _read(self, about: Path, said: Mapping[str, Any], like: Any) -> Any:
        path = about.with_suffix("")
        _check(about, said)
        leaves, structure = jax.tree.flatten(like)
        wanted = {
            str(i): _abstract(x, *shape)
            for i, (x, shape) in enumerate(zip(leaves, said["leaves"], strict=True))
            if np.prod(shape[0])
        }
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(path.absolute(), wanted)
        filled = [
            found[str(i)] if np.prod(shape) else np.zeros(shape, kind)
            for i, (shape, kind) in enumerate(said["leaves"])
        ]
        return jax.tree.unflatten(structure, filled)

    def _whole(self) -> list[Path]:
        """Returns the notes behind the states that are whole, the oldest first."""
        found = [x for x in self.folder.glob("*.json") if x.stem.isdecimal()]
        return sorted(found, key=lambda x: int(x.stem))

    def _clear(self) -> None:
        """Removes what a process that ended while saving left behind."""
        known = {y for x in self._whole() for y in (x, x.with_suffix(""))}
        for path in set(self.folder.glob("*")) - known:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _about(self, done: int) -> Path:
        return self.folder / f"{done}.json"

    def _forget(self, about: Path) -> None:
        about.unlink(missing_ok=True)
        shutil.rmtree(about.with_suffix(""), ignore_errors=True)


def _check(about: Path, said: Mapping[str, Any]) -> None:
    """Raises unless a state is the one that is spoken of."""
    path = about.with_suffix("")
    if not path.is_dir() or checksum(path) != said["sha256"]:
        raise ValueError(
            f"{path} is not what was saved: its checksum differs from that in "
            f"{about.name}. Restore it, or delete {about.parent} to begin this stage "
            "again."
        )


def _kind(x: Any) -> str:
    return str(x.dtype if isinstance(x, jax.Array) else np.asarray(x).dtype)


def _abstract(like: Any, shape: list[int], kind: str) -> Any:
    """Returns what a saved array is restored as: on the device if it was there."""
    if isinstance(like, jax.Array):
        return jax.ShapeDtypeStruct(tuple(shape), kind, sharding=like.sharding)
    return np.empty(tuple(shape), kind)
