"""From a `config.json` to the facts of a decoder, and from those of a Llama back.

A word that is neither understood nor known to change nothing is an error: what it asks
for would be missing from the model in silence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from influence.model.config import Config
from influence.runtime.huggingface.families import family_of
from influence.runtime.huggingface.words import ACTIVATIONS, Words, check

WITHOUT_EFFECT = (
    *("_attn_implementation_autoset", "_name_or_path", "architectures", "dtype"),
    *("attention_dropout", "attn_pdrop", "cache_implementation", "classifier_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "prefix", "tokenizer_class"),
    *("chunk_size_feed_forward", "diversity_penalty", "do_sample", "early_stopping"),
    *("embd_pdrop", "finetuning_task", "gradient_checkpointing", "hidden_dropout"),
    *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
    *("initializer_range", "is_decoder", "is_llama_config", "length_penalty"),
    *("max_length", "min_length", "model_type", "n_ctx", "name_or_path", "num_beams"),
    *("num_return_sequences", "output_attentions", "output_hidden_states"),
    *("output_scores", "pretraining_tp", "reorder_and_upcast_attn", "resid_pdrop"),
    *("repetition_penalty", "return_dict", "summary_activation", "summary_type"),
    *("summary_first_dropout", "summary_proj_to_labels", "summary_use_proj"),
    *("temperature", "tie_encoder_decoder", "top_k", "top_p", "torch_dtype"),
    *("torchscript", "transformers.js_config", "transformers_version"),
    *("unsloth_version", "use_cache", "use_return_dict"),
)
"""Words that change nothing of the logits a model computes, dropout being off."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False,),
}
"""Words with a value that changes nothing, which is supported, and others."""


def config_of(words: Words, ignore: Sequence[str] = ()) -> Config:
    """Returns the facts a config states.

    Args:
      words: what it says.
      ignore: words not to be heeded.

    Raises:
      ValueError: if the architecture, a word or the value of one is not supported, or a
        word is missing.
    """
    family = family_of(words)
    words = {k: x for k, x in words.items() if k not in ignore}
    check("model_type", words.get("model_type", family.model_type), [family.model_type])
    known = {*family.needed, *family.words, *ONLY, *WITHOUT_EFFECT}
    unknown = sorted(words.keys() - known)
    if unknown:
        listed = ", ".join(f"{x} = {words[x]!r}" for x in unknown)
        raise ValueError(
            f"The config of {family.architecture} has words that are not understood: "
            f"{listed}. If they change nothing of what the model computes, pass "
            f"ignore={unknown}."
        )
    for word in family.needed:
        if type(words.get(word)) is not int or words[word] < 1:
            raise ValueError(
                f"The config of {family.architecture} has {word} = {words.get(word)!r},"
                " which has to be a whole number above zero."
            )
    for word in words.keys() & ONLY.keys():
        check(word, words[word], ONLY[word])
    for word, usual in family.words.items():
        if not _alike(words.get(word), usual):
            raise ValueError(
                f"The config of {family.architecture} has {word} = {words[word]!r}, "
                f"which has to be something like {usual!r}."
            )
    return family.facts({**family.words, **words})


def _alike(value: Any, usual: Any) -> bool:
    """Returns whether a word's value is of the kind it usually is; None always is."""
    kinds = [bool, str, (int, float)]
    mine, usually = ([isinstance(x, kind) for kind in kinds] for x in (value, usual))
    return value is None or usual is None or mine == usually


def llama_words(config: Config) -> dict[str, Any]:
    """Returns a decoder's facts as words of Llama.

    Raises:
      ValueError: if they are not those of a Llama, naming the facts.
    """
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    words = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.blocks,
        "num_key_value_heads": config.groups,
        "head_dim": config.features,
        "hidden_act": activations[config.activation],
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary.base if config.rotary else 0.0,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
    facts, read = asdict(config), asdict(config_of(words))
    different = [x for x in facts if facts[x] != read[x]]
    if different:
        listed = ", ".join(f"{x} = {facts[x]}" for x in different)
        raise ValueError(
            f"A Llama has no {listed}: this decoder can't be written as one. Save it "
            "with `save_orbax`."
        )
    return words
