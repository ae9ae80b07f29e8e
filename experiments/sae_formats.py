"""Do dictionaries mean the same here and in SAELens, written there or here?

    python -m experiments.sae_formats

Random dictionaries of every architecture, biases, gates and thresholds included:

* SAELens writes, we read: those it trains are exported as it exports them, `topk` with
  its decoder's lengths in the file as well as folded;
* we write, SAELens reads: the same ones, every number changed meanwhile.

Of each, encodings and reconstructions of the same inputs are compared, in float32: the
largest difference, relative to the largest number. A feature that is on in one and off
in the other shows. The last line printed is JSON, `{"direction/architecture": error}`.
Needs `pip install -e '.[interp-peers]'`.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.peers import needed
from influence.interpret.dictionary import Dictionary, encode, reconstruct
from influence.runtime.dictionaries import saelens

os.environ["HF_HUB_OFFLINE"] = "1"
torch, sae_lens, registry, base = (
    needed(x, "interp-peers")
    for x in ("torch", "sae_lens", "sae_lens.registry", "sae_lens.saes.sae")
)

D, F, OUT, K, ROWS = 8, 16, 6, 3, 12
"""Numbers that are read, features, numbers that transcoders write, features that are
on, and vectors that are encoded."""

LIMIT = 1e-5
"""How far two may differ: float32 sums in another order."""

READS, WRITES = "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"


def inference(name: str, **options: Any) -> Callable[[Path], Any]:
    """Returns what writes a random dictionary of one of SAELens' architectures."""

    def write(folder: Path) -> Any:
        make, config = registry.get_sae_class(name)
        out = {"d_out": OUT, "apply_b_dec_to_input": False} if "coder" in name else {}
        sae = make(config(d_in=D, d_sae=F, metadata=_metadata(name), **out, **options))
        randomise(sae)
        sae.save_model(folder)
        return sae

    return write


def trained(name: str, **options: Any) -> Callable[[Path], Any]:
    """Returns what exports a random dictionary as if it had been trained."""

    def write(folder: Path) -> Any:
        make, config = registry.get_sae_training_class(name)
        sae = make(config(d_in=D, d_sae=F, **options))
        sae.cfg.metadata = _metadata(name)
        randomise(sae)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.8)
        sae.save_inference_model(folder)
        return sae_lens.SAE.load_from_disk(folder)

    return write


CASES = {
    "standard": inference("standard"),
    "topk": trained("topk", k=K, rescale_acts_by_decoder_norm=True),
    "topk, not folded": inference("topk", k=K, rescale_acts_by_decoder_norm=True),
    "batchtopk": trained("batchtopk", k=K),
    "matryoshka": trained("matryoshka_batchtopk", k=K, matryoshka_widths=[4, F]),
    "jumprelu": trained("jumprelu"),
    "gated": trained("gated"),
    "transcoder": inference("transcoder"),
    "skip_transcoder": inference("skip_transcoder"),
    "jumprelu_transcoder": inference("jumprelu_transcoder"),
    "jumprelu_skip_transcoder": inference("jumprelu_skip_transcoder"),
}


def _metadata(name: str) -> Any:
    out = {"hook_name_out": WRITES} if "coder" in name else {}
    said = {"model_name": "tiny", "hook_name": READS, "context_size": 32, **out}
    return base.SAEMetadata(training_architecture=name, **said)


def randomise(sae: Any) -> None:
    """Draws all weights anew; thresholds are positive."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if name == "log_threshold":
                drawn = 0.3 * drawn - 0.5
            weight.copy_(drawn.abs() if name == "threshold" else 0.5 * drawn)


def inputs() -> np.ndarray:
    """Returns the vectors that are encoded."""
    return np.random.default_rng(0).normal(size=(ROWS, D)).astype(np.float32)


def theirs(sae: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns encodings and reconstructions by SAELens."""
    with torch.no_grad():
        value = torch.tensor(x)
        return sae.encode(value).numpy(), sae(value).numpy()


def ours(dictionary: Dictionary, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns encodings and reconstructions by us."""
    value = jnp.asarray(x)
    return (
        np.asarray(encode(dictionary, value)),
        np.asarray(reconstruct(dictionary, value)),
    )


def compare(
    write: Callable[[Path], Any], folder: Path, x: np.ndarray
) -> tuple[float, float]:
    """Returns how far the two are apart, read here and read there."""
    written = write(folder / "theirs")
    stored = saelens.read(folder / "theirs")
    there = _apart(ours(stored.dictionary, x), theirs(written, x))
    changed = jax.tree.map(lambda x: x * 1.01 + 0.01, stored.dictionary)
    saelens.write(folder / "ours", replace(stored, dictionary=changed))
    opened = sae_lens.SAE.load_from_disk(folder / "ours")
    return there, _apart(theirs(opened, x), ours(changed, x))


def _apart(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def main() -> None:
    """Prints how far every architecture is apart, the last line as JSON."""
    torch.set_num_threads(1)
    console, errors = Console(), {}
    shown = Table("architecture", "SAELens writes, we read", "we write, SAELens reads")
    for name, write in CASES.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            jax.default_matmul_precision("highest"),
        ):
            there, back = compare(write, Path(folder), inputs())
        shown.add_row(name, f"{there:.1e}", f"{back:.1e}")
        errors |= {f"read/{name}": there, f"written/{name}": back}
    console.print(shown)
    console.print(json.dumps(errors), soft_wrap=True, highlight=False)
    if max(errors.values()) > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
