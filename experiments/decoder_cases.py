"""The tiny models that `experiments.parity_transformers` compares, by family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.peers import needed

transformers = needed("transformers", "parity")

SIZES = {
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
}
SHARED = {**SIZES, "num_key_value_heads": 2}
WIDE = {**SHARED, "head_dim": 8}
"""Sizes of a tiny model; with shared keys and values; with heads wider than usual."""

GPT2 = {"vocab_size": 40, "n_positions": 64, "n_embd": 12, "n_layer": 3, "n_head": 2}
NEOX = {
    **SIZES,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
"""GPT-2's words for sizes; heads so wide that a quarter of one turns at two speeds."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@dataclass(frozen=True)
class Case:
    """A model to compare.

    Attributes:
      config: transformers' class of its config.
      words: the config's.
      shard: how many bytes its files may have.
      multiple: of what its vocabulary is padded to a multiple.
      adapter: PEFT's words, if it has one.
    """

    config: Callable[..., Any]
    words: Mapping[str, Any]
    shard: int = 1 << 30
    multiple: int | None = None
    adapter: Mapping[str, Any] = field(default_factory=dict)


def case(name: str, words: Mapping[str, Any], **more: Any) -> Case:
    """Returns a case from the name of a config's class and its words."""
    return Case(getattr(transformers, name), {**words, **more})


CASES: Mapping[str, Mapping[str, Case]] = {
    "gpt2": {
        "as published": case("GPT2Config", GPT2),
        "untied, narrow, unscaled": case(
            *("GPT2Config", GPT2),
            tie_word_embeddings=False,
            n_inner=20,
            activation_function="relu",
            scale_attn_weights=False,
        ),
        "sharded": replace(case("GPT2Config", GPT2), shard=4096, multiple=16),
    },
    "gpt_neox": {
        "as published": case("GPTNeoXConfig", NEOX),
        "one after the other": case(
            *("GPTNeoXConfig", NEOX),
            use_parallel_residual=False,
            tie_word_embeddings=True,
            attention_bias=False,
            rope_parameters={"rope_theta": 5000.0, "partial_rotary_factor": 1.0},
        ),
        "sharded": replace(case("GPTNeoXConfig", NEOX), shard=4096, multiple=64),
    },
    "llama": {
        "Llama 2": case("LlamaConfig", SIZES),
        "Llama 3": case("LlamaConfig", SHARED, rope_parameters=LLAMA3),
        "tied, wide heads, biases": case(
            *("LlamaConfig", WIDE),
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=LINEAR,
        ),
        "sharded": replace(case("LlamaConfig", SHARED), shard=4096, multiple=64),
    },
    "mistral": {
        "window": case("MistralConfig", SHARED, sliding_window=5),
        "no window, wide heads": case("MistralConfig", WIDE, sliding_window=None),
    },
    "qwen2": {
        "as published": case("Qwen2Config", SHARED, tie_word_embeddings=True),
        "last blocks local": case(
            *("Qwen2Config", SHARED),
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=1,
        ),
        "sharded": replace(case("Qwen2Config", SHARED), shard=4096, multiple=64),
    },
    "qwen3": {
        "as published": case("Qwen3Config", WIDE),
        "biases, tied, last blocks local": case(
            *("Qwen3Config", WIDE),
            attention_bias=True,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=2,
        ),
    },
    "gemma2": {
        "as published": case(
            "Gemma2Config", WIDE, sliding_window=4, query_pre_attn_scalar=16
        ),
        "no caps, untied": case(
            *("Gemma2Config", WIDE),
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            tie_word_embeddings=False,
        ),
    },
    "gemma3": {
        "as published": case(
            *("Gemma3TextConfig", WIDE),
            sliding_window=4,
            sliding_window_pattern=3,
            rope_parameters=GEMMA3,
        ),
        "sharded": replace(
            case("Gemma3TextConfig", WIDE, sliding_window=6), shard=4096, multiple=64
        ),
    },
    "olmo2": {
        "as published": case("Olmo2Config", SIZES),
        "shared keys, tied": case("Olmo2Config", SHARED, tie_word_embeddings=True),
    },
    "peft": {
        "Llama, two layers": replace(
            case("LlamaConfig", SHARED),
            adapter={"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 7},
        ),
        "Gemma 2, all, √r": replace(
            case("Gemma2Config", WIDE),
            adapter={"target_modules": "all-linear", "r": 4, "use_rslora": True},
        ),
        "GPT-2, fused": replace(
            case("GPT2Config", GPT2),
            adapter={"target_modules": ["c_attn", "c_fc"], "r": 2, "lora_alpha": 5},
        ),
        "GPT-NeoX, fused": replace(
            case("GPTNeoXConfig", NEOX),
            adapter={"target_modules": ["query_key_value", "dense"], "r": 2},
        ),
    },
}
"""What is compared, by family and variant."""
