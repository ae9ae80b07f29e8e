"""dictionary_learning's folders: `ae.pt`, a state dict, and `config.json`.

The state dict is converted without being unpickled. Where the library multiplies
activations by the lengths of decoder rows, so does what is read: its rows are of length
one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from influence.interpret.activations import Activation, Gated, JumpReLU, ReLU
from influence.interpret.dictionary import unit
from influence.runtime.dictionaries.arrays import (
    Arrays,
    assembled,
    centred,
    checked,
    top,
)
from influence.runtime.dictionaries.stored import About, Stored
from influence.runtime.dictionaries.torch_zip import read_state
from influence.runtime.huggingface.folders import read_json

WEIGHTS, CONFIG = "ae.pt", "config.json"

LINEAR = {
    "encoder.weight": ("W_enc", "FD"),
    "encoder.bias": ("b_enc", "F"),
    "decoder.weight": ("W_dec", "DF"),
}
PLAIN = {
    "W_enc": ("W_enc", "DF"),
    "b_enc": ("b_enc", "F"),
    "W_dec": ("W_dec", "FD"),
    "b_dec": ("b_dec", "D"),
}
GATED = {
    "encoder.weight": ("W_enc", "FD"),
    "decoder.weight": ("W_dec", "DF"),
    "decoder_bias": ("b_dec", "D"),
    "gate_bias": ("gate", "F"),
    "mag_bias": ("magnitude", "F"),
    "r_mag": ("r_mag", "F"),
}


class _Class(NamedTuple):
    """How a class of theirs keeps its arrays.

    Attributes:
      kind: what we call it.
      names: ours by theirs, and their axes.
      numbers: its tensors that are no arrays of the dictionary.
      centres: whether it takes its decoder's bias off what it reads.
      lengthens: whether it multiplies activations by the lengths of decoder rows.
    """

    kind: str
    names: Mapping[str, tuple[str, str]]
    numbers: tuple[str, ...] = ()
    centres: bool = True
    lengthens: bool = False


CLASSES = {
    "AutoEncoder": _Class("standard", {**LINEAR, "bias": ("b_dec", "D")}),
    "AutoEncoderNew": _Class(
        "standard", {**LINEAR, "decoder.bias": ("b_dec", "D")}, centres=False
    ),
    "GatedAutoEncoder": _Class("gated", GATED, lengthens=True),
    "AutoEncoderTopK": _Class(
        "topk", {**LINEAR, "b_dec": ("b_dec", "D")}, ("k", "threshold")
    ),
    "BatchTopKSAE": _Class(
        "batchtopk", {**LINEAR, "b_dec": ("b_dec", "D")}, ("k", "threshold")
    ),
    "JumpReluAutoEncoder": _Class(
        "jumprelu",
        {**PLAIN, "threshold": ("threshold", "F")},
        centres=False,
        lengthens=True,
    ),
    "MatryoshkaBatchTopKSAE": _Class(
        "matryoshka", PLAIN, ("k", "threshold", "group_sizes")
    ),
}
"""What is read, by the class's name in the config."""

SUBMODULE = re.compile(r"(resid|mlp|attn|attention)\w*?_?(?:layer)?_?(\d+)")
SITES = {"mlp": "mlp_out", "attn": "attention_out", "attention": "attention_out"}


def read(folder: str | Path) -> Stored:
    """Returns the dictionary of a folder.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if one is damaged, is of a class that is not read here, or is a pickle
        of anything but tensors.
    """
    path = Path(folder)
    words = read_json(path / CONFIG)
    trainer = words.get("trainer") or {}
    how = _class(path, trainer)
    state = _state(path / WEIGHTS)
    numbers = {k: state.pop(k) for k in how.numbers if k in state}
    wanted = {theirs: axes for theirs, (_, axes) in how.names.items()}
    sizes = {"D": trainer.get("activation_dim"), "F": trainer.get("dict_size")}
    found = checked(path / WEIGHTS, state, wanted, sizes)
    arrays = {
        ours: found[theirs].T if axes in ("FD", "DF") and theirs in LINEAR else x
        for theirs, (ours, axes) in how.names.items()
        for x in (found[theirs],)
    }
    activation = _activation(path, how.kind, arrays, numbers)
    none = np.zeros(arrays["W_enc"].shape[1], arrays["W_enc"].dtype)
    arrays = {"b_enc": none, **arrays}
    dictionary = assembled(centred(arrays) if how.centres else arrays, activation)
    about = About(
        _site(path, trainer),
        model=str(trainer.get("lm_name") or ""),
        kind=how.kind,
        context=(words.get("buffer") or {}).get("ctx_len"),
        facts=words,
    )
    return Stored(unit(dictionary) if how.lengthens else dictionary, about)


def _class(path: Path, trainer: Mapping[str, Any]) -> _Class:
    name = trainer.get("dict_class")
    if name not in CLASSES:
        raise ValueError(
            f"{path / CONFIG} says dict_class {name!r}. Choose a dictionary of one of "
            f"{', '.join(CLASSES)}, or correct the config."
        )
    return CLASSES[name]


def _state(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}. Fetch it again.")
    return read_state(path)


def _activation(path: Path, kind: str, arrays: Arrays, numbers: Arrays) -> Activation:
    width = arrays["W_enc"].shape[1]
    if kind == "topk":
        k = numbers.get("k")
        return top(path / WEIGHTS, None if k is None else k.tolist(), width)
    if kind == "gated":
        gate, magnitude = jnp.asarray(arrays["gate"]), jnp.asarray(arrays["magnitude"])
        return Gated(gate, jnp.asarray(np.exp(arrays["r_mag"])), magnitude)
    if kind == "jumprelu":
        return JumpReLU(jnp.asarray(arrays["threshold"]))
    if kind == "standard":
        return ReLU()
    return JumpReLU(_one_threshold(path / WEIGHTS, numbers, arrays["W_enc"]))


def _one_threshold(path: Path, numbers: Arrays, like: np.ndarray) -> jnp.ndarray:
    """Returns the threshold that all features have; -1 before it was estimated."""
    value = numbers.get("threshold")
    if value is None or value.shape or not np.isfinite(value):
        what = "no threshold" if value is None else f"a threshold {value.shape}"
        raise ValueError(
            f"{path} has {what}, and not one finite number. Fetch it again."
        )
    return jnp.full(like.shape[1], value.astype(like.dtype), like.dtype)


def _site(path: Path, trainer: Mapping[str, Any]) -> str:
    """Returns what the config's submodule and layer name: what a module puts out."""
    name, layer = trainer.get("submodule_name"), trainer.get("layer")
    match = None if name is None else SUBMODULE.fullmatch(name)
    if match is not None:
        part, layer = match[1], int(match[2])
    elif name is None and isinstance(layer, int):
        part = "resid"
    else:
        raise ValueError(
            f"{path / CONFIG} says submodule_name {name!r} and layer {layer!r}, which "
            "name no site. Correct them: resid_post_layer_4, mlp_out_layer_4."
        )
    return f"resid.{layer + 1}" if part == "resid" else f"{SITES[part]}.{layer}"
