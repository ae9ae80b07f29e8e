"""What can not be read as what it is, or not saved, is refused, with the reason."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from influence.runtime import checkpoints
from tests.runtime import checkpoint_files as files


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        (
            "llama",
            {"architectures": ["MambaForCausalLM"]},
            "architecture MambaForCausa",
        ),
        (
            "llama",
            {"architectures": ["MambaForCausalLM"]},
            "Supported are GPT2LMHeadMo",
        ),
        ("llama", {"architectures": ["MambaForCausalLM"]}, r"`LanguageModel\(apply\)`"),
        ("llama", {"architectures": "OUT", "model_type": "bert"}, "model_type 'bert'"),
        ("llama", {"model_type": "qwen2"}, "model_type = 'qwen2'"),
        ("llama", {"hidden_act": "mish"}, "hidden_act = 'mish'.*'silu'"),
        ("llama", {"mystery": 3}, r"mystery = 3.*pass ignore=\['mystery'\]"),
        ("llama", {"hidden_size": "OUT"}, "hidden_size = None"),
        ("llama", {"hidden_size": "16"}, "hidden_size = '16'"),
        ("llama", {"attention_bias": "yes"}, "attention_bias = 'yes'"),
        ("llama", {"rms_norm_eps": True}, "rms_norm_eps = True"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "both rope_scaling"),
        (
            "llama",
            {"rope_parameters": "OUT", "rope_scaling": {"type": "dynamic"}},
            "rope_type = 'dynamic'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear"}},
            r"\['factor'\] is missing",
        ),
        ("llama", {"rope_parameters": {"mrope_section": [1]}}, "mrope_section"),
        (
            "llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        ("mistral", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention'"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "look back at None"),
        ("gemma2", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        (
            "gemma3",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("llama", {"num_key_value_heads": 3}, "do not divide into 3 groups"),
        # What the weights do not fit.
        ("llama", {"num_hidden_layers": 4}, r"missing: model\.layers\.3\.\S+"),
        ("llama", {"num_hidden_layers": 2}, r"unexpected: model\.layers\.2\.\S+"),
        ("llama", {"attention_bias": True}, "self_attn.k_proj.bias"),
        ("llama", {"intermediate_size": 24}, r"is \(20, 16\), not \(24, 16\)"),
        ("llama", {"tie_word_embeddings": True}, r"lm_head\.weight differs"),
    ],
)
def test_configs_that_can_not_be_kept_are_refused(family, changes, said, tmp_path):
    folder = files.copy(family, tmp_path / "model")
    files.words(folder, **changes)
    with pytest.raises(ValueError, match=said):
        checkpoints.load(folder)


def test_folders_that_are_not_whole_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere"):
        checkpoints.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="There is no folder no/where"):
        checkpoints.load("./no/where/")
    folder = files.copy("llama", tmp_path / "model")
    weights = folder / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="is a file"):
        checkpoints.load(weights)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors \(.* can't be read"):
        checkpoints.load(folder)
    weights.write_bytes(b"not at all a tensor file")
    with pytest.raises(ValueError, match=r"model\.safetensors \(.* can't be read"):
        checkpoints.load(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="a config and no weights"):
        checkpoints.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="only as PyTorch pickles"):
        checkpoints.load(folder)
    weights.write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json can't be read"):
        checkpoints.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        checkpoints.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        checkpoints.load(folder)


def test_shards_that_are_not_whole_are_refused(tmp_path):
    loaded = checkpoints.load(files.GOLDEN / "llama")
    folder = tmp_path / "model"
    checkpoints.save(folder, loaded, max_shard_bytes=8000)
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    first, *_, last = sorted(set(said["weight_map"].values()))
    norm = next(k for k, x in said["weight_map"].items() if x == first)

    def changed(**weights):
        weights = {**said["weight_map"], **weights}
        index.write_text(json.dumps({**said, "weight_map": weights}))

    changed(**{norm: last})
    with pytest.raises(ValueError, match="and it does not"):
        checkpoints.load(folder)
    changed(**{norm: "../elsewhere.safetensors"})
    with pytest.raises(ValueError, match="which is not in its folder"):
        checkpoints.load(folder)
    changed()
    shard = folder / last
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{last}.* can't be read"):
        checkpoints.load(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {last}"):
        checkpoints.load(folder)


def test_types_that_do_not_exist_are_refused(tmp_path):
    folder = files.copy("llama", tmp_path / "model")
    for dtype, said in (
        ("int8", "can't be held as int8"),
        ("float7", "can't be held as float7"),
        ("float8_e4m3fn", "can't be held as float8"),
    ):
        with pytest.raises(ValueError, match=said):
            checkpoints.load(folder, dtype=dtype)
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match=r"float64 does not exist.*jax_enable_x64"):
            checkpoints.load(folder, dtype="float64")
        doubles = {k: x.astype(float) for k, x in files.tensors(folder).items()}
        files.rewrite(folder, doubles)
        with pytest.raises(ValueError, match="float64 does not exist"):
            checkpoints.load(folder)
        assert checkpoints.load(folder, dtype="float32").config
    norm = {"model.norm.weight": doubles["model.norm.weight"].astype(np.float16)}
    files.rewrite(folder, {**doubles, **norm})
    with pytest.raises(ValueError, match="several types, float16, float64"):
        checkpoints.load(folder)
    norm = {"model.norm.weight": np.ones(16, np.int8)}
    files.rewrite(folder, {**doubles, **norm})
    with pytest.raises(ValueError, match=r"model\.norm\.weight .* stored as I8"):
        checkpoints.load(folder)


def test_what_does_not_fit_together_is_not_saved(tmp_path):
    loaded = checkpoints.load(files.GOLDEN / "llama")
    longer = dataclasses.replace(loaded.config, context=128)
    with pytest.raises(ValueError, match="not what its words say"):
        checkpoints.save(tmp_path / "x", dataclasses.replace(loaded, config=longer))
    other = checkpoints.load(files.GOLDEN / "qwen3").params
    with pytest.raises(ValueError, match="and the config wants"):
        checkpoints.save(tmp_path / "x", dataclasses.replace(loaded, params=other))
    assert not (tmp_path / "x").exists()
