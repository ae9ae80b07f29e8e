"""SAELens' folders: `sae_weights.safetensors` and `cfg.json`.

What they say of training is folded into the arrays as they are read: the decoder's bias
taken off the input, pre-activations multiplied by the decoder's lengths, one scale of
all inputs. What is written has none of it, and opens in SAELens 6 as the same
dictionary; a transcoder that keeps the `k` largest or has gates has no name there, and
is written as `topk_transcoder` or `gated_transcoder`, which is read here alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from influence.interpret.activations import Activation, Gated, JumpReLU, ReLU, TopK
from influence.interpret.dictionary import Dictionary
from influence.runtime.dictionaries import sites
from influence.runtime.dictionaries.arrays import (
    Arrays,
    assembled,
    centred,
    checked,
    read_safetensors,
    rescaled,
    top,
)
from influence.runtime.dictionaries.stored import About, Stored, plain
from influence.runtime.huggingface.folders import read_json
from influence.runtime.store import atomic

WEIGHTS, CONFIG, SPARSITY = (
    "sae_weights.safetensors",
    "cfg.json",
    "sparsity.safetensors",
)
SCALER = "activation_scaler.json"
"""Beside weights that are in training there: what inputs are multiplied by."""

VERSION = "6.54.12"
"""Whose folders are written."""

OWN = "influence"
"""What of the metadata is only ours."""

BIASES = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""The arrays with a number for each feature, by kind of activation."""


class _Plan(NamedTuple):
    """What an architecture's name says.

    Attributes:
      kind: of activation.
      transcodes: whether what is written is not what is read.
      skips: whether there is a linear map beside the features.
    """

    kind: str
    transcodes: bool = False
    skips: bool = False

    @property
    def name(self) -> str:
        """Returns the architecture."""
        if not self.transcodes:
            return self.kind
        words = [self.kind] * (self.kind != "standard") + ["skip"] * self.skips
        return "_".join([*words, "transcoder"])

    @property
    def axes(self) -> dict[str, str]:
        """Returns the arrays and their axes."""
        out = "O" if self.transcodes else "D"
        return {
            "W_enc": "DF",
            **dict.fromkeys(BIASES[self.kind], "F"),
            "W_dec": f"F{out}",
            "b_dec": out,
            **({"W_skip": f"{out}D"} if self.skips else {}),
        }


PLANS = {
    plan.name: plan
    for kind in BIASES
    for plan in (_Plan(kind), _Plan(kind, True), _Plan(kind, True, True))
}
"""What is read, by the architecture's name."""


def read(folder: str | Path, *, folded: bool = False) -> Stored:
    """Returns the dictionary of a folder.

    Args:
      folder: where it is.
      folded: whether the scales of the model's norms are in the weights after them, see
        `sites.from_transformer_lens`.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if one is damaged, or holds what can't be said by arrays alone.
    """
    path = Path(folder)
    words = _modern(read_json(path / CONFIG))
    plan = _plan(path, words)
    _check_words(path / CONFIG, words, plan)
    arrays = _without_ones(path / WEIGHTS, read_safetensors(path / WEIGHTS))
    sizes = {"D": words.get("d_in"), "F": words.get("d_sae"), "O": words.get("d_out")}
    arrays = checked(path / WEIGHTS, arrays, plan.axes, sizes)
    activation = _activation(path / CONFIG, words, plan.kind, arrays)
    dictionary = assembled(_folded(path, words, plan, arrays), activation)
    return Stored(dictionary, _about(path, words, plan, folded))


def write(folder: str | Path, stored: Stored) -> None:
    """Writes a dictionary; each file is whole or not there.

    Args:
      folder: where; files of other names in it stay.
      stored: the dictionary.

    Raises:
      ValueError: if numbers are not finite, or facts can't be written as JSON.
      OSError: if it could not be written.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    plan, arrays = _written(path / WEIGHTS, stored)
    words = json.dumps(_words(stored, plan, arrays), indent=2, allow_nan=False) + "\n"
    sparsity = _sparsity(stored.about.facts)
    with atomic(path / WEIGHTS) as temporary:
        save_file(arrays, temporary, metadata={"format": "pt"})
    (path / SPARSITY).unlink(missing_ok=True)
    if sparsity is not None:
        with atomic(path / SPARSITY) as temporary:
            save_file({"sparsity": sparsity}, temporary)
    with atomic(path / CONFIG) as temporary:
        temporary.write_text(words, encoding="utf-8")


_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""What configs of before version 6 called some things."""

_SHAPED = (
    *("architecture", "activation_fn", "activation_fn_kwargs", "k", "d_in", "d_sae"),
    *("apply_b_dec_to_input", "normalize_activations", "reshape_activations"),
    *("dtype", "device", "finetuning_scaling_factor"),
)
"""What is metadata of none: the rest of an older config is."""


def _modern(words: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config as version 6 has it: metadata apart."""
    if isinstance(words.get("metadata"), dict):
        return {**words}
    flat = {_RENAMED.get(k, k): x for k, x in words.items()}
    found = {"architecture": "standard", **{k: flat[k] for k in _SHAPED if k in flat}}
    function, options = flat.get("activation_fn"), flat.get("activation_fn_kwargs")
    if function == "topk":
        found |= {"architecture": "topk", "k": (options or {}).get("k")}
    if found.get("normalize_activations") is True:
        found["normalize_activations"] = "expected_average_only_in"
    return {**found, "metadata": {k: x for k, x in flat.items() if k not in _SHAPED}}


def _plan(path: Path, words: Mapping[str, Any]) -> _Plan:
    name = words.get("architecture")
    if name not in PLANS:
        raise ValueError(
            f"{path / CONFIG} says architecture {name!r}. Choose a dictionary of one "
            f"that is read here: {', '.join(PLANS)}. One in training is to be exported."
        )
    return PLANS[name]


def _check_words(path: Path, words: Mapping[str, Any], plan: _Plan) -> None:
    """Raises if there is something in a config that arrays do not hold."""
    norm = words.get("normalize_activations") or "none"
    if norm not in ("none", "expected_average_only_in"):
        raise ValueError(
            f"{path} says normalize_activations {norm!r}: each input is scaled by its "
            "own size, which no array does. Choose a dictionary trained without."
        )
    if words.get("activation_fn") not in (None, "relu", "topk"):
        raise ValueError(
            f"{path} says activation function {words['activation_fn']!r}. Choose a "
            "dictionary of relu or topk."
        )
    if plan.transcodes and words.get("apply_b_dec_to_input"):
        raise ValueError(
            f"{path} says that a {plan.name}'s output bias is taken off its input. "
            "Set apply_b_dec_to_input to false if it was trained so."
        )
    head = words["metadata"].get("hook_head_index")
    if head is not None:
        raise ValueError(
            f"{path} is of head {head} alone, and a site here has all heads. Choose a "
            "dictionary of all heads."
        )


def _without_ones(path: Path, arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns arrays without a factor of each feature that older versions wrote."""
    factor = arrays.get("scaling_factor")
    if factor is not None and not np.allclose(factor.astype(np.float32), 1):
        raise ValueError(
            f"{path} has a scaling_factor of features that is not one, as version 6 "
            "does not read it either. Multiply W_dec by it, and leave it out."
        )
    return {k: x for k, x in arrays.items() if k != "scaling_factor"}


def _activation(
    path: Path, words: Mapping[str, Any], kind: str, arrays: Arrays
) -> Activation:
    if kind == "topk":
        return top(path, words.get("k"), arrays["W_enc"].shape[1])
    if kind == "jumprelu":
        return JumpReLU(jnp.asarray(arrays["threshold"]))
    if kind == "gated":
        gate, magnitude = jnp.asarray(arrays["b_gate"]), jnp.asarray(arrays["b_mag"])
        return Gated(gate, jnp.asarray(np.exp(arrays["r_mag"])), magnitude)
    return ReLU()


def _folded(
    path: Path, words: Mapping[str, Any], plan: _Plan, arrays: Arrays
) -> dict[str, np.ndarray]:
    """Returns arrays that do what the config says is done beside them."""
    # A gated dictionary's encoder has no bias: gate and magnitude have their own.
    none = np.zeros(arrays["W_enc"].shape[1], arrays["W_enc"].dtype)
    found = {"b_enc": none, **arrays}
    if not plan.transcodes and words.get("apply_b_dec_to_input", True):
        found = centred(found)
    if plan.kind == "topk" and words.get("rescale_acts_by_decoder_norm"):
        found = rescaled(found)
    scaled = words.get("normalize_activations") == "expected_average_only_in"
    if scaled and (path / SCALER).exists():
        scale = np.float32(read_json(path / SCALER).get("scaling_factor") or 1)
        found["W_enc"] = found["W_enc"] * scale
        found |= {k: found[k] / scale for k in ("W_dec", "b_dec")}
    return found


_TOLD = (
    *("hook_name", "hook_name_out", "hook_head_index", "model_name", "context_size"),
    *("training_architecture", "sae_lens_version", OWN),
)
"""The metadata that are no facts: they have a place of their own."""


def _about(path: Path, words: Mapping[str, Any], plan: _Plan, folded: bool) -> About:
    told = words["metadata"]
    own = told.get(OWN) or {}
    site = own.get("site") or _site(path, told, "hook_name", folded)
    writes = own.get("writes")
    if plan.transcodes and writes is None:
        writes = _site(path, told, "hook_name_out", folded)
    facts = {k: x for k, x in told.items() if k not in _TOLD} | own.get("facts", {})
    if (path / SPARSITY).exists():
        facts |= read_safetensors(path / SPARSITY)
    return About(
        site,
        writes,
        told.get("model_name") or "",
        own.get("model_digest"),
        told.get("training_architecture") or plan.kind,
        told.get("context_size"),
        facts,
    )


def _site(path: Path, told: Mapping[str, Any], key: str, folded: bool) -> str:
    name = told.get(key)
    if not isinstance(name, str):
        raise ValueError(
            f"{path / CONFIG} does not say which site the dictionary is of: its "
            f"{key} is {name!r}. Add it to the metadata, such as "
            "blocks.2.hook_resid_post."
        )
    return sites.from_transformer_lens(name, folded=folded)


def _written(path: Path, stored: Stored) -> tuple[_Plan, dict[str, np.ndarray]]:
    """Returns the architecture of a dictionary and its arrays, looked at once more."""
    of, own = stored.dictionary, stored.dictionary.activation
    kind = _KINDS.get(type(own))
    if kind is None:
        raise ValueError(
            f"There is no name on disk for the activation {type(own).__name__}. Use "
            f"one of {', '.join(x.__name__ for x in _KINDS)}."
        )
    transcodes = stored.about.writes is not None or of.skip_OxD is not None
    plan = _Plan(kind, transcodes, of.skip_OxD is not None)
    arrays = {
        "W_enc": of.encoder_DxF,
        "W_dec": of.decoder_FxO,
        "b_dec": of.decoder_bias_O,
        **({} if of.skip_OxD is None else {"W_skip": of.skip_OxD}),
        **_biases(of),
    }
    found = {k: np.ascontiguousarray(x) for k, x in arrays.items()}
    return plan, checked(path, found, plan.axes, {})


_KINDS = {ReLU: "standard", TopK: "topk", JumpReLU: "jumprelu", Gated: "gated"}


def _biases(dictionary: Dictionary) -> dict[str, Any]:
    own, bias = dictionary.activation, dictionary.encoder_bias_F
    if isinstance(own, Gated):
        return {
            "b_gate": own.gate_F + bias,
            "b_mag": own.bias_F + own.scale_F * bias,
            "r_mag": np.log(own.scale_F),
        }
    if isinstance(own, JumpReLU):
        return {"b_enc": bias, "threshold": own.threshold_F}
    return {"b_enc": bias}


def _words(stored: Stored, plan: _Plan, arrays: Arrays) -> dict[str, Any]:
    """Returns the config of a dictionary."""
    of, about = stored.dictionary, stored.about
    facts = {k: plain(x) for k, x in about.facts.items() if k != "sparsity"}
    reshaped = about.site.startswith("attention_heads") and not plan.transcodes
    found = {
        "d_in": of.reads,
        "d_sae": of.width,
        "dtype": arrays["W_enc"].dtype.name,
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if reshaped else "none",
        "architecture": plan.name,
        "metadata": {
            **facts,
            **_hooks(about, facts.get("blocks")),
            "model_name": about.model,
            "context_size": about.context,
            "training_architecture": about.kind,
            "sae_lens_version": VERSION,
            OWN: {
                "site": about.site,
                "writes": about.writes,
                "model_digest": about.model_digest,
            },
        },
    }
    if plan.transcodes:
        found["d_out"] = of.writes
    if isinstance(of.activation, TopK):
        found |= {"k": of.activation.k, "rescale_acts_by_decoder_norm": False}
    return found


def _sparsity(facts: Mapping[str, Any]) -> np.ndarray | None:
    """Returns logarithms of how often features are on, if a fact says how often."""
    if "sparsity" in facts:
        return np.asarray(facts["sparsity"], np.float32)
    if "density" in facts:
        return np.log10(np.maximum(np.asarray(facts["density"], np.float32), 1e-10))
    return None


def _hooks(about: About, blocks: int | None) -> dict[str, str | None]:
    """Returns TransformerLens' names of the sites; ours, where there are none."""
    named = {"hook_name": about.site, "hook_name_out": about.writes}
    return {
        k: sites.to_transformer_lens(x, blocks) or x
        for k, x in named.items()
        if x is not None
    }
