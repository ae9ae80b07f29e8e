"""What a run has finished, and from what: so that nothing is done twice, or mixed.

A stage is named after what it makes and known by everything that goes into it: weights,
data, options, what earlier stages made, the version of the code. Finished with the same
inputs it is used again. Finished with others it is stale, and so is all that was made
from what it made.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from influence.runtime.processes import leads, led, together
from influence.runtime.store import MANIFEST, TORN, Run

FORMAT = 1
"""Of run folders. A folder of another format is refused, not guessed at."""

LOCK = ".lock"

LONGEST = 160
"""Characters of an input that are shown where it changed."""

RUN, METHODS, DICTIONARIES = "run", "methods", "dictionaries"
"""What a folder with stages may be: a run, a table of methods, dictionaries."""


class Stage(NamedTuple):
    """Something a run makes.

    Attributes:
      name: what it makes.
      inputs: everything that goes into it, as words a person can compare.
      about: what else there is to know of it: of which corpus it is, of which model.
    """

    name: str
    inputs: Mapping[str, str]
    about: Mapping[str, Any] = MappingProxyType({})

    @property
    def key(self) -> str:
        """Returns a SHA-256 of the inputs."""
        return hashlib.sha256(
            json.dumps(dict(self.inputs), sort_keys=True).encode()
        ).hexdigest()


@dataclass(frozen=True)
class Ledger:
    """The stages of a run folder.

    Attributes:
      run: the folder.
    """

    run: Run

    def finished(self, stage: Stage, made: Path) -> bool:
        """Returns whether a stage was finished with these very inputs.

        Args:
          stage: the stage.
          made: what it makes; deleted, it has to be made again.
        """
        entry = self.stages.get(stage.name, {})
        return entry.get("key") == stage.key and entry["finished"] and made.exists()

    def changes(self, stage: Stage) -> list[str]:
        """Returns how the inputs differ from those it was begun with, in words."""
        entry = self.stages.get(stage.name)
        if entry is None:
            return []
        before, now = entry["inputs"], stage.inputs
        return [
            f"{name}: {_short(before.get(name))} → {_short(now.get(name))}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]

    def begin(self, stage: Stage) -> None:
        """Notes what a stage is being made from; what was made from else is no more."""
        entry = self.stages.get(stage.name, {})
        if entry.get("key") != stage.key or entry["finished"]:
            self._note(stage, finished=False)

    def finish(self, stage: Stage, **about: Any) -> None:
        """Notes that a stage is finished, with what else there is to say of it."""
        self._note(stage, finished=True, **about)

    def drop(self, name: str) -> None:
        """Forgets a stage that is none of the run's any more."""
        left = {k: x for k, x in self.stages.items() if k != name}
        led(f"dropping {name}", lambda: self.run.note(stages=left))

    @property
    def stages(self) -> dict[str, Any]:
        """Returns every stage that was begun, by name."""
        return self.run.manifest.get("stages", {})

    def needed(self, name: str, command: str) -> dict[str, Any]:
        """Returns what is noted of a stage that has to be finished by now.

        Raises:
          FileNotFoundError: if it is not, naming the command that finishes it.
        """
        entry = self.stages.get(name, {})
        if not entry.get("finished"):
            raise FileNotFoundError(
                f"The run in {self.run.folder} has no {name} yet. Run "
                f"`influence {command} {self.run.folder}` first."
            )
        return entry

    def _note(self, stage: Stage, **about: Any) -> None:
        entry = {
            "key": stage.key,
            "inputs": dict(stage.inputs),
            **stage.about,
            **about,
        }
        stages = {**self.stages, stage.name: entry}
        led(f"noting {stage.name}", lambda: self.run.note(stages=stages))


def begin(folder: Path, job: str = RUN) -> Ledger:
    """Returns a folder's ledger; an empty or missing folder becomes one of its job.

    Raises:
      FileExistsError: if there is something else in the folder.
      ValueError: if the run was made by another version.
    """
    if not Run(folder).path(MANIFEST).is_file():
        about = {"job": job, "format": FORMAT, "influence": version("influence")}
        led("beginning a run", lambda: Run.create(folder, about))
    return opened(folder, job)


def opened(folder: Path, job: str = RUN) -> Ledger:
    """Returns the ledger of a folder that was begun before.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if the run was made by another version.
    """
    run = Run(folder)
    if not run.path(MANIFEST).is_file():
        raise FileNotFoundError(
            f"There is no run in {folder}. `influence fit {folder} --model … --data …` "
            "begins one."
        )
    about = run.manifest
    if about.get("job") != job:
        raise FileExistsError(
            f"{folder} holds the results of another job ({about.get('job')}). Name "
            "another folder for the run."
        )
    made = about.get("format"), about.get("influence")
    if made != (FORMAT, version("influence")):
        raise ValueError(
            f"The run in {folder} was made by influence {made[1]} (format {made[0]}); "
            f"this is {version('influence')} (format {FORMAT}), whose numbers may "
            "differ. Go on with that version, or begin a new run."
        )
    return Ledger(run)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run folder; those of the same job are let in.

    What a process was writing to a run when it was killed is removed: nothing refers
    to it.

    Raises:
      BlockingIOError: if another process is at work in it, naming that.
    """
    if not leads():
        together("the lock")
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            file.seek(0)
            raise BlockingIOError(
                taken.errno,
                f"Process {file.read() or '?'} is at work in {folder}. Wait for it, or "
                "name another folder",
            ) from taken
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        run = Run(folder)
        known = run.path(MANIFEST).is_file()
        ours = known and run.manifest.get("job") in (RUN, METHODS, DICTIONARIES)
        for torn in list(folder.rglob(TORN)) if ours else ():
            if torn.is_dir():
                shutil.rmtree(torn)
            else:
                torn.unlink()
        together("the lock")
        yield


def worker(folder: Path) -> str | None:
    """Returns which process is at work in a run folder, if one is."""
    if not (folder / LOCK).is_file():
        return None
    with (folder / LOCK).open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read() or "?"
        return None


def _short(value: str | None) -> str:
    """Returns a value as it is shown: of what is long only the beginning."""
    if value is None:
        return "nothing"
    hexadecimal = len(value) == 64 and set(value) <= set("0123456789abcdef")
    if hexadecimal:
        return value[:10] + "…"
    return repr(value) if len(value) <= LONGEST else repr(value[:LONGEST]) + " …"
