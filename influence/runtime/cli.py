"""The command line: words become function calls, errors become sentences.

Every command imports what carries it out when it is asked for: what all of them need
together takes longer to import than a misspelt option should.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from influence.runtime.allocator import keep_memory
from influence.runtime.evaluating.options import Lds, Methods, Pbrf, Removal
from influence.runtime.planning.options import Plan
from influence.runtime.processes import check_alone, join, leads
from influence.runtime.programs import keep_programs
from influence.runtime.run.options import (
    Fit,
    Index,
    Query,
    Report,
    Scan,
    Search,
    Show,
    Status,
)
from influence.runtime.sae.options import Eval, Features, Link, Steer, Train

Flat = tyro.conf.OmitArgPrefixes
"""Options of a part of a record are named as those of the record are."""

app = tyro.extras.SubcommandApp()


@app.command
def demo(
    out: Path = Path("influence-demo"),
    seed: int = 0,
    fast: bool = False,
    size: Literal["small", "large"] = "small",
) -> None:
    """Answers the whole question on text that is on every machine.

    Trains a small decoder on part of Python's standard library, asks why it says six
    things, checks the answers by retraining, and writes a page.

    Args:
        out: The folder to write to.
        seed: Of the start, the training order, the sampled labels, the random removal.
        fast: Half as much text, half as long a training.
        size: `large` trains a better model of more text, for an hour or more on a CPU.
    """
    if fast and size == "large":
        raise ValueError("--fast and --size large exclude each other. Choose one.")
    from influence.runtime.demo import FAST, LARGE, SMALL
    from influence.runtime.demo import demo as run_demo

    chosen = FAST if fast else {"small": SMALL, "large": LARGE}[size]
    run_demo(out, seed, chosen, _alone("demo"))


@app.command
def fit(options: Annotated[Fit, tyro.conf.arg(name=""), Flat]) -> None:
    """Fits the curvature of a model's loss on a corpus."""
    from influence.runtime.run import fitting

    fitting.fit(options, _console())


@app.command
def query(options: Annotated[Query, tyro.conf.arg(name=""), Flat]) -> None:
    """Solves for what is asked: why does the model say this?"""
    from influence.runtime.run import asking

    asking.query(options, _console())


@app.command
def scan(options: Annotated[Scan, tyro.conf.arg(name=""), Flat]) -> None:
    """Scores every training sequence for everything that was asked."""
    from influence.runtime.run import scanning

    scanning.scan(options, _console())


@app.command
def index(options: Annotated[Index, tyro.conf.arg(name=""), Flat]) -> None:
    """Makes a short vector of every training sequence, for `search`."""
    from influence.runtime.run import indexing

    indexing.index(options, _alone("index"))


@app.command
def search(options: Annotated[Search, tyro.conf.arg(name=""), Flat]) -> None:
    """Asks an index: a new question, and no pass over the corpus."""
    from influence.runtime.run import searching

    searching.search(options, _alone("search"))


@app.command
def show(options: Annotated[Show, tyro.conf.arg(name=""), Flat]) -> None:
    """Prints the sequences that matter most, with their text."""
    from influence.runtime.run import showing

    showing.show(options, _alone("show"))


@app.command
def report(options: Annotated[Report, tyro.conf.arg(name=""), Flat]) -> None:
    """Writes a page about what was found."""
    from influence.runtime.run import showing

    showing.report(options, _alone("report"))


@app.command
def status(options: Annotated[Status, tyro.conf.arg(name=""), Flat]) -> None:
    """Says what a run has finished, what is stale and why, and what is damaged."""
    from influence.runtime.run import showing

    if not showing.status(options, _alone("status")):
        sys.exit(1)


@app.command
def plan(options: Annotated[Plan, tyro.conf.arg(name=""), Flat]) -> None:
    """Says what an analysis would take, before there are weights or machines."""
    from influence.runtime.planning import planning

    planning.plan(options, _alone("plan"))


Judgement = (
    Annotated[Lds, tyro.conf.subcommand("lds")]
    | Annotated[Pbrf, tyro.conf.subcommand("pbrf")]
    | Annotated[Removal, tyro.conf.subcommand("removal")]
    | Annotated[Methods, tyro.conf.subcommand("methods")]
)
"""What can be judged, each by its own options."""


@app.command
def evaluate(options: Annotated[Judgement, tyro.conf.arg(name=""), Flat]) -> None:
    """Judges scores, mostly by training again: are they true?"""
    from influence.runtime.evaluating import comparing, judging, removing, responding

    if isinstance(options, Lds):
        judging.judge(options, _alone("evaluate"))
    elif isinstance(options, Pbrf):
        responding.respond(options, _alone("evaluate"))
    elif isinstance(options, Removal):
        removing.remove(options, _alone("evaluate"))
    else:
        comparing.compare(options, _alone("evaluate"))


Dictionaries = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Features, tyro.conf.subcommand("features")]
    | Annotated[Steer, tyro.conf.subcommand("steer")]
)
"""What can be done with dictionaries of features, each by its own options."""


@app.command
def sae(options: Annotated[Dictionaries, tyro.conf.arg(name=""), Flat]) -> None:
    """Dictionaries of features: trained, judged, looked at, steered by."""
    from influence.runtime.sae import browsing, judging, steering, training

    if isinstance(options, Train):
        training.train(options, _alone("sae"))
    elif isinstance(options, Eval):
        judging.judge(options, _alone("sae"))
    elif isinstance(options, Features):
        browsing.browse(options, _alone("sae"))
    else:
        steering.steer(options, _alone("sae"))


@app.command
def features(options: Annotated[Link, tyro.conf.arg(name=""), Flat]) -> None:
    """Says what a run's most influential sequences have in common."""
    from influence.runtime.sae import linking

    linking.link(options, _alone("features"))


@app.command
def version() -> None:
    """Prints the version."""
    from importlib.metadata import version

    Console().print(version("influence"))


def _alone(command: str) -> Console:
    """Returns where a command says something that one process carries out.

    Raises:
      ValueError: if there are others.
    """
    check_alone(f"`influence {command}`")
    return Console()


def _console() -> Console:
    """Returns what one of several processes says, the first."""
    return Console(quiet=not leads())


def main() -> None:
    """Runs the command line."""
    keep_memory()
    keep_programs()
    try:
        join()
        app.cli(prog="influence")
    except (ValueError, OSError, MemoryError, ImportError) as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print("[bold red]error:[/]", escape(str(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
