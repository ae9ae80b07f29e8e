"""The judged tasks as PyTorch and kronfluence have them: same weights and losses.

Modules are named as layers are there, so that one pattern chooses both.
"""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import jax
import numpy as np

from experiments.peers import needed
from influence.model.config import Config
from influence.model.supervised import Regression
from influence.model.task import LanguageModel, Task
from influence.model.transformer import Apply
from influence.truth.methods import Subject
from influence.types import Inputs, Params, named_leaves

torch = needed("torch", "peers")
kronfluence = needed("kronfluence.task", "peers")
F = torch.nn.functional
distributions = torch.distributions

FAR = 1e-4
"""How far outputs may differ."""


def twin(task: Task, params: Params) -> Any:
    """Returns a task's model in PyTorch.

    Raises:
      ValueError: if it is a language model of another kind than decoders here.
    """
    if not isinstance(task, LanguageModel):
        weights = dict(_of_perceptron(params))
        model = Perceptron([x.shape for x in weights.values() if x.ndim == 2])
    elif isinstance(task.apply, Apply):
        model, weights = Decoder(task.apply.config), dict(_of_decoder(params))
    else:
        raise ValueError(f"{task.apply} is no decoder of this package. Give an Apply.")
    model.load_state_dict({k: torch.tensor(x) for k, x in weights.items()})
    return model.eval()


def distribution(task: Task) -> Callable[[Any], Any]:
    """Returns `outputs -> distribution of labels`, whose log-probability is judged."""
    if isinstance(task, Regression):
        return lambda outputs: distributions.Normal(outputs[:, 0], 1.0)
    return lambda outputs: distributions.Categorical(logits=outputs)


def points(task: Task, inputs: Inputs) -> tuple[Any, Any]:
    """Returns what the model is given, and the labels that follow from it.

    Of texts all but their last token, which predicts none: the positions are those that
    count here.

    Raises:
      ValueError: if texts are of several lengths.
    """
    if not isinstance(task, LanguageModel):
        return torch.tensor(inputs["x"]), _labels(inputs["label"])
    if not np.all(inputs["counts"]):
        raise ValueError("Texts are of several lengths. Cut them to one.")
    tokens = _labels(inputs["tokens"])
    return tokens[:, :-1], tokens[:, 1:]


def asked(subject: Subject) -> Inputs:
    """Returns the examples whose log-probability is measured, as inputs."""
    each = [x.inputs for x in subject.measurements.values()]
    return jax.tree.map(lambda *x: np.concatenate(x), *each)


def difference(task: Task, params: Params, inputs: Inputs) -> float:
    """Returns how far the outputs of both models differ at most.

    Raises:
      ValueError: if that is more than `FAR`.
    """
    with torch.no_grad():
        theirs = twin(task, params)(points(task, inputs)[0]).numpy()
    ours = np.asarray(task.outputs(params, inputs))
    if isinstance(task, Regression):
        ours = ours[:, None]
    if isinstance(task, LanguageModel):
        ours = ours[:, :-1]
    found = float(np.abs(ours - theirs).max())
    if not found <= FAR:
        raise ValueError(
            f"The model's outputs differ by {found:.1e} in PyTorch. Is everything that "
            "its config says in `torch_tasks.py`?"
        )
    return found


def linear(model: Any, layers: str | tuple[str, ...]) -> list[str]:
    """Returns the names of a model's linear modules that patterns choose."""
    patterns = [layers] if isinstance(layers, str) else layers
    return [
        name
        for name, x in model.named_modules()
        if isinstance(x, torch.nn.Linear) and any(fnmatch(name, y) for y in patterns)
    ]


class Judged(kronfluence.Task):
    """A judged task, for kronfluence."""

    def __init__(self, distribution: Any, names: Sequence[str]):
        super().__init__()
        self.distribution, self.names = distribution, list(names)

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
        """Returns the summed loss of a batch, its labels sampled or its own."""
        x, labels = batch
        found = self.distribution(model(x))
        return -found.log_prob(found.sample() if sample else labels).sum()

    def compute_measurement(self, batch: Any, model: Any) -> Any:
        """Returns the same: an example's loss is what is asked about."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """Returns the layers that are read."""
        return self.names


class Perceptron(torch.nn.Module):
    """A multilayer perceptron."""

    def __init__(self, shapes: list[tuple[int, int]]):
        super().__init__()
        each = [torch.nn.Linear(i, o) for o, i in shapes]
        self.layers = torch.nn.ModuleList(each)

    def forward(self, x: Any) -> Any:
        """Returns outputs, `[B, O]`."""
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x).tanh()
        return last(x)


class Decoder(torch.nn.Module):
    """A decoder with nothing in its config but sizes."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed = torch.nn.Embedding(config.vocabulary, config.width)
        each = [Block(config) for _ in range(config.blocks)]
        self.blocks = torch.nn.ModuleList(each)
        self.norm = torch.nn.RMSNorm(config.width, config.norm_epsilon)
        self.head = torch.nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, ids: Any) -> Any:
        """Returns logits, `[B, T, V]`."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(torch.nn.Module):
    """One block of a decoder."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads, width = config.heads, config.width
        self.attention, self.mlp = torch.nn.Module(), torch.nn.Module()
        for name in ("query", "key", "value", "out"):
            setattr(self.attention, name, torch.nn.Linear(width, width, bias=False))
        self.mlp.gate = torch.nn.Linear(width, config.hidden, bias=False)
        self.mlp.up = torch.nn.Linear(width, config.hidden, bias=False)
        self.mlp.down = torch.nn.Linear(config.hidden, width, bias=False)
        self.attention_norm = torch.nn.RMSNorm(width, config.norm_epsilon)
        self.mlp_norm = torch.nn.RMSNorm(width, config.norm_epsilon)

    def forward(self, x: Any) -> Any:
        """Returns the residual stream after the block."""
        own, y = self.attention, self.attention_norm(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (own.query, own.key, own.value)
        )
        y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        x = x + own.out(y.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.mlp.down(F.silu(self.mlp.gate(y)) * self.mlp.up(y))


def turned(x: Any) -> Any:
    """Returns queries or keys, `[B, H, T, K]`, turned by their positions' angles."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * frequency
    a, b = x.split(half, dim=-1)
    sin, cos = angle.sin(), angle.cos()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _of_perceptron(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    for i, name in enumerate(sorted(params)):
        yield f"layers.{i}.weight", np.asarray(params[name]["w"]).T
        yield f"layers.{i}.bias", np.asarray(params[name]["b"])


def _of_decoder(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in named_leaves(params).items():
        name, kind = path.rsplit(".", 1)
        x = np.asarray(leaf)
        x = x.swapaxes(-1, -2) if kind == "kernel" else x
        if not name.startswith("blocks."):
            yield f"{name}.weight", x
            continue
        for i, own in enumerate(x):
            yield f"{name.replace('.', f'.{i}.', 1)}.weight", own


def _labels(x: np.ndarray) -> Any:
    """Returns labels, whole numbers in the type that PyTorch wants of them."""
    found = torch.tensor(np.asarray(x))
    return found if found.is_floating_point() else found.long()
