"""Where a model's files are: a folder on this machine, or a name on the hub."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

TOKENIZER = (
    *("tokenizer*.json", "tokenizer.model", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    "generation_config.json",
)
"""The files that go along with a model as they are."""

WANTED = (
    *("config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors"),
    *TOKENIZER,
)
"""What is fetched from the hub: nothing that runs as it is read."""

NAME = r"[\w-][\w.-]*(/[\w.-]+)?"
"""What names on the hub look like."""


def locate(source: str | Path, revision: str | None = None) -> Path:
    """Returns the folder a model is in, fetched from the hub if it is a name there.

    A folder on this machine goes before a name on the hub.

    Raises:
      FileNotFoundError: if there is no such folder and no such name.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file. Name the folder that it is in.")
    if isinstance(source, Path) or not re.fullmatch(NAME, source):
        raise FileNotFoundError(f"There is no folder {path}.")
    try:
        found = snapshot_download(source, revision=revision, allow_patterns=[*WANTED])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no folder {source!r} here, and no model of that name could be "
            f"fetched from the hub: {error}"
        ) from error
    return Path(found)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the words of a config.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is no JSON object.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}, which says what its weights are of."
        )
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}. Fetch it again.") from error
    if not isinstance(words, dict):
        raise ValueError(f"{path} holds {type(words).__name__}, not a JSON object.")
    return words


def beside(folder: Path | None) -> list[Path]:
    """Returns the files of a folder that go along with its model as they are."""
    if folder is None:
        return []
    return [path for pattern in TOKENIZER for path in sorted(folder.glob(pattern))]
