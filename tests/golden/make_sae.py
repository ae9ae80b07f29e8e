"""Writes small dictionaries as their libraries do: `python -m tests.golden.make_sae`.

In an environment with SAELens 6.54.12 (`[interp-peers]`). SAELens writes its own
folders, and encodes and reconstructs. dictionary_learning's are state dicts in its
layout, written by torch, with what its classes' formulas make of the same inputs.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from experiments import sae_formats
from experiments.sae_formats import CASES, D, F, K, inputs, torch

FOLDER = Path(__file__).with_name("sae")

LEFT = ("topk, not folded", "jumprelu_transcoder")
"""What others have all of."""


def main() -> None:
    """Writes all folders beside this file."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.set_num_threads(1)
    x = inputs()
    for name, write in CASES.items():
        if name not in LEFT:
            sae = write(FOLDER / "saelens" / name)
            _expect(FOLDER / "saelens" / name, x, *sae_formats.theirs(sae, x))
    for name, make in CLASSES.items():
        folder = FOLDER / "dictionary_learning" / name
        folder.mkdir(parents=True)
        state, encodings, outputs = make(torch.tensor(x))
        torch.save(state, folder / "ae.pt")
        words = {"dict_class": name, "activation_dim": D, "dict_size": F, "k": K}
        where = {"layer": 1, "lm_name": "tiny", "submodule_name": "resid_post_layer_1"}
        config = {"trainer": {**words, **where}, "buffer": {"ctx_len": 32}}
        (folder / "config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")
        _expect(folder, x, encodings.numpy(), outputs.numpy())


def _expect(folder: Path, x: np.ndarray, z: np.ndarray, y: np.ndarray) -> None:
    arrays = {"x": x, "z": z, "y": y}
    save_file(
        {k: np.ascontiguousarray(v) for k, v in arrays.items()},
        folder / "expected.safetensors",
    )


def _drawn(seed: int, *shape: int) -> Any:
    return 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _linear(x: Any, base: Any) -> tuple[dict[str, Any], Any]:
    """Returns a state dict with an encoder and a decoder, and pre-activations."""
    state = {
        "encoder.weight": _drawn(0, F, D),
        "encoder.bias": _drawn(1, F),
        "decoder.weight": _drawn(2, D, F),
    }
    return state, (x - base) @ state["encoder.weight"].T + state["encoder.bias"]


def _plain() -> dict[str, Any]:
    return {
        "W_enc": _drawn(0, D, F),
        "b_enc": _drawn(1, F),
        "W_dec": _drawn(2, F, D),
        "b_dec": _drawn(3, D),
    }


def standard(x: Any) -> tuple[dict[str, Any], Any, Any]:
    """`AutoEncoder`."""
    base = _drawn(3, D)
    state, pre = _linear(x, base)
    z = pre.relu()
    return {"bias": base, **state}, z, z @ state["decoder.weight"].T + base


def standard_new(x: Any) -> tuple[dict[str, Any], Any, Any]:
    """`AutoEncoderNew`: the decoder's bias is not taken off."""
    base = _drawn(3, D)
    state, pre = _linear(x, torch.zeros(D))
    z = pre.relu()
    return {**state, "decoder.bias": base}, z, z @ state["decoder.weight"].T + base


def gated(x: Any) -> tuple[dict[str, Any], Any, Any]:
    """`GatedAutoEncoder`: activations are multiplied by the decoder's lengths."""
    base, gate, magnitude, scale = (
        _drawn(3, D),
        _drawn(4, F),
        _drawn(5, F),
        _drawn(6, F),
    )
    encoder, decoder = _drawn(0, F, D), _drawn(2, D, F)
    pre = (x - base) @ encoder.T
    z = (pre + gate > 0) * (scale.exp() * pre + magnitude).relu()
    state = {
        "decoder_bias": base,
        "r_mag": scale,
        "gate_bias": gate,
        "mag_bias": magnitude,
        "encoder.weight": encoder,
        "decoder.weight": decoder,
    }
    return state, z * decoder.norm(dim=0), z @ decoder.T + base


def topk(x: Any) -> tuple[dict[str, Any], Any, Any]:
    """`AutoEncoderTopK`: its threshold is not used."""
    base = _drawn(3, D)
    state, pre = _linear(x, base)
    best = pre.relu().topk(K, dim=-1)
    z = torch.zeros_like(pre).scatter_(-1, best.indices, best.values)
    numbers = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.4)}
    whole = {"b_dec": base, **numbers, **state}
    return whole, z, z @ state["decoder.weight"].T + base


def batchtopk(x: Any) -> tuple[dict[str, Any], Any, Any]:
    """`BatchTopKSAE`: one threshold for all features."""
    base = _drawn(3, D)
    state, pre = _linear(x, base)
    z = pre.relu() * (pre > 0.8)
    numbers = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.8)}
    whole = {"b_dec": base, **numbers, **state}
    return whole, z, z @ state["decoder.weight"].T + base


def jumprelu(x: Any) -> tuple[dict[str, Any], Any, Any]:
    """`JumpReluAutoEncoder`: activations are multiplied by the decoder's lengths."""
    state, threshold = _plain(), _drawn(4, F).abs()
    pre = x @ state["W_enc"] + state["b_enc"]
    z = (pre * (pre > threshold)).relu()
    whole = {**state, "threshold": threshold}
    out = z @ state["W_dec"] + state["b_dec"]
    return whole, z * state["W_dec"].norm(dim=1), out


def matryoshka(x: Any) -> tuple[dict[str, Any], Any, Any]:
    """`MatryoshkaBatchTopKSAE`."""
    state = _plain()
    pre = (x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]
    z = pre.relu() * (pre > 0.8)
    numbers = {
        "k": torch.tensor(K, dtype=torch.int),
        "threshold": torch.tensor(0.8),
        "group_sizes": torch.tensor([4, F - 4]),
    }
    return {**state, **numbers}, z, z @ state["W_dec"] + state["b_dec"]


CLASSES = {
    "AutoEncoder": standard,
    "AutoEncoderNew": standard_new,
    "GatedAutoEncoder": gated,
    "AutoEncoderTopK": topk,
    "BatchTopKSAE": batchtopk,
    "JumpReluAutoEncoder": jumprelu,
    "MatryoshkaBatchTopKSAE": matryoshka,
}


if __name__ == "__main__":
    main()
