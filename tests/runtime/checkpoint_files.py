"""Checkpoints written by transformers, and ways to change a copy of one."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from influence.types import named_leaves

GOLDEN = Path(__file__).parent.parent / "golden" / "decoders"
FAMILIES = sorted(x.name for x in GOLDEN.iterdir())


def copy(family: str, folder: Path) -> Path:
    """Returns a copy of a family's checkpoint."""
    shutil.copytree(GOLDEN / family, folder)
    (folder / "expected.safetensors").unlink()
    return folder


def words(folder: Path, **changes) -> dict:
    """Returns a config after changing some of its words; "OUT" takes one out."""
    path = folder / "config.json"
    said = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: x for k, x in said.items() if x != "OUT"}))
    return said


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a checkpoint, in one file or several."""
    return {
        k: x
        for path in folder.glob("model*.safetensors")
        for k, x in load_file(path).items()
    }


def rewrite(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Puts other tensors in the place of those of a checkpoint."""
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def expected(family: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens, and the logits that transformers computed."""
    arrays = load_file(GOLDEN / family / "expected.safetensors")
    return arrays["tokens"], arrays["logits"]


def adapter(folder: Path, modules: dict[str, tuple[int, int]], **said) -> Path:
    """Writes a PEFT folder with random factors of rank 2.

    Args:
      folder: where.
      modules: inputs and outputs of what is adapted, by their names.
      said: words of its config, instead of the usual ones.
    """
    folder.mkdir()
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**usual, **said}))
    rng, arrays = np.random.default_rng(0), {}
    for name, (inputs, outputs) in modules.items():
        for word, shape in (("A", (2, inputs)), ("B", (outputs, 2))):
            key = f"base_model.model.{name}.lora_{word}.weight"
            arrays[key] = (0.4 * rng.standard_normal(shape)).astype(np.float32)
    save_file(arrays, folder / "adapter_model.safetensors")
    return folder


def same(found, expected) -> None:
    """Compares parameters to the bit."""
    found, expected = named_leaves(found), named_leaves(expected)
    assert found.keys() == expected.keys()
    for k, x in found.items():
        assert x.dtype == expected[k].dtype
        np.testing.assert_array_equal(x, expected[k], err_msg=k)
