"""From a feature's pre-activation to its activation: what makes a dictionary sparse.

Every activation is a value with one method, `z = activation(pre)`, of arrays
`[..., F]`; all are zero where a feature is off, and the pre-activation or more than
that where it is on.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from influence.linalg.largest import keep_largest


class Activation(Protocol):
    """A function of pre-activations, `[..., F]`."""

    def __call__(self, pre: Array) -> Array:
        """Returns activations, none negative."""
        ...

    def scaled(self, factor_F: Array) -> "Activation":
        """Returns what activates features whose pre-activations are multiplied.

        So that `activation.scaled(c)(c * pre) == c * activation(pre)`, for positive
        factors.
        """
        ...


@jax.tree_util.register_static
@dataclass(frozen=True)
class ReLU:
    """On where positive: standard L1 dictionaries."""

    def __call__(self, pre: Array) -> Array:
        """Returns `max(pre, 0)`."""
        return jax.nn.relu(pre)

    def scaled(self, factor_F: Array) -> "ReLU":
        """Returns the same: it is homogeneous."""
        del factor_F
        return self


@jax.tree_util.register_static
@dataclass(frozen=True)
class TopK:
    """On where positive and among the `k` largest of a token (Gao et al. 2024, §2.3).

    Attributes:
      k: how many features of a token are on at most.
    """

    k: int

    def __call__(self, pre: Array) -> Array:
        """Returns the `k` largest positive pre-activations."""
        return keep_largest(jax.nn.relu(pre), self.k)

    def scaled(self, factor_F: Array) -> "TopK":
        """Returns the same, which is right only if all factors are equal."""
        del factor_F
        return self


@partial(jax.tree_util.register_dataclass, data_fields=["threshold_F"], meta_fields=[])
@dataclass(frozen=True)
class JumpReLU:
    """On where above a threshold of its own (Rajamanoharan et al. 2024, eq. 3).

    Attributes:
      threshold_F: which a pre-activation has to exceed.
    """

    threshold_F: Array

    def __call__(self, pre: Array) -> Array:
        """Returns `pre [pre > threshold]`, and nothing negative."""
        threshold = self.threshold_F.reshape((1,) * (pre.ndim - 1) + (-1,))
        return jnp.where(pre > threshold, jax.nn.relu(pre), 0)

    def scaled(self, factor_F: Array) -> "JumpReLU":
        """Returns the same with its thresholds multiplied."""
        return JumpReLU(self.threshold_F * factor_F)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["gate_F", "scale_F", "bias_F"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Gated:
    """A gate says whether a feature is on, a magnitude how much (2404.16014, eq. 6).

    Both come from one product with the encoder, `pre`, which has no bias here.

    Attributes:
      gate_F: `b_gate`; on where `pre + b_gate > 0`.
      scale_F: `exp(r_mag)`, what the magnitude's pre-activation is multiplied by.
      bias_F: `b_mag`, added to it.
    """

    gate_F: Array
    scale_F: Array
    bias_F: Array

    def __call__(self, pre: Array) -> Array:
        """Returns `[pre + b_gate > 0] relu(exp(r_mag) pre + b_mag)`."""
        unit = (1,) * (pre.ndim - 1) + (-1,)
        gate, scale, bias = (
            x.reshape(unit) for x in (self.gate_F, self.scale_F, self.bias_F)
        )
        return jnp.where(pre + gate > 0, jax.nn.relu(scale * pre + bias), 0)

    def scaled(self, factor_F: Array) -> "Gated":
        """Returns the same with gates and magnitudes multiplied."""
        return Gated(self.gate_F * factor_F, self.scale_F, self.bias_F * factor_F)
