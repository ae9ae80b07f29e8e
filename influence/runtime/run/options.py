"""What the commands on a run are told: one record each, shown by `--help`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from influence.runtime.corpus.source import LONGEST

Folder = Annotated[Path, tyro.conf.Positional]

Meshed = tuple[int, int] | None
"""How many devices examples are dealt out to, and over how many models are cut."""

Kind = Literal["flat", "ivf", "ivfpq", "hnsw"]
"""How vectors are looked up."""

Sides = Literal["both", "leading"]
"""Along which eigenvectors gradients are taken: all of both sides, or leading ones."""

Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
"""An option that is given once for each of several values."""


@dataclass(frozen=True)
class Data:
    """A corpus, and how its documents are read.

    Attributes:
      data: A file or folder of JSON lines, Parquet or text, a folder written by
        `save_to_disk`, or a dataset on the hub.
      text_column: The column with the documents.
      split: Of a dataset.
      pattern: Of a folder of text files, which: `*.py`.
      skip_empty: Pass over rows without text.
      longest: How many characters a document may have.
    """

    data: str
    text_column: str = "text"
    split: str | None = None
    pattern: str = "*"
    skip_empty: bool = False
    longest: int = LONGEST


@dataclass(frozen=True)
class Packing:
    """How documents become sequences.

    Attributes:
      context: The longest sequence, in tokens; the model's own, 512 at most, if left
        out.
      apart: Every document by itself, instead of all one behind the other.
      within: Attention does not cross documents.
      separator: What ends a document: `eos`, `none`, or a token id.
      special_tokens: Whether the tokenizer puts its own around every text.
      chunk: After so many tokens what was packed is saved.
    """

    context: int | None = None
    apart: bool = False
    within: bool = False
    separator: str = "eos"
    special_tokens: bool = False
    chunk: int = 1 << 22


@dataclass(frozen=True)
class Fit:
    """Fits the curvature of a model's loss on a corpus.

    Attributes:
      run: The run folder.
      model: A folder or hub name: Hugging Face's (safetensors), PEFT's, or orbax.
      data: The corpus.
      packing: How documents become sequences.
      base: A model to score the same questions under, for the difference.
      merge: Work a PEFT folder's adapter into the weights.
      layers: `all` matrices of the blocks, `mlp`, or patterns on layers' names.
      samples: Fit to so many sequences at most, drawn from all.
      method: `ekfac`, `shampoo` (its basis), `kfac`, `diagonal` or `identity`.
      seed: Of the sampled labels and the drawn sequences.
      draws: Of labels, for each sequence.
      dtype: Of the weights and the forward pass; statistics are float32 at least.
      batch: Sequences a batch; measured if left out.
      memory: GB for factors; half of what is free if left out. More layers than fit
        are fitted in groups, one after the other.
      save_every: Seconds between saves, or more if saving takes over 2 % of the time.
      mesh: DATA MODEL: sequences are dealt out to DATA rows of MODEL devices each, over
        which the model and its curvature are cut. All devices are rows if left out.
    """

    run: Folder
    model: str
    data: Data
    packing: Packing = Packing()
    base: str | None = None
    merge: bool = False
    layers: tuple[str, ...] = ("all",)
    samples: int = 100_000
    method: Literal["ekfac", "shampoo", "kfac", "diagonal", "identity"] = "ekfac"
    seed: int = 0
    draws: int = 1
    dtype: str | None = None
    batch: int | None = None
    memory: float | None = None
    save_every: float = 60.0
    mesh: Meshed = None


@dataclass(frozen=True)
class Query:
    """Solves for what is asked: why does the model say this?

    Attributes:
      run: The run folder.
      prompt: What comes before; once for every question.
      completion: What the model says then; as often as prompts.
      queries: A file of JSON lines with `prompt`, `completion` and, if you like, `name`
        and `instead`: another completion, to ask why the one rather than the other.
      solver: `ekfac`; `cg`: conjugate gradients, preconditioned by the curvature; or
        `unrolled`: training followed as its recipe says, without a damping.
      recipe: A TOML file that says how the model was trained, for `unrolled`.
      damping: As a multiple of the mean eigenvalue; 0.1, or 10 with `cg`.
      solve_on: Sequences that `cg` and `unrolled` see.
      steps: Of `cg`, at most, or of `unrolled`.
      rank: Keep so many whitened directions of each layer's query; all if left out.
      sae: A dictionary of the model's features, to ask about one of them.
      feature: Which; once for each of several. It is measured at a completion's tokens,
        or, if there is none, at those of the corpus at which it is on most.
      mesh: As of `fit`.
    """

    run: Folder
    prompt: Repeated = ()
    completion: Repeated = ()
    queries: Path | None = None
    solver: Literal["ekfac", "cg", "unrolled"] = "ekfac"
    recipe: Path | None = None
    damping: float | None = None
    solve_on: int = 1024
    steps: int = 5
    rank: int | None = None
    sae: str | None = None
    feature: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    mesh: Meshed = None


@dataclass(frozen=True)
class Scan:
    """Scores every training sequence for everything that was asked.

    Attributes:
      run: The run folder.
      data: A corpus to rank, `PATH` or `NAME=PATH`; once for each of several. That of
        the fit if left out.
      candidates: `bm25:N`: only the N sequences that share most words with a query.
      keep: `layers` and totals, only `totals`, or `top:N`: the N highest and lowest of
        every query, by layer. If left out, layers up to 4 GB, then totals.
      n_train: How many sequences the model was trained on, if not those scanned.
      batch: Sequences a batch; measured if left out.
      save_every: Seconds between saves, or more if saving takes over 2 % of the time.
      mesh: As of `fit`.
    """

    run: Folder
    data: Repeated = ()
    candidates: str | None = None
    keep: str | None = None
    n_train: int | None = None
    batch: int | None = None
    save_every: float = 60.0
    mesh: Meshed = None


@dataclass(frozen=True)
class Index:
    """Makes a short vector of every training sequence, for `influence search`.

    Attributes:
      run: The run folder.
      data: A corpus to index, `PATH` or `NAME=PATH`; once for each of several. That of
        the fit if left out. What was indexed before stays.
      size: Bytes a sequence, at the most: its numbers' signs, or, where there is room
        for every number, a byte of each.
      kind: How they are looked up: `flat`, compared one and all; `ivf` and `ivfpq`,
        lists around centres; `hnsw`, a graph.
      sides: Along which eigenvectors gradients are taken: all those of `both` sides of
        a matrix, or the `leading` ones of either. That takes less time, and leaves out
        a fiftieth of the variance of scores.
      damping: As a multiple of the mean eigenvalue, of the vectors. Questions may be
        solved with another.
      batch: Sequences a batch; measured if left out.
      save_every: Seconds between saves, or more if saving takes over 2 % of the time.
    """

    run: Folder
    data: Repeated = ()
    size: Annotated[int, tyro.conf.arg(name="bytes")] = 512
    kind: Kind = "flat"
    sides: Sides = "both"
    damping: float = 0.1
    batch: int | None = None
    save_every: float = 60.0


@dataclass(frozen=True)
class Search:
    """Asks an index: a new question, and no pass over the corpus.

    Attributes:
      run: The run folder.
      prompt: What comes before; once for every question.
      completion: What the model says then; as often as prompts.
      queries: A file of questions, as for `query`.
      solver: As of `query`.
      damping: As of `query`.
      solve_on: As of `query`.
      steps: As of `query`.
      rescore: How many sequences of either sign are looked up for each question, and
        scored exactly.
      top: How many sequences of either sign are shown.
      n_train: How many sequences the model was trained on, if not those indexed.
      out: A page to write, with layers and tokens.
    """

    run: Folder
    prompt: Repeated = ()
    completion: Repeated = ()
    queries: Path | None = None
    solver: Literal["ekfac", "cg"] = "ekfac"
    damping: float | None = None
    solve_on: int = 1024
    steps: int = 5
    rescore: int = 200
    top: int = 5
    n_train: int | None = None
    out: Path | None = None

    @property
    def asked(self) -> Query:
        """Returns what is asked, as `query` is told it."""
        return Query(
            self.run,
            self.prompt,
            self.completion,
            self.queries,
            solver=self.solver,
            damping=self.damping,
            solve_on=self.solve_on,
            steps=self.steps,
        )


@dataclass(frozen=True)
class Show:
    """Prints the sequences that matter most, with their text.

    Attributes:
      run: The run folder.
      query: Which question, by number or name; all if left out.
      top: How many sequences of either sign.
      difference: Of model and base, rather than the model's own scores.
    """

    run: Folder
    query: str | None = None
    top: int = 5
    difference: bool = False


@dataclass(frozen=True)
class Report:
    """Writes a page about what was found.

    Attributes:
      run: The run folder.
    """

    run: Folder


@dataclass(frozen=True)
class Status:
    """Says what a run has finished, what is stale and why, and what is damaged.

    Attributes:
      run: The run folder.
    """

    run: Folder


LEAST = {
    "at_once": 1,
    "batch": 1,
    "blocks": 1,
    "chunk": 1,
    "copies": 1e-6,
    "context": 2,
    "damping": 0,
    "draws": 1,
    "evaluations": 1,
    "held": 1,
    "longest": 1,
    "n_train": 1,
    "per_token": 0,
    "rank": 1,
    "repeats": 1,
    "rescore": 1,
    "samples": 1,
    "sequences": 3,
    "save_every": 0,
    "solve_on": 1,
    "steps": 1,
    "subsets": 2,
    "tokens": 1,
    "tolerance": 1e-12,
    "top": 1,
}
"""The smallest values that options make sense with."""


def check_numbers(options: Any) -> None:
    """Raises for a number that an option makes no sense with.

    Raises:
      ValueError: naming it.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            check_numbers(value)
        elif value is not None and value < LEAST.get(field.name, value):
            raise ValueError(
                f"--{field.name.replace('_', '-')} {value} makes no sense. Give "
                f"{LEAST[field.name]} at least."
            )


def as_json(options: Fit) -> dict[str, Any]:
    """Returns options as JSON has them, without the devices: those may change."""
    said = json.loads(json.dumps(asdict(options), default=str))
    del said["mesh"]
    return said


def from_json(said: Mapping[str, Any], run: Path) -> Fit:
    """Returns the options of a run that may have been moved since."""
    whole = {
        "run": run,
        "data": Data(**said["data"]),
        "packing": Packing(**said["packing"]),
        "layers": tuple(said["layers"]),
    }
    return Fit(**{**said, **whole})
