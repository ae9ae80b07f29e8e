"""A dictionary's arrays as files have them: read, held against each other, folded.

In between they have SAELens' names: `W_enc` [D, F], `b_enc` [F], `W_dec` [F, O],
`b_dec` [O], `W_skip` [O, D].
"""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from influence.interpret.activations import Activation, TopK
from influence.interpret.dictionary import Dictionary

Arrays = Mapping[str, np.ndarray]

LETTERS = {
    "D": "numbers that are read",
    "F": "features",
    "O": "numbers that are written",
}
"""What the axes of arrays stand for."""


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of a file.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}. Fetch it again.")
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()  # a method of the file; it is no mapping
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) can't be read: {error}. It may be "
            "cut short or be no safetensors file; fetch it again."
        ) from error


def checked(
    path: Path,
    arrays: Arrays,
    wanted: Mapping[str, str],
    sizes: Mapping[str, int | None],
) -> dict[str, np.ndarray]:
    """Returns arrays in float32, or wider if they are, if they fit each other.

    Args:
      path: where they are from.
      arrays: by name.
      wanted: the axes of each, as letters: `{"W_enc": "DF"}`.
      sizes: of the letters, as far as something else says them; an array says the rest.

    Raises:
      ValueError: if one is missing or beside, has a wrong shape or type, or numbers
        that are not finite.
    """
    if arrays.keys() != wanted.keys():
        raise ValueError(
            f"{path} has {', '.join(sorted(arrays)) or 'no arrays'}, and what it is "
            f"said to be has {', '.join(sorted(wanted))}. Restore it, or correct what "
            "its config says it is."
        )
    known = {k: n for k, n in sizes.items() if n is not None}
    for name, axes in wanted.items():
        _check_shape(path, name, arrays[name], axes, known)
    return {name: _floats(path, name, arrays[name]) for name in wanted}


def _check_shape(
    path: Path, name: str, array: np.ndarray, axes: str, known: dict[str, int]
) -> None:
    """Raises if a shape is not what is known, and learns the rest from it."""
    if array.ndim == len(axes):
        for letter, size in zip(axes, array.shape, strict=True):
            known.setdefault(letter, size)
    if array.shape != tuple(known.get(x) for x in axes):
        told = ", ".join(
            f"{known[x]} {LETTERS[x]}" if x in known else LETTERS[x]
            for x in dict.fromkeys(axes)
        )
        raise ValueError(
            f"{path}: {name} has shape {array.shape}, and is an array of {told}. "
            "Restore it, or correct what its config says."
        )


def _floats(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f" and array.dtype != jnp.bfloat16:
        raise ValueError(
            f"{path}: {name} holds {array.dtype}, no real numbers. Restore it."
        )
    wide = array if array.dtype == np.float64 else array.astype(np.float32)
    bad = int((~np.isfinite(wide)).sum())
    if bad:
        raise ValueError(
            f"{path}: {bad:,} of the {wide.size:,} numbers in {name} are not finite. "
            "Train it again with a lower learning rate, or fetch it again."
        )
    return wide


def top(path: Path, k: object, width: int) -> TopK:
    """Returns the activation that keeps the `k` largest of `width` features.

    Raises:
      ValueError: if that is no such number.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= width:
        raise ValueError(
            f"{path} says that the {k} largest of {width:,} features are on. Correct "
            f"`k`: it is a whole number from 1 to {width:,}."
        )
    return TopK(k)


def centred(arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns arrays of a dictionary that takes `b_dec` off what it reads, without.

    `(x - b_dec) W_enc + b_enc = x W_enc + (b_enc - b_dec W_enc)`
    """
    wide = {k: arrays[k].astype(np.float64) for k in ("b_enc", "b_dec", "W_enc")}
    bias = wide["b_enc"] - wide["b_dec"] @ wide["W_enc"]
    return {**arrays, "b_enc": bias.astype(arrays["b_enc"].dtype)}


def rescaled(arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns arrays of a dictionary that multiplies pre-activations by `‖W_dec‖`.

    Its decoder's rows are then of length one. A feature without a direction is off.
    """
    length = np.linalg.norm(arrays["W_dec"], axis=1)
    inverse = np.divide(1, length, out=np.zeros_like(length), where=length > 0)
    return {
        **arrays,
        "W_enc": arrays["W_enc"] * length,
        "b_enc": arrays["b_enc"] * length,
        "W_dec": arrays["W_dec"] * inverse[:, None],
    }


def assembled(arrays: Arrays, activation: Activation) -> Dictionary:
    """Returns the dictionary that arrays are of."""
    skip = arrays.get("W_skip")
    return Dictionary(
        jnp.asarray(arrays["W_enc"]),
        jnp.asarray(arrays["b_enc"]),
        jnp.asarray(arrays["W_dec"]),
        jnp.asarray(arrays["b_dec"]),
        activation,
        None if skip is None else jnp.asarray(skip),
    )
