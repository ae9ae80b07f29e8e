"""Dictionaries of features: what a sparse autoencoder or transcoder has learned.

    z = activation(x W_enc + b_enc),    y ≈ z W_dec + b_dec  (+ W_skip x)

An autoencoder's `y` is its `x`; a transcoder's is what an MLP makes of it. Whatever was
done to `x` in training (centring, scaling, a bias taken off) is folded into these
arrays, so this is all there is.

Letters: `F` features, `D` what is read, `O` what is written (`D` in an autoencoder).
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from influence.interpret.activations import Activation


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "encoder_DxF",
        "encoder_bias_F",
        "decoder_FxO",
        "decoder_bias_O",
        "activation",
        "skip_OxD",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class Dictionary:
    """A dictionary of features.

    Attributes:
      encoder_DxF: by which features are read.
      encoder_bias_F: added to their pre-activations.
      decoder_FxO: each feature's direction, a row.
      decoder_bias_O: what is written if no feature is on.
      activation: which features are on, and how much.
      skip_OxD: of a skip transcoder, the linear map beside the features.

    Example:
      >>> from influence.interpret.activations import ReLU
      >>> from influence.interpret.dictionary import Dictionary, decode, encode
      >>> both = jnp.concatenate([jnp.eye(2), -jnp.eye(2)])
      >>> signs = Dictionary(both.T, jnp.zeros(4), both, jnp.zeros(2), ReLU())
      >>> encode(signs, jnp.array([3.0, -1.0])).tolist()
      [3.0, 0.0, 0.0, 1.0]
      >>> decode(signs, encode(signs, jnp.array([3.0, -1.0]))).tolist()
      [3.0, -1.0]
    """

    encoder_DxF: Array
    encoder_bias_F: Array
    decoder_FxO: Array
    decoder_bias_O: Array
    activation: Activation
    skip_OxD: Array | None = None

    @property
    def width(self) -> int:
        """Returns `F`."""
        return self.encoder_DxF.shape[1]

    @property
    def reads(self) -> int:
        """Returns `D`."""
        return self.encoder_DxF.shape[0]

    @property
    def writes(self) -> int:
        """Returns `O`."""
        return self.decoder_FxO.shape[1]


def pre_activations(dictionary: Dictionary, x: Array) -> Array:
    """Returns what decides which features are on, `[..., F]`."""
    pre = x @ dictionary.encoder_DxF
    return pre + dictionary.encoder_bias_F.reshape((1,) * (pre.ndim - 1) + (-1,))


def encode(dictionary: Dictionary, x: Array) -> Array:
    """Returns features' activations, `[..., F]`, of values `[..., D]`."""
    return dictionary.activation(pre_activations(dictionary, x))


def decode(dictionary: Dictionary, z: Array, x: Array | None = None) -> Array:
    """Returns what features stand for, `[..., O]`.

    Args:
      dictionary: the dictionary.
      z: activations, `[..., F]`.
      x: what was read, `[..., D]`; a skip transcoder needs it.

    Raises:
      ValueError: if it is needed and missing.
    """
    y = z @ dictionary.decoder_FxO
    y = y + dictionary.decoder_bias_O.reshape((1,) * (y.ndim - 1) + (-1,))
    if dictionary.skip_OxD is None:
        return y
    if x is None:
        raise ValueError(
            "A skip transcoder's output depends on its input. Pass what it read as `x`."
        )
    return y + x @ dictionary.skip_OxD.T


def reconstruct(dictionary: Dictionary, x: Array) -> Array:
    """Returns what the dictionary makes of values, `[..., O]`."""
    return decode(dictionary, encode(dictionary, x), x)


def unit(dictionary: Dictionary) -> Dictionary:
    """Returns the same dictionary with decoder rows of length one.

    Activations are multiplied by the lengths, reconstructions stay. A feature without
    a direction stays as it is. A `TopK` chooses alike only if all lengths are equal.
    """
    length_F = jnp.linalg.norm(dictionary.decoder_FxO, axis=1)
    length_F = jnp.where(length_F > 0, length_F, 1)
    return replace(
        dictionary,
        encoder_DxF=dictionary.encoder_DxF * length_F[None],
        encoder_bias_F=dictionary.encoder_bias_F * length_F,
        decoder_FxO=dictionary.decoder_FxO / length_F[:, None],
        activation=dictionary.activation.scaled(length_F),
    )
