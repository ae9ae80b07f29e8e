"""How a dictionary is made sparse while it is trained: one class for each way.

Every kind says how features are turned on, what it adds to the loss, what it learns
beside encoder and decoder, and what activation it leaves in the finished dictionary.
What is read is centred and scaled to a mean square length of `D`; the loss is the mean
over tokens of `‖y − ŷ‖²`, so coefficients mean what they do in the literature.

Letters: `B` tokens of a batch, `F` features.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from influence.interpret.activations import Activation, Gated, JumpReLU, ReLU, TopK
from influence.linalg.largest import keep_largest, keep_largest_of_all

PRICED = 5e-4
"""The highest rate of Adam, for 2¹⁴ features, where features have a price.

Gao et al. (2024) have 2e-4 for trainings a thousand times as long. Kinds that keep a
number of features on take more: theirs were chosen on a small model, for trainings of
four million tokens, as what explains most and leaves less than one in twenty dead.
"""

Learned = dict[str, Array]
"""What is trained, by name: `encoder_DxF`, `bias_F`, `decoder_FxO` and so on."""


class Found(NamedTuple):
    """What features make of a batch.

    Attributes:
      z_BxF: their activations.
      penalty: what is added to the loss.
      alone_BxF: activations that have to reconstruct by themselves through the decoder
        as it is, if there are such.
    """

    z_BxF: Array
    penalty: Array
    alone_BxF: Array | None = None


class Kind(Protocol):
    """A way to make a dictionary sparse, a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Returns what it is called."""
        ...

    @property
    def unit(self) -> bool:
        """Returns whether decoder rows are kept at length one."""
        ...

    @property
    def rate(self) -> float:
        """Returns the highest rate of Adam, for a dictionary of 2¹⁴ features."""
        ...

    @property
    def revives(self) -> bool:
        """Returns whether dead features learn from what the others leave over."""
        ...

    def check(self, width: int) -> None:
        """Raises if a dictionary so wide can't be trained this way."""
        ...

    def learned(self, width: int) -> Learned:
        """Returns what is trained beside encoder and decoder, as it begins."""
        ...

    def features(self, learned: Learned, pre_BxF: Array, progress: Array) -> Found:
        """Returns features' activations and what they cost.

        Args:
          learned: all that is trained.
          pre_BxF: pre-activations.
          progress: the share of all steps that is done.
        """
        ...

    def prefixes(self, width: int) -> tuple[int, ...]:
        """Returns how many of the first features each reconstruct by themselves."""
        ...

    def activation(self, learned: Learned, edge: Array) -> Activation:
        """Returns the finished dictionary's activation.

        Args:
          learned: all that was trained.
          edge: the running mean of the least activation that was on.
        """
        ...


def _check_k(k: int, width: int) -> None:
    if not 1 <= k <= width:
        raise ValueError(
            f"k is {k}, and the dictionary has {width} features. Give k from 1 to "
            f"{width}, or a wider dictionary."
        )


@dataclass(frozen=True)
class Top:
    """Keeps the `k` largest of each token (Gao et al. 2024)."""

    k: int
    name = "topk"
    unit = True
    rate = 2.8e-3
    revives = True

    def check(self, width: int) -> None:
        """Raises if `k` is not within the width."""
        _check_k(self.k, width)

    def learned(self, width: int) -> Learned:
        """Returns nothing more."""
        del width
        return {}

    def features(self, learned: Learned, pre_BxF: Array, progress: Array) -> Found:
        """Returns the `k` largest of each token."""
        del learned, progress
        return Found(keep_largest(jax.nn.relu(pre_BxF), self.k), jnp.zeros(()))

    def prefixes(self, width: int) -> tuple[int, ...]:
        """Returns the whole width."""
        return (width,)

    def activation(self, learned: Learned, edge: Array) -> Activation:
        """Returns the same as in training."""
        del learned, edge
        return TopK(self.k)


@dataclass(frozen=True)
class BatchTop:
    """Keeps `k` a token on average: the largest of the batch (Bussmann et al. 2024).

    The finished dictionary, which sees no batch, has one threshold for all features:
    the mean over late training of the least activation that was kept.

    Attributes:
      k: how many features of a token are on, on average.
      nested: widths below the whole at which the first features reconstruct as well
        (Matryoshka, Bussmann et al. 2025); none if left out.
    """

    k: int
    nested: tuple[int, ...] = ()
    unit = True
    rate = 1.4e-3
    revives = True

    @property
    def name(self) -> str:
        """Returns what it is called."""
        return "matryoshka" if self.nested else "batchtopk"

    def check(self, width: int) -> None:
        """Raises if `k` or a nested width is not within the width."""
        _check_k(self.k, width)
        whole = (0, *self.nested, width)
        if list(whole) != sorted(set(whole)):
            raise ValueError(
                f"The nested widths {self.nested} of a dictionary of {width} features "
                "do not grow from one to the next. Give each once, the smallest first."
            )

    def learned(self, width: int) -> Learned:
        """Returns nothing more."""
        del width
        return {}

    def features(self, learned: Learned, pre_BxF: Array, progress: Array) -> Found:
        """Returns the largest of the batch."""
        del learned, progress
        z = keep_largest_of_all(jax.nn.relu(pre_BxF), self.k * len(pre_BxF))
        return Found(z, jnp.zeros(()))

    def prefixes(self, width: int) -> tuple[int, ...]:
        """Returns the nested widths and the whole."""
        return (*self.nested, width)

    def activation(self, learned: Learned, edge: Array) -> Activation:
        """Returns one threshold for all features."""
        return JumpReLU(jnp.full(len(learned["bias_F"]), edge))


@dataclass(frozen=True)
class Jump:
    """Learns a threshold for each feature (Rajamanoharan et al. 2024).

    Thresholds are learned as they are: their logarithms hardly move. Their gradient is
    a kernel estimate of width `bandwidth` (eq. 11, 12).

    Attributes:
      target: the number of features a token should have on: the penalty is
        `((L0 / target) − 1)²` (Gemma Scope 2's form); None for the tanh form.
      coefficient: of the penalty. With the tanh form of `Σ tanh(4 z ‖W_dec‖)`, the only
        say on how many features are on.
      start: of every threshold.
      bandwidth: of the kernel.
      warmup: the share of all steps over which the coefficient grows to its value.
      asleep: of what pulls a feature's pre-activations up to its threshold.
    """

    target: float | None = None
    coefficient: float = 1.0
    start: float = 0.1
    bandwidth: float = 0.1
    warmup: float = 0.25
    asleep: float = 3e-6
    name = "jumprelu"
    unit = True
    rate = PRICED
    revives = True

    def check(self, width: int) -> None:
        """Raises if the target is not within the width."""
        if self.target is not None and not 0 < self.target <= width:
            raise ValueError(
                f"{self.target:g} features of a token should be on, and the dictionary "
                f"has {width}. Give a target above 0 and not above the width."
            )

    def learned(self, width: int) -> Learned:
        """Returns thresholds."""
        return {"threshold_F": jnp.full(width, self.start)}

    def features(self, learned: Learned, pre_BxF: Array, progress: Array) -> Found:
        """Returns what is above its threshold, and the price of being on."""
        threshold = learned["threshold_F"]
        z: Any = jump(pre_BxF, threshold, self.bandwidth)
        if self.target is None:
            length = jnp.linalg.norm(learned["decoder_FxO"], axis=1)
            price = jnp.tanh(4 * z * length[None]).sum(1).mean()
        else:
            on: Any = step(pre_BxF, threshold, self.bandwidth)
            price = (on.sum(1).mean() / self.target - 1) ** 2
        short = jax.nn.relu(threshold[None] - pre_BxF).sum(1).mean()
        grown = _grown(self.coefficient, progress, self.warmup)
        return Found(z, grown * price + self.asleep * short)

    def prefixes(self, width: int) -> tuple[int, ...]:
        """Returns the whole width."""
        return (width,)

    def activation(self, learned: Learned, edge: Array) -> Activation:
        """Returns the thresholds."""
        del edge
        return JumpReLU(learned["threshold_F"])


@dataclass(frozen=True)
class Standard:
    """Pays for activations times decoder lengths (Anthropic, April 2024 update).

    Attributes:
      coefficient: of `Σ z ‖W_dec‖`, averaged over tokens.
      warmup: the share of all steps over which the coefficient grows to its value.
    """

    coefficient: float = 5.0
    warmup: float = 0.05
    name = "standard"
    unit = False
    rate = PRICED
    revives = False

    def check(self, width: int) -> None:
        """Accepts any width."""
        del width

    def learned(self, width: int) -> Learned:
        """Returns nothing more."""
        del width
        return {}

    def features(self, learned: Learned, pre_BxF: Array, progress: Array) -> Found:
        """Returns what is positive, and its price."""
        z = jax.nn.relu(pre_BxF)
        length = jnp.linalg.norm(learned["decoder_FxO"], axis=1)
        price = (z * length[None]).sum(1).mean()
        return Found(z, _grown(self.coefficient, progress, self.warmup) * price)

    def prefixes(self, width: int) -> tuple[int, ...]:
        """Returns the whole width."""
        return (width,)

    def activation(self, learned: Learned, edge: Array) -> Activation:
        """Returns the same as in training."""
        del learned, edge
        return ReLU()


@dataclass(frozen=True)
class Gate:
    """Pays for the gate, not for the magnitude (Rajamanoharan et al. 2024, Gated).

    The gate learns from a reconstruction of its own through the frozen decoder (eq. 8).

    Attributes:
      coefficient: of `Σ relu(gate) ‖W_dec‖`, averaged over tokens.
      warmup: the share of all steps over which the coefficient grows to its value.
    """

    coefficient: float = 5.0
    warmup: float = 0.05
    name = "gated"
    unit = False
    rate = PRICED
    revives = False

    def check(self, width: int) -> None:
        """Accepts any width."""
        del width

    def learned(self, width: int) -> Learned:
        """Returns the gate's bias, the magnitude's bias and its scale's logarithm."""
        zeros = jnp.zeros(width)
        return {"gate_F": zeros, "magnitude_F": zeros, "log_scale_F": zeros}

    def features(self, learned: Learned, pre_BxF: Array, progress: Array) -> Found:
        """Returns magnitudes of what the gate lets through, and its price."""
        gated = jax.nn.relu(pre_BxF + learned["gate_F"][None])
        length = jnp.linalg.norm(learned["decoder_FxO"], axis=1)
        price = (gated * length[None]).sum(1).mean()
        z = self.activation(learned, jnp.zeros(()))(pre_BxF)
        grown = _grown(self.coefficient, progress, self.warmup)
        return Found(z, grown * price, gated)

    def prefixes(self, width: int) -> tuple[int, ...]:
        """Returns the whole width."""
        return (width,)

    def activation(self, learned: Learned, edge: Array) -> Activation:
        """Returns gate and magnitude."""
        del edge
        scale = jnp.exp(learned["log_scale_F"])
        return Gated(learned["gate_F"], scale, learned["magnitude_F"])


def _grown(coefficient: float, progress: Array, warmup: float) -> Array:
    """Returns a coefficient that grows from zero over a share of all steps."""
    if warmup == 0:
        return jnp.asarray(coefficient)
    return coefficient * jnp.minimum(progress / warmup, 1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(pre_BxF: Array, threshold_F: Array, bandwidth: float) -> Array:
    """Returns `pre [pre > threshold]`, with a gradient for thresholds (eq. 11)."""
    del bandwidth
    return jnp.where(pre_BxF > threshold_F[None], jax.nn.relu(pre_BxF), 0)


def _jump_forward(pre_BxF: Array, threshold_F: Array, bandwidth: float) -> Any:
    return jump(pre_BxF, threshold_F, bandwidth), (pre_BxF, threshold_F)


def _jump_backward(bandwidth: float, kept: Any, g_BxF: Array) -> Any:
    pre, threshold = kept
    on = (pre > threshold[None]) & (pre > 0)
    near = _kernel(pre, threshold, bandwidth)
    return jnp.where(on, g_BxF, 0), -(threshold[None] * near * g_BxF).sum(0)


jump.defvjp(_jump_forward, _jump_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(pre_BxF: Array, threshold_F: Array, bandwidth: float) -> Array:
    """Returns 1 where `pre > threshold`, with a gradient for thresholds (eq. 12)."""
    del bandwidth
    return (pre_BxF > threshold_F[None]).astype(pre_BxF.dtype)


def _step_forward(pre_BxF: Array, threshold_F: Array, bandwidth: float) -> Any:
    return step(pre_BxF, threshold_F, bandwidth), (pre_BxF, threshold_F)


def _step_backward(bandwidth: float, kept: Any, g_BxF: Array) -> Any:
    pre, threshold = kept
    near = _kernel(pre, threshold, bandwidth)
    return jnp.zeros_like(pre), -(near * g_BxF).sum(0)


step.defvjp(_step_forward, _step_backward)


def _kernel(pre_BxF: Array, threshold_F: Array, bandwidth: float) -> Array:
    """Returns a rectangle of area one around the threshold."""
    near = jnp.abs(pre_BxF - threshold_F[None]) < bandwidth / 2
    return near.astype(pre_BxF.dtype) / bandwidth
