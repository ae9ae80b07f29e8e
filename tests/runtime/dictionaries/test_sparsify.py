"""sparsify's folders are read as its formulas say, and written nowhere."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from influence.interpret.dictionary import encode, reconstruct
from influence.runtime.dictionaries import sparsify
from tests.runtime.dictionaries import cases
from tests.runtime.dictionaries.cases import D, F, drawn

K = 3
X = drawn(9, 5, D)


def written(folder, **words):
    """Writes a hookpoint's folder as sparsify does; returns its arrays."""
    arrays = {
        "encoder.weight": drawn(0, F, D),
        "encoder.bias": drawn(1, F),
        "W_dec": drawn(2, F, D),
        "b_dec": drawn(3, D),
    }
    if words.get("skip_connection"):
        arrays["W_skip"] = drawn(4, D, D)
    folder.mkdir(parents=True)
    save_file(arrays, folder / "sae.safetensors")
    plain = {"activation": "topk", "expansion_factor": F // D, "num_latents": 0}
    config = {**plain, "k": K, "d_in": D, "transcode": False, **words}
    (folder / "cfg.json").write_text(json.dumps(config))
    return arrays


def by_hand(a, x, *, centred):
    """Returns encodings and outputs by the formulas."""
    x = x - a["b_dec"] if centred else x
    pre = np.maximum(x @ a["encoder.weight"].T + a["encoder.bias"], 0)
    z = np.where(pre >= np.sort(pre, axis=-1)[:, -K][:, None], pre, 0)
    return z, z @ a["W_dec"] + a["b_dec"]


def test_an_autoencoder_takes_its_bias_off(tmp_path):
    a = written(tmp_path / "layers.5")
    (tmp_path / "config.json").write_text(json.dumps({"model": "tiny", "ctx_len": 32}))
    stored = sparsify.read(tmp_path / "layers.5")
    z, y = by_hand(a, X, centred=True)
    cases.close(encode(stored.dictionary, jnp.asarray(X)), z)
    cases.close(reconstruct(stored.dictionary, jnp.asarray(X)), y)
    about = stored.about
    assert (about.site, about.writes, about.kind) == ("resid.6", None, "topk")
    assert (about.model, about.context) == ("tiny", 32)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_does_not(skip, tmp_path):
    folder = tmp_path / "some-model" / "layers.5.mlp"
    a = written(folder, transcode=True, skip_connection=skip)
    stored = sparsify.read(folder)
    z, y = by_hand(a, X, centred=False)
    cases.close(encode(stored.dictionary, jnp.asarray(X)), z)
    y = y + X @ a["W_skip"].T if skip else y
    cases.close(reconstruct(stored.dictionary, jnp.asarray(X)), y)
    about = stored.about
    assert (about.site, about.writes) == ("mlp_in.5", "mlp_out.5")
    assert about.model == "some-model"


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layers.0", "resid.1"),
        ("gpt_neox.layers.3", "resid.4"),
        ("h.2.mlp", "mlp_out.2"),
        ("layers.2.self_attn", "attention_out.2"),
    ],
)
def test_a_hookpoint_is_a_site(name, site, tmp_path):
    written(tmp_path / name)
    assert sparsify.read(tmp_path / name).about.site == site


BAD = {
    "groups": ({"activation": "groupmax"}, "says activation groupmax"),
    "signs": ({"signed": True}, "says signed"),
    "embeddings": ({"embed_skip": True}, "says embed_skip"),
    "too many": ({"k": F + 1}, "the 17 largest of 16"),
    "other width": ({"d_in": 9}, r"encoder\.weight has shape \(16, 8\)"),
    "other features": ({"num_latents": 8}, r"array of 8 features"),
    "no skip": ({"skip_connection": True}, "W_skip, b_dec, encoder.bias"),
}


@pytest.mark.parametrize("case", BAD)
def test_configs_that_can_not_be_followed_are_refused(case, tmp_path):
    written(tmp_path / "layers.5")
    changes, said = BAD[case]
    cases.words(tmp_path / "layers.5" / "cfg.json", **changes)
    with pytest.raises(ValueError, match=said):
        sparsify.read(tmp_path / "layers.5")


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    folder = tmp_path / "layers.5"
    written(folder)
    path = folder / "sae.safetensors"
    cases.arrays(path, W_dec=drawn(2, D, F))
    with pytest.raises(ValueError, match=r"W_dec has shape \(8, 16\)"):
        sparsify.read(folder)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"sae\.safetensors .* can't be read"):
        sparsify.read(folder)


def test_a_folder_of_another_name_is_refused(tmp_path):
    for name, words, said in (
        ("embed_tokens", {}, "'embed_tokens', which says no site of a dictionary"),
        ("layers.5", {"transcode": True}, "'layers.5', which says no site of a trans"),
    ):
        written(tmp_path / said[:4] / name, **words)
        with pytest.raises(ValueError, match=said):
            sparsify.read(tmp_path / said[:4] / name)
