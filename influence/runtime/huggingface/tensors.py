"""Tensors in safetensors files, one or several, read and written one at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""The kinds of numbers weights are stored in, as the format and as numpy call them."""


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        """Returns its values.

        The file is opened for each tensor anew: a mapped file counts as memory of the
        process as far as it was read, until it is closed.
        """
        with safe_open(self.path, framework="np") as file:
            return file.get_tensor(self.name)


def inspect(folder: Path, stem: str = "model") -> dict[str, Stored]:
    """Returns every tensor of a folder's checkpoint by name; only headers are read.

    Raises:
      FileNotFoundError: if there is none, or a shard is missing, naming it.
      ValueError: if a file is damaged, or an index does not fit its shards.
    """
    index, single = (
        folder / f"{stem}.safetensors.index.json",
        folder / f"{stem}.safetensors",
    )
    if not index.exists():
        if not single.exists():
            raise FileNotFoundError(_nothing(folder, single.name))
        return {x.name: x for x in _header(single)}
    shards = _weight_map(index)
    missing = sorted({x for x in shards.values() if not (folder / x).exists()})
    if missing:
        raise FileNotFoundError(
            f"{index} names {', '.join(missing)}, which {folder} does not have. Fetch "
            "the missing shards."
        )
    found: dict[str, Stored] = {}
    for name in sorted(set(shards.values())):
        found |= {x.name: x for x in _header(folder / name)}
    astray = sorted(
        k
        for k, shard in shards.items()
        if k not in found or found[k].path.name != shard
    )
    if astray:
        raise ValueError(
            f"{index} says that {shards[astray[0]]} holds {astray[0]}, and it does "
            "not. Are index and shards from the same place?"
        )
    return found


def _weight_map(index: Path) -> dict[str, str]:
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    outside = [x for x in shards.values() if Path(x).name != x]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is not in its folder.")
    return shards


def _nothing(folder: Path, name: str) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            f"{folder} has weights only as PyTorch pickles, which can run code as they "
            f"are read. Convert them: `save_pretrained` of transformers writes {name}."
        )
    return f"{folder} has a config and no weights: there is no {name} and no index."


def _header(path: Path) -> Iterator[Stored]:
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()  # a method of the file; it is no mapping
            for name in names:
                part = file.get_slice(name)
                yield Stored(path, name, tuple(part.get_shape()), part.get_dtype())
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) can't be read: {error}. It may be "
            "cut short or be no safetensors file; fetch it again."
        ) from error


def write(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    sizes: Mapping[str, int],
    limit: int,
    stem: str = "model",
) -> None:
    """Writes tensors, in as many files as the limit asks for, with an index if several.

    Args:
      folder: where.
      tensors: all of them, by name; held in memory a file at a time.
      sizes: how many bytes each has, in the same order.
      limit: how many bytes a file may have, unless it is one tensor's.
      stem: of the files' names.
    """
    shards = _shards(sizes, limit)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    rest = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        arrays = dict(next(rest) for _ in shard)
        save_file(arrays, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {x: name for name, xs in zip(names, shards, strict=True) for x in xs}
        index: dict[str, Any] = {"metadata": {"total_size": sum(sizes.values())}}
        text = json.dumps({**index, "weight_map": where}, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards, size = [[]], 0
    for name, own in sizes.items():
        if shards[-1] and size + own > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards
