"""A model as a run needs it: a task, parameters, a tokenizer, what it is known by.

From a folder or hub name, or any function and parameters of one's own.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from influence.model.task import LanguageModel
from influence.runtime import checkpoints, native
from influence.runtime.corpus.tokenizer import (
    ModelTokenizer,
    check_tokenizer,
    read_tokenizer,
)
from influence.runtime.huggingface import folders
from influence.runtime.store import checksum
from influence.types import Params, named_leaves

LONGEST = 512
"""The context of a run if none is named and the model's own is longer."""

BLOCKS = {"all": ("blocks.*",), "mlp": ("blocks.mlp.*",)}
"""What the words for layers mean in the decoders that come with the engine."""

ANY = {"all": ("*",), "mlp": ("*mlp*",)}
"""What they mean in any other model."""


@dataclass(frozen=True)
class Model:
    """A language model, ready to be asked about.

    Attributes:
      task: the model and its loss.
      params: its parameters.
      vocabulary: how many logits it has.
      context: the longest sequence it takes.
      digest: a SHA-256 of its weights and config.
      tokenizer: its tokenizer; None if its corpora are token ids.
      words: what `all` and `mlp` mean, as patterns on layers' names.
    """

    task: LanguageModel
    params: Params
    vocabulary: int
    context: int
    digest: str
    tokenizer: ModelTokenizer | None = None
    words: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: ANY)

    def patterns(self, layers: tuple[str, ...]) -> list[str]:
        """Returns patterns on layers' names, words for groups of them spelt out."""
        return [y for x in layers for y in self.words.get(x, (x,))]


def open_model(place: str, *, dtype: Any = None, merge: bool = False) -> Model:
    """Returns a model from a folder or the hub, its tokenizer compared with it.

    Args:
      place: a Hugging Face or PEFT folder, an orbax checkpoint with its config, or a
        name on the hub.
      dtype: of the weights; as they are stored if left out.
      merge: whether an adapter is worked into the weights.

    Raises:
      FileNotFoundError: if there is nothing, or no weights.
      ValueError: if the architecture is not known, a file is damaged, or the tokenizer
        is another model's.

    Example:
      >>> from influence.runtime import checkpoints
      >>> from influence.runtime.models import open_model
      >>> checkpoints.save(folder / "llama", checkpoints.as_llama(config, weights))
      >>> model = open_model(str(folder / "llama"))
      >>> model.vocabulary == config.vocabulary, model.tokenizer
      (True, None)
    """
    found = _Place.of(place)
    if found.native:
        loaded = native.load_orbax(found.folder, dtype=dtype)
    else:
        loaded = checkpoints.load(found.folder, dtype=dtype)
    if merge:
        loaded = checkpoints.merged(loaded)
    tokenizer = found.tokenizer()
    if tokenizer is not None:
        check_tokenizer(tokenizer, loaded.config.vocabulary, loaded.words)
    return Model(
        task=LanguageModel(loaded.apply, loaded.config.context),
        params=loaded.params,
        vocabulary=loaded.config.vocabulary,
        context=loaded.config.context,
        digest=found.digest(f"{dtype} {merge}"),
        tokenizer=tokenizer,
        words=BLOCKS,
    )


def digest(place: str, *, dtype: Any = None, merge: bool = False) -> str:
    """Returns what `open_model` would know a model by, without loading it."""
    return _Place.of(place).digest(f"{dtype} {merge}")


def check_place(place: str) -> None:
    """Raises unless a folder or hub name leads to a model's folder.

    Raises:
      FileNotFoundError: if it does not.
    """
    _Place.of(place)


def open_tokenizer(place: str) -> ModelTokenizer | None:
    """Returns the tokenizer of a model that is not loaded; None if it has none."""
    return _Place.of(place).tokenizer()


class _Place(NamedTuple):
    """Where a model is.

    Attributes:
      folder: with its config, or an adapter's.
      base: the folder of what the adapter is beside; the same if it is none.
      native: whether it is an orbax checkpoint with its facts.
    """

    folder: Path
    base: Path
    native: bool

    @classmethod
    def of(cls, place: str) -> "_Place":
        """Returns where a folder or hub name leads to."""
        if (Path(place) / native.FACTS).is_file():
            return cls(Path(place), Path(place), True)
        folder = folders.locate(place)
        return cls(folder, checkpoints.base_of(folder), False)

    def digest(self, options: str) -> str:
        """Returns a SHA-256 of all files its numbers depend on."""
        state = hashlib.sha256(options.encode())
        names = ("*.safetensors", "config.json", "adapter_config.json")
        files = [self.folder] if self.native else []
        for folder in () if self.native else dict.fromkeys((self.folder, self.base)):
            files += sorted(x for name in names for x in folder.glob(name))
        for file in files:
            state.update(f"{file.name} {checksum(file)}\0".encode())
        return state.hexdigest()

    def tokenizer(self) -> ModelTokenizer | None:
        """Returns the tokenizer beside the weights, if there is one."""
        homes = dict.fromkeys((self.folder, self.base))
        found = (x for x in homes if (x / "tokenizer.json").is_file())
        return next(map(read_tokenizer, found), None)


def given(
    apply: Callable[..., Any],
    params: Params,
    *,
    vocabulary: int,
    context: int,
    tokenizer: str | Path | None = None,
) -> Model:
    """Returns a model of one's own: any function and its parameters.

    Args:
      apply: `(params, tokens_BxT) -> logits_BxTxV`, and a third argument, which
        document of its sequence each token is of, if attention is to keep them apart.
      params: its parameters.
      vocabulary: `V`.
      context: the longest sequence it takes.
      tokenizer: a `tokenizer.json` or a folder with one; None if corpora are ids.

    Example:
      >>> from influence.runtime.models import given
      >>> given(apply, params, vocabulary=10, context=8).context
      8
    """
    read = None if tokenizer is None else read_tokenizer(tokenizer)
    if read is not None:
        check_tokenizer(read, vocabulary)
    state = hashlib.sha256()
    for name, leaf in named_leaves(params).items():
        array = np.asarray(leaf)
        state.update(f"{name} {array.dtype} {array.shape}\0".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    task = LanguageModel(apply, context)
    return Model(task, params, vocabulary, context, state.hexdigest(), read)


def parameters(params: Params) -> int:
    """Returns how many numbers a model has learned."""
    return sum(x.size for x in jax.tree.leaves(params))
