"""Where a dictionary's files are, and which format they are in."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from influence.runtime.dictionaries import (
    dictionary_learning,
    gemma_scope,
    saelens,
    sparsify,
)
from influence.runtime.dictionaries.stored import Stored
from influence.runtime.store import atomic

READERS: Mapping[str, Callable[[Path], Stored]] = {
    saelens.WEIGHTS: saelens.read,
    sparsify.WEIGHTS: sparsify.read,
    gemma_scope.WEIGHTS: gemma_scope.read,
    dictionary_learning.WEIGHTS: dictionary_learning.read,
}
"""By a file that a folder of its format has, what reads it."""

WANTED = ("*.json", "*.safetensors", "*.npz", "ae.pt")


def open_dictionary(place: str | Path) -> Stored:
    """Returns a dictionary from a folder, or from a folder of a repository on the hub.

    Args:
      place: a folder; or `owner/name`, or `owner/name/folder/in/it` on the hub.

    Raises:
      FileNotFoundError: if there is nothing there.
      ValueError: if it is of no known format, damaged, or does not fit together.

    Example:
      >>> from influence.interpret.activations import TopK
      >>> from influence.interpret.dictionary import Dictionary
      >>> from influence.runtime.dictionaries.folders import open_dictionary, save
      >>> from influence.runtime.dictionaries.stored import About, Stored
      >>> rows = jnp.eye(4)[:, :3]
      >>> small = Dictionary(rows.T, jnp.zeros(4), rows, jnp.zeros(3), TopK(2))
      >>> save(folder / "sae", Stored(small, About("resid.1")))
      >>> open_dictionary(folder / "sae").about.site
      'resid.1'
    """
    folder = _located(str(place))
    found = [x for x in READERS if (folder / x).is_file()]
    if not found:
        inside = sorted(x.parent.name for x in folder.glob(f"*/{saelens.CONFIG}"))
        hint = f" It has dictionaries in it: {', '.join(inside)}." if inside else ""
        raise FileNotFoundError(
            f"{folder} is no dictionary: it has none of {', '.join(READERS)}.{hint}"
        )
    return READERS[found[0]](folder)


def _located(place: str) -> Path:
    """Returns a folder on this machine, fetched if it is on the hub."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    words = place.split("/")
    if place.startswith(("/", ".", "~")) or len(words) < 2 or not all(words):
        raise FileNotFoundError(f"There is no folder {folder}.")
    name, inside = "/".join(words[:2]), "/".join(words[2:])
    wanted = [f"{inside}/{x}" if inside else x for x in WANTED]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted)) / inside
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no folder {place!r} here, and no dictionary of that name could "
            f"be fetched from the hub: {error}"
        ) from error


def save(folder: Path, stored: Stored, *, replace: bool = False) -> None:
    """Writes a dictionary as SAELens reads it.

    Args:
      folder: where to.
      stored: the dictionary and what is known of it.
      replace: whether a dictionary that is there already is taken away.

    Raises:
      FileExistsError: if there is something in the folder.
    """
    if replace and (folder / saelens.CONFIG).is_file():
        shutil.rmtree(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"There is something in {folder}. Name another folder for the dictionary."
        )
    with atomic(folder) as temporary:
        saelens.write(temporary, stored)
