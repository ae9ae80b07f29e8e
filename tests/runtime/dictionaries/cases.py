"""Dictionaries that others wrote, random ones of our own, and ways to damage them."""

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from influence.interpret.activations import Gated, JumpReLU, ReLU, TopK
from influence.interpret.dictionary import Dictionary, encode, reconstruct
from influence.runtime.dictionaries.stored import Stored

GOLDEN = Path(__file__).parents[2] / "golden" / "sae"

D, F, OUT = 8, 16, 6
"""Numbers that are read, features, and numbers that transcoders write."""

TOLERANCE = 1e-5
"""Of the largest number: sums of float32 in another order."""


def close(found, expected) -> None:
    """Asserts that two arrays are as equal as sums in another order."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def as_expected(stored: Stored, folder: Path) -> None:
    """Asserts that a dictionary does what the library did that wrote it."""
    expected = load_file(folder / "expected.safetensors")
    x = jnp.asarray(expected["x"])
    z = encode(stored.dictionary, x)
    assert ((z > 0) == (expected["z"] > 0)).all(), "other features are on"
    close(z, expected["z"])
    close(reconstruct(stored.dictionary, x), expected["y"])


def same(a: Dictionary, b: Dictionary) -> None:
    """Asserts that two dictionaries are equal to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def drawn(seed: int, *shape: int) -> np.ndarray:
    """Returns random numbers in float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / 2


def random(kind: str, *, out: int = D, skip: bool = False) -> Dictionary:
    """Returns a random dictionary with a kind of activation."""
    return Dictionary(
        jnp.asarray(drawn(0, D, F)),
        jnp.asarray(drawn(1, F)),
        jnp.asarray(drawn(2, F, out)),
        jnp.asarray(drawn(3, out)),
        ACTIVATIONS[kind],
        jnp.asarray(drawn(4, out, D)) if skip else None,
    )


ACTIVATIONS = {
    "standard": ReLU(),
    "topk": TopK(3),
    "jumprelu": JumpReLU(jnp.asarray(np.abs(drawn(5, F)))),
    "gated": Gated(
        jnp.asarray(drawn(6, F)),
        jnp.asarray(np.exp(drawn(7, F))),
        jnp.asarray(drawn(8, F)),
    ),
}


def copied(name: str, folder: Path) -> Path:
    """Returns a copy of a golden folder, under its own name."""
    place = folder / Path(name).name
    shutil.copytree(GOLDEN / name, place)
    return place


def words(path: Path, **changes) -> None:
    """Changes words of a config; "OUT" takes one out."""
    said = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: x for k, x in said.items() if x != "OUT"}))


def arrays(path: Path, **changes) -> None:
    """Changes arrays of a safetensors file; None takes one out."""
    found = {**load_file(path), **changes}
    save_file({k: x for k, x in found.items() if x is not None}, path)


def zipped(
    path: Path,
    like: Path,
    parts: Mapping[str, bytes | None],
    method: int = zipfile.ZIP_STORED,
) -> Path:
    """Writes a copy of a state dict with some of its parts changed, or taken out."""
    with zipfile.ZipFile(like) as file:
        found = {x: file.read(x) for x in file.namelist()}
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in found.items():
            new = parts.get(name.partition("/")[2], data)
            if new is not None:
                file.writestr(name, new)
    return path
