"""LoRA adapters as PEFT's folders have them.

Each adapted module has two factors of its own, so that both are layers: `x A` and
`(x A) B`. Where a family has queries, keys and values as one module, so is its adapter.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from influence.model.config import FUSED as TOGETHER
from influence.model.config import Adapter, Config
from influence.model.transformer import shapes
from influence.runtime.huggingface import layouts, tensors
from influence.runtime.huggingface.families import FUSED, Family
from influence.runtime.huggingface.table import Entry
from influence.runtime.huggingface.tensors import Stored
from influence.types import named_leaves

STEM = "adapter_model"

WITHOUT_EFFECT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type"),
        *("inference_mode", "lora_dropout", "peft_version", "fan_in_fan_out"),
        *("target_modules", "exclude_modules", "layers_pattern", "megatron_core"),
        *("qalora_group_size", "init_lora_weights", "peft_type", "r", "lora_alpha"),
        *("use_rslora", "base_model_class", "parent_library"),
    )
)
"""Words that say how an adapter was made, not what it computes; or that are read."""

STARTS = (True, False, "gaussian", "eva", "orthogonal", "lora_ga")
"""Ways to begin training that leave the weights beside the adapter as they were."""

NAME = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


def adapters(
    family: Family,
    config: Config,
    words: Mapping[str, Any],
    stored: Mapping[str, Stored],
) -> Config:
    """Returns the config with the adapters of a folder.

    Raises:
      ValueError: if the adapter is of another kind, or not of every block.
    """
    _check(words)
    rank, alpha = words["r"], words["lora_alpha"]
    scale = alpha / math.sqrt(rank) if words.get("use_rslora") else alpha / rank
    parts = [NAME.fullmatch(x) for x in stored]
    odd = [x for x, part in zip(stored, parts, strict=True) if part is None]
    named = {x.group(1) for x in parts if x is not None}
    where = _modules(family, config)
    odd += sorted(named - where.keys())
    if odd or not named:
        raise ValueError(
            f"The adapter has {odd[:10] or 'no tensors'}. Supported are LoRA factors "
            "of the linear layers of blocks."
        )
    layers = dict.fromkeys(where[x] for x in where if x in named)
    lacking = [x for x, layer in where.items() if layer in layers and x not in named]
    if lacking:
        raise ValueError(
            f"The adapter leaves out {', '.join(lacking[:10])}, and has the same "
            "module of other blocks. Adapters of some blocks are not supported; merge "
            "it with PEFT first."
        )
    return replace(config, adapters=tuple(Adapter(x, rank, scale) for x in layers))


def words_of(family: Family, config: Config, base: Path | None) -> dict[str, Any]:
    """Returns what PEFT's config would say of adapters that were made here.

    Raises:
      ValueError: if they are not of one rank and scale.
    """
    kinds = {(x.rank, x.scale) for x in config.adapters}
    if len(kinds) > 1:
        raise ValueError(
            f"The adapters have several ranks and scales, {sorted(kinds)}, and PEFT's "
            "folders are written with one. Save the decoder with `save_orbax`."
        )
    ((rank, scale),) = kinds
    named = {x.layer for x in config.adapters}
    where = _modules(family, config)
    modules = {k.rpartition(".")[2] for k, layer in where.items() if layer in named}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base.absolute()),
        "r": rank,
        "lora_alpha": rank * scale,
        "target_modules": sorted(modules),
        "fan_in_fan_out": family.kernel == layouts.AS_IS,
        "bias": "none",
        "inference_mode": True,
    }


def _check(words: Mapping[str, Any]) -> None:
    kind = words.get("peft_type")
    start = words.get("init_lora_weights", True)
    other = {k: x for k, x in words.items() if k not in WITHOUT_EFFECT}
    on = {k: x for k, x in other.items() if x not in (None, False, [], {}, "none")}
    if kind != "LORA" or start not in STARTS or on:
        said = {"peft_type": kind, "init_lora_weights": start, **on}
        raise ValueError(
            f"The adapter is described by {said}. Supported is LoRA alone, of one rank "
            "and beside linear layers. Merge it with PEFT first."
        )


def _modules(family: Family, config: Config) -> dict[str, str]:
    """Returns the layer each of the family's adaptable modules is, block by block."""
    leaves = named_leaves(shapes(config))
    return {
        theirs.format(i): ours.removeprefix("blocks.") if ours != FUSED else TOGETHER
        for ours, theirs in family.modules.items()
        if ours == FUSED or ours.startswith("blocks.") and f"{ours}.kernel" in leaves
        for i in range(config.blocks)
    }


def entries(family: Family, config: Config) -> list[Entry]:
    """Returns every tensor of a config's adapters, as PEFT names it."""
    leaves = named_leaves(shapes(config))
    found = []
    for theirs, layer in _modules(family, config).items():
        block = int(re.findall(r"\.(\d+)\.", theirs)[0])
        for word, factor in (("A", "a"), ("B", "b")):
            path = f"blocks.{layer}.lora.{factor}"
            if path in leaves:
                both = layer == TOGETHER and word == "B"
                layout = family.fused_lora if both else layouts.TURNED
                name = f"base_model.model.{theirs}.lora_{word}.weight"
                shape = leaves[path].shape[1:][::-1]
                found.append(Entry(name, (path,), layout, block, shape))
    return found


def match(
    plan: list[Entry], stored: Mapping[str, Stored]
) -> list[tuple[Entry, Stored]]:
    """Returns the stored tensor of every entry.

    Raises:
      ValueError: if one is missing or of another shape, naming it.
    """
    for x in plan:
        found = stored[x.theirs].shape if x.theirs in stored else "missing"
        if found != x.shape:
            raise ValueError(
                f"The adapter's {x.theirs} is {found}, not {x.shape}. Is it of this "
                "model, and is its file whole?"
            )
    return [(x, stored[x.theirs]) for x in plan]


def inspect(folder: Path) -> dict[str, Stored]:
    """Returns every tensor of a PEFT folder by name."""
    return tensors.inspect(folder, STEM)
