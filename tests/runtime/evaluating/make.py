"""A finished run of a tiny model, and how it is said to have been trained."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np

from tests.runtime.run import make

RECIPE = {"steps": 8, "batch": 4, "rate": 0.05, "from": "start"}


def recipe(folder, **changed):
    """Writes a recipe file; returns where. What is None is left out."""
    path = folder / "recipe.toml"
    said = {k: x for k, x in {**RECIPE, **changed}.items() if x is not None}
    lines = (f"{k} = {x!r}\n" for k, x in said.items())
    path.write_text("".join(lines).replace("'", '"'), encoding="utf-8")
    return path


@cache
def models():
    """Returns a run's model, and beside it what training began with.

    The same every time, so that what was compiled for it serves all tests.
    """
    own = make.models()
    model = own["model"]
    rng = np.random.default_rng(5)
    start = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), model.params
    )
    return {**own, "start": replace(model, params=start, digest="start")}
