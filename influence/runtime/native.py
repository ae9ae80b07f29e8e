"""Decoders as orbax checkpoints: parameters by orbax, facts as JSON beside them.

For decoders that are no family's, and for whole ones with adapters beside weights.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from influence.model.config import Adapter, Config, Rotary
from influence.model.transformer import shapes
from influence.runtime.checkpoints import Loaded, checked, compare, new
from influence.runtime.huggingface.folders import read_json
from influence.runtime.huggingface.stream import Place, check_dtype
from influence.runtime.store import atomic
from influence.types import named_leaves, with_leaves

FACTS, PARAMS = "decoder.json", "params"


def save_orbax(folder: str | Path, loaded: Loaded) -> None:
    """Writes a decoder as an orbax checkpoint with its facts beside it.

    Args:
      folder: a new or empty one.
      loaded: the decoder; `Loaded(config, params)` for one trained here.

    Raises:
      FileExistsError: if there is something in the folder.
      ValueError: if the parameters are not those of the config.
      OSError: if it could not be written; nothing is left of it.

    Example:
      >>> from influence.runtime import checkpoints, native
      >>> decoder = checkpoints.Loaded(config, weights)
      >>> native.save_orbax(folder / "orbax", decoder)
      >>> native.load_orbax(folder / "orbax").config == config
      True
    """
    leaves = checked(loaded)
    facts = {
        "config": dataclasses.asdict(loaded.config),
        "dtype": leaves["norm.scale"].dtype.name,
        "words": dict(loaded.words),
        "ignore": loaded.ignore,
        "adapter": loaded.adapter,
    }
    with atomic(new(folder)) as temporary:
        temporary.mkdir(parents=True)
        text = json.dumps(facts, indent=2) + "\n"
        (temporary / FACTS).write_text(text, encoding="utf-8")
        with ocp.StandardCheckpointer() as checkpointer:
            tree = unflatten_dict(leaves, sep=".")
            checkpointer.save((temporary / PARAMS).absolute(), tree)


def load_orbax(
    folder: str | Path, *, dtype: Any = None, device: Place = None
) -> Loaded:
    """Returns a decoder from the folder that `save_orbax` wrote.

    Args:
      folder: where it is.
      dtype: of the weights; as they are stored if left out.
      device: where they go, a device or a sharding.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if the facts are damaged, or are not those of the parameters; or if
        the type does not exist on this device.

    Example:
      >>> from influence.runtime import checkpoints, native
      >>> decoder = checkpoints.Loaded(config, weights)
      >>> native.save_orbax(folder / "saved", decoder)
      >>> params = native.load_orbax(folder / "saved", dtype="bfloat16").params
      >>> params["norm"]["scale"].dtype.name
      'bfloat16'
    """
    path = Path(folder)
    config, stored, rest = _read(path / FACTS)
    if not (path / PARAMS).is_dir():
        raise FileNotFoundError(f"{path} has {FACTS} and no {PARAMS}: no weights.")
    like = shapes(config, check_dtype(dtype or stored))
    place = device or jax.devices()[0]
    if isinstance(place, jax.Device):
        place = jax.sharding.SingleDeviceSharding(place)
    wanted = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        for k, x in named_leaves(like).items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        at = (path / PARAMS).absolute()
        found = checkpointer.metadata(at).item_metadata.tree
        compare(_shapes(found), _shapes(like))
        tree = checkpointer.restore(at, unflatten_dict(wanted, sep="."))
    return Loaded(config, with_leaves(like, named_leaves(tree)), **rest)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {k: tuple(x.shape) for k, x in named_leaves(tree).items()}


def _read(path: Path) -> tuple[Config, str, dict[str, Any]]:
    """Returns the facts beside the parameters, their type, and what else `Loaded` has.

    JSON has no tuples and no records.
    """
    said = read_json(path)
    try:
        facts = said.pop("config")
        turns = {k: x and Rotary(**x) for k, x in facts.items() if "rotary" in k}
        adapters = tuple(Adapter(**x) for x in facts["adapters"])
        lists = {"local": tuple(facts["local"]), "adapters": adapters}
        said["ignore"] = tuple(said["ignore"])
        return Config(**{**facts, **turns, **lists}), said.pop("dtype"), said
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not what `save_orbax` writes: {error!r}. Restore it."
        ) from error
