"""Does the engine give the numbers an independent implementation gives?

    python -m experiments.parity_kronfluence --golden F.npz --reference DIR

Compares with what kronfluence 1.0.1 (PyTorch) computed for two language models:

* `--golden`: a tiny model with a tied head on padded data, in float64. Covariances,
  eigenvalues, scores of every layer at three dampings, scores of every token.
* `--reference`: a folder with a trained character model (`small/`) and what
  kronfluence made of it in float32 (`ref_small/`), 4000 sequences. A few minutes.

Both fit the empirical Fisher. kronfluence's raw number `qᵀ H⁻¹ g` has a loss as the
measurement; ours divides by the number of sequences and measures a log-probability,
which changes the sign twice. The last line printed is JSON, `{quantity: relative
error}` in the Frobenius norm, of the worst layer where there are several.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from safetensors.numpy import load_file

import influence
from influence.curvature import covariance
from influence.fold import run as plain
from influence.linalg.damping import Inverse
from influence.model.task import losses
from influence.model.trace import select, trace
from influence.runtime.driver import Driver
from influence.types import Batch, Inputs, Layer, Params

DAMPINGS: dict[str, Inverse] = {
    "none": influence.Relative(0.1),
    "1e-3": influence.Absolute(1e-3),
    "1e-8": influence.Absolute(1e-8),
}
"""kronfluence's names for its dampings; "none" is its heuristic."""


@dataclass(frozen=True)
class Counted(influence.Task):
    """A language model whose last position counts too, as kronfluence counts it.

    No gradient leaves that position, so it only dilutes the covariances. Inputs are
    those of `LanguageModel`; the model is handed all of them.
    """

    apply: Any

    @property
    def language(self) -> influence.LanguageModel:
        """Returns the task that differs in nothing else."""
        return influence.LanguageModel(self.apply)

    def outputs(self, params: Params, inputs: Inputs) -> Array:
        """Returns logits, `[B, T, V]`."""
        return self.apply(params, inputs)

    def labels(self, inputs: Inputs) -> Array:
        """Returns the next tokens."""
        return self.language.labels(inputs)

    def counts(self, inputs: Inputs) -> Array:
        """Returns whether the next token counts."""
        return self.language.counts(inputs)

    def loss(self, outputs: Array, labels: Array) -> Array:
        """Returns `-log p(next token)`."""
        return self.language.loss(outputs, labels)

    def sample(self, keys_B: Array, outputs: Array) -> Array:
        """Returns next tokens from the softmax."""
        return self.language.sample(keys_B, outputs)

    def counted(self, inputs: Inputs) -> Array:
        """Returns every position that is not padding."""
        return jnp.asarray(inputs["counts"])

    def check(self, inputs: Inputs, outputs: Any, ids: Sequence[str]) -> None:
        """Raises for token ids outside the vocabulary."""
        self.language.check(inputs, outputs, ids)


def linear(params: Params, name: str, x: Array) -> Array:
    """Returns a PyTorch linear layer's output, from its weight `[O, I]` and bias."""
    y = x @ params[f"{name}.weight"].T
    bias = params.get(f"{name}.bias")
    return y if bias is None else y + bias[None, None]


def norm(params: Params, name: str, x: Array) -> Array:
    """Returns a PyTorch layer norm's output."""
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * params[f"{name}.weight"][None, None] + params[f"{name}.bias"][None, None]


def attend(q: Array, k: Array, v: Array, seen: Array, heads: int) -> Array:
    """Returns causal attention over positions that are `seen`, `[B, T]`."""
    split = (*q.shape[:2], heads, -1)
    q, k, v = (x.reshape(split) for x in (q, k, v))
    causal = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    mask = causal[None, None] & seen[:, None, None]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], -1)


def tiny(params: Params, inputs: Inputs) -> Array:
    """The tiny model: one block, its head tied to the embedding."""
    tokens, seen = inputs["tokens"], inputs["counts"]
    x = params["emb.weight"][tokens] + params["pos.weight"][: tokens.shape[1]][None]
    h = norm(params, "l1", x)
    q, k, v = (linear(params, f"attn.{name}", h) for name in "qkv")
    x = x + linear(params, "attn.o", attend(q, k, v, seen, heads=1))
    up = jax.nn.gelu(linear(params, "up", x), approximate=False)
    return (x + linear(params, "down", up)) @ params["emb.weight"].T


def small(params: Params, inputs: Inputs) -> Array:
    """The reference model: four blocks as in GPT-2, one matrix for q, k and v."""
    tokens, seen = inputs["tokens"], inputs["counts"]
    position = params["pos_emb.weight"][: tokens.shape[1]][None]
    x = params["tok_emb.weight"][tokens] + position
    for i in range(4):
        block = f"blocks.{i}"
        qkv = linear(params, f"{block}.attn.qkv", norm(params, f"{block}.ln1", x))
        y = attend(*jnp.split(qkv, 3, axis=-1), seen, heads=4)
        x = x + linear(params, f"{block}.attn.proj", y)
        up = linear(params, f"{block}.mlp.fc1", norm(params, f"{block}.ln2", x))
        x = x + linear(params, f"{block}.mlp.fc2", jax.nn.gelu(up))
    return linear(params, "lm_head", norm(params, "ln_f", x))


def examples(ids: np.ndarray, mask: np.ndarray, kind: str) -> influence.Examples:
    """Returns token ids with their padding mask as named examples."""
    inputs = {"tokens": ids.astype(np.int32), "counts": mask.astype(bool)}
    return influence.Examples(inputs, tuple(f"{kind} {i}" for i in range(len(ids))))


def measurements(task: Counted, queries: influence.Examples) -> dict[str, Any]:
    """Returns each query sequence's log-probability as a measurement."""

    def log_likelihood(batch: Batch, params: Params) -> Array:
        outputs = task.outputs(params, batch.inputs)
        return -losses(task, outputs, task.labels(batch.inputs), batch).sum()

    return {
        name: jax.tree_util.Partial(log_likelihood, jax.tree.map(jnp.asarray, batch))
        for name, batch in zip(queries.ids, queries.batches(1), strict=True)
    }


def error(found: Any, expected: Any) -> float:
    """Returns the relative error in the Frobenius norm."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class Errors(dict[str, float]):
    """The worst relative error of each quantity."""

    def note(self, quantity: str, found: Any, expected: Any) -> None:
        """Compares, and keeps the error if it is the worst of its kind."""
        self[quantity] = max(self.get(quantity, 0.0), error(found, expected))


def golden(path: Path) -> Errors:
    """Returns the errors against the tiny model's numbers, in float64."""
    arrays = np.load(path)
    names = [x.split("/")[-1] for x in arrays.files if x.startswith("lambda/")]
    params = {k[2:]: arrays[k] for k in arrays.files if k.startswith("w/")}
    del params["head.weight"]  # the embedding, once more
    with jax.enable_x64(True):
        params = {k: jnp.asarray(x) for k, x in params.items()}
        train, queries = (
            examples(arrays[f"{kind}/ids"], arrays[f"{kind}/mask"], kind)
            for kind in ("train", "query")
        )
        return _golden(Counted(tiny), params, train, queries, arrays, names)


def _golden(
    task: Counted,
    params: Params,
    train: influence.Examples,
    queries: influence.Examples,
    arrays: Mapping[str, np.ndarray],
    names: Sequence[str],
) -> Errors:
    errors, batches = Errors(), train.batches(4)
    patterns = [f"{name}.weight" for name in names]
    curvature = influence.fit(
        task, params, batches, layers=patterns, labels=influence.Empirical()
    )
    moments = _moments(task, params, batches, curvature.layers)
    for x in curvature.layers:
        name = x.name.removesuffix(".weight")
        for kind, found in (
            ("activation", moments.inputs[x.reads][0]),
            ("gradient", moments.gradients[x.name][0]),
        ):
            total = arrays[f"cov/{kind}_covariance/{name}"]
            count = arrays[f"cov/num_{kind}_covariance_processed/{name}"]
            errors.note(f"golden {kind} covariance", found, total / count)
        lam = arrays[f"lambda/{name}"] / arrays[f"lambda_num/{name}"]
        errors.note("golden eigenvalues", curvature.blocks[x.name].lam_OxI, lam)
    asked = measurements(task, queries)
    for damping, inverse in DAMPINGS.items():
        query = influence.query(
            curvature, params, asked, solver=influence.Eigenbasis(inverse)
        )
        layers = influence.scan(task, params, query, batches).layers * len(train)
        for name in names:
            expected = arrays[f"ekfac/pair/{damping}/{name}"]
            found = layers.sel(layer=f"{name}.weight")
            errors.note(f"golden scores, damping {damping}", found, expected)
        for name in names:
            expected = arrays.get(f"ekfac/tok/{damping}/{name}")
            if expected is not None:
                found = _tokens(task, params, curvature, asked, inverse, batches, name)
                errors.note(f"golden token scores, damping {damping}", found, expected)
    return errors


def _tokens(
    task: Counted,
    params: Params,
    curvature: influence.Curvature,
    asked: Mapping[str, Any],
    inverse: Inverse,
    batches: Any,
    name: str,
) -> np.ndarray:
    """Returns one layer's scores of every token, times the number of sequences."""
    layers = tuple(x for x in curvature.layers if x.name == f"{name}.weight")
    blocks = {x.name: curvature.blocks[x.name] for x in layers}
    alone = influence.Curvature(layers, blocks, 0, 0, curvature.labels)
    query = influence.query(alone, params, asked, solver=influence.Eigenbasis(inverse))
    return influence.token_scores(task, params, query, batches, n_train=1).values


def _moments(
    task: Counted, params: Params, batches: Any, layers: tuple[Layer, ...]
) -> covariance.Covariances:
    fold = covariance.fold(task, params, layers, influence.Empirical())
    return plain(fold, batches)


def reference(folder: Path) -> Errors:
    """Returns the errors against the reference model's numbers, in float32."""
    task, errors = Counted(small), Errors()
    params = load_file(folder / "small" / "model.safetensors")
    params = {k: jnp.asarray(x) for k, x in params.items()}
    ids = [np.load(folder / "small" / f"{k}_ids.npy") for k in ("train", "query")]
    train, queries = (
        examples(x, np.ones(x.shape, bool), kind)
        for x, kind in zip(ids, ("train", "query"), strict=True)
    )
    theirs = {
        path.stem: load_file(path)
        for path in (folder / "ref_small").glob("*.safetensors")
    }
    driver, batches = Driver(Console(stderr=True)), train.batches(32)
    first = next(iter(batches))
    layers = select(trace(task.outputs, params, first.inputs), "blocks.*")
    labels = influence.Empirical()
    moments = driver.run(covariance.fold(task, params, layers, labels), batches)
    curvature = influence.fit(
        task, params, batches, layers="blocks.*", labels=labels, run=driver.run
    )
    for x in curvature.layers:
        name = x.name.removesuffix(".weight")
        for kind, found in (
            ("activation", moments.inputs[x.reads][0]),
            ("gradient", moments.gradients[x.name][0]),
        ):
            total = theirs[f"{kind}_covariance"][name]
            count = theirs[f"num_{kind}_covariance_processed"][name]
            errors.note(f"small {kind} covariance", found, total / count)
        count = theirs["num_lambda_processed"][name]
        lam = theirs["lambda_matrix"][name].astype(float) / count
        found = np.asarray(curvature.blocks[x.name].lam_OxI, float)
        errors.note("small eigenvalues, trace", found.sum(), lam.sum())
        errors.note(
            "small eigenvalues, sorted", np.sort(found.ravel()), np.sort(lam.ravel())
        )
    query = influence.query(curvature, params, measurements(task, queries))
    scores = influence.scan(task, params, query, batches, run=driver.run)
    raw = scores.layers * len(train)
    for kind in ("all", "mlp"):
        chosen = [x for x in raw["layer"].values if kind == "all" or ".mlp." in x]
        expected = np.load(folder / "ref_small" / f"scores_total_{kind}.npy")
        found = raw.sel(layer=chosen).sum("layer")
        errors.note(f"small total scores, {kind}", found, expected)
    return errors


def main() -> None:
    """Prints every quantity's relative error, the last line as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--golden", type=Path, help="the tiny model's numbers, npz")
    parser.add_argument("--reference", type=Path, help="the reference folder")
    given, console = parser.parse_args(), Console()
    if given.golden is None and given.reference is None:
        parser.error("give --golden, --reference, or both")
    errors = Errors()
    if given.golden is not None:
        errors |= golden(given.golden)
    if given.reference is not None:
        errors |= reference(given.reference)
    for quantity, value in errors.items():
        console.print(f"{value:.1e}  {quantity}", highlight=False)
    console.print(json.dumps(errors), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
