"""An orbax checkpoint keeps a decoder and its facts."""

import json

import jax
import jax.numpy as jnp
import pytest

from influence.runtime import checkpoints, native
from tests.model.test_transformer import CONFIGS, parameters
from tests.runtime import checkpoint_files as files
from tests.runtime.checkpoint_files import same


@pytest.mark.parametrize("name", ["gemma", "gpt2", "fused lora"])
def test_orbax_keeps_a_decoder_to_the_bit(name, tmp_path):
    config = CONFIGS[name]
    params = parameters(config)
    native.save_orbax(tmp_path / "model", checkpoints.Loaded(config, params))
    loaded = native.load_orbax(tmp_path / "model")
    assert loaded.config == config
    same(loaded.params, params)
    half = native.load_orbax(tmp_path / "model", dtype="bfloat16")
    same(half.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_orbax_keeps_what_a_folder_said(tmp_path):
    loaded = checkpoints.load(files.GOLDEN / "llama")
    native.save_orbax(tmp_path / "orbax", loaded)
    checkpoints.save(tmp_path / "again", native.load_orbax(tmp_path / "orbax"))
    same(checkpoints.load(tmp_path / "again").params, loaded.params)


def test_orbax_checkpoints_that_are_not_whole_are_refused(tmp_path):
    config = CONFIGS["llama"]
    folder = tmp_path / "model"
    with pytest.raises(FileNotFoundError, match=r"has no decoder\.json"):
        native.load_orbax(tmp_path)
    native.save_orbax(folder, checkpoints.Loaded(config, parameters(config)))
    with pytest.raises(FileExistsError, match="There is something"):
        native.save_orbax(folder, checkpoints.Loaded(config, parameters(config)))
    facts = json.loads((folder / "decoder.json").read_text())
    with jax.enable_x64(False), pytest.raises(ValueError, match="float64 does not ex"):
        native.load_orbax(folder)
    for changes, said in (
        ({"hidden": 13}, r"blocks\.mlp\.down\.kernel is \(2, 12, 8\)"),
        ({"tied": True}, r"head\.kernel is \(8, 11\), and the config wants none"),
        ({"warmth": 3}, "not what `save_orbax` writes"),
    ):
        other = {**facts, "config": {**facts["config"], **changes}}
        (folder / "decoder.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=said):
            native.load_orbax(folder)
    (folder / "params").rename(folder / "gone")
    (folder / "decoder.json").write_text(json.dumps(facts))
    with pytest.raises(FileNotFoundError, match="and no params"):
        native.load_orbax(folder)
