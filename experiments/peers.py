"""Libraries to compare with, which only some environments have."""

from importlib import import_module
from typing import Any


def needed(name: str, extra: str) -> Any:
    """Returns a module.

    Raises:
      ImportError: if it is not installed, naming the extra it comes with.
    """
    try:
        return import_module(name)
    except ImportError as missing:
        raise ImportError(
            f"{missing.name or name!r} is needed to compare with: pip install -e "
            f"'.[{extra}]', after the CPU builds of PyTorch and its torchvision."
        ) from missing
