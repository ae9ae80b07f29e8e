"""A checkpoint is read as what it is, and written as it was read."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.model.config import Config
from influence.model.transformer import shapes
from influence.runtime import checkpoints
from influence.runtime.huggingface import families, layouts, words
from influence.runtime.huggingface.configs import config_of, llama_words
from tests.model.test_transformer import CONFIGS, parameters
from tests.runtime import checkpoint_files as files
from tests.runtime.checkpoint_files import same

FAMILIES = pytest.mark.parametrize("family", files.FAMILIES)


def logits(loaded, tokens):
    return jax.jit(loaded.apply)(loaded.params, jnp.asarray(tokens))


@FAMILIES
def test_logits_are_those_transformers_computes(family):
    loaded = checkpoints.load(files.GOLDEN / family)
    tokens, expected = files.expected(family)
    # Two float32 programs with their sums in another order; measured are 4e-6.
    np.testing.assert_allclose(logits(loaded, tokens), expected, atol=1e-4)
    assert {x.dtype.name for x in jax.tree.leaves(loaded.params)} == {"float32"}


@FAMILIES
def test_what_is_saved_is_what_was_loaded_to_the_bit(family, tmp_path):
    loaded = checkpoints.load(files.GOLDEN / family)
    checkpoints.save(tmp_path / "one", loaded)
    checkpoints.save(tmp_path / "several", loaded, max_shard_bytes=5000)
    assert len([*(tmp_path / "several").glob("model-0*.safetensors")]) > 3
    original = files.tensors(files.GOLDEN / family)
    config = json.loads((files.GOLDEN / family / "config.json").read_text())
    for folder in (tmp_path / "one", tmp_path / "several"):
        written = files.tensors(folder)
        assert written.keys() == original.keys()
        for k, x in written.items():
            np.testing.assert_array_equal(x, original[k])
        assert json.loads((folder / "config.json").read_text()) == config
        same(checkpoints.load(folder).params, loaded.params)


def test_weights_are_held_in_the_type_asked_for(tmp_path):
    folder = files.copy("llama", tmp_path / "model")
    loaded = checkpoints.load(folder, dtype="bfloat16", device=jax.devices()[0])
    kinds = {x.dtype.name for x in jax.tree.leaves(loaded.params)}
    assert kinds == {"bfloat16"}
    checkpoints.save(tmp_path / "half", loaded)
    again = checkpoints.load(tmp_path / "half")
    assert again.words["dtype"] == "bfloat16"
    same(again.params, loaded.params)
    wide = checkpoints.load(tmp_path / "half", dtype=jnp.float64)
    whole = jax.tree.map(lambda x: x.astype(jnp.float64), loaded.params)
    same(wide.params, whole)


def test_weights_go_where_a_sharding_says():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    loaded = checkpoints.load(files.GOLDEN / "gpt2", device=everywhere)
    placed = {x.sharding for x in jax.tree.leaves(loaded.params)}
    assert all(x.is_equivalent_to(everywhere, 2) for x in placed)


def test_what_goes_along_with_a_model_goes_along(tmp_path):
    folder = files.copy("llama", tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling.py").write_text("raise SystemExit")
    loaded = checkpoints.load(folder)
    (tmp_path / "saved").mkdir()
    checkpoints.save(tmp_path / "saved", loaded)
    assert {x.name for x in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    with pytest.raises(FileExistsError, match="There is something in"):
        checkpoints.save(tmp_path / "saved", loaded)


def test_words_to_be_ignored_are_ignored_and_kept(tmp_path):
    folder = files.copy("llama", tmp_path / "model")
    files.words(folder, mystery=3)
    loaded = checkpoints.load(folder, ignore=["mystery"])
    checkpoints.save(tmp_path / "saved", loaded)
    said = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert said["mystery"] == 3


ROPE = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("family", "new", "old"),
    [
        (
            "llama",
            {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
            {"rope_scaling": LLAMA3, "rope_theta": 5e5},
        ),
        (
            "llama",
            {"rope_parameters": {**ROPE, "rope_theta": 1e4}},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        (
            "gpt_neox",
            {"rope_parameters": {"rope_theta": 500, "partial_rotary_factor": 0.5}},
            {"rotary_emb_base": 500, "rotary_pct": 0.5},
        ),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": {**ROPE, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                },
                "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
            },
            {
                "rope_scaling": ROPE,
                "rope_theta": 1e6,
                "rope_local_base_freq": 500.0,
                "layer_types": "OUT",
                "_sliding_window_pattern": "OUT",
                "sliding_window_pattern": 3,
            },
        ),
        (
            "qwen2",
            {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
            {"layer_types": "OUT", "max_window_layers": 2},
        ),
        ("llama", {"head_dim": 4}, {"head_dim": None}),
    ],
)
def test_old_words_say_what_new_ones_do(family, new, old, tmp_path):
    said = []
    for i, changes in enumerate((new, {"rope_parameters": "OUT", **old})):
        folder = files.copy(family, tmp_path / str(i))
        if family == "qwen2":
            window = {"use_sliding_window": True, "sliding_window": 4}
            changes = {**window, **changes, "rope_parameters": "OUT"}
        files.words(folder, **changes)
        said.append(checkpoints.load(folder).config)
    assert said[0] == said[1]


def test_every_word_a_family_understands_is_heeded():
    source = Path(words.__file__).read_text("utf-8")
    for family in families.FAMILIES.values():
        for word in (*family.needed, *family.words):
            assert f'words["{word}"]' in source, (family.architecture, word)
        width = {x: 256 for x in family.needed if x in ("hidden_size", "n_embd")}
        said = {**dict.fromkeys(family.needed, 32), **width}
        assert config_of({**said, "model_type": family.model_type}).blocks == 32


def test_names_of_other_versions_are_understood(tmp_path):
    folder = files.copy("gpt2", tmp_path / "gpt2")
    arrays = files.tensors(folder)
    short = {k.removeprefix("transformer."): x for k, x in arrays.items()}
    mask = {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}
    files.rewrite(folder, {**short, **mask})
    expected = checkpoints.load(files.GOLDEN / "gpt2").params
    same(checkpoints.load(folder).params, expected)
    folder = files.copy("gpt_neox", tmp_path / "neox")
    arrays = files.tensors(folder)
    arrays["lm_head.weight"] = arrays.pop("embed_out.weight")
    arrays["gpt_neox.layers.1.attention.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    files.rewrite(folder, arrays)
    expected = checkpoints.load(files.GOLDEN / "gpt_neox").params
    same(checkpoints.load(folder).params, expected)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    folder = files.copy("gpt2", tmp_path / "model")
    arrays = files.tensors(folder)
    embed = arrays["transformer.wte.weight"]
    files.rewrite(folder, {**arrays, "lm_head.weight": embed})
    expected = checkpoints.load(files.GOLDEN / "gpt2").params
    same(checkpoints.load(folder).params, expected)
    files.rewrite(folder, {**arrays, "lm_head.weight": embed + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        checkpoints.load(folder)


@pytest.mark.parametrize("layout", [layouts.COLUMNS, layouts.HEADS])
def test_layouts_are_cut_and_joined_without_loss(layout):
    config = Config(5, 5, width=8, hidden=8, heads=4, blocks=1)
    for shape in ((24, 24), (24,)):
        x = jnp.arange(float(np.prod(shape))).reshape(shape)
        parts = layout.cut(config, x)
        assert sum(y.size for y in parts) == x.size
        np.testing.assert_array_equal(layout.join(config, parts), x)


def test_a_decoder_trained_here_is_saved_as_a_llama(tmp_path):
    config = Config(11, 16, width=8, hidden=12, heads=4, blocks=2, groups=2, tied=True)
    params = parameters(config, jnp.float32)
    checkpoints.save(tmp_path / "model", checkpoints.as_llama(config, params))
    loaded = checkpoints.load(tmp_path / "model")
    assert loaded.config == config
    same(loaded.params, params)
    with pytest.raises(ValueError, match=r"A Llama has no .*attention_cap = 2\.0"):
        llama_words(CONFIGS["gemma"])
    with pytest.raises(ValueError, match=r"A Llama has no rotary = None"):
        llama_words(dataclasses.replace(config, rotary=None))


def test_a_name_on_the_hub_is_found_in_its_cache(tmp_path):
    script = """
        from influence.runtime import checkpoints
        print(checkpoints.load("some/llama").config.width)
        try:
            checkpoints.load("some/other")
        except FileNotFoundError as error:
            print(error)
    """
    refs = tmp_path / "hub" / "models--some--llama" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0" * 40)
    snapshot = refs.parent / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir()
    files.copy("llama", snapshot)
    done = subprocess.run(
        [sys.executable, "-c", dedent(script)],
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("16\n")
    assert "no folder 'some/other' here, and no model of that name" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads the system's own count")
def test_loading_holds_one_model_and_little_more(tmp_path):
    config = Config(4096, 64, width=512, hidden=1536, heads=8, blocks=12)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes(config))
    size = sum(x.nbytes for x in jax.tree.leaves(zeros))
    checkpoints.save(tmp_path / "model", checkpoints.as_llama(config, zeros))
    del zeros
    script = """
        import sys
        import jax
        from influence.runtime import checkpoints

        def now(word):
            lines = open("/proc/self/status").read().splitlines()
            (line,) = [x for x in lines if x.startswith(word)]
            return int(line.split()[1]) * 1024

        # What programs for so many shapes take is no matter of size: it is all there
        # once the model has been loaded.
        first = checkpoints.load(sys.argv[1])
        before = now("VmRSS")
        second = checkpoints.load(sys.argv[1])
        print(now("VmHWM") - before)
    """
    command = [sys.executable, "-c", dedent(script), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # 180 MB of weights, the largest tensor of 8; two models at once would be twice so.
    assert int(done.stdout) < 1.25 * size, (int(done.stdout), size)
