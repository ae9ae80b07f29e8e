"""What `influence plan` is told, shown by `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Plan:
    """Says what an analysis would take, before there are weights or machines.

    Attributes:
      model: A Hugging Face `config.json`, or a folder with one. No weights are needed.
      tokens: How many are scanned: of the corpus.
      devices: `KIND×COUNT` or `KINDxCOUNT`, such as `H100×8`; `cpu×1` is this machine,
        measured on the spot.
      context: Tokens a sequence; the model's own, 512 at most, if left out.
      queries: How many questions are asked at once.
      layers: `all` matrices of the blocks, `mlp`, or patterns on layers' names.
      rank: Of the queries' factors; matrices if left out.
      samples: Fit the curvature to so many sequences at most.
      per_token: Score so many sequences token by token.
      blocks: Cut covariances into so many blocks.
      dtype: Of the weights and the forward pass; statistics are float32.
      batch: Sequences a batch on each device; the best that fits if left out.
      remat: Blocks are computed again in the backward pass, not kept.
    """

    model: Path
    tokens: int
    devices: str
    context: int | None = None
    queries: int = 16
    layers: tuple[str, ...] = ("all",)
    rank: int | None = None
    samples: int = 100_000
    per_token: int = 1000
    blocks: int = 1
    dtype: Literal["bfloat16", "float32"] = "float32"
    batch: int | None = None
    remat: bool = False
