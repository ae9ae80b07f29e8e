"""dictionary_learning's folders: `ae.pt`, a state dict of torch, and `config.json`."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from influence.interpret.activations import Activation, Gated, JumpReLU, ReLU, TopK
from influence.runtime.dictionaries.arrays import Arrays, check_k
from influence.runtime.dictionaries.stored import About, Stored
from influence.runtime.dictionaries.tensors import needed
from influence.runtime.dictionaries.torch_state import read_state
from influence.runtime.huggingface.folders import read_json

WEIGHTS = "ae.pt"


def read(folder: Path) -> Stored:
    """Returns the dictionary in a folder; the file is read and not run.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged, holds something else than tensors, or is of a
        kind that is not known.
    """
    path = folder / WEIGHTS
    said = read_json(folder / "config.json").get("trainer", {})
    state = read_state(path)
    kind = str(said.get("dict_class", ""))
    arrays = {k: x for k, x in state.items() if isinstance(x, np.ndarray)}
    parts, activation = _parts(kind, arrays, state, said, path)
    about = About(_site(said, folder), None, str(said.get("lm_name", "")), kind=kind)
    return Stored(parts.dictionary(activation, path), about)


def _parts(
    kind: str, arrays: dict[str, np.ndarray], state: Any, said: Any, path: Path
) -> tuple[Arrays, Activation]:
    """Returns a dictionary's arrays, and its activation, by its class."""
    if "W_enc" in arrays:  # classes that keep their matrices themselves
        encoder, decoder = needed(arrays, ("W_enc", "W_dec"), path)
        bias, base = needed(arrays, ("b_enc", "b_dec"), path)
        if "Matryoshka" in kind:
            return Arrays(encoder, bias, decoder, base, None, True), _edge(
                encoder.shape[1], arrays, state, said, path
            )
        (threshold,) = needed(arrays, ("threshold",), path)
        activation = JumpReLU(jnp.asarray(threshold))
        centred = bool(state.get("apply_b_dec_to_input", False))
        return Arrays(encoder, bias, decoder, base, None, centred), activation
    encoder, decoder = needed(arrays, ("encoder.weight", "decoder.weight"), path)
    if "Gated" in kind or "r_mag" in arrays:
        names = ("r_mag", "gate_bias", "mag_bias", "decoder_bias")
        scale, gate, magnitude, base = needed(arrays, names, path)
        activation = Gated(*map(jnp.asarray, (gate, np.exp(scale), magnitude)))
        return Arrays(encoder.T, None, decoder.T, base, None, True), activation
    (bias,) = needed(arrays, ("encoder.bias",), path)
    if "k" in state or "TopK" in kind:
        (base,) = needed(arrays, ("b_dec",), path)
        activation = _edge(len(encoder), arrays, state, said, path)
        return Arrays(encoder.T, bias, decoder.T, base, None, True), activation
    centred = "bias" in arrays
    (base,) = needed(arrays, ("bias",) if centred else ("decoder.bias",), path)
    return Arrays(encoder.T, bias, decoder.T, base, None, centred), ReLU()


def _edge(width: int, arrays: Any, state: Any, said: Any, path: Path) -> Activation:
    """Returns a threshold for all features, or the `k` largest if none was found."""
    threshold = float(np.asarray(arrays.get("threshold", -1.0)))
    if threshold > 0:
        return JumpReLU(jnp.full(width, threshold, jnp.float32))
    k = state.get("k", said.get("k"))
    return TopK(check_k(np.asarray(k).item() if k is not None else k, width, path))


def _site(said: dict[str, Any], folder: Path) -> str:
    """Returns the site of a submodule's name."""
    name, layer = str(said.get("submodule_name", "")), said.get("layer")
    known = {"resid_post": "resid", "mlp_out": "mlp_out", "attn_out": "attention_out"}
    found = next((x for k, x in known.items() if k in name), None)
    if found is None or not isinstance(layer, int):
        raise ValueError(
            f"{folder / 'config.json'} names the submodule {name!r} of layer "
            f"{layer!r}, which has no site here. Known are {', '.join(known)}, with a "
            "layer."
        )
    return f"{found}.{layer + 1 if found == 'resid' else layer}"
