"""A tiny decoder, a corpus, and a dictionary trained on them, for the tests."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from influence.model.transformer import Apply, Config, Decoder
from influence.runtime.models import Model, given
from influence.runtime.run.options import Data, Packing
from influence.runtime.sae.options import Read, Train
from influence.runtime.sae.training import train

QUIET = Console(quiet=True)
CONFIG = Config(23, 16, width=8, hidden=12, heads=2, blocks=2, tied=True)
PACKING = Packing(separator="none")


def models(seed: int = 0) -> dict[str, Model]:
    """Returns a model by its role."""
    params = nnx.state(Decoder(CONFIG, rngs=nnx.Rngs(seed), dtype=jnp.float64))
    return {"model": given(Apply(CONFIG), params, vocabulary=23, context=16)}


def corpus(folder: Path, n: int = 60) -> Path:
    """Writes documents of token ids."""
    rng = np.random.default_rng(0)
    path = folder / "ids.jsonl"
    rows = (rng.integers(0, 23, 33).tolist() for _ in range(n))
    path.write_text("".join(f'{{"text": {x}}}\n' for x in rows), encoding="utf-8")
    return path


def reads(folder: Path) -> Read:
    """Returns what the commands read."""
    path = folder / "ids.jsonl"
    return Read(
        "my own", Data(str(path if path.is_file() else corpus(folder))), PACKING
    )


def options(folder: Path, **rest) -> Train:
    """Returns how a dictionary is trained."""
    own = {"site": ("resid.1",), "k": 4, "tokens": 20_000, "train_batch": 256, **rest}
    return Train(folder / "sae", reads(folder), **own)


def trained(folder: Path, **rest) -> str:
    """Trains a dictionary; returns where it is."""
    train(options(folder, **rest), QUIET, models())
    return str(folder / "sae" / "dictionary")
