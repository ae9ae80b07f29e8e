"""Gemma Scope's arrays: `params.npz`."""

import re
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from influence.interpret.activations import JumpReLU
from influence.runtime.dictionaries.arrays import Arrays
from influence.runtime.dictionaries.stored import About, Stored
from influence.runtime.dictionaries.tensors import needed

WEIGHTS = "params.npz"


def read(folder: Path) -> Stored:
    """Returns the dictionary in a folder, `layer_12/width_16k/average_l0_82`.

    Raises:
      ValueError: if the file is damaged or holds objects, or its layer is not known.
    """
    path = folder / WEIGHTS
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path} can't be read without running what is in it: {error}. Fetch it "
            "again; arrays of numbers need no objects."
        ) from error
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    encoder, bias, decoder, base, threshold = needed(arrays, names, path)
    parts = Arrays(encoder, bias, decoder, base)
    made = parts.dictionary(JumpReLU(jnp.asarray(threshold)), path)
    return Stored(made, About(_site(folder), kind="jumprelu"))


def _site(folder: Path) -> str:
    """Returns the site that a folder's path names."""
    said = re.search(r"layer_(\d+)", str(folder))
    if said is None:
        raise ValueError(
            f"The path {folder} does not say which layer the dictionary is of. Keep "
            "the folders as they are published: layer_12/width_16k/average_l0_82."
        )
    block = int(said[1])
    if "-mlp" in str(folder):
        return f"mlp_out.{block}"
    if "-att" in str(folder):
        return f"attention_heads.{block}"
    return f"resid.{block + 1}"
