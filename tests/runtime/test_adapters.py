"""LoRA adapters stand beside weights as two layers, and come from PEFT's folders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import influence
from influence.model.adapters import added
from influence.model.config import Adapter
from influence.runtime import checkpoints
from influence.types import named_leaves, with_leaves
from tests.runtime import checkpoint_files as files
from tests.runtime.checkpoint_files import same

LLAMA = {
    f"model.layers.{i}.{name}": sizes
    for i in range(3)
    for name, sizes in (
        ("self_attn.q_proj", (16, 16)),
        ("self_attn.v_proj", (16, 16)),
        ("mlp.down_proj", (20, 16)),
    )
}
ADAPTED = {
    "llama": LLAMA,
    "gpt2": {f"transformer.h.{i}.attn.c_attn": (12, 36) for i in range(3)},
    "gpt_neox": {
        f"gpt_neox.layers.{i}.{name}": sizes
        for i in range(2)
        for name, sizes in (
            ("attention.query_key_value", (32, 96)),
            ("mlp.dense_h_to_4h", (32, 20)),
        )
    },
}


def merged_by_hand(family, adapter, scale, folder):
    """Writes the checkpoint with the adapter worked into its weights as they lie."""
    files.copy(family, folder)
    arrays, factors = (
        files.tensors(folder),
        load_file(adapter / "adapter_model.safetensors"),
    )
    for name in ADAPTED[family]:
        a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        change = scale * b @ a
        arrays[f"{name}.weight"] += change.T if family == "gpt2" else change
    files.rewrite(folder, arrays)
    return checkpoints.load(folder)


@pytest.mark.parametrize("family", ADAPTED)
@pytest.mark.parametrize(
    ("said", "scale"), [({}, 5 / 2), ({"use_rslora": True}, 5 / 2**0.5)]
)
def test_an_adapter_does_what_its_product_in_the_weights_does(
    family, said, scale, tmp_path
):
    base = str(files.GOLDEN / family)
    said = {"base_model_name_or_path": base, **said}
    adapter = files.adapter(tmp_path / "adapter", ADAPTED[family], **said)
    beside = checkpoints.load(adapter)
    by_hand = merged_by_hand(family, adapter, scale, tmp_path / "merged")
    merged = checkpoints.merged(beside)
    assert merged.config == by_hand.config
    tokens, plain = files.expected(family)
    found, other, expected = (
        jax.jit(x.apply)(x.params, jnp.asarray(tokens))
        for x in (beside, merged, by_hand)
    )
    # Float32, sums in another order.
    np.testing.assert_allclose(found, expected, atol=2e-4)
    np.testing.assert_allclose(other, expected, atol=2e-4)
    assert np.abs(expected - plain).max() > 0.1


@pytest.mark.parametrize("family", ADAPTED)
def test_adapters_are_saved_as_they_were_loaded(family, tmp_path):
    folder = files.adapter(tmp_path / "adapter", ADAPTED[family], task_type="CAUSAL_LM")
    base = checkpoints.load(files.GOLDEN / family)
    loaded = checkpoints.adapt(base, folder)
    checkpoints.save_adapter(tmp_path / "saved", loaded)
    for path in folder.iterdir():
        written = tmp_path / "saved" / path.name
        if path.suffix == ".json":
            assert json.loads(written.read_text()) == json.loads(path.read_text())
        else:
            found, expected = load_file(written), load_file(path)
            assert found.keys() == expected.keys()
            for k, x in found.items():
                np.testing.assert_array_equal(x, expected[k])
    leaves = named_leaves(loaded.params)
    kept = {k: x for k, x in leaves.items() if ".lora." not in k}
    same(with_leaves(base.params, kept), base.params)


def test_a_base_model_is_found_beside_its_adapter(tmp_path):
    files.copy("llama", tmp_path / "base")
    said = {"base_model_name_or_path": "../base"}
    loaded = checkpoints.load(files.adapter(tmp_path / "adapter", LLAMA, **said))
    assert [x.layer for x in loaded.config.adapters] == [
        "attention.query",
        "attention.value",
        "mlp.down",
    ]
    folder = files.adapter(tmp_path / "alone", LLAMA)
    with pytest.raises(ValueError, match="does not say what model"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"peft_type": "IA3"}, "'peft_type': 'IA3'"),
        ({"use_dora": True}, "'use_dora': True"),
        ({"bias": "all"}, "'bias': 'all'"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
        ({"rank_pattern": {"q_proj": 4}}, "'rank_pattern'"),
        ({"alpha_pattern": {"q_proj": 4}}, "'alpha_pattern'"),
        ({"layers_to_transform": [1]}, "'layers_to_transform'"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights': 'pissa'"),
        ({"something_new": 3}, "'something_new': 3"),
        ({"r": 3}, r"is \(2, 16\), not \(3, 16\)"),
    ],
)
def test_other_adapters_are_refused(said, error, tmp_path):
    base = checkpoints.load(files.GOLDEN / "llama")
    with pytest.raises(ValueError, match=error):
        checkpoints.adapt(base, files.adapter(tmp_path / "adapter", LLAMA, **said))


def test_adapters_of_other_modules_are_refused(tmp_path):
    base = checkpoints.load(files.GOLDEN / "llama")
    for i, (modules, error) in enumerate(
        (
            ({**LLAMA, "lm_head": (16, 40)}, "The adapter has .*lm_head"),
            ({}, "no tensors"),
            (
                {k: x for k, x in LLAMA.items() if ".1." not in k},
                "leaves out .*layers.1",
            ),
            (
                {**LLAMA, "model.layers.0.self_attn.q_proj": (8, 16)},
                r"is \(2, 8\), not",
            ),
        )
    ):
        with pytest.raises(ValueError, match=error):
            checkpoints.adapt(base, files.adapter(tmp_path / str(i), modules))
    folder = files.adapter(tmp_path / "whole", LLAMA)
    path = folder / "adapter_model.safetensors"
    factors = load_file(path)
    del factors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    save_file(factors, path)
    with pytest.raises(ValueError, match=r"down_proj\.lora_B\.weight is missing"):
        checkpoints.adapt(base, folder)


def test_adapters_are_neither_stacked_nor_lost(tmp_path):
    base = checkpoints.load(files.GOLDEN / "llama")
    folder = files.adapter(tmp_path / "adapter", LLAMA)
    loaded = checkpoints.adapt(base, folder)
    with pytest.raises(ValueError, match=r"adapters already, beside attention\.query"):
        checkpoints.adapt(loaded, folder)
    with pytest.raises(ValueError, match="Save them alone with"):
        checkpoints.save(tmp_path / "saved", loaded)
    with pytest.raises(ValueError, match="has no adapters"):
        checkpoints.save_adapter(tmp_path / "saved", base)
    checkpoints.save(tmp_path / "saved", checkpoints.merged(loaded))
    again = checkpoints.adapt(checkpoints.merged(loaded), folder)
    assert again.config == loaded.config
    assert dataclasses.replace(again.config, adapters=()) == base.config


@pytest.mark.parametrize("family", ADAPTED)
def test_adapters_made_here_are_saved_as_peft_s(family, tmp_path):
    base = checkpoints.load(files.GOLDEN / family)
    layers = ("attention", "mlp.up") if family != "llama" else ("attention.key",)
    wanted = [Adapter(x, rank=2, scale=0.5) for x in layers]
    config, params = added(base.config, base.params, wanted, jax.random.key(0))
    made = dataclasses.replace(base, config=config, params=params)
    tokens, plain = files.expected(family)
    found = jax.jit(made.apply)(params, jnp.asarray(tokens))
    np.testing.assert_allclose(found, plain, atol=1e-4)
    checkpoints.save_adapter(tmp_path / "adapter", made)
    again = checkpoints.load(tmp_path / "adapter")
    assert again.config == config
    same(again.params, params)


def test_adapters_of_several_ranks_are_not_saved_as_one(tmp_path):
    base = checkpoints.load(files.GOLDEN / "llama")
    wanted = [Adapter("attention.key", 2, 0.5), Adapter("mlp.up", 3, 0.5)]
    config, params = added(base.config, base.params, wanted, jax.random.key(0))
    made = dataclasses.replace(base, config=config, params=params)
    with pytest.raises(ValueError, match="several ranks and scales"):
        checkpoints.save_adapter(tmp_path / "adapter", made)


def test_curvature_is_fitted_to_the_factors_alone(tmp_path):
    folder = files.adapter(tmp_path / "adapter", LLAMA)
    loaded = checkpoints.adapt(checkpoints.load(files.GOLDEN / "llama"), folder)
    task = influence.LanguageModel(loaded.apply, loaded.config.context)
    batches = influence.sequences([[1, 2, 3, 4], [5, 6, 7]]).batches(2)
    fitted = influence.fit(task, loaded.params, batches, layers="*.lora.*")
    assert [(x.name.removeprefix("blocks."), x.inputs) for x in fitted.layers] == [
        ("attention.query.lora.a", 16),
        ("attention.query.lora.b", 2),
        ("attention.value.lora.a", 16),
        ("attention.value.lora.b", 2),
        ("mlp.down.lora.a", 20),
        ("mlp.down.lora.b", 2),
    ]
