"""How good dictionaries are, how fast they are trained, and beside whose.

    python -m experiments.sae_quality            # ours
    python -m experiments.sae_quality --peers    # SAELens' beside them

On the demo's model and on the truth bench's: dictionaries of eight times the width of
the residual stream, every kind on the same tokens for the same number of updates, each
in a process of its own. Ours run the model for every token, and their time and memory
have that in them. SAELens' are given activations that were computed before, shuffled,
in a file; beside them are ours that are given the same, in as little a program. All are
judged by the same function on the same held-out text. All have one thread: two made
SAELens three times as slow here. Of those given activations three rates are tried each.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

from experiments.dictionaries import SUBJECTS, Subject, activations
from experiments.given import BATCH
from experiments.given_training import KINDS
from experiments.process import anonymous
from experiments.results import Claim, table, write
from influence.interpret.dictionary import Dictionary
from influence.interpret.kinds import Kind
from influence.interpret.learning import Aim, Schedule
from influence.interpret.quality import scrambled
from influence.runtime.dictionaries import saelens
from influence.runtime.dictionaries.stored import About, Stored

PEERS = ("batchtopk", "topk")
"""Kinds that SAELens trains as well: those whose `k` means the same."""

GIVEN = {
    "influence, given": ("experiments.given_training", (8e-3, 1.6e-2, 3.2e-2)),
    "sae-lens": ("experiments.sae_lens_training", (1e-3, 3e-3, 1e-2)),
}
"""What trains on activations that were computed before, and the rates it has to choose.

SAELens' default, 3e-4, is meant for longer trainings.
"""

DEAD = 0.05
"""The largest share of dead features that is asked for."""


@dataclass(frozen=True)
class Options:
    """What is trained.

    Attributes:
      peers: whether SAELens trains as well.
      steps: updates of 2,048 tokens.
      k: features of a token that are on.
      subjects: which models.
      kinds: which kinds.
      work: where models and activations are kept.
      seed: of everything.
      one: for a process of its own: what to train, `LIBRARY:SUBJECT:KIND`.
    """

    peers: bool = False
    steps: int = 2000
    k: int = 31
    subjects: tuple[str, ...] = ("demo", "bench")
    kinds: tuple[str, ...] = ("batchtopk", "topk", "jumprelu")
    work: Path = Path("runs") / "sae_quality"
    seed: int = 0
    one: str = ""


def main(options: Options) -> None:
    """Trains dictionaries of every kind, and judges them."""
    if options.one:
        _one(options, *options.one.split(":"))
        return
    rows = []
    for name in options.subjects:
        subject = _subject(options, name)
        for kind in options.kinds:
            rows.append(_row(options, subject, "influence", kind))
            if kind == "batchtopk":
                rows.append(_row(options, subject, "influence", kind, control=True))
        if options.peers:
            _write_activations(options, subject)
            asked = [x for x in options.kinds if x in PEERS]
            rows += [
                _row(options, subject, library, kind, rate)
                for kind in asked
                for library, (_, rates) in GIVEN.items()
                for rate in rates
            ]
    _report(options, rows)


def _subject(options: Options, name: str) -> Subject:
    """Returns a model, trained unless it was."""
    kept = options.work / f"{name}.safetensors"
    subject = SUBJECTS[name](options.seed, _kept(kept))
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        leaves = jax.tree.leaves(subject.source.params)
        save_file({str(i): np.asarray(x) for i, x in enumerate(leaves)}, kept)
    return subject


def _kept(path: Path) -> list[np.ndarray] | None:
    if not path.exists():
        return None
    found = load_file(path)
    return [found[str(i)] for i in range(len(found))]


def _row(
    options: Options,
    subject: Subject,
    library: str,
    kind: str,
    rate: float | None = None,
    *,
    control: bool = False,
) -> dict[str, Any]:
    """Trains one dictionary in a process of its own, and judges it here."""
    word = "control" if control else library
    if library in GIVEN:
        words = _given(options, subject, library, kind, rate)
    else:
        words = _alone(options, f"{word}:{subject.name}:{kind}")
    cost = _measured(words)
    made = saelens.read(_folder(options, word, subject.name, kind, rate)).dictionary
    if control:
        subject = _random(subject, options.seed)
    found = subject.judged(made)
    row = {
        "model": subject.name,
        "weights": "random" if control else "trained",
        "kind": kind,
        "library": library,
        "rate": rate,
        "variance_explained": found.variance_explained,
        "ce_recovered": found.recovered,
        "ce_recovered_of_mean": found.recovered_of_mean,
        "kl": found.kl,
        "l0": found.l0,
        "dead": found.dead,
        **cost,
    }
    print(json.dumps(row), flush=True)  # noqa: T201
    return row


def _alone(options: Options, one: str) -> list[str]:
    """Returns the command that trains one dictionary on what a model computes."""
    words = [
        *("--one", one, "--steps", options.steps, "--k", options.k),
        *("--work", options.work, "--seed", options.seed),
    ]
    return ["experiments.sae_quality", *map(str, words)]


def _given(
    options: Options, subject: Subject, library: str, kind: str, rate: float | None
) -> list[str]:
    """Returns the command that trains one dictionary on activations in a file."""
    site = f"blocks.{subject.site.place - 1}.hook_resid_post"
    words = [
        *("--rows", options.work / f"{subject.name}.npy", "--site", site),
        *("--out", _folder(options, library, subject.name, kind, rate)),
        *("--kind", kind, "--k", options.k, "--steps", options.steps, "--rate", rate),
    ]
    return [GIVEN[library][0], *map(str, words)]


def _measured(command: list[str]) -> dict[str, float]:
    """Runs a module in a process of its own; returns what it says, and its memory."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "NPROC": "1"},
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.05)
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command} failed with {process.returncode}.")
    return {**json.loads(said.strip().splitlines()[-1]), "megabytes": peak}


def _one(options: Options, library: str, name: str, kind: str) -> None:
    """Trains one dictionary, and prints how fast."""
    subject = _subject(options, name)
    if library == "control":
        subject = _random(subject, options.seed)
    made, seconds = _ours(options, subject, kind)
    _write(_folder(options, library, name, kind), made, subject)
    rate = options.steps * BATCH / seconds
    print(json.dumps({"tokens_per_second": rate}))  # noqa: T201


def _ours(options: Options, subject: Subject, kind: str) -> tuple[Dictionary, float]:
    width = 8 * subject.width
    way: Kind = KINDS[kind](options.k, width)
    aim = {"own": Aim(subject.site, width, way)}
    schedule = Schedule(options.steps)
    begun = time.monotonic()
    made = subject.train(aim, schedule, options.seed)["own"]
    return made.dictionary, time.monotonic() - begun


def _random(subject: Subject, seed: int) -> Subject:
    """Returns the same with a model of random weights."""
    source = subject.source
    mixed = scrambled(source.params, seed)
    return subject._replace(source=replace(source, params=mixed))


def _folder(
    options: Options, library: str, name: str, kind: str, rate: float | None = None
) -> Path:
    parts = [*library.split(", "), name, kind, *([] if rate is None else [f"{rate:g}"])]
    return options.work / "-".join(parts)


def _write(folder: Path, made: Dictionary, subject: Subject) -> None:
    for path in sorted(folder.glob("*")):
        path.unlink()
    if folder.exists():
        folder.rmdir()
    saelens.write(folder, Stored(made, About(str(subject.site))))


def _write_activations(options: Options, subject: Subject) -> None:
    """Writes what SAELens learns from: as many activations as there are tokens."""
    path = options.work / f"{subject.name}.npy"
    if not path.exists():
        rows = activations(subject, options.steps * BATCH, options.seed)
        np.save(path, rows, allow_pickle=False)


def _report(options: Options, rows: list[dict[str, Any]]) -> None:
    own = [x for x in rows if x["library"] == "influence"]
    claims = []
    for name in options.subjects:
        found = next(
            x
            for x in own
            if (x["model"], x["kind"], x["weights"]) == (name, "batchtopk", "trained")
        )
        claims.append(
            Claim(
                f"{name}: 8 × wide, L0 16 to 32: variance explained ≥ 0.92, "
                "cross-entropy recovered ≥ 0.98, dead ≤ 5 %",
                f"batchtopk: {found['variance_explained']:.3f}, "
                f"{found['ce_recovered']:.3f}, {found['dead']:.1%} at L0 "
                f"{found['l0']:.1f}",
                found["variance_explained"] >= 0.92
                and found["ce_recovered"] >= 0.98
                and found["dead"] <= DEAD,
            )
        )
        theirs = {
            x["kind"] for x in rows if (x["model"], x["library"]) == (name, "sae-lens")
        }
        asked = [x for x in PEERS if x in theirs]
        claims += [_beside(rows, name, kind) for kind in asked]
    settings = {k: getattr(options, k) for k in ("steps", "k", "subjects", "kinds")}
    write("sae_quality", seed=options.seed, settings=settings, rows=rows, claims=claims)
    heads = ("model", "weights", "kind", "library", "rate")
    shown = Table(*heads, *COLUMNS)
    for x in rows:
        words = (str(x[k]) for k in heads)
        shown.add_row(*words, *(format(x[k], form) for k, form in COLUMNS.items()))
    Console(width=150).print(shown)
    Console().print(table(claims))


COLUMNS = {
    "variance_explained": ".4f",
    "ce_recovered": ".4f",
    "l0": ".1f",
    "dead": ".1%",
    "tokens_per_second": ",.0f",
    "megabytes": ",.0f",
}


def best(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns the rate that explains most with few features dead, or has the fewest.

    In a top-k dictionary what explains most is to let features die: those that are left
    are told apart better.
    """
    rows = list(rows)
    few = [x for x in rows if x["dead"] <= DEAD]
    if few:
        return max(few, key=lambda x: x["variance_explained"])
    return min(rows, key=lambda x: x["dead"])


def _beside(rows: list[dict[str, Any]], name: str, kind: str) -> Claim:
    """Returns whether ours is better in everything."""
    ours, theirs = (
        best(
            x
            for x in rows
            if (x["model"], x["kind"], x["library"]) == (name, kind, library)
        )
        for library in GIVEN
    )
    better = (
        ours["variance_explained"] >= theirs["variance_explained"],
        ours["dead"] < theirs["dead"] or ours["dead"] == 0,
        ours["tokens_per_second"] > theirs["tokens_per_second"],
        ours["megabytes"] < theirs["megabytes"],
    )
    said = (
        f"rates {ours['rate']:g} and {theirs['rate']:g}: "
        f"variance {ours['variance_explained']:.4f} and "
        f"{theirs['variance_explained']:.4f} (L0 {ours['l0']:.0f} and "
        f"{theirs['l0']:.0f}), dead {ours['dead']:.1%} and {theirs['dead']:.1%}, "
        f"{ours['tokens_per_second']:,.0f} and {theirs['tokens_per_second']:,.0f} "
        f"tokens/s, {ours['megabytes']:,.0f} and {theirs['megabytes']:,.0f} MB"
    )
    return Claim(
        f"{name}, {kind}: beside SAELens, variance at least equal, fewer dead, faster, "
        "less memory",
        said,
        all(better),
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
