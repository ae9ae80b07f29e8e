"""Arrays of a safetensors file, read with its damage told."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of a file.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: no weights.")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}. Fetch it again.") from error


def needed(
    arrays: Mapping[str, np.ndarray], names: Sequence[str], path: Path
) -> list[np.ndarray]:
    """Returns arrays by name.

    Raises:
      ValueError: if one is missing, naming what there is.
    """
    missing = [x for x in names if x not in arrays]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}, only {', '.join(sorted(arrays))}. Is "
            "it of the architecture that its config names?"
        )
    return [arrays[x] for x in names]
