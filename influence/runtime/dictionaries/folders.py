"""Where dictionaries are: folders of several libraries, here or on the hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from influence.runtime.checkpoints import new
from influence.runtime.dictionaries import (
    dictionary_learning,
    gemma_scope,
    saelens,
    sparsify,
)
from influence.runtime.dictionaries.stored import Stored
from influence.runtime.huggingface.folders import locate
from influence.runtime.store import atomic

WEIGHTS = (
    saelens.WEIGHTS,
    sparsify.WEIGHTS,
    dictionary_learning.WEIGHTS,
    gemma_scope.WEIGHTS,
)
"""The files by which formats are told apart."""

WANTED = (*WEIGHTS, saelens.CONFIG, "config.json", saelens.SPARSITY, saelens.SCALER)
"""What is fetched of a folder on the hub."""

NAME = r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)*"
"""What folders on the hub look like: `owner/name`, and folders inside."""

PICKLES = ("*.pt", "*.pth", "*.bin", "*.pkl", "*.pickle")


def open_dictionary(place: str | Path, *, folded: bool = False) -> Stored:
    """Returns a dictionary that SAELens, sparsify or others wrote, or we.

    Args:
      place: a folder, or `owner/name` on the hub, with folders inside it if it has any:
        `owner/name/layers.5`. A folder on this machine goes first.
      folded: whether the scales of the model's norms are in the weights after them, see
        `sites.from_transformer_lens`.

    Raises:
      FileNotFoundError: if there is no such folder, or a file is missing in it.
      ValueError: if it is none of a dictionary, or one that is not read here.

    Example:
      >>> from influence.interpret.activations import TopK
      >>> from influence.interpret.dictionary import Dictionary
      >>> from influence.runtime.dictionaries.folders import open_dictionary, save
      >>> from influence.runtime.dictionaries.stored import About, Stored
      >>> eye, zero = jnp.eye(2, dtype="float32"), jnp.zeros(2, "float32")
      >>> own = Dictionary(eye, zero, eye, zero, TopK(1))
      >>> save(folder / "features", Stored(own, About("resid.1", kind="topk")))
      >>> open_dictionary(str(folder / "features")).about.site
      'resid.1'
    """
    path = _located(place)
    if (path / saelens.WEIGHTS).exists():
        return saelens.read(path, folded=folded)
    if (path / sparsify.WEIGHTS).exists():
        return sparsify.read(path)
    if (path / dictionary_learning.WEIGHTS).exists():
        return dictionary_learning.read(path)
    if (path / gemma_scope.WEIGHTS).exists():
        return gemma_scope.read(path, folded=folded)
    raise ValueError(_nothing(path))


def save(folder: str | Path, stored: Stored, *, replace: bool = False) -> None:
    """Writes a dictionary into a folder that SAELens opens as well.

    Args:
      folder: a new or empty one, which appears whole or not at all.
      stored: the dictionary.
      replace: whether one that is in the folder is written over, file by file; files of
        other names stay.

    Raises:
      FileExistsError: if there is something else in the folder.
      ValueError: if its numbers are not finite.
      OSError: if it could not be written.
    """
    path = Path(folder)
    if replace and (path / saelens.WEIGHTS).exists():
        saelens.write(path, stored)
        return
    with atomic(new(path)) as temporary:
        saelens.write(temporary, stored)


def _located(place: str | Path) -> Path:
    """Returns the folder of a place, fetched if it is on the hub."""
    path = Path(place).expanduser()
    if isinstance(place, Path) or path.exists() or not re.fullmatch(NAME, place):
        return locate(path)
    owner, name, *inside = place.split("/")
    patterns = ["/".join([*inside, x]) for x in WANTED]
    # sparsify's folders are of one run, whose config is beside them.
    patterns += ["/".join([*inside[:-1], sparsify.RUN])] if inside else []
    try:
        found = snapshot_download(f"{owner}/{name}", allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no folder {place!r} here, and no dictionary of that name could "
            f"be fetched from the hub: {error}"
        ) from error
    whole = Path(found).joinpath(*inside)
    if not whole.is_dir():
        raise FileNotFoundError(
            f"{owner}/{name} on the hub has no dictionary in {'/'.join(inside)!r}. "
            "Name the folder that its weights are in."
        )
    return whole


def _nothing(path: Path) -> str:
    """Returns what is wrong with a folder of no format."""
    pickles = sorted(x.name for pattern in PICKLES for x in path.glob(pattern))
    if pickles:
        return (
            f"{path / pickles[0]} is a pickle of an unknown kind, which can run code "
            "as it is read. Write the dictionary with SAELens' save_model instead."
        )
    inside = sorted(
        x.parent.relative_to(path).as_posix()
        for name in WEIGHTS
        for x in path.rglob(name)
    )
    if inside:
        listed = ", ".join(inside[:8]) + (", …" if len(inside) > 8 else "")
        return f"{path} has dictionaries in folders: {listed}. Name one of them."
    return (
        f"{path} has no dictionary: none of {', '.join(WEIGHTS)}. Name the folder that "
        "its weights are in."
    )
