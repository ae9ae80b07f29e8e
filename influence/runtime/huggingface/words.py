"""What the words of a `config.json` say, as the facts of a `Config`.

One function a family, from words (those left out filled in) to facts. Values that ask
for what is not there are errors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from influence.model.config import Config, Rotary

Words = Mapping[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Hugging Face's words for activations, and those of a `Config`."""

ROPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
}
"""The kinds of rotary positions, and the numbers each is described by."""


def check(word: str, value: Any, supported: Sequence[Any]) -> Any:
    """Returns a value if it is one of those supported.

    Raises:
      ValueError: if not, naming them.
    """
    if value not in supported:
        raise ValueError(
            f"The config has {word} = {value!r}, which is not supported; "
            f"{', '.join(map(repr, supported))} is. Another model can be passed as a "
            "function of your own, `LanguageModel(apply)`."
        )
    return value


def llama(words: Words) -> Config:
    """Returns the facts of Llama 2 and 3."""
    return Config(**_sizes(words), rotary=_rope(words), mlp_bias=words["mlp_bias"])


def mistral(words: Words) -> Config:
    """Returns the facts of Mistral: Llama whose blocks look back so far, or all way."""
    window = words["sliding_window"]
    local = (window is not None,) * words["num_hidden_layers"]
    return Config(**_sizes(words), rotary=_rope(words), window=window, local=local)


def qwen2(words: Words) -> Config:
    """Returns the facts of Qwen 2: Llama with three biases, its last blocks local."""
    sizes = {**_sizes(words), "attention_bias": True, "out_bias": False}
    return Config(**sizes, **_last_blocks_local(words))


def qwen3(words: Words) -> Config:
    """Returns the facts of Qwen 3: each head's queries and keys are normed."""
    return Config(**_sizes(words), **_last_blocks_local(words), query_norm=True)


def gemma2(words: Words) -> Config:
    """Returns the facts of Gemma 2: every other block is local."""
    local = _local(words, lambda i: i % 2 == 0)
    return Config(**_gemma(words), rotary=_rope(words), local=local)


def gemma3(words: Words) -> Config:
    """Returns the facts of Gemma 3: five of six blocks are local, and turn faster."""
    kinds = ("full_attention", "sliding_attention")
    new, old = words["rope_parameters"] or {}, words["rope_scaling"] or {}
    if new.keys() - set(kinds) or new and old:
        raise ValueError(
            f"The config has rope_parameters = {new} and rope_scaling = {old}. "
            f"Supported is one of them, the first by {' and '.join(kinds)}."
        )
    wide, near = (new.get(x) or {} for x in kinds)
    every = words["sliding_window_pattern"] or words["_sliding_window_pattern"]
    return Config(
        **_gemma(words),
        rotary=_rotary({**old, **wide}, words, words["rope_theta"]),
        local_rotary=_rotary(near, words, words["rope_local_base_freq"]),
        local=_local(words, lambda i: (i + 1) % every > 0),
        query_norm=True,
    )


def olmo2(words: Words) -> Config:
    """Returns the facts of OLMo 2: norms stand behind attention and MLP."""
    return Config(
        **_sizes(words),
        rotary=_rope(words),
        query_norm=True,
        query_norm_whole=True,
        pre_norm=False,
        post_norm=True,
    )


def neox(words: Words) -> Config:
    """Returns the facts of GPT-NeoX: a part of each head turns, and more."""
    words = {
        **words,
        "rms_norm_eps": words["layer_norm_eps"],
        "rope_theta": words["rope_theta"] or words["rotary_emb_base"],
    }
    part = words["partial_rotary_factor"] or words["rotary_pct"]
    return Config(
        **_sizes(words),
        rotary=_rope(words, part),
        gated=False,
        mlp_bias=True,
        centred=True,
        parallel=words["use_parallel_residual"],
    )


def gpt2(words: Words) -> Config:
    """Returns the facts of GPT-2: positions are learned."""
    act = check("activation_function", words["activation_function"], [*ACTIVATIONS])
    return Config(
        vocabulary=words["vocab_size"],
        context=words["n_positions"],
        width=words["n_embd"],
        hidden=words["n_inner"] or 4 * words["n_embd"],
        heads=words["n_head"],
        blocks=words["n_layer"],
        rotary=None,
        attention_scale=0.0 if words["scale_attn_weights"] else 1.0,
        attention_bias=True,
        out_bias=True,
        gated=False,
        activation=ACTIVATIONS[act],
        mlp_bias=True,
        centred=True,
        norm_epsilon=words["layer_norm_epsilon"],
        tied=words["tie_word_embeddings"],
    )


def _sizes(words: Words) -> dict[str, Any]:
    """Returns the facts that Llama and its kin state alike."""
    act = check("hidden_act", words["hidden_act"], [*ACTIVATIONS])
    return {
        "vocabulary": words["vocab_size"],
        "context": words["max_position_embeddings"],
        "width": words["hidden_size"],
        "hidden": words["intermediate_size"],
        "heads": words["num_attention_heads"],
        "blocks": words["num_hidden_layers"],
        "groups": words["num_key_value_heads"] or 0,
        "features": words["head_dim"] or 0,
        "activation": ACTIVATIONS[act],
        "norm_epsilon": words["rms_norm_eps"],
        "tied": words["tie_word_embeddings"],
        "attention_bias": words["attention_bias"],
        "out_bias": words["attention_bias"],
    }


def _gemma(words: Words) -> dict[str, Any]:
    """Returns the facts that Gemma 2 and 3 state alike."""
    act, window = words["hidden_activation"], words["sliding_window"]
    check("hidden_act", words["hidden_act"], [None, act])
    check("sliding_window_size", words["sliding_window_size"], [None, window])
    return {
        **_sizes({**words, "hidden_act": act}),
        "window": window,
        "attention_scale": words["query_pre_attn_scalar"] ** -0.5,
        "attention_cap": words["attn_logit_softcapping"],
        "logit_cap": words["final_logit_softcapping"],
        "norm_offset": 1.0,
        "post_norm": True,
        "embed_scale": words["hidden_size"] ** 0.5,
    }


def _last_blocks_local(words: Words) -> dict[str, Any]:
    """Returns what the blocks of Qwen look back at, and how positions turn."""
    window = words["sliding_window"] if words["use_sliding_window"] else None
    first = words["max_window_layers"]
    local = _local(words, lambda i: window is not None and i >= first)
    return {"rotary": _rope(words), "window": window, "local": local}


def _local(words: Words, rule: Callable[[int], bool]) -> tuple[bool, ...]:
    """Returns which blocks are local: those listed, or else those of a rule."""
    kinds = {"sliding_attention": True, "full_attention": False}
    listed = words["layer_types"]
    if listed is None:
        return tuple(rule(i) for i in range(words["num_hidden_layers"]))
    return tuple(kinds[check("layer_types", x, [*kinds])] for x in listed)


def _rope(words: Words, part: float | None = None) -> Rotary:
    """Returns how positions turn, as old configs say it or as new ones do.

    Args:
      words: the config's.
      part: of each head's features, how many are turned where it is not said; None
        where all of them are, always.
    """
    old, new = words["rope_scaling"] or {}, words["rope_parameters"] or {}
    if old and new and old != new:
        raise ValueError(
            f"The config has both rope_scaling = {old} and rope_parameters = {new}. "
            "Take out the one that does not hold."
        )
    return _rotary({**old, **new}, words, words["rope_theta"], part)


def _rotary(
    said: Words, words: Words, base: float, part: float | None = None
) -> Rotary:
    kind = said.get("rope_type", said.get("type", "default"))
    numbers = ROPES[check("rope_type", kind, [*ROPES])]
    trained = {"original_max_position_embeddings": words["max_position_embeddings"]}
    said = {k: x for k, x in said.items() if x is not None}
    said = {"rope_theta": base, **trained, **said}
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *trained}
    odd, missing = said.keys() - known - {*numbers}, {"rope_theta", *numbers} - {*said}
    if odd or missing:
        raise ValueError(
            f"The config describes rotary positions of type {kind!r} by {dict(said)}: "
            f"{sorted(odd)} is not understood, {sorted(missing)} is missing."
        )
    turned = said.get("partial_rotary_factor", part or 1.0)
    if part is None:
        check("partial_rotary_factor", turned, [1.0])
    size = words["head_dim"] or words["hidden_size"] // words["num_attention_heads"]
    rotary = Rotary(said["rope_theta"], int(size * turned))
    if kind != "llama3":
        return replace(rotary, factor=said.get("factor", 1.0))
    factor, slow, fast, context = (said[x] for x in numbers)
    return replace(rotary, factor=factor, slow=slow, fast=fast, trained=context)
