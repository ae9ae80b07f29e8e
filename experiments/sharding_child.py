"""One process of `experiments.sharding`: fits, asks and scans on meshes of devices."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx
from rich.console import Console

from experiments.material import write_corpus, write_random_llama
from influence.attribution.measurements import completions
from influence.attribution.query import query
from influence.attribution.scan import scan
from influence.curvature import covariance, eigenvalues
from influence.curvature.covariance import PerToken
from influence.curvature.eigenvalues import Bases
from influence.curvature.ekfac import fit
from influence.model.config import Config
from influence.model.examples import sequences
from influence.model.task import LanguageModel, Sampled
from influence.model.transformer import Decoder
from influence.runtime.driver import Driver
from influence.runtime.mesh import COLUMNS, ROWS, Layout, layout
from influence.runtime.placing import placed
from influence.runtime.processes import join, leads

CONFIG = Config(64, 16, width=32, hidden=64, heads=4, blocks=2)

LLAMA = Config(
    vocabulary=512, context=32, width=32, hidden=64, heads=4, blocks=2, groups=2
)

COUNT, BATCH = 40, 16
"""Sequences, and those of a batch: eight lanes have as many, the last batch not."""


def bytes_held(tree: Any) -> int:
    """Returns how many bytes of a pytree the device holds that holds most."""
    held: dict[Any, int] = {}
    for x in {id(x): x for x in jax.tree.leaves(tree)}.values():
        for piece in x.addressable_shards:
            held[piece.device] = held.get(piece.device, 0) + piece.data.nbytes
    return max(held.values())


def planned(tree: Any, model: int, order: tuple[int, ...], lead: int = 0) -> int:
    """Returns how many bytes a device has to hold: what can be cut is."""
    total = 0
    for x in {id(x): x for x in jax.tree.leaves(tree)}.values():
        shape = x.shape[lead:]
        cut = len(shape) > 1 and any(shape[axis] % model == 0 for axis in order)
        total += math.prod(shape) * x.dtype.itemsize // (model if cut else 1)
    return total


def material(dtype: str) -> tuple[Any, Any, Any, Any]:
    """Returns task, parameters, sequences and measurements."""
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    graph, state = nnx.split(decoder)
    params = jax.tree.map(lambda x: x.astype(dtype), state)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 64, 16).tolist() for _ in range(COUNT)]
    task = LanguageModel(_Apply(graph))
    measured = completions(task, {"a": ([1, 2], [3]), "b": ([4], [5, 6])})
    return task, params, sequences(texts), measured


class _Apply:
    """A decoder as a function of its parameters."""

    def __init__(self, graph: Any):
        self.graph = graph

    def __call__(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Returns logits."""
        return nnx.merge(self.graph, params)(tokens)


def carried_out(dtype: str, here: Layout | None) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns scores by layer, and what a device holds for them."""
    task, params, examples, measured = material(dtype)
    batches = examples.batches(BATCH)
    driver = Driver(Console(quiet=True), here)
    if here is not None:
        params = here.shard(params)
    curvature = fit(task, params, batches, run=driver.run)
    asked = query(curvature, params, measured)
    if here is not None:
        curvature, asked = here.shard(curvature), here.shard(asked)
    scores = scan(task, params, asked, batches, run=driver.run).layers.values
    if here is None:
        return scores, {}
    model = here.mesh.shape["model"]
    layers = curvature.layers
    bases = Bases(
        {x.reads: curvature.blocks[x.name].inputs for x in layers},
        {x.name: curvature.blocks[x.name].outputs for x in layers},
    )
    passes = {
        "covariances": covariance.fold(task, params, layers, Sampled(), PerToken()),
        "eigenvalues": eigenvalues.fold(task, params, layers, Sampled(), bases),
    }
    states = {}
    for name, fold in passes.items():
        plan = placed(fold, batches, here)
        what, _ = next(plan.walk(0))
        states[name] = plan.update(plan.init(), what)
    factors = [x.blocks for x in bases.inputs.values()]
    factors += [x.blocks for x in bases.outputs.values()]
    lam = [x.lam_OxI for x in curvature.blocks.values()]
    held = {"parameters": params, **states, "bases": factors, "Λ": lam,
            "queries": asked.forms}  # fmt: skip
    orders = {"parameters": COLUMNS, "bases": COLUMNS}
    return scores, {
        "bytes": {k: bytes_held(x) for k, x in held.items()},
        "planned": {
            k: planned(x, model, orders.get(k, ROWS), int(k in states))
            for k, x in held.items()
        },
    }


def main(
    out: tyro.conf.Positional[Path],
    dtype: tyro.conf.Positional[str],
    meshes: tyro.conf.Positional[str],
    dump: Path | None = None,
    corpus: bool = False,
) -> None:
    """Carries out everything on each mesh.

    Args:
        out: A folder for scores and what there is to say of them.
        dtype: Of everything.
        meshes: `DATAxMODEL`, several with spaces between.
        dump: Where the compiler writes its programs.
        corpus: Only write a corpus and a model for the command line.
    """
    if corpus:
        write_corpus(out / "corpus.jsonl", 0.05)
        write_random_llama(out / "llama", LLAMA)
        return
    join()
    jax.config.update("jax_enable_x64", dtype == "float64")
    known: set[str] = set()
    if jax.process_count() == 1:
        scores, _ = carried_out(dtype, None)
        np.save(out / "base.npy", scores)
    for mesh in meshes.split():
        data, model = (int(x) for x in mesh.split("x"))
        several = jax.process_count() > 1
        devices = None if several else jax.devices()[: data * model]
        known |= _texts(dump)
        scores, about = carried_out(dtype, layout(data, model, devices))
        if leads():
            np.save(out / f"{mesh}.npy", scores)
            new = sorted(_texts(dump) - known)
            about["programs"] = _stages(new)
            (out / f"{mesh}.json").write_text(json.dumps(about))


def _texts(dump: Path | None) -> set[str]:
    """Returns the names of the compiled programs there are."""
    if dump is None or not dump.exists():
        return set()
    return {x.name for x in dump.glob("*after_optimizations.txt")}


def _stages(texts: list[str]) -> dict[str, list[str]]:
    """Returns the programs of each stage: of updates the first is the covariances'."""
    updates = [x for x in texts if "jit__update" in x]
    reads = [x for x in texts if "jit__read" in x]
    return {
        "covariances": updates[:1],
        "eigenvalues": updates[1:],
        "scan": reads[-1:],
    }


if __name__ == "__main__":
    tyro.cli(main)
