"""SAELens' folders: `cfg.json`, `sae_weights.safetensors`, `sparsity.safetensors`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from influence.interpret.activations import Activation, Gated, JumpReLU, ReLU, TopK
from influence.interpret.dictionary import Dictionary
from influence.runtime.dictionaries import sites
from influence.runtime.dictionaries.arrays import Arrays, check_array, check_k
from influence.runtime.dictionaries.stored import About, Stored
from influence.runtime.dictionaries.tensors import needed, read_tensors
from influence.runtime.huggingface.folders import read_json

CONFIG, WEIGHTS, SPARSITY = (
    "cfg.json",
    "sae_weights.safetensors",
    "sparsity.safetensors",
)

OURS = "influence"
"""What is ours among the metadata."""

TRANSCODERS = {
    "transcoder": (ReLU, False),
    "skip_transcoder": (ReLU, True),
    "jumprelu_transcoder": (JumpReLU, False),
    "jumprelu_skip_transcoder": (JumpReLU, True),
}
"""By architecture, a transcoder's activation and whether it has a skip."""

OLD = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
"""What old configs call what."""


def read(folder: Path) -> Stored:
    """Returns the dictionary in a folder.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged, files do not fit each other, or activations are
        normalised in a way that weights can't hold.
    """
    path = folder / CONFIG
    config = read_json(path)
    flat = {**config, **config.get("metadata", {})}
    flat |= {OLD[k]: v for k, v in flat.items() if k in OLD}
    _check_normalised(flat, path)
    arrays = read_tensors(folder / WEIGHTS)
    architecture = _architecture(flat, arrays)
    made = _dictionary(architecture, flat, arrays, folder / WEIGHTS)
    return Stored(made, _about(architecture, flat, folder))


def _check_normalised(flat: Mapping[str, Any], path: Path) -> None:
    said = flat.get("normalize_activations", "none")
    if said not in ("none", "expected_average_only_in", None):
        raise ValueError(
            f"{path} normalises activations by {said!r}, token by token, which a "
            "dictionary's arrays can't hold. Use one without, or with the expected "
            "average, which is folded in."
        )


def _architecture(flat: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Returns what kind of dictionary it is; old configs say so in other words."""
    said = flat.get("architecture", "standard")
    if said == "standard" and flat.get("activation_fn") == "topk":
        return "topk"
    if said in ("batchtopk", "matryoshka_batchtopk"):
        return "jumprelu" if "threshold" in arrays else "topk"
    return said


def _dictionary(
    architecture: str,
    flat: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    path: Path,
) -> Dictionary:
    centred = flat.get("apply_b_dec_to_input", architecture not in TRANSCODERS)
    encoder, decoder = needed(arrays, ("W_enc", "W_dec"), path)
    bias = arrays.get("b_enc")
    parts = Arrays(
        encoder, bias, decoder, arrays.get("b_dec"), arrays.get("W_skip"), bool(centred)
    )
    if architecture == "gated":
        made = parts._replace(encoder_bias_F=None)
        gate, scale, magnitude = needed(arrays, ("b_gate", "r_mag", "b_mag"), path)
        activation = Gated(*map(jnp.asarray, (gate, np.exp(scale), magnitude)))
        return _checked(
            made.dictionary(activation, path), (gate, scale, magnitude), path
        )
    if "jumprelu" in architecture:
        (threshold,) = (
            [np.exp(arrays["log_threshold"])]
            if "log_threshold" in arrays and "threshold" not in arrays
            else needed(arrays, ("threshold",), path)
        )
        found = parts.dictionary(JumpReLU(jnp.asarray(threshold)), path)
        return _checked(found, (threshold,), path)
    if architecture == "topk":
        k = flat.get("k", flat.get("activation_fn_kwargs", {}).get("k"))
        found = parts.dictionary(TopK(check_k(k, encoder.shape[-1], path)), path)
        # Chosen by length-weighted activations, which are those of rows of length one.
        return _unit(found) if flat.get("rescale_acts_by_decoder_norm") else found
    if architecture == "standard" or architecture in TRANSCODERS:
        return parts.dictionary(ReLU(), path)
    raise ValueError(
        f"{path.parent / CONFIG} is of architecture {architecture!r}. Known are "
        f"standard, topk, batchtopk, matryoshka_batchtopk, jumprelu, gated, "
        f"{', '.join(TRANSCODERS)}."
    )


def _unit(found: Dictionary) -> Dictionary:
    length = jnp.linalg.norm(found.decoder_FxO, axis=1)
    length = jnp.where(length > 0, length, jnp.ones_like(length))
    return Dictionary(
        found.encoder_DxF * length[None],
        found.encoder_bias_F * length,
        found.decoder_FxO / length[:, None],
        found.decoder_bias_O,
        found.activation,
        found.skip_OxD,
    )


def _checked(found: Dictionary, each: tuple[np.ndarray, ...], path: Path) -> Dictionary:
    for x in each:
        check_array("activation", x, (found.width,), path)
    return found


def _about(architecture: str, flat: Mapping[str, Any], folder: Path) -> About:
    own = flat.get(OURS, {})
    hook, out = flat.get("hook_name"), flat.get("hook_name_out")
    if hook is None and not own:
        raise ValueError(
            f"{folder / CONFIG} does not say what the dictionary reads: it has no "
            "hook_name. Add it, such as blocks.2.hook_resid_post."
        )
    site = own.get("site") or sites.from_transformer_lens(str(hook))
    writes = own.get("writes")
    if writes is None and architecture in TRANSCODERS and out is not None:
        writes = sites.from_transformer_lens(str(out))
    known = ("context_size", "model_name", "hook_name", "hook_name_out", OURS)
    facts = {
        k: v
        for k, v in flat.items()
        if k not in (*known, "metadata", "training_architecture_details")
    }
    return About(
        site=site,
        writes=writes,
        model=str(flat.get("model_name") or ""),
        model_digest=own.get("model_digest"),
        kind=own.get("kind") or flat.get("training_architecture") or architecture,
        context=flat.get("context_size"),
        facts={**facts, **own.get("facts", {})},
    )


def write(folder: Path, stored: Stored) -> None:
    """Writes a dictionary into a new folder as SAELens reads it.

    Raises:
      ValueError: if SAELens has nothing like it.
    """
    made, about = stored.dictionary, stored.about
    architecture, arrays, rest = _arrays(made, about)
    transcoder = about.writes is not None
    metadata = {
        "sae_lens_version": "6.54.12",
        "training_architecture": about.kind or architecture,
        "model_name": about.model,
        "hook_name": sites.to_transformer_lens(about.site),
        "hook_head_index": None,
        "context_size": about.context,
        "prepend_bos": False,
        OURS: {
            "site": about.site,
            "writes": about.writes,
            "model_digest": about.model_digest,
            "kind": about.kind,
            "facts": dict(about.facts),
        },
    }
    config = {
        "architecture": architecture,
        "d_in": made.reads,
        "d_sae": made.width,
        "dtype": str(made.encoder_DxF.dtype),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
        **rest,
    }
    if transcoder:
        config["d_out"] = made.writes
        metadata["hook_name_out"] = sites.to_transformer_lens(str(about.writes))
    folder.mkdir(parents=True)
    save_file(arrays, folder / WEIGHTS)
    density = about.facts.get("density")
    if density is not None:
        log = np.log10(np.maximum(np.asarray(density, np.float32), 1e-10))
        save_file({"sparsity": log}, folder / SPARSITY)
    text = json.dumps(config, indent=1, default=str) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _arrays(
    made: Dictionary, about: About
) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """Returns what SAELens calls a dictionary, its arrays, and what its config adds."""
    activation: Activation = made.activation
    arrays = {
        "W_enc": np.asarray(made.encoder_DxF),
        "b_enc": np.asarray(made.encoder_bias_F),
        "W_dec": np.asarray(made.decoder_FxO),
        "b_dec": np.asarray(made.decoder_bias_O),
    }
    if isinstance(activation, JumpReLU):
        arrays["threshold"] = np.asarray(activation.threshold_F)
    if about.writes is not None:
        skip = made.skip_OxD is not None
        if skip:
            arrays["W_skip"] = np.asarray(made.skip_OxD)
        for name, (kind, skips) in TRANSCODERS.items():
            if type(activation) is kind and skips == skip:
                return name, _contiguous(arrays), {}
        raise ValueError(
            f"SAELens has no transcoder with {type(activation).__name__} features. "
            "Train it with batchtopk or jumprelu, which end in thresholds."
        )
    if isinstance(activation, TopK):
        rest = {"k": activation.k, "rescale_acts_by_decoder_norm": False}
        return "topk", _contiguous(arrays), rest
    if isinstance(activation, Gated):
        bias = arrays.pop("b_enc")
        gate, scale, magnitude = (
            np.asarray(x)
            for x in (activation.gate_F, activation.scale_F, activation.bias_F)
        )
        arrays |= {
            "b_gate": gate + bias,
            "r_mag": np.log(scale),
            "b_mag": magnitude + scale * bias,
        }
        return "gated", _contiguous(arrays), {}
    name = "jumprelu" if isinstance(activation, JumpReLU) else "standard"
    return name, _contiguous(arrays), {}


def _contiguous(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: np.ascontiguousarray(x) for k, x in arrays.items()}
