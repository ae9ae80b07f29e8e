"""A corpus ten times larger takes ten times as long, and no more memory.

    python -m experiments.corpus_growth --factor 10

Carries out `fit`, `query` and `scan` on a small Llama and Python's sources: as much
text as one batch has, some megabytes, and so many times more. Takes processor seconds
and peak anonymous memory (what is allocated, as opposed to files mapped into memory) of
every process. What a corpus of one batch takes is the start: importing, compiling,
decomposing. Each is done several times and the median taken. Linux only.
"""

import json
import statistics
import tempfile
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments.material import write_corpus, write_random_llama
from experiments.process import Cost, measured
from influence.model.config import Config

CONFIG = Config(
    vocabulary=1024, context=64, width=32, hidden=64, heads=4, blocks=2, groups=2
)

BATCH = "16"

LONGEST = 20_000
"""The longest source, in characters: the smaller corpus has such as well."""

COMMANDS = ("fit", "query", "scan")


def costs(folder: Path, corpus: Path, run: Path) -> dict[str, Cost]:
    """Returns what each command takes on a corpus."""
    model, data = str(folder / "llama"), str(corpus)
    words = {
        "fit": ["--model", model, "--data", data, "--samples", "100000000"],
        "query": ["--prompt", "import os", "--completion", ".path"],
        "scan": [],
    }
    fixed = {"fit": ["--batch", BATCH], "query": [], "scan": ["--batch", BATCH]}
    return {x: measured(x, str(run), *words[x], *fixed[x]) for x in COMMANDS}


def median(found: list[dict[str, Cost]]) -> dict[str, Cost]:
    """Returns the median of what several runs took."""
    return {
        name: Cost(*(statistics.median(getattr(x[name], part) for x in found)
                     for part in ("wall", "cpu", "megabytes")))
        for name in COMMANDS
    }  # fmt: skip


def main(factor: int = 10, megabytes: float = 0.6, repetitions: int = 3) -> None:
    """Measures a corpus and one that is so many times larger.

    Args:
        factor: How many times.
        megabytes: Of text, in the smaller of the two.
        repetitions: How often each is measured.
    """
    sizes = {"start": 0.001, "once": megabytes, "larger": factor * megabytes}
    found: dict[str, list[dict[str, Cost]]] = {name: [] for name in sizes}
    written = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_llama(folder / "llama", CONFIG)
        for size, wanted in sizes.items():
            path = folder / f"{size}.jsonl"
            written[size] = write_corpus(path, wanted, LONGEST)
        for number in range(repetitions):
            for size in sizes:
                run = folder / f"{size}-{number}"
                found[size].append(costs(folder, folder / f"{size}.jsonl", run))
    medians = {name: median(x) for name, x in found.items()}
    start, once, larger = (medians[x] for x in ("start", "once", "larger"))
    table = Table(
        title=f"processor seconds; MB of anonymous memory, {repetitions} runs"
    )
    for head in ("command", *(f"{x:.2f} MB of text" for x in written.values()),
                 "time beyond start", "memory"):  # fmt: skip
        table.add_column(head, justify="right")
    ratios = {}
    for command in ("fit", "scan"):
        beyond = [x[command].cpu - start[command].cpu for x in (once, larger)]
        grown = larger[command].megabytes / once[command].megabytes
        ratios[command] = beyond[1] / beyond[0], grown
    for command in COMMANDS:
        cells = (f"{x[command].cpu:.1f} s; {x[command].megabytes:.0f} MB"
                 for x in medians.values())  # fmt: skip
        said = (f"×{x:.2f}" for x in ratios.get(command, ()))
        table.add_row(command, *cells, *said)
    Console().print(table)
    record = {
        "memory_ratio": {k: round(x[1], 3) for k, x in ratios.items()},
        "time_ratio": {k: round(x[0], 2) for k, x in ratios.items()},
        "text_ratio": round(written["larger"] / written["once"], 3),
    }
    Console(soft_wrap=True).print_json(json.dumps(record), indent=None)


if __name__ == "__main__":
    tyro.cli(main)
