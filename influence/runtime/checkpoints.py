"""Decoders from Hugging Face's folders and orbax checkpoints, and back into them.

    loaded = load("org/model")                    # or a folder; a PEFT folder as well
    task = influence.LanguageModel(loaded.apply, loaded.config.context)
    trained = dataclasses.replace(loaded, params=...)
    save(folder, trained)                         # opens elsewhere

Weights go tensor by tensor from safetensors to their device and type: beside the model
itself, one tensor is held at a time. Everything that can be wrong is looked at before
the first one is read. Nothing of a checkpoint is run, and nothing pickled is read.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from influence.model.adapters import merged as merged_params
from influence.model.config import Config
from influence.model.transformer import Apply, shapes
from influence.runtime.huggingface import folders, peft, stream, tensors
from influence.runtime.huggingface.configs import config_of, llama_words
from influence.runtime.huggingface.families import family_of
from influence.runtime.huggingface.stream import Place
from influence.runtime.huggingface.table import Entry, entries, match
from influence.runtime.store import atomic
from influence.types import Params, named_leaves, with_leaves

CONFIG, PEFT = "config.json", "adapter_config.json"
DTYPE = ("dtype", "torch_dtype")
"""What configs call the type of the weights."""

SHARD = 2 << 30
"""How many bytes a file of weights has at most, unless one tensor has more."""


@dataclass(frozen=True)
class Loaded:
    """A decoder, and what its folder said of it.

    Attributes:
      config: its facts.
      params: its parameters.
      words: its `config.json`; empty for a decoder of no family.
      folder: where its tokenizer is, if it came from a folder.
      ignore: words of its config that were not heeded.
      adapter: its `adapter_config.json`, if it has adapters beside its weights.
    """

    config: Config
    params: Params
    words: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    ignore: tuple[str, ...] = ()
    adapter: Mapping[str, Any] | None = None

    @property
    def apply(self) -> Apply:
        """Returns `(params, tokens_BxT, segments_BxT=None) -> logits_BxTxV`."""
        return Apply(self.config)


def load(
    source: str | Path,
    *,
    dtype: Any = None,
    device: Place = None,
    revision: str | None = None,
    ignore: Sequence[str] = (),
) -> Loaded:
    """Returns a decoder from a folder, or from the hub.

    A PEFT folder gives its base model with the adapter beside it, see `adapt`.

    Args:
      source: a folder, or a name on the hub.
      dtype: of the weights; as they are stored if left out.
      device: where they go, a device or a sharding.
      revision: which version, on the hub.
      ignore: words of the config that are not to be heeded.

    Raises:
      FileNotFoundError: if there is no such folder or name, or no weights in it.
      ValueError: if the architecture, the config or its weights are not supported, or
        do not fit one another; or if a file is damaged.

    Example:
      >>> from influence.runtime import checkpoints
      >>> checkpoints.save(folder / "model", checkpoints.as_llama(config, weights))
      >>> loaded = checkpoints.load(folder / "model", dtype="bfloat16")
      >>> loaded.words["architectures"], loaded.config == config
      (['LlamaForCausalLM'], True)
      >>> small = influence.LanguageModel(loaded.apply, loaded.config.context)
    """
    folder = folders.locate(source, revision)
    if (folder / PEFT).exists() and not (folder / CONFIG).exists():
        words = folders.read_json(folder / PEFT)
        base, revision = _base(folder, words), words.get("revision")
        whole = load(base, dtype=dtype, device=device, revision=revision, ignore=ignore)
        return adapt(whole, folder, device=device)
    words = folders.read_json(folder / CONFIG)
    family, config = family_of(words), config_of(words, ignore)
    plan, equal = match(family, config, tensors.inspect(folder))
    like = shapes(config, stream.pick_dtype(dtype, [x for _, x in plan]))
    for head, embed in equal:
        if not np.array_equal(head.read(), embed.read()):
            raise ValueError(
                f"The config ties the head to the embedding, but {head.name} differs "
                f"from {embed.name}. Correct tie_word_embeddings, or take {head.name} "
                "out of the weights."
            )
    arrays = stream.read(config, plan, named_leaves(like), device)
    return Loaded(config, with_leaves(like, arrays), words, folder, tuple(ignore))


def base_of(folder: Path) -> Path:
    """Returns the folder of what an adapter is beside; of any other model its own.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if the adapter does not name its model.
    """
    if not (folder / PEFT).exists() or (folder / CONFIG).exists():
        return folder
    words = folders.read_json(folder / PEFT)
    return folders.locate(_base(folder, words), words.get("revision"))


def _base(folder: Path, words: Mapping[str, Any]) -> str | Path:
    """Returns where an adapter's base model is; a relative path may be from either."""
    name = words.get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"{folder / PEFT} does not say what model it is an adapter of. Load that "
            "first: `adapt(load(...), folder)`."
        )
    return folder / name if (folder / name).is_dir() else name


def adapt(loaded: Loaded, source: str | Path, *, device: Place = None) -> Loaded:
    """Returns a decoder with a LoRA adapter beside its weights.

    The factors are parameters of their own, `blocks.….lora.a` and `.b`, and layers of
    their own: `influence.fit(…, layers="*.lora.*")`. `merged` works them into the
    weights.

    Args:
      loaded: the decoder.
      source: a PEFT folder, or a name on the hub.
      device: where the factors go.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is another kind of adapter, of another model, or there is one
        already.

    Example:
      >>> from influence.runtime import checkpoints
      >>> model = checkpoints.as_llama(config, weights)
      >>> adapted = checkpoints.adapt(model, folder / "adapter")
      >>> [(x.layer, x.rank) for x in adapted.config.adapters]
      [('attention.query', 2), ('attention.value', 2)]
    """
    if loaded.config.adapters:
        raise ValueError(
            f"The decoder has adapters already, beside "
            f"{', '.join(x.layer for x in loaded.config.adapters)}. Merge them first."
        )
    folder = folders.locate(source)
    words, stored = folders.read_json(folder / PEFT), peft.inspect(folder)
    family = family_of(loaded.words)
    config = peft.adapters(family, loaded.config, words, stored)
    plan = peft.match(peft.entries(family, config), stored)
    leaves = dict(named_leaves(loaded.params))
    kind = leaves["norm.scale"].dtype
    stream.pick_dtype(kind, stored.values())
    like = shapes(config, kind)
    leaves |= stream.read(config, plan, named_leaves(like), device)
    return replace(
        loaded, config=config, params=with_leaves(like, leaves), adapter=words
    )


def merged(loaded: Loaded) -> Loaded:
    """Returns the same decoder with its adapters worked into its weights.

    Example:
      >>> from influence.runtime import checkpoints
      >>> model = checkpoints.as_llama(config, weights)
      >>> adapted = checkpoints.adapt(model, folder / "adapter")
      >>> checkpoints.merged(adapted).config == config
      True
    """
    config, params = merged_params(loaded.config, loaded.params)
    return replace(loaded, config=config, params=params, adapter=None)


def as_llama(config: Config, params: Params) -> Loaded:
    """Returns a decoder trained here as the Llama it is, to be saved as one.

    Raises:
      ValueError: if it is none, naming the facts a Llama can't have.

    Example:
      >>> from influence.runtime import checkpoints
      >>> checkpoints.as_llama(config, weights).words["hidden_size"] == config.width
      True
    """
    return Loaded(config, params, llama_words(config))


def save(folder: str | Path, loaded: Loaded, *, max_shard_bytes: int = SHARD) -> None:
    """Writes a decoder as it was read, for other programs to open.

    The config is the one it came with; its tokenizer's files go along.

    Args:
      folder: a new or empty one.
      loaded: the decoder.
      max_shard_bytes: the most bytes of a file, unless one tensor has more.

    Raises:
      FileExistsError: if there is something in the folder.
      ValueError: if the decoder has adapters beside its weights, or is not what its
        config says.
      OSError: if it could not be written; nothing is left of it.

    Example:
      >>> from influence.runtime import checkpoints
      >>> model = checkpoints.as_llama(config, weights)
      >>> checkpoints.save(folder / "shards", model, max_shard_bytes=4096)
      >>> len([*(folder / "shards").glob("model-*.safetensors")])
      6
    """
    if loaded.config.adapters:
        raise ValueError(
            "The decoder has adapters beside its weights. Save them alone with "
            "`save_adapter`, or the whole with `save(folder, merged(loaded))`."
        )
    if config_of(loaded.words, loaded.ignore) != loaded.config:
        raise ValueError(
            "The decoder's config is not what its words say. Change both, or neither."
        )
    plan = entries(family_of(loaded.words), loaded.config)
    leaves = checked(loaded)
    kind = leaves["norm.scale"].dtype.name
    words = {k: kind if k in DTYPE else x for k, x in loaded.words.items()}
    with atomic(new(folder)) as temporary:
        temporary.mkdir(parents=True)
        _write_json(temporary / CONFIG, words)
        for path in folders.beside(loaded.folder):
            shutil.copy(path, temporary)
        _write(temporary, loaded, plan, "model", max_shard_bytes)


def save_adapter(folder: str | Path, loaded: Loaded) -> None:
    """Writes a decoder's adapters alone, as a PEFT folder.

    Args:
      folder: a new or empty one.
      loaded: a decoder with adapters, from `adapt` or `influence.model.adapters.added`.

    Raises:
      FileExistsError: if there is something in the folder.
      ValueError: if the decoder has no adapters, or has some that PEFT's folders
        can't hold together.

    Example:
      >>> from influence.runtime import checkpoints
      >>> model = checkpoints.as_llama(config, weights)
      >>> adapted = checkpoints.adapt(model, folder / "adapter")
      >>> checkpoints.save_adapter(folder / "trained", adapted)
    """
    if not loaded.config.adapters:
        raise ValueError("The decoder has no adapters. Save it whole with `save`.")
    family = family_of(loaded.words)
    plan = peft.entries(family, loaded.config)
    words = loaded.adapter or peft.words_of(family, loaded.config, loaded.folder)
    with atomic(new(folder)) as temporary:
        temporary.mkdir(parents=True)
        _write_json(temporary / PEFT, words)
        _write(temporary, loaded, plan, peft.STEM, SHARD)


def checked(loaded: Loaded) -> dict[str, Any]:
    """Returns the parameters by path, after a look at their shapes.

    Raises:
      ValueError: if they are not those the config wants, naming one.
    """
    leaves = named_leaves(loaded.params)
    wanted = {k: x.shape for k, x in named_leaves(shapes(loaded.config)).items()}
    compare({k: x.shape for k, x in leaves.items()}, wanted)
    return leaves


def compare(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises if parameters are not those of a config.

    Raises:
      ValueError: naming one, and both shapes.
    """
    odd = sorted(x for x in {*found, *wanted} if found.get(x) != wanted.get(x))
    if odd:
        raise ValueError(
            f"The parameter {odd[0]} is {found.get(odd[0], 'missing')}, and the config "
            f"wants {wanted.get(odd[0], 'none')}. Are they of the same decoder?"
        )


def new(folder: str | Path) -> Path:
    """Returns the path of a folder to be written, if nothing is in its way.

    Raises:
      FileExistsError: if there is something in the folder.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"There is something in {path}. Name a new folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write(
    folder: Path, loaded: Loaded, plan: Sequence[Entry], stem: str, limit: int
) -> None:
    leaves = checked(loaded)
    sizes = {x.theirs: prod(x.shape) * leaves[x.ours[0]].dtype.itemsize for x in plan}
    tensors.write(
        folder, stream.unread(loaded.config, plan, leaves), sizes, limit, stem
    )


def _write_json(path: Path, words: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
