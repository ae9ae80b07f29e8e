"""What tells one decoder from another: a record of facts, not a family's name.

Letters: `D` width, `F` hidden width of the MLP, `H` heads, `G` groups of heads that
share a key and a value, `K` features of a head, `L` blocks.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""The nonlinearities of an MLP, by the word a `Config` has for each."""

FUSED = "attention"
"""The name of an adapter beside queries, keys and values at once."""

ADAPTABLE = (
    *(f"attention.{x}" for x in ("query", "key", "value", "out")),
    *(f"mlp.{x}" for x in ("gate", "up", "down")),
)
"""The linear layers of a block, by the names adapters beside them have."""


@dataclass(frozen=True)
class Rotary:
    """Positions as angles (Su et al. 2021, arXiv 2104.09864).

    Feature `i` of a head's first half turns with feature `i` of its second half, by
    `position * base^(-2i / features)`. A model stretched to longer texts divides slow
    frequencies by `factor`: those that turn less than `slow` times within `trained`
    positions wholly, those that turn more than `fast` times not at all.

    Attributes:
      base: of the frequencies.
      features: how many of each head's features are turned, the first; 0 for all.
      factor: by which frequencies are divided.
      slow: turns below which a frequency is divided wholly.
      fast: turns above which a frequency is kept.
      trained: the context before it was stretched; 0 divides every frequency wholly.
    """

    base: float = 10_000.0
    features: int = 0
    factor: float = 1.0
    slow: float = 1.0
    fast: float = 4.0
    trained: int = 0

    def frequencies(self) -> np.ndarray:
        """Returns the angles per position, in radians, `[features / 2]`."""
        whole = self.base ** (-np.arange(0, self.features, 2) / self.features)
        turns = self.trained * whole / (2 * np.pi)
        kept = np.clip((turns - self.slow) / (self.fast - self.slow), 0, 1)
        return kept * whole + (1 - kept) * whole / self.factor


@dataclass(frozen=True)
class Adapter:
    """A low-rank change to a linear layer, `y += scale (x A) B` (LoRA).

    Attributes:
      layer: its place in a block, `attention.query`, `mlp.down`, …; `FUSED` for one
        whose output is cut into queries, keys and values.
      rank: `R`.
      scale: of what it adds.
    """

    layer: str
    rank: int
    scale: float


@dataclass(frozen=True)
class Config:
    """What tells one decoder from another. Left out, a fact is that of a small Llama.

    Attributes:
      vocabulary: `V`, the number of token ids, padding of the table included.
      context: the longest sequence.
      width: `D`, of the residual stream.
      hidden: `F`, of the MLP.
      heads: `H`, of attention.
      blocks: `L`, how many.
      groups: `G`, key/value heads; 0 for as many as heads.
      features: `K`, of each head; 0 for `D / H`.
      rotary: positions as angles; None for a learned vector each.
      window: how many positions a local block looks back at, itself included.
      local: for each block whether it is local; `()` if none is.
      local_rotary: positions in local blocks; None for those of the others.
      attention_scale: of scores; 0 for `1 / √K`.
      attention_cap: `c` in `c tanh(scores / c)`.
      attention_bias: whether queries, keys and values have a bias.
      out_bias: whether what attention gathers has one on its way out.
      query_norm: whether queries and keys are normed.
      query_norm_whole: whether over all heads together, rather than each by itself.
      gated: whether the MLP is `down(f(gate x) * up x)`, not `down(f(up x))`.
      activation: `f`, a key of `ACTIVATIONS`.
      mlp_bias: whether the MLP's layers have biases.
      centred: whether norms take the mean off first and add a shift at the end.
      norm_epsilon: what norms add to the mean square.
      norm_offset: what norms add to their scale.
      pre_norm: whether attention and MLP read a normed residual stream.
      post_norm: whether what they add to it is normed.
      parallel: whether the MLP reads what attention reads, not its result as well.
      embed_scale: what embeddings are multiplied by.
      tied: whether the head is the embedding, transposed.
      logit_cap: `c` in `c tanh(logits / c)`.
      adapters: low-rank changes beside the weights of every block.
    """

    vocabulary: int
    context: int
    width: int
    hidden: int
    heads: int
    blocks: int
    groups: int = 0
    features: int = 0
    rotary: Rotary | None = Rotary()
    window: int | None = None
    local: tuple[bool, ...] = ()
    local_rotary: Rotary | None = None
    attention_scale: float = 0.0
    attention_cap: float | None = None
    attention_bias: bool = False
    out_bias: bool = False
    query_norm: bool = False
    query_norm_whole: bool = False
    gated: bool = True
    activation: str = "silu"
    mlp_bias: bool = False
    centred: bool = False
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    embed_scale: float = 1.0
    tied: bool = False
    logit_cap: float | None = None
    adapters: tuple[Adapter, ...] = ()

    def __post_init__(self) -> None:
        """Fills in what was left to be derived, and raises where facts don't fit."""
        features = self.features or self.width // self.heads
        derived = {
            "groups": self.groups or self.heads,
            "features": features,
            "rotary": _whole(self.rotary, features),
            "local_rotary": _whole(self.local_rotary, features),
            "local": self.local or (False,) * self.blocks,
            "attention_scale": self.attention_scale or features**-0.5,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        self._check_attention()
        self._check_names()

    def _check_attention(self) -> None:
        if self.heads % self.groups:
            raise ValueError(
                f"{self.heads} heads do not divide into {self.groups} groups that "
                "share keys and values. Check both numbers."
            )
        if len(self.local) != self.blocks or any(self.local) and self.window is None:
            raise ValueError(
                f"{self.blocks} blocks are described as {len(self.local)}, of which "
                f"{sum(self.local)} look back at {self.window} positions. Say of each "
                "block whether it is local, and how far a local one sees."
            )
        for x in (self.rotary, self.local_rotary):
            if x and (x.features % 2 or x.features > self.features):
                raise ValueError(
                    f"{x.features} of a head's {self.features} features are to turn in "
                    "pairs. Turn an even number of those there are."
                )

    def _check_names(self) -> None:
        layers = [x.layer for x in self.adapters]
        known = {FUSED, *ADAPTABLE} - ({"mlp.gate"} if not self.gated else set())
        if len(set(layers)) < len(layers) or set(layers) - known:
            raise ValueError(
                f"Adapters stand beside {', '.join(layers)}. Name each once, of "
                f"{', '.join(sorted(known))}."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"{self.activation!r} is no known activation. Choose one of "
                f"{', '.join(ACTIVATIONS)}."
            )

    @property
    def views(self) -> tuple[tuple[int | None, Rotary | None], ...]:
        """Returns the different windows and rotations that blocks have."""
        return tuple(dict.fromkeys(self._view(x) for x in self.local))

    @property
    def view_L(self) -> np.ndarray:
        """Returns which of `views` each block has."""
        return np.array([self.views.index(self._view(x)) for x in self.local])

    def _view(self, local: bool) -> tuple[int | None, Rotary | None]:
        return (
            (self.window, self.local_rotary or self.rotary)
            if local
            else (None, self.rotary)
        )

    def adapter(self, layer: str) -> Adapter | None:
        """Returns the adapter beside a layer of the blocks, if there is one."""
        return next((x for x in self.adapters if x.layer == layer), None)


def _whole(rotary: Rotary | None, features: int) -> Rotary | None:
    if rotary is None or rotary.features:
        return rotary
    return replace(rotary, features=features)
