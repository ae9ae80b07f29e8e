"""What experiments on runs are made of: text that is on every machine, small models."""

import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from flax import nnx
from rich.console import Console

from influence.model import train
from influence.model.config import Config
from influence.model.examples import Examples
from influence.model.task import LanguageModel
from influence.model.train import Order, Recipe
from influence.model.transformer import Decoder
from influence.runtime import checkpoints
from influence.runtime.data import Text, train_tokenizer
from influence.runtime.driver import Driver
from influence.types import Params

LONGEST = 100_000
"""The longest source, in characters."""

END = "<|end|>"
"""The token that ends a document."""


def sources(longest: int = LONGEST) -> Iterator[str]:
    """Yields the Python sources of this environment, mixed, the longest left out.

    Their order is that of their paths' checksums: any number of them is of one mixture.

    Args:
      longest: how many characters one may have.
    """
    roots = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib")}
    paths = {x for root in roots for x in Path(root).rglob("*.py")}
    for path in sorted(paths, key=lambda x: (crc32(str(x).encode()), x)):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if 0 < len(text) <= longest:
            yield text


def write_corpus(path: Path, megabytes: float, longest: int = LONGEST) -> float:
    """Writes sources as JSON lines, and returns how many megabytes of text they are."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for text in sources(longest):
            if size >= megabytes * 1e6:
                break
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
    return size / 1e6


def write_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int) -> int:
    """Trains a tokenizer on texts and writes it; returns the id that ends a text."""
    tokenizer = train_tokenizer((Text("", x) for x in texts), vocabulary - 1)
    tokenizer.add_special_tokens([END])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = json.dumps({"eos_token": END})
    (folder / "tokenizer_config.json").write_text(words, encoding="utf-8")
    (end,) = tokenizer.encode(END).ids
    return end


def random_llama(config: Config, seed: int = 0) -> Params:
    """Returns the parameters of a decoder that has learned nothing."""
    return nnx.state(Decoder(config, rngs=nnx.Rngs(seed)))


def trained(
    apply: Callable[..., Any], params: Params, examples: Examples, recipe: Recipe
) -> tuple[Params, float]:
    """Returns parameters after training, and the last loss, in nats a token."""
    task, order = LanguageModel(apply), Order(len(examples), recipe, 0)
    fold = train.fold(task, recipe, params, examples, np.ones(len(examples)))
    end = Driver(Console(quiet=True)).run(fold, order)
    return end.params, float(end.losses[-1])


def write_llama(folder: Path, config: Config, params: Params, tokenizer: Path) -> None:
    """Writes a decoder as the Llama it is, with a tokenizer that was written."""
    checkpoints.save(folder, checkpoints.as_llama(config, params))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())


def write_random_llama(folder: Path, config: Config) -> None:
    """Writes a Llama that has learned nothing, and a tokenizer that has."""
    tokenizer = folder.parent / "tokenizer"
    write_tokenizer(tokenizer, islice(sources(), 100), config.vocabulary)
    write_llama(folder, config, random_llama(config), tokenizer)
