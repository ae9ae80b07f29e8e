"""A dictionary's arrays as files have them, checked and put together."""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from influence.interpret.activations import Activation
from influence.interpret.dictionary import Dictionary


class Arrays(NamedTuple):
    """A dictionary's arrays as files have them.

    Attributes:
      encoder_DxF: the encoder.
      encoder_bias_F: its bias; None if there is none.
      decoder_FxO: the decoder.
      decoder_bias_O: its bias; None if there is none.
      skip_OxD: a skip transcoder's.
      centred: whether the decoder's bias is taken off what is read.
    """

    encoder_DxF: np.ndarray
    encoder_bias_F: np.ndarray | None
    decoder_FxO: np.ndarray
    decoder_bias_O: np.ndarray | None
    skip_OxD: np.ndarray | None = None
    centred: bool = False

    def dictionary(self, activation: Activation, path: Path) -> Dictionary:
        """Returns the dictionary, the centring folded into the encoder's bias.

        Raises:
          ValueError: if shapes do not fit one another, or a number is not finite.
        """
        arrays = self._whole()
        arrays.check(path)
        encoder, bias, decoder, base, skip, centred = arrays
        assert bias is not None
        assert base is not None
        if centred:
            bias = bias - base @ encoder
        kind = encoder.dtype if encoder.dtype.itemsize >= 4 else np.dtype(np.float32)

        def here(x: np.ndarray) -> Any:
            return jnp.asarray(x.astype(kind))

        return Dictionary(
            here(encoder),
            here(bias),
            here(decoder),
            here(base),
            activation,
            None if skip is None else here(skip),
        )

    def _whole(self) -> "Arrays":
        """Returns the same with zeros for what is missing."""
        bias, base = self.encoder_bias_F, self.decoder_bias_O
        if bias is None:
            bias = np.zeros(self.encoder_DxF.shape[-1], self.encoder_DxF.dtype)
        if base is None:
            base = np.zeros(self.decoder_FxO.shape[-1], self.decoder_FxO.dtype)
        return self._replace(encoder_bias_F=bias, decoder_bias_O=base)

    def check(self, path: Path) -> None:
        """Raises if shapes do not fit one another, or a number is not finite."""
        d, f = (*self.encoder_DxF.shape, 0, 0)[:2]
        o = (*self.decoder_FxO.shape, 0, 0)[1]
        wanted = {
            "encoder": (self.encoder_DxF, (d, f)),
            "encoder's bias": (self.encoder_bias_F, (f,)),
            "decoder": (self.decoder_FxO, (f, o)),
            "decoder's bias": (self.decoder_bias_O, (o,)),
            "skip": (self.skip_OxD, (o, d)),
        }
        for name, (x, shape) in wanted.items():
            if x is not None:
                check_array(name, x, shape, path)
        if self.centred and d != o:
            raise ValueError(
                f"{path} takes the decoder's bias, {o} numbers, off what is read, {d} "
                "numbers. A transcoder must not; set `apply_b_dec_to_input` to false."
            )


def check_array(name: str, x: np.ndarray, shape: tuple[int, ...], path: Path) -> None:
    """Raises if an array has another shape than it should, or is not finite.

    Raises:
      ValueError: saying which, and what it should have.
    """
    if x.shape != shape:
        raise ValueError(
            f"{path}: the {name} has shape {x.shape}, and {shape} goes with the others. "
            "Fetch the file again."
        )
    odd = int((~np.isfinite(x.astype(np.float32))).sum())
    if odd:
        raise ValueError(
            f"{path}: {odd} of the {x.size} numbers of the {name} are not finite. "
            "Fetch the file again, or train anew."
        )


def check_k(k: Any, width: int, path: Path) -> int:
    """Returns how many features of a token are on at most.

    Raises:
      ValueError: if that is no number within the width.
    """
    if not isinstance(k, int | float) or k != int(k) or not 1 <= k <= width:
        raise ValueError(
            f"{path} says that {k!r} features of a token are on, of {width}. k is a "
            f"whole number from 1 to {width}."
        )
    return int(k)
