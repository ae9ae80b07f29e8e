"""Killed anywhere, a run goes on to the same bits; a changed byte is found and named.

    python -m experiments.kill_resume --kills 20

Carries out `fit`, `query` and `scan` on a small Llama and Python's sources once without
a disturbance. Then again, killing the process (SIGKILL) and giving the same command
again: twice in each stage, at a random moment after a save of that stage, and for the
rest at random moments. Every file the run is made of is compared with the undisturbed
run's, byte by byte. In the end a byte is changed in each file of a finished run, and of
runs that were killed in each stage, and `influence status` has to name it.
"""

import io
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments.material import write_corpus, write_random_llama
from experiments.process import ended, questions, started
from influence.model.config import Config
from influence.runtime.run.options import Status
from influence.runtime.run.showing import status

CONFIG = Config(
    vocabulary=1024, context=64, width=32, hidden=64, heads=4, blocks=2, groups=2
)

STAGES: tuple[str, ...] = ("corpus", "covariances", "eigenvalues", "scores")
"""The stages that are saved as they go."""

EACH = 2
"""How often a process is killed in each of them, at least."""

QUESTIONS = (("import os", ".path"), ("def __init__(", "self"))


@dataclass(frozen=True)
class Setting:
    """What is run on, and how often it is saved.

    Attributes:
      folder: with the model and the corpus.
      every: seconds between saves.
    """

    folder: Path
    every: float

    def commands(self, run: Path) -> list[list[str]]:
        """Returns what a user types, one behind the other."""
        every = ["--save-every", str(self.every), "--batch", "32"]
        model, data = (str(self.folder / x) for x in ("llama", "corpus.jsonl"))
        fit = ["--model", model, "--data", data, "--chunk", "50000", *every]
        return [
            ["fit", str(run), *fit],
            ["query", str(run), *questions(QUESTIONS)],
            ["scan", str(run), *every],
        ]


def saved(run: Path) -> dict[str, float]:
    """Returns when each stage was last saved."""
    found = {
        "corpus": [*run.glob("corpora/*/chunks.jsonl")],
        "scores": [*run.glob("*/scores-*.log.jsonl")],
    }
    for name in ("covariances", "eigenvalues"):
        found[name] = [*run.glob(f"saves/*/{name}/*.json")]
    times = {}
    for name, files in found.items():
        # A log has a line before there is anything it could speak of.
        lines = 2 if name == "scores" else 1
        own = [x for x in map(_look, files) if x and x[0] >= lines]
        if own:
            times[name] = max(x[1] for x in own)
    return times


def _look(file: Path) -> tuple[int, float] | None:
    """Returns how many lines a file has and when it was written, if it is there."""
    try:
        return file.read_bytes().count(b"\n") or 1, file.stat().st_mtime
    except OSError:
        return None


def undisturbed(setting: Setting, run: Path) -> dict[str, float]:
    """Carries out a run; returns the longest time between two saves of each stage."""
    longest = dict.fromkeys(STAGES, 0.0)
    for words in setting.commands(run):
        process, last = started(*words), {}
        while process.poll() is None:
            for name, when in saved(run).items():
                if name in last and when > last[name]:
                    longest[name] = max(longest[name], when - last[name])
                last[name] = when
            time.sleep(0.05)
        ended(process)
    return longest


@dataclass(frozen=True)
class Kill:
    """A process that was killed.

    Attributes:
      command: what it was doing.
      stage: the last stage that was saved; None if none was.
      again: seconds since the last save; if there was none, since the process's start,
        which is importing and compiling for the most part.
      aimed: whether it was waited for a save.
    """

    command: str
    stage: str | None
    again: float
    aimed: bool


@dataclass
class Killer:
    """Kills processes, and keeps what one killed in each stage has left behind."""

    setting: Setting
    kills: int
    chance: random.Random
    done: list[Kill] = field(default_factory=list)
    left: dict[str, Path] = field(default_factory=dict)

    def wanted(self) -> str | None:
        """Returns a stage in which too few were killed, or None for any moment."""
        for name in STAGES:
            if sum(x.aimed and x.stage == name for x in self.done) < EACH:
                return name
        return None

    def carry_out(self, run: Path) -> None:
        """Carries out a run, its processes killed until enough were."""
        for words in self.setting.commands(run):
            while not self._finished(run, words):
                pass

    def _finished(self, run: Path, words: list[str]) -> bool:
        """Starts a command; returns whether it came to its end."""
        if len(self.done) == self.kills:
            ended(started(*words))
            return True
        begun, before = time.time(), saved(run)
        process = started(*words)
        # Random moments between aimed ones, but never so many that aims are missed; and
        # packing is over so soon that none comes before those.
        aim, rest = self.wanted(), self.kills - len(self.done) - self._needed()
        if aim != STAGES[0] and rest > 0 and self.chance.random() < 0.5:
            aim = None
        if not self._wait(process, run, aim, before):
            ended(process)
            return True
        process.kill()
        process.communicate()
        now = time.time()
        times = {k: x for k, x in saved(run).items() if x > begun}
        stage = max(times, key=lambda x: times[x], default=None)
        since = now - max([begun, *times.values()])
        aimed = aim is not None and stage == aim
        self.done.append(Kill(words[0], stage, since, aimed))
        if aim is not None and aim == stage and aim not in self.left:
            self.left[aim] = shutil.copytree(run, run.with_name(f"{run.name}-{aim}"))
        return False

    def _needed(self) -> int:
        aimed = [x.stage for x in self.done if x.aimed]
        return sum(max(0, EACH - aimed.count(x)) for x in STAGES)

    def _wait(
        self,
        process: subprocess.Popen[str],
        run: Path,
        aim: str | None,
        before: dict[str, float],
    ) -> bool:
        """Waits for the moment; returns whether the process was still at work."""
        begun, latest = time.monotonic(), self.chance.uniform(0.5, 40.0)
        while process.poll() is None:
            if aim is None and time.monotonic() - begun > latest:
                return True
            if aim and saved(run).get(aim, 0.0) > before.get(aim, 0.0):
                time.sleep(self.chance.uniform(0.0, 1.0))
                return process.poll() is None
            time.sleep(0.02)
        return False


def files(run: Path) -> dict[str, Path]:
    """Returns what a run is made of, without its notes on how it came to be."""
    found = (x for x in sorted(run.rglob("*")) if x.is_file())
    names = {str(x.relative_to(run)): x for x in found}
    return {
        k: x
        for k, x in names.items()
        if x.name not in (".lock", "chunks.jsonl", "manifest.json")
    }


def different(left: Path, right: Path) -> list[str]:
    """Returns the names of files that two runs do not have alike."""
    one, other = files(left), files(right)
    return [
        name
        for name in sorted({*one, *other})
        if name not in one
        or name not in other
        or one[name].read_bytes() != other[name].read_bytes()
    ]


def flips(run: Path) -> Iterator[tuple[str, bool]]:
    """Changes a byte in every file of a run; yields whether that was named."""
    for file in sorted(x for x in run.rglob("*") if x.is_file()):
        if file.name == ".lock" or not file.stat().st_size:
            continue
        whole = file.read_bytes()
        middle = len(whole) // 2
        changed = bytes([whole[middle] ^ 1])
        file.write_bytes(whole[:middle] + changed + whole[middle + 1 :])
        named = artifact(run, file)
        yield str(file.relative_to(run)), named in _said(run)
        file.write_bytes(whole)


def artifact(run: Path, file: Path) -> str:
    """Returns what a file belongs to: a folder of scores or of a save, or itself."""
    within = [*reversed(file.relative_to(run).parents)][1:]
    scores = (x for x in within if x.suffix == ".zarr")
    saves = (x for x in within if x.name.isdecimal())
    return str(next(scores, None) or next(saves, None) or file.name)


def _said(run: Path) -> str:
    """Returns what `influence status` says is damaged."""
    console = Console(file=io.StringIO(), record=True, width=2000)
    try:
        status(Status(run), console)
    except ValueError as error:  # the manifest itself: there is no table without it
        return str(error)
    lines = console.export_text().splitlines()
    return "\n".join(x for x in lines if " damaged " in x)


def main(
    kills: int = 20,
    megabytes: float = 4.0,
    every: float = 2.0,
    seed: int = 0,
    keep: Path | None = None,
) -> None:
    """Kills a run again and again.

    Args:
        kills: How many processes are killed.
        megabytes: Of text.
        every: Seconds between saves, as the commands are told.
        seed: Of the moments.
        keep: A new folder for the runs, to look at them afterwards.

    Raises:
        ValueError: if there are too few kills for every stage.
    """
    if kills < EACH * len(STAGES):
        raise ValueError(
            f"{kills} kills are too few for {EACH} in each of {', '.join(STAGES)}. "
            f"Give --kills {EACH * len(STAGES)} at least."
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if keep is None else keep
        folder.mkdir(exist_ok=True)
        write_corpus(folder / "corpus.jsonl", megabytes)
        write_random_llama(folder / "llama", CONFIG)
        setting = Setting(folder, every)
        longest = undisturbed(setting, folder / "whole")
        killer = Killer(setting, kills, random.Random(seed))
        odd: list[str] = []
        rounds = 0
        while len(killer.done) < kills:
            rounds += 1
            run = folder / f"killed-{rounds}"
            killer.carry_out(run)
            odd += different(folder / "whole", run)
        found = [x for run in (folder / "whole", *killer.left.values())
                 for x in flips(run)]  # fmt: skip
    console = Console()
    _print(console, killer.done, longest)
    for text in (*odd, *(name for name, named in found if not named)):
        console.print(f"not as it should be: {text}")
    console.print(f"{rounds} runs; {len(found)} flips")
    record = {
        "kills": len(killer.done),
        "identical": not odd,
        "flips_found": sum(named for _, named in found),
        "flips": len(found),
        "seconds_again": round(max(x.again for x in killer.done if x.stage), 1),
        "seconds_between_saves": round(max(longest.values()), 1),
    }
    console.print_json(json.dumps(record), indent=None)


def _print(console: Console, kills: list[Kill], longest: dict[str, float]) -> None:
    table = Table(title="killed", title_justify="left")
    for head in ("command", "last saved", "done again, s", "longest between saves, s"):
        table.add_column(head)
    for x in kills:
        stage = f"{x.stage or 'nothing'}{' (waited for)' if x.aimed else ''}"
        between = f"{longest[x.stage]:.1f}" if x.stage else ""
        table.add_row(x.command, stage, f"{x.again:.1f}", between)
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
