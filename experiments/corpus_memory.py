"""Packing and reading a corpus ten times larger takes no more memory.

    python -m experiments.corpus_memory

Takes the Python sources of this environment as text, some megabytes of it, and after
that ten times as many; packs them, walks all batches, ranks candidates by BM25 and
reads a few texts back. Each size in a process of its own, whose anonymous memory (what
is allocated, as opposed to files mapped into memory) is looked at fifty times a second.
Linux only.

What memory does grow with is the longest document, up to 150 bytes a character while it
is turned into tokens. So both sizes are of one mixture: sources in an order that is
their paths' checksums', none longer than 100,000 characters.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments.material import sources, write_corpus, write_tokenizer
from experiments.process import anonymous
from influence.attribution.lexical import candidates
from influence.runtime.corpus.pack import pack
from influence.runtime.corpus.plan import Plan
from influence.runtime.corpus.source import open_source
from influence.runtime.corpus.texts import texts
from influence.runtime.corpus.tokenizer import read_tokenizer

QUERY = "def __init__(self, name: str) -> None:"


@dataclass(frozen=True)
class Stage:
    """What a stage took: seconds, and megabytes of anonymous memory at its peak."""

    name: str
    seconds: float
    megabytes: float


@contextmanager
def stage(name: str, found: list[Stage]) -> Iterator[None]:
    """Notes what a stage takes."""
    peak, over, start = [anonymous()], threading.Event(), time.monotonic()

    def watch() -> None:
        while not over.wait(0.02):
            peak.append(max(peak.pop(), anonymous()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    over.set()
    watcher.join()
    found.append(Stage(name, time.monotonic() - start, peak[0]))


def measure(folder: Path) -> list[Stage]:
    """Returns what packing and reading the corpus in a folder take."""
    found: list[Stage] = []
    source, tokenizer = open_source(folder / "corpus.jsonl"), read_tokenizer(folder)
    with stage("begin", found):
        pass
    with stage("pack", found):
        packed = pack(source, tokenizer, folder / "packed", Plan(512, None))
    with stage("walk", found):
        for _ in packed.batches(32, segments=True):
            pass
    with stage("candidates", found):
        query = {"query": tokenizer.encode([QUERY])[0].ids}
        best = packed.take(candidates(query, packed.batches(32), 100).places[0])
    with stage("texts", found):
        texts(packed, source, best.ids[:20])
    return found


def main(megabytes: float = 20) -> None:
    """Measures a corpus of some megabytes and one of ten times as many.

    Args:
        megabytes: Of text, in the smaller of the two.
    """
    columns: dict[str, list[Stage]] = {}
    for size in (megabytes, 10 * megabytes):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            written = write_corpus(folder / "corpus.jsonl", size)
            write_tokenizer(folder, islice(sources(), 200), 8192)
            command = [sys.executable, "-m", "experiments.corpus_memory", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows = json.loads(done.stdout)
            columns[f"{written:.0f} MB"] = [Stage(**row) for row in rows]
    table = Table(title="anonymous memory at the peak")
    table.add_column("stage")
    for head in columns:
        table.add_column(head, justify="right")
    for row in zip(*columns.values(), strict=True):
        cells = (f"{x.seconds:.1f} s; {x.megabytes:.0f} MB" for x in row)
        table.add_row(row[0].name, *cells)
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
        rows = [vars(x) for x in measure(Path(sys.argv[1]))]
        Console(soft_wrap=True).print_json(json.dumps(rows))
    else:
        tyro.cli(main)
