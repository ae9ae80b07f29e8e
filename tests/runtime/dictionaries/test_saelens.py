"""SAELens' folders are read as SAELens reads them, and written as it does."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from influence.interpret.activations import ReLU
from influence.interpret.dictionary import encode, reconstruct
from influence.runtime.dictionaries import saelens
from influence.runtime.dictionaries.stored import About, Stored
from tests.runtime.dictionaries import cases
from tests.runtime.dictionaries.cases import OUT, D, F, drawn

NAMES = sorted(x.name for x in (cases.GOLDEN / "saelens").iterdir())
ABOUT = About("resid.2", None, "tiny", "ab" * 32, "batchtopk", 32, {"l0": 3.5})


@pytest.mark.parametrize("name", NAMES)
def test_what_saelens_wrote_does_what_it_did_there(name):
    folder = cases.GOLDEN / "saelens" / name
    stored = saelens.read(folder)
    cases.as_expected(stored, folder)
    assert stored.about.site == "resid.2"
    assert stored.about.writes == ("mlp_out.2" if "transcoder" in name else None)
    assert (stored.about.model, stored.about.context) == ("tiny", 32)
    assert stored.about.kind in (name, "matryoshka_batchtopk")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_back_is_the_same_to_the_bit(name, tmp_path):
    stored = saelens.read(cases.GOLDEN / "saelens" / name)
    saelens.write(tmp_path, stored)
    again = saelens.read(tmp_path)
    assert again.about == stored.about
    if stored.about.kind == "gated":  # whose biases take in the encoder's
        x = jnp.asarray(drawn(9, 5, D))
        cases.close(reconstruct(again.dictionary, x), reconstruct(stored.dictionary, x))
    else:
        cases.same(again.dictionary, stored.dictionary)


@pytest.mark.parametrize("kind", cases.ACTIVATIONS)
@pytest.mark.parametrize(
    ("writes", "skip"), [(None, False), ("mlp_out.2", False), ("mlp_out.2", True)]
)
def test_every_dictionary_comes_back(kind, writes, skip, tmp_path):
    dictionary = cases.random(kind, out=D if writes is None else OUT, skip=skip)
    stored = Stored(dictionary, replace(ABOUT, writes=writes))
    saelens.write(tmp_path, stored)
    again = saelens.read(tmp_path)
    assert again.about == stored.about
    x = jnp.asarray(drawn(9, 5, D))
    cases.close(encode(again.dictionary, x), encode(dictionary, x))
    cases.close(reconstruct(again.dictionary, x), reconstruct(dictionary, x))


def test_sites_have_transformer_lens_names_on_disk(tmp_path):
    stored = Stored(
        cases.random("standard"), replace(ABOUT, site="resid_final.0", writes=None)
    )
    named = replace(stored, about=replace(stored.about, facts={"blocks": 4}))
    for folder, given, hook in (
        ("known", named, "blocks.3.hook_resid_post"),
        ("unknown", stored, "resid_final.0"),
    ):
        saelens.write(tmp_path / folder, given)
        said = json.loads((tmp_path / folder / "cfg.json").read_text())
        assert said["metadata"]["hook_name"] == hook
        assert saelens.read(tmp_path / folder).about.site == "resid_final.0"
    heads = replace(stored, about=replace(ABOUT, site="attention_heads.1"))
    saelens.write(tmp_path / "heads", heads)
    said = json.loads((tmp_path / "heads" / "cfg.json").read_text())
    assert said["metadata"]["hook_name"] == "blocks.1.attn.hook_z"
    assert said["reshape_activations"] == "hook_z"


def test_facts_come_back_as_json_has_them(tmp_path):
    facts = {"l0": np.float32(2.5), "some": (1, 2), "lost": float("nan")}
    facts["sparsity"] = drawn(0, F)
    saelens.write(
        tmp_path, Stored(cases.random("topk"), replace(ABOUT, facts={**facts}))
    )
    again = saelens.read(tmp_path).about.facts
    assert (again["l0"], again["some"], again["lost"]) == (2.5, [1, 2], None)
    np.testing.assert_array_equal(again["sparsity"], facts["sparsity"])
    density = [0.0, *[0.01] * (F - 1)]
    often = replace(ABOUT, facts={"density": density})
    saelens.write(tmp_path, Stored(cases.random("topk"), often))
    again = saelens.read(tmp_path).about.facts
    assert again["density"] == density
    np.testing.assert_allclose(again["sparsity"], [-10, *[-2] * (F - 1)], rtol=1e-6)
    saelens.write(tmp_path, Stored(cases.random("topk"), ABOUT))
    assert not (tmp_path / "sparsity.safetensors").exists()
    with pytest.raises(ValueError, match="A fact is .* a set, which JSON"):
        saelens.write(
            tmp_path, Stored(cases.random("topk"), replace(ABOUT, facts={"a": set()}))
        )


def raw(folder, config, **arrays):
    """Writes a folder as SAELens would; returns its arrays."""
    made = {
        "W_enc": drawn(0, D, F),
        "b_enc": drawn(1, F),
        "W_dec": drawn(2, F, D),
        "b_dec": drawn(3, D),
        **arrays,
    }
    folder.mkdir(exist_ok=True)
    save_file(made, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return made


METADATA = {"hook_name": "blocks.1.hook_resid_post", "sae_lens_version": "6.54.12"}
X = drawn(9, 5, D)


def largest(pre, k):
    edge = np.sort(pre, axis=-1)[:, -k][:, None]
    return np.where(pre >= edge, np.maximum(pre, 0), 0)


def test_the_decoders_bias_is_taken_off_what_is_read(tmp_path):
    config = {"architecture": "standard", "apply_b_dec_to_input": True}
    a = raw(tmp_path, {**config, "metadata": METADATA})
    z = np.maximum((X - a["b_dec"]) @ a["W_enc"] + a["b_enc"], 0)
    found = saelens.read(tmp_path).dictionary
    cases.close(encode(found, jnp.asarray(X)), z)
    cases.close(reconstruct(found, jnp.asarray(X)), z @ a["W_dec"] + a["b_dec"])


def test_pre_activations_are_multiplied_by_the_decoders_lengths(tmp_path):
    config = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}
    decoder = drawn(2, F, D) * np.arange(F, dtype=np.float32)[:, None]
    a = raw(tmp_path, {**config, "metadata": METADATA}, W_dec=decoder)
    length = np.linalg.norm(decoder, axis=1)
    z = largest(((X - a["b_dec"]) @ a["W_enc"] + a["b_enc"]) * length, 3)
    found = saelens.read(tmp_path).dictionary
    cases.close(encode(found, jnp.asarray(X)), z)
    inverse = np.where(length > 0, 1 / np.where(length > 0, length, 1), 0)
    cases.close(
        reconstruct(found, jnp.asarray(X)), (z * inverse) @ decoder + a["b_dec"]
    )


def test_a_scale_of_all_inputs_is_folded_while_it_is_beside_the_weights(tmp_path):
    config = {
        "architecture": "jumprelu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "expected_average_only_in",
        "metadata": METADATA,
    }
    a = raw(tmp_path, config, threshold=np.abs(drawn(5, F)))

    def by_hand(scale):
        pre = (X * scale - a["b_dec"]) @ a["W_enc"] + a["b_enc"]
        z = np.where(pre > a["threshold"], np.maximum(pre, 0), 0)
        return z, (z @ a["W_dec"] + a["b_dec"]) / scale

    for scale in (1, 3):  # SAELens, too, takes it for folded if it is not there
        if scale > 1:
            said = json.dumps({"scaling_factor": scale})
            (tmp_path / "activation_scaler.json").write_text(said)
        found = saelens.read(tmp_path).dictionary
        z, y = by_hand(np.float32(scale))
        cases.close(encode(found, jnp.asarray(X)), z)
        cases.close(reconstruct(found, jnp.asarray(X)), y)


def test_a_gate_and_a_magnitude_have_the_decoders_bias_taken_off(tmp_path):
    config = {"architecture": "gated", "apply_b_dec_to_input": True}
    biases = {"b_gate": drawn(5, F), "b_mag": drawn(6, F), "r_mag": drawn(7, F)}
    a = raw(tmp_path, {**config, "metadata": METADATA}, **biases)
    path = tmp_path / "sae_weights.safetensors"
    cases.arrays(path, b_enc=None)
    pre = (X - a["b_dec"]) @ a["W_enc"]
    magnitude = np.maximum(np.exp(a["r_mag"]) * pre + a["b_mag"], 0)
    z = np.where(pre + a["b_gate"] > 0, magnitude, 0)
    cases.close(encode(saelens.read(tmp_path).dictionary, jnp.asarray(X)), z)


def test_configs_of_before_version_6_are_read(tmp_path):
    flat = {
        "hook_point": "blocks.4.attn.hook_z",
        "hook_point_head_index": None,
        "model_name": "gpt2-small",
        "context_size": 128,
        "d_in": D,
        "d_sae": F,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "normalize_activations": False,
        "dataset_path": "some/text",
    }
    a = raw(tmp_path, flat, scaling_factor=np.ones(F, np.float32))
    stored = saelens.read(tmp_path)
    z = largest((X - a["b_dec"]) @ a["W_enc"] + a["b_enc"], 3)
    cases.close(encode(stored.dictionary, jnp.asarray(X)), z)
    about = stored.about
    assert (about.site, about.model, about.context) == (
        "attention_heads.4",
        "gpt2-small",
        128,
    )
    assert about.facts["dataset_path"] == "some/text"
    plain = {k: x for k, x in flat.items() if "activation" not in k}
    a = raw(tmp_path, {**plain, "normalize_activations": True})
    z = np.maximum((X - a["b_dec"]) @ a["W_enc"] + a["b_enc"], 0)
    cases.close(encode(saelens.read(tmp_path).dictionary, jnp.asarray(X)), z)


def test_half_precision_is_widened(tmp_path):
    config = {"architecture": "standard", "metadata": METADATA, "dtype": "bfloat16"}
    made = {k: x.astype(jnp.bfloat16) for k, x in raw(tmp_path, config).items()}
    save_file(made, tmp_path / "sae_weights.safetensors")
    found = saelens.read(tmp_path).dictionary
    assert found.encoder_DxF.dtype == jnp.float32
    np.testing.assert_array_equal(
        np.asarray(found.decoder_FxO), made["W_dec"].astype(np.float32)
    )


BAD_WORDS = {
    "no architecture": ({"architecture": "spline"}, "architecture 'spline'"),
    "token by token": (
        {"normalize_activations": "layer_norm"},
        "normalize_activations 'layer_norm'.* no array",
    ),
    "rescaled": (
        {"normalize_activations": "constant_norm_rescale"},
        "no array does. Choose",
    ),
    "too many": ({"k": F + 1}, "the 17 largest of 16 features"),
    "none": ({"k": 0}, "the 0 largest"),
    "k left out": ({"k": "OUT"}, "the None largest"),
    "other width": ({"d_in": 9}, r"W_enc has shape \(8, 16\), and is an array of 9"),
    "other features": ({"d_sae": 15}, "an array of 8 numbers that are read, 15"),
    "one head": (
        {"metadata": {**METADATA, "hook_head_index": 3}},
        "of head 3 alone",
    ),
    "no site": ({"metadata": {}}, "hook_name is None"),
    "other site": (
        {"metadata": {"hook_name": "blocks.1.attn.hook_q"}},
        "no site here for .*hook_q",
    ),
    "norm": (
        {"metadata": {"hook_name": "blocks.1.ln2.hook_normalized"}},
        "before its norm's scale",
    ),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_configs_that_can_not_be_followed_are_refused(case, tmp_path):
    folder = cases.copied("saelens/topk", tmp_path)
    changes, said = BAD_WORDS[case]
    cases.words(folder / "cfg.json", **changes)
    with pytest.raises(ValueError, match=said):
        saelens.read(folder)


BAD_ARRAYS = {
    "missing": ({"b_dec": None}, "has W_dec, W_enc, b_enc, and what"),
    "beside": ({"log_threshold": drawn(0, F)}, "log_threshold"),
    "turned": ({"W_enc": drawn(0, F, D)}, r"W_enc has shape \(16, 8\)"),
    "short": ({"b_enc": drawn(0, F - 1)}, r"b_enc has shape \(15,\)"),
    "other rank": ({"b_dec": drawn(0, D, 1)}, r"b_dec has shape \(8, 1\)"),
    "not finite": (
        {"b_dec": np.full(D, np.inf, np.float32)},
        "8 of the 8 numbers in b_dec",
    ),
    "whole": ({"b_dec": np.ones(D, np.int32)}, "b_dec holds int32"),
    "factors": ({"scaling_factor": drawn(0, F)}, "scaling_factor of features"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_refused(case, tmp_path):
    folder = cases.copied("saelens/topk", tmp_path)
    changes, said = BAD_ARRAYS[case]
    cases.arrays(folder / "sae_weights.safetensors", **changes)
    with pytest.raises(ValueError, match=f"sae_weights.*{said}"):
        saelens.read(folder)


def test_damaged_files_are_named(tmp_path):
    folder = cases.copied("saelens/topk", tmp_path)
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors \([\d,]+ bytes\)"):
        saelens.read(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no sae_weights\.safetensors"):
        saelens.read(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match=r"cfg\.json can't be read"):
        saelens.read(folder)


def test_a_transcoder_has_to_say_what_it_writes(tmp_path):
    folder = cases.copied("saelens/transcoder", tmp_path)
    cases.words(folder / "cfg.json", metadata=METADATA)
    with pytest.raises(ValueError, match="hook_name_out is None"):
        saelens.read(folder)
    cases.words(folder / "cfg.json", apply_b_dec_to_input=True)
    with pytest.raises(ValueError, match="output bias is taken off its input"):
        saelens.read(folder)


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    dictionary = cases.random("standard")
    broken = replace(dictionary, encoder_bias_F=dictionary.encoder_bias_F * jnp.nan)
    with pytest.raises(ValueError, match="16 of the 16 numbers in b_enc"):
        saelens.write(tmp_path, Stored(broken, ABOUT))
    assert not list(tmp_path.iterdir())


def test_an_activation_without_a_name_is_not_written(tmp_path):
    class Cubed(ReLU):
        pass

    other = replace(cases.random("standard"), activation=Cubed())
    with pytest.raises(ValueError, match="no name on disk for the activation Cubed"):
        saelens.write(tmp_path, Stored(other, ABOUT))


def test_what_is_written_has_the_names_of_their_arrays(tmp_path):
    for kind, names in (
        ("standard", {"b_enc"}),
        ("jumprelu", {"b_enc", "threshold"}),
        ("gated", {"b_gate", "b_mag", "r_mag"}),
    ):
        saelens.write(tmp_path / kind, Stored(cases.random(kind), ABOUT))
        found = load_file(tmp_path / kind / "sae_weights.safetensors")
        assert found.keys() == {"W_enc", "W_dec", "b_dec", *names}
