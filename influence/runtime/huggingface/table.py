"""Which tensor of a checkpoint is which parameter of ours.

Made of a family's names and of the shapes that a decoder of the config has, so nothing
is said twice: what the decoder has is looked for, and what it has not is unexpected.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax

from influence.model.config import Config
from influence.model.transformer import shapes
from influence.runtime.huggingface import layouts
from influence.runtime.huggingface.families import ATTENTION, FUSED, Family
from influence.runtime.huggingface.layouts import Layout
from influence.runtime.huggingface.tensors import Stored
from influence.types import named_leaves

WORDS = {"kernel": "weight", "bias": "bias", "scale": "weight", "embedding": "weight"}
"""Our words for arrays of a module, and theirs."""

SHOWN = 10
"""How many names an error lists."""


class Entry(NamedTuple):
    """One tensor of theirs, and what it is here.

    Attributes:
      theirs: its name.
      ours: the parameters it is cut into.
      layout: how.
      block: which block of them it is; None if they belong to none.
      shape: its own.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout
    block: int | None
    shape: tuple[int, ...]


def entries(family: Family, config: Config) -> list[Entry]:
    """Returns every tensor a checkpoint of the config has, block by block.

    Adapters are kept elsewhere and have no entries.
    """
    leaves = named_leaves(shapes(config))
    fused = ATTENTION if FUSED in family.modules else ()
    found = []
    for path in leaves:
        module, _, word = path.rpartition(".")
        if ".lora." in path or module in fused[1:]:
            continue
        ours, theirs, layout = (path,), module, layouts.AS_IS
        if module in fused:
            theirs, layout = FUSED, family.fused
            ours = tuple(f"{x}.{word}" for x in fused)
        elif module == "head":
            layout = layouts.TURNED  # a plain linear layer even where others are not
        elif word == "kernel":
            layout = family.kernel
        stacked = module.startswith("blocks.")
        parts = [leaves[x].update(shape=leaves[x].shape[stacked:]) for x in ours]
        shape = jax.eval_shape(partial(layout.join, config), parts).shape
        name = f"{family.modules[theirs]}.{WORDS[word]}"
        for i in range(config.blocks) if stacked else [None]:
            found.append(Entry(name.format(i), ours, layout, i, shape))
    return sorted(found, key=lambda x: (x.block is not None, x.block or 0))


def match(
    family: Family, config: Config, stored: Mapping[str, Stored]
) -> tuple[list[tuple[Entry, Stored]], list[tuple[Stored, Stored]]]:
    """Returns the stored tensor of every entry, and pairs that have to be equal.

    Such are a head that is tied and stored all the same, and what it is tied to.

    Args:
      family: whose checkpoint it is.
      config: what it should hold.
      stored: every tensor in it.

    Raises:
      ValueError: if tensors are missing, unexpected or of other shapes, naming them.
    """
    found = _named(family, stored)
    wanted = {x.theirs: x for x in entries(family, config)}
    head, embed = (f"{family.modules[x]}.weight" for x in ("head", "embed"))
    expected = {k: x.shape for k, x in wanted.items()}
    if config.tied and head in found:
        expected[head] = expected[embed]
    odd = [
        x.name
        for name, x in found.items()
        if name not in expected
        and not any(re.fullmatch(y, name) for y in family.buffers)
    ]
    other = [
        f"{found[name].name} is {found[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    missing = [x for x in wanted if x not in found]
    said = {"missing": missing, "unexpected": odd, "of another shape": other}
    if any(said.values()):
        listed = "; ".join(f"{k}: {_listed(x)}" for k, x in said.items() if x)
        raise ValueError(
            f"The weights are not those of a {family.architecture} with this config: "
            f"{listed}. Are config.json and weights from the same place?"
        )
    pairs = [(found[x], found[embed]) for x in expected.keys() - wanted.keys()]
    return [(x, found[name]) for name, x in wanted.items()], pairs


def _named(family: Family, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Returns each tensor by the name it has in the table.

    Some versions call a tensor otherwise, and some leave out the prefix everywhere.
    """
    names = {family.aliases.get(k, k): x for k, x in stored.items()}
    if any(x.startswith(family.prefix) for x in names):
        return names
    head = family.modules["head"] + "."
    return {k if k.startswith(head) else family.prefix + k: x for k, x in names.items()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
