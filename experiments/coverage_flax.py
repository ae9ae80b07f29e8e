"""Which parameters of other people's models are read, and is what is read right?

    python -m experiments.coverage_flax --examples DIR

`DIR` is the folder `examples` of a checkout of Flax. Of each model there, as its
authors wrote it and at a small size, the table says which parameters are in layers, on
request, or uncovered and why. What is read is then compared with `jax.grad`, example by
example: a mistake is an error. One model draws random numbers as it runs; that it is
refused, and why, is said as well. The last line is JSON, by model.
"""

import argparse
import ast
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import Array
from rich.console import Console

from influence.model.check import check_taps
from influence.model.coverage import layers
from influence.model.task import Task
from influence.model.trace import trace
from influence.types import Batch, Inputs, Params, named_leaves

EXAMPLES = 4
"""How many examples each model is given."""


class Model(NamedTuple):
    """A model and something to give it.

    Attributes:
      apply: `(params, inputs) -> outputs`, every array with a leading example axis.
      params: its parameters.
      inputs: some examples.
    """

    apply: Callable[[Params, Inputs], Any]
    params: Params
    inputs: Inputs


@dataclass(frozen=True)
class Projected(Task):
    """Any model, its loss a fixed random projection of all of its outputs."""

    apply: Callable[[Params, Inputs], Any]

    def outputs(self, params: Params, inputs: Inputs) -> Any:
        """Returns what the model makes of the inputs."""
        return self.apply(params, inputs)

    def labels(self, inputs: Inputs) -> Array:
        """Returns nothing to predict, `[B]`."""
        return jnp.zeros(len(jax.tree.leaves(inputs)[0]))

    def counts(self, inputs: Inputs) -> Array:
        """Returns that every example counts."""
        return self.labels(inputs) == 0

    def loss(self, outputs: Any, labels: Array) -> Array:
        """Returns each example's projection, `[B]`."""
        rng = np.random.default_rng(0)
        floats = [
            x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.inexact)
        ]
        parts = [
            x.reshape(len(x), -1) @ jnp.asarray(rng.standard_normal(x[0].size), x.dtype)
            for x in floats
        ]
        return sum(parts, labels)

    def sample(self, keys_B: Array, outputs: Any) -> Array:
        """Returns the labels there are."""
        del outputs
        return jnp.zeros(len(keys_B))

    def counted(self, inputs: Inputs) -> Array:
        """Returns that all positions count, `[B, 1]`."""
        return self.counts(inputs)[:, None]

    def check(self, inputs: Inputs, outputs: Any, ids: Sequence[str]) -> None:
        """Raises nothing: the inputs were made here."""


def module(folder: Path, name: str) -> ModuleType:
    """Returns a module of an example, imported from its file."""
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder / name}.py can't be imported.")
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    try:
        spec.loader.exec_module(found)
    finally:
        sys.path.remove(str(folder))
    return found


def alone(path: Path, name: str, **known: Any) -> Any:
    """Returns a class of a file whose other imports are not to be had."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == name]
    space = dict(known)
    exec(compile(tree, str(path), "exec"), space)
    return space[name]


def tokens(length: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    """Returns token ids, none of them padding."""
    drawn = np.random.default_rng(seed).integers(1, vocabulary, (EXAMPLES, length))
    return drawn.astype(np.int32)


def noise(*shape: int) -> np.ndarray:
    """Returns examples of normal numbers."""
    drawn = np.random.default_rng(0).standard_normal((EXAMPLES, *shape))
    return drawn.astype(np.float32)


def from_linen(model: linen.Module, inputs: Inputs, **options: Any) -> Model:
    """Returns a Linen model; what it keeps besides parameters stays as it begins."""
    first = jax.tree.map(lambda x: x[:1], inputs)
    variables = jax.jit(lambda x: model.init(jax.random.key(0), *x, **options))(first)
    rest = {k: v for k, v in variables.items() if k != "params"}

    def apply(params: Params, inputs: Inputs) -> Any:
        return model.apply({"params": params, **rest}, *inputs, **options)

    return Model(apply, variables["params"], inputs)


def from_nnx(model: nnx.Module, inputs: Inputs, call: Any) -> Model:
    """Returns an NNX model that is used as `call(model, *inputs)`."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params: Params, inputs: Inputs) -> Any:
        return call(nnx.merge(graph, params, rest), *inputs)

    return Model(apply, params, inputs)


def mnist(folder: Path) -> Model:
    """The convolutional classifier, in evaluation mode."""
    model = alone(folder / "train.py", "CNN", nnx=nnx, partial=partial)(nnx.Rngs(0))
    model.eval()
    return from_nnx(model, (noise(28, 28, 1),), lambda m, x: m(x, nnx.Rngs(0)))


def imagenet(folder: Path) -> Model:
    """A residual network, its batch statistics fixed."""
    model = module(folder, "models").ResNet18(num_classes=10, num_filters=4)
    return from_linen(model, (noise(32, 32, 3),), train=False)


def lm1b(folder: Path) -> Model:
    """A decoder, its head tied to its embedding."""
    models = module(folder, "models")
    config = models.TransformerConfig(
        vocab_size=20, output_vocab_size=20, emb_dim=16, num_heads=2, num_layers=2,
        qkv_dim=16, mlp_dim=32, max_len=12, deterministic=True,
        logits_via_embedding=True,
    )  # fmt: skip
    return from_linen(models.TransformerLM(config), (tokens(12, 20),))


def wmt(folder: Path) -> Model:
    """An encoder and a decoder that share one embedding with the head."""
    models = module(folder, "models")
    config = models.TransformerConfig(
        vocab_size=20, output_vocab_size=20, emb_dim=16, num_heads=2, num_layers=2,
        qkv_dim=16, mlp_dim=32, max_len=12, deterministic=True,
        share_embeddings=True, logits_via_embedding=True,
    )  # fmt: skip
    inputs = (tokens(12, 20), tokens(10, 20, seed=1))
    return from_linen(models.Transformer(config), inputs)


def nlp_seq(folder: Path) -> Model:
    """An encoder that tags every token."""
    models = module(folder, "models")
    config = models.TransformerConfig(
        vocab_size=20, output_vocab_size=7, emb_dim=16, num_heads=2, num_layers=2,
        qkv_dim=16, mlp_dim=32, max_len=12,
    )  # fmt: skip
    model = models.Transformer(config)
    ids = tokens(12, 20)
    params = model.init(jax.random.key(0), inputs=ids, train=False)["params"]

    def apply(params: Params, inputs: Inputs) -> Any:
        return model.apply({"params": params}, inputs=inputs[0], train=False)

    return Model(apply, params, (ids,))


def ppo(folder: Path) -> Model:
    """Convolutions shared by a policy and a value."""
    return from_linen(module(folder, "models").ActorCritic(4), (noise(84, 84, 4),))


def seq2seq(folder: Path) -> Model:
    """Two recurrent networks, which draw labels as they run: to be refused."""
    model = module(folder, "models").Seq2seq(
        teacher_force=True, hidden_size=8, vocab_size=9
    )
    inputs = tuple(np.eye(9, dtype=np.float32)[tokens(n, 9)] for n in (6, 5))
    keys = {"params": jax.random.key(0), "lstm": jax.random.key(1)}
    params = model.init(keys, *inputs)["params"]

    def apply(params: Params, inputs: Inputs) -> Any:
        return model.apply({"params": params}, *inputs, rngs={"lstm": keys["lstm"]})

    return Model(apply, params, inputs)


def sst2(folder: Path) -> Model:
    """A recurrent network each way, and attention."""
    model = module(folder, "models").TextClassifier(
        embedding_size=8, hidden_size=8, vocab_size=20, output_size=2,
        dropout_rate=0.1, word_dropout_rate=0.1, deterministic=True,
    )  # fmt: skip
    return from_linen(model, (tokens(10, 20), np.array([10, 7, 4, 9])))


def vae(folder: Path) -> Model:
    """An autoencoder, from the mean of its latents."""
    model = module(folder, "models").VAE(5)

    def generate(model: Any, x: Array) -> Any:
        mean, spread = model.encoder(x)
        return model.decoder(mean), spread

    x = noise(784)
    params = model.init(jax.random.key(0), x[:1], jax.random.key(1))["params"]

    def apply(params: Params, inputs: Inputs) -> Any:
        return model.apply({"params": params}, *inputs, method=generate)

    return Model(apply, params, (x,))


def gemma(folder: Path) -> Model:
    """A decoder with local and global attention and a tied head."""
    module(folder, "helpers")
    made, transformer = module(folder, "transformer_cfg"), module(folder, "transformer")
    kinds = made.AttentionType
    config = made.TransformerConfig(
        num_layers=2, num_embed=20, embed_dim=16, hidden_dim=32, num_heads=2,
        head_dim=8, num_kv_heads=1, final_logit_softcap=30.0, use_post_attn_norm=True,
        use_post_ffw_norm=True, attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        attn_logits_soft_cap=50.0, sliding_window_size=4,
    )  # fmt: skip
    model = transformer.Transformer(config, rngs=nnx.Rngs(0))
    model.eval()
    length = 12
    seen = np.tril(np.ones((length, length), bool))
    inputs = (
        tokens(length, 20),
        np.tile(np.arange(length), (EXAMPLES, 1)),
        np.tile(seen, (EXAMPLES, 1, 1)),
    )
    return from_nnx(model, inputs, lambda m, x, at, mask: m(x, at, None, mask)[0])


MODELS = {
    x.__name__: x
    for x in (
        *(mnist, imagenet, lm1b, wmt, nlp_seq, ppo),
        *(seq2seq, sst2, vae, gemma),
    )
}


def examined(name: str, model: Model, console: Console) -> dict[str, Any]:
    """Returns what becomes of a model's parameters, and prints it, with the reasons.

    Raises:
      ValueError: if what is read of a layer is not its gradient.
    """
    task = Projected(model.apply)
    batch = Batch(
        model.inputs, np.zeros((EXAMPLES, 2), np.uint32), np.ones(EXAMPLES, bool)
    )
    console.print(f"\n[bold]{name}[/]")
    try:
        found = layers(task, model.params, batch)
    except ValueError as refusal:
        console.print(f"refused: {refusal}", highlight=False)
        return {"refused": str(refusal)}
    console.print(str(found), highlight=False, markup=False)
    program = trace(task.outputs, model.params, batch.inputs)
    check_taps(task, program.layers, model.params, batch)
    read = {x.parameter for x in program.layers} | {
        x.bias for x in program.layers if x.bias
    }
    missing = {x.name: x.reason for x in found.uncovered}
    if unknown := set(named_leaves(model.params)) - read - set(missing):
        raise ValueError(f"{name}: nothing is said of {sorted(unknown)}.")
    return {
        "layers": len(found.layers),
        "on_request": len(found.on_request),
        "uncovered": missing,
        "checked": True,
    }


def main() -> None:
    """Prints every model's layers, and as a last line a summary in JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", type=Path, required=True)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    given, console = parser.parse_args(), Console(width=200)
    summary: Mapping[str, Any] = {
        name: examined(name, MODELS[name](given.examples / name), console)
        for name in given.models
    }
    console.print(json.dumps(summary), soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    main()
