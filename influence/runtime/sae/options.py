"""What the commands on dictionaries are told: one record each, shown by `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from influence.runtime.run.options import Data, Folder, Packing, Repeated

Place = Annotated[str, tyro.conf.Positional]
"""A dictionary: a folder, or a name on the hub with a folder in it."""

Several = tuple[str, ...]
Numbers = Annotated[tuple[float, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class Read:
    """A model, and the text it reads.

    Attributes:
      model: A folder or hub name: Hugging Face's (safetensors), PEFT's, or orbax.
      data: The corpus.
      packing: How documents become sequences.
      dtype: Of the weights and the forward pass.
    """

    model: str
    data: Data
    packing: Packing = Packing()
    dtype: str | None = None


@dataclass(frozen=True)
class Train:
    """Trains dictionaries of features on what a model computes.

    Attributes:
      out: The folder to write to; of several dictionaries, each gets a folder in it.
      read: What is read.
      site: Where: `resid.4`, `mlp_out.2`, TransformerLens' names as well. Once for each
        of several: the model is run once for all.
      writes: A transcoder's output, `mlp_out.2`; once for each site.
      width: Features, or a multiple of the site's width; once for each of several. `8x`
        if left out.
      kind: How features are made sparse.
      k: Features of a token that are on, with `topk`, `batchtopk`, `matryoshka` and
        `jumprelu` (its target).
      coefficient: Of what being on costs, with `jumprelu-tanh`, `standard`, `gated`.
      nested: Of `matryoshka`, widths that reconstruct by themselves; an eighth, a
        quarter and half of the width if left out.
      skip: A linear map beside a transcoder's features.
      aligned: Encoder and decoder of a feature have an inner product of 1.
      tokens: How many are learned from, the corpus walked over as often as it takes.
      train_batch: Tokens an update.
      rate: The highest learning rate; by kind and width if left out.
      hold_out: The share of sequences that is held out, to judge by.
      control: Train the same on a model of random weights as well.
      seed: Of the start and of every order.
      save_every: Seconds between saves, or more if saving takes over 2 % of the time.
    """

    out: Path
    read: Read
    site: Repeated
    writes: Repeated = ()
    width: Repeated = ()
    kind: Literal[
        "batchtopk",
        "topk",
        "matryoshka",
        "jumprelu",
        "jumprelu-tanh",
        "standard",
        "gated",
    ] = "batchtopk"
    k: int = 32
    coefficient: float | None = None
    nested: tuple[int, ...] = ()
    skip: bool = False
    aligned: bool = False
    tokens: int = 4_000_000
    train_batch: int = 2048
    rate: float | None = None
    hold_out: float = 0.05
    control: bool = False
    seed: int = 0
    save_every: float = 60.0


@dataclass(frozen=True)
class Eval:
    """Judges a dictionary on text: what it explains, and what the model loses by it.

    Attributes:
      sae: The dictionary.
      read: What is read.
      control: A dictionary of the same model with random weights, to put beside it;
        the one that was trained with it if left out.
      sequences: How many are looked at, at most.
      seed: Of the sequences that are drawn, and of the random weights.
      out: A JSON file for the numbers.
    """

    sae: Place
    read: Read
    control: str | None = None
    sequences: int = 4096
    seed: int = 0
    out: Path | None = None


@dataclass(frozen=True)
class Features:
    """Writes a page about what each feature is.

    Attributes:
      sae: The dictionary.
      read: What is read.
      out: The page.
      run: A run, for the training sequences that influenced each feature most.
      causes: With a run: of how many features, those that are on most.
      sequences: How many are looked at, at most.
      around: Tokens to either side of an example.
      seed: Of what is drawn.
      neuronpedia: A folder for the same in Neuronpedia's format.
      circuit_tracer: A folder for the same in circuit-tracer's format.
    """

    sae: Place
    read: Read
    out: Path = Path("features.html")
    run: Path | None = None
    causes: int = 256
    sequences: int = 8192
    around: int = 12
    seed: int = 0
    neuronpedia: Path | None = None
    circuit_tracer: Path | None = None


@dataclass(frozen=True)
class Link:
    """What a run's most influential sequences have in common.

    Attributes:
      run: The run folder, scanned.
      sae: A dictionary of the run's model.
      top: How many sequences of either sign are compared with others.
      shown: How many features of each kind are shown.
      sequences: With how many others they are compared, at most.
      permutations: How many random choices p-values are from.
      level: Features with a larger p-value are not listed.
      seed: Of the others, and of the choices.
    """

    run: Folder
    sae: str
    top: int = 50
    shown: int = 8
    sequences: int = 4096
    permutations: int = 1000
    level: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Steer:
    """Shows what a model says with features of a dictionary edited.

    Each feature is given one of `--add`, `--clamp`, `--scale`, or, with none of them,
    is ablated.

    Attributes:
      sae: The dictionary.
      model: A folder or hub name.
      prompt: What is continued; once for each of several.
      feature: Which feature is edited; once for each of several.
      add: This much is added to it, on or off.
      clamp: It is set to this much.
      scale: It is multiplied by this much.
      positions: Where: `all`, `prompt`, `generated`, or the first and the last,
        counted from the end of the prompt: `-3:-1`, `0:9`.
      units: Of `--add` and `--clamp`: multiples of the feature's largest activation on
        the text that the dictionary was judged on, or `absolute`.
      length: Tokens that are added.
      temperature: Of drawn tokens; 0 takes the likeliest.
      seed: Of the draws, the same with edits and without.
      freeze_attention: Attention looks where it would without edits.
      dtype: Of the weights and the forward pass.
      out: A page with all of it, and with the features ablated beside it.
    """

    sae: Place
    model: str
    prompt: Repeated
    feature: Annotated[tuple[int, ...], tyro.conf.UseAppendAction]
    add: Numbers = ()
    clamp: Numbers = ()
    scale: Numbers = ()
    positions: str = "all"
    units: Literal["maximum", "absolute"] = "maximum"
    length: int = 24
    temperature: float = 0.0
    seed: int = 0
    freeze_attention: bool = False
    dtype: str | None = None
    out: Path | None = None
