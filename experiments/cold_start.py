"""How long until the first result, and how much of that is compiling and importing?

    python -m experiments.cold_start

Gives `fit`, `query` and `scan` on a small Llama and Python's sources, each a process of
its own: with an empty cache of compiled programs, and again, as a new run, with what
that left. Then imports jax and flax, alone and with the package, turn by turn.

* Compilation is what JAX says compiling took, reading compiled programs included.
* Times of processors are of all threads; on a machine that others use believe those.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jax
import tyro
from rich.console import Console
from rich.table import Table

from experiments.material import write_corpus, write_random_llama
from experiments.process import questions
from experiments.results import Claim, table, write
from influence.model.config import Config
from influence.runtime import cli
from influence.runtime.programs import VARIABLE

CONFIG = Config(
    vocabulary=512, context=64, width=32, hidden=64, heads=4, blocks=2, groups=2
)

ASKED = questions([("import os", ".path"), ("def __init__(", "self")])

COMPILED = "/jax/core/compile/backend_compile_duration"
"""The event in which JAX tells what compiling took."""

COMMANDS = ("fit", "query", "scan")

WATCHED = """
import sys
from experiments.cold_start import watched
watched(*sys.argv[1:])
"""
"""The program of the process that is watched."""

BARE, WHOLE = "import jax, flax", "import jax, flax, influence"

SAVED, ALLOWED = 0.7, 0.3
"""The share of compilation a cache has to save, and what an import may take, in s."""


@dataclass(frozen=True)
class Start:
    """What a command took, from nothing.

    Attributes:
      command: one of `COMMANDS`.
      cache: "empty" or "filled".
      seconds: on the clock.
      cpu_seconds: of processor time.
      compilation: seconds.
      programs: how many were compiled or read.
    """

    command: str
    cache: str
    seconds: float
    cpu_seconds: float
    compilation: float
    programs: int


class Took(NamedTuple):
    """What a process took: on the clock, and of processor time."""

    seconds: float
    cpu_seconds: float


def took(*words: str, **given: str) -> Took:
    """Runs Python with some words to its end, in this environment and what is given.

    Raises:
      RuntimeError: if it failed, with what it said.
    """
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{words} failed:\n{done.stdout}{done.stderr}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return Took(time.monotonic() - begun, cpu)


def watched(path: str, *words: str) -> None:
    """Gives a command, and writes to a file what compiling each program took.

    In the process that is watched: `took` starts it.
    """
    seen: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            seen.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    sys.argv = ["influence", *words]
    try:
        cli.main()
    finally:
        Path(path).write_text(json.dumps(seen), encoding="utf-8")


def started(material: Path, run: Path, cache: Path, name: str) -> list[Start]:
    """Returns what each command took, with a cache of compiled programs."""
    model, data = (str(material / x) for x in ("llama", "corpus.jsonl"))
    words = {
        "fit": ["--model", model, "--data", data, "--batch", "32"],
        "query": ASKED,
        "scan": ["--batch", "32"],
    }
    found, said = [], material / "compiled.json"
    for command in COMMANDS:
        each = (str(said), command, str(run), *words[command])
        cost = took("-c", WATCHED, *each, **{VARIABLE: str(cache)})
        seen = json.loads(said.read_text(encoding="utf-8"))
        found.append(Start(command, name, *cost, sum(seen), len(seen)))
    return found


def imported(repetitions: int) -> dict[str, list[Took]]:
    """Returns what importing takes, turn by turn."""
    found: dict[str, list[Took]] = {BARE: [], WHOLE: []}
    for _ in range(repetitions):
        for words, costs in found.items():
            costs.append(took("-c", words))
    return found


def total(starts: list[Start], cache: str, what: str) -> float:
    """Returns the sum over commands of the median over repetitions."""
    return sum(
        median(
            getattr(x, what) for x in starts if (x.command, x.cache) == (name, cache)
        )
        for name in COMMANDS
    )


def claims(starts: list[Start], imports: dict[str, list[Took]]) -> list[Claim]:
    """Returns what the issue asks for, and what came of it."""
    empty, filled = (total(starts, x, "compilation") for x in ("empty", "filled"))
    first, again = (total(starts, x, "seconds") for x in ("empty", "filled"))
    pairs = list(zip(imports[BARE], imports[WHOLE], strict=True))
    wall, cpu = (median(y[i] - x[i] for x, y in pairs) for i in (0, 1))
    return [
        Claim(
            f"a filled cache takes {SAVED:.0%} off the compilation time",
            f"{1 - filled / empty:.0%}: {empty:.1f} s and {filled:.1f} s; to the first "
            f"result {first:.1f} s and {again:.1f} s",
            1 - filled / empty >= SAVED,
        ),
        Claim(
            f"importing takes {ALLOWED} s beyond jax and flax at most",
            f"{wall:.2f} s on the clock, {cpu:.2f} s of processor time",
            wall <= ALLOWED,
        ),
    ]


def shown(starts: list[Start]) -> Table:
    """Returns the medians as a table to print."""
    found = Table(title="medians", title_justify="left")
    for head in ("command", "cache", "seconds", "CPU-s", "compilation, s", "programs"):
        found.add_column(head)
    for name in COMMANDS:
        for cache in ("empty", "filled"):
            own = [x for x in starts if (x.command, x.cache) == (name, cache)]
            numbers = [
                median(getattr(x, what) for x in own)
                for what in ("seconds", "cpu_seconds", "compilation", "programs")
            ]
            cells = [*(f"{x:.1f}" for x in numbers[:3]), f"{numbers[3]:.0f}"]
            found.add_row(name, cache, *cells)
    return found


def main(repetitions: int = 3, imports: int = 7, megabytes: float = 0.3) -> None:
    """Starts the engine's commands from nothing, and from what a first run left.

    Args:
        repetitions: How many caches are filled.
        imports: How often each import is made.
        megabytes: Of text.
    """
    starts: list[Start] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", megabytes)
        write_random_llama(folder / "llama", CONFIG)
        for i in range(repetitions):
            cache = folder / f"cache-{i}"
            for what in ("empty", "filled"):
                starts += started(folder, folder / f"run-{i}-{what}", cache, what)
    costs = imported(imports)
    said = claims(starts, costs)
    rows = {
        "commands": [asdict(x) for x in starts],
        "imports": {k: [x._asdict() for x in v] for k, v in costs.items()},
    }
    settings = {"repetitions": repetitions, "imports": imports, "megabytes": megabytes}
    write("cold_start", seed=0, settings=settings, rows=rows, claims=said)
    console = Console()
    console.print(shown(starts))
    console.print(table(said))


if __name__ == "__main__":
    tyro.cli(main)
