"""What a training on activations in a file is told, ours and SAELens' alike."""

from dataclasses import dataclass
from pathlib import Path

BATCH = 2048
"""Tokens an update."""


@dataclass(frozen=True)
class Given:
    """One dictionary.

    Attributes:
      rows: the activations, `[N, D]`.
      out: the folder for the dictionary.
      kind: how it is made sparse.
      site: where the activations are from.
      k: features of a token that are on.
      steps: updates.
      rate: the highest of Adam.
    """

    rows: Path
    out: Path
    kind: str
    site: str
    k: int
    steps: int
    rate: float
