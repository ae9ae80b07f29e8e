"""Families of decoders as Hugging Face's folders write them.

A `Family` says which words of a `config.json` it understands and what it calls each
module of ours. Both directions of a checkpoint's way are read off the same table, so
loading and saving cannot disagree.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from influence.model.config import Config
from influence.runtime.huggingface import layouts
from influence.runtime.huggingface import words as said
from influence.runtime.huggingface.layouts import Layout
from influence.runtime.huggingface.words import Words

NEEDED = (
    *("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_hidden_layers"),
)
"""The words without which nothing is known."""

LLAMA: Words = {
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
"""The other words of Llama and its kin, with what they are where left out."""

QWEN: Words = {
    **LLAMA,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

GEMMA: Words = {
    **LLAMA,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_size": None,
    "layer_types": None,
    "tie_word_embeddings": True,
}

ATTENTION = tuple(f"blocks.attention.{x}" for x in ("query", "key", "value"))
"""Our modules of queries, keys and values, which some families have as one."""

FUSED = ", ".join(ATTENTION)
"""What such a module is called in the tables below."""


def _llama_modules(*norms: tuple[str, str]) -> dict[str, str]:
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    mlp = {x: f"{x}_proj" for x in ("gate", "up", "down")}
    block = {
        **{f"attention.{x}": f"self_attn.{y}" for x, y in attention.items()},
        **{f"mlp.{x}": f"mlp.{y}" for x, y in mlp.items()},
        **dict(norms),
    }
    return {
        "embed": "model.embed_tokens",
        **{f"blocks.{x}": f"model.layers.{{}}.{y}" for x, y in block.items()},
        "norm": "model.norm",
        "head": "lm_head",
    }


BEFORE = (
    ("attention_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
)
BEHIND = (
    ("attention_post_norm", "post_attention_layernorm"),
    ("mlp_post_norm", "post_feedforward_layernorm"),
)
AROUND = (
    *(("attention_norm", "input_layernorm"), *BEHIND),
    ("mlp_norm", "pre_feedforward_layernorm"),
)
OF_HEADS = (
    ("attention.query_norm", "self_attn.q_norm"),
    ("attention.key_norm", "self_attn.k_norm"),
)


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's.

    Attributes:
      architecture: the name of its class.
      model_type: its word in a config.
      facts: what its words state.
      modules: by the path of each of our modules, what theirs is called; `{}` stands
        for the block's number.
      needed: the words without which nothing is known.
      words: the other words understood, and what they are where left out.
      kernel: how the weights of linear layers lie.
      fused: how they lie where queries, keys and values are one module.
      fused_lora: how the second factor of an adapter beside that module lies.
      aliases: what other versions call a tensor, and what it is called here.
      buffers: patterns of tensors that hold no weights: masks and frequencies.
    """

    architecture: str
    model_type: str
    facts: Callable[[Words], Config]
    modules: Mapping[str, str]
    needed: tuple[str, ...] = NEEDED
    words: Words = field(default_factory=lambda: LLAMA)
    kernel: Layout = layouts.TURNED
    fused: Layout = layouts.AS_IS
    fused_lora: Layout = layouts.TURNED
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)

    @property
    def prefix(self) -> str:
        """Returns what all names but the head's begin with."""
        return self.modules["norm"].rpartition(".")[0] + "."


GPT2 = Family(
    "GPT2LMHeadModel",
    "gpt2",
    said.gpt2,
    modules={
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "blocks.attention_norm": "transformer.h.{}.ln_1",
        FUSED: "transformer.h.{}.attn.c_attn",
        "blocks.attention.out": "transformer.h.{}.attn.c_proj",
        "blocks.mlp_norm": "transformer.h.{}.ln_2",
        "blocks.mlp.up": "transformer.h.{}.mlp.c_fc",
        "blocks.mlp.down": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    needed=("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"),
    words={
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    kernel=layouts.AS_IS,
    fused=layouts.COLUMNS,
    buffers=(r".*\.attn\.(masked_)?bias",),
)

NEOX = Family(
    "GPTNeoXForCausalLM",
    "gpt_neox",
    said.neox,
    modules={
        "embed": "gpt_neox.embed_in",
        "blocks.attention_norm": "gpt_neox.layers.{}.input_layernorm",
        FUSED: "gpt_neox.layers.{}.attention.query_key_value",
        "blocks.attention.out": "gpt_neox.layers.{}.attention.dense",
        "blocks.mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
        "blocks.mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "blocks.mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    },
    words={
        **LLAMA,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "attention_bias": True,
        "use_parallel_residual": True,
        "rope_theta": None,
        "rotary_emb_base": 10_000.0,
        "partial_rotary_factor": None,
        "rotary_pct": 0.25,
    },
    fused=layouts.HEADS,
    fused_lora=layouts.HEADS_TOGETHER,
    aliases={"lm_head.weight": "embed_out.weight"},
    buffers=(r".*\.attention\.(masked_)?bias", r".*\.rotary_emb\.inv_freq"),
)

FAMILIES = {
    x.architecture: x
    for x in (
        GPT2,
        NEOX,
        Family(
            "LlamaForCausalLM",
            "llama",
            said.llama,
            _llama_modules(*BEFORE),
            words={**LLAMA, "mlp_bias": False},
        ),
        Family(
            "MistralForCausalLM",
            "mistral",
            said.mistral,
            _llama_modules(*BEFORE),
            words={**LLAMA, "num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Family(
            "Qwen2ForCausalLM",
            "qwen2",
            said.qwen2,
            _llama_modules(*BEFORE),
            words=QWEN,
        ),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            said.qwen3,
            _llama_modules(*BEFORE, *OF_HEADS),
            words={**QWEN, "head_dim": 128},
        ),
        Family(
            "Gemma2ForCausalLM",
            "gemma2",
            said.gemma2,
            _llama_modules(*AROUND),
            words={
                **GEMMA,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
        ),
        Family(
            "Gemma3ForCausalLM",
            "gemma3_text",
            said.gemma3,
            _llama_modules(*AROUND, *OF_HEADS),
            words={
                **GEMMA,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "sliding_window_pattern": None,
                "_sliding_window_pattern": 6,
            },
        ),
        Family(
            "Olmo2ForCausalLM",
            "olmo2",
            said.olmo2,
            _llama_modules(*BEHIND, *OF_HEADS),
            words={**LLAMA, "rms_norm_eps": 1e-5},
        ),
    )
}
"""What is supported, by the name of its class."""


def family_of(words: Words) -> Family:
    """Returns the family a config belongs to.

    Raises:
      ValueError: if it is none of those supported, naming them.
    """
    named = words.get("architectures") or []
    by_type = {x.model_type: x.architecture for x in FAMILIES.values()}
    found = named[0] if named else by_type.get(words.get("model_type", ""), "")
    if len(named) > 1 or found not in FAMILIES:
        named = ", ".join(named) or f"of model_type {words.get('model_type')!r}"
        raise ValueError(
            f"The architecture {named} is not supported. Supported are "
            f"{', '.join(FAMILIES)}. Any other model can be passed as a function of "
            "your own: `LanguageModel(apply)`, with `apply(params, tokens_BxT) -> "
            "logits_BxTxV`."
        )
    return FAMILIES[found]
