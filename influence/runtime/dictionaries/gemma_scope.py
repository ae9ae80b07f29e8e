"""Gemma Scope's folders: `params.npz`, whose path says what it is of.

gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz
"""

import re
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from influence.interpret.activations import JumpReLU
from influence.runtime.dictionaries import sites
from influence.runtime.dictionaries.arrays import assembled, checked
from influence.runtime.dictionaries.stored import About, Stored

WEIGHTS = "params.npz"

AXES = {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D", "threshold": "F"}

PLACE = re.compile(
    r"gemma-scope-(\d+b)-(pt|it)-(res|att|mlp|transcoders)\b.*layer_(\d+)\b", re.DOTALL
)

HOOKS = {"res": "hook_resid_post", "att": "attn.hook_z", "mlp": "hook_mlp_out"}
"""TransformerLens' names of what their names say."""

CONTEXT = 1024
"""How many tokens their sequences had."""


def read(folder: str | Path, *, folded: bool = False) -> Stored:
    """Returns the dictionary of a folder.

    Args:
      folder: where it is, in a path like theirs.
      folded: whether the scales of the model's norms are in the weights after them:
        only then are their transcoders of what an MLP reads.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if it is damaged, or the path does not say what it is of.
    """
    path = Path(folder)
    match = PLACE.search(path.resolve().as_posix())
    if match is None:
        raise ValueError(
            f"{path} does not say which site its dictionary is of. Keep the names of "
            "the original: gemma-scope-2b-pt-res/layer_20/…"
        )
    size, tuned, kind, block = match[1], match[2], match[3], int(match[4])
    writes = None
    if kind == "transcoders":
        hook, writes = "ln2.hook_normalized", f"mlp_out.{block}"
    else:
        hook = HOOKS[kind]
    about = About(
        sites.from_transformer_lens(f"blocks.{block}.{hook}", folded=folded),
        writes,
        model=f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}",
        kind="jumprelu",
        context=CONTEXT,
    )
    arrays = checked(path / WEIGHTS, _arrays(path / WEIGHTS), AXES, {})
    threshold = jnp.asarray(arrays.pop("threshold"))
    return Stored(assembled(arrays, JumpReLU(threshold)), about)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}. Fetch it again.")
    try:
        # numpy leaves a file that it opened itself open if it is no whole zip.
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) can't be read as arrays: {error}. "
            "Fetch it again."
        ) from error
