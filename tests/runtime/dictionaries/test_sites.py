"""Sites have TransformerLens' names, there and back."""

import pytest

from influence.runtime.dictionaries import sites

BLOCKS = 4


@pytest.mark.parametrize(
    "site",
    [
        *(f"resid.{i}" for i in range(BLOCKS)),
        "resid_final",
        "resid_mid.2",
        "attention_out.0",
        "attention_heads.3",
        "attention_pattern.1",
        "mlp_in.2",
        "mlp_out.3",
    ],
)
def test_names_lead_back(site):
    name = sites.to_transformer_lens(site, BLOCKS)
    assert name is not None
    assert name.startswith("blocks.")
    assert sites.from_transformer_lens(name, BLOCKS) == site


def test_the_stream_between_two_blocks_has_one_address():
    read = sites.from_transformer_lens
    assert read("blocks.2.hook_resid_post") == "resid.3"
    assert read("blocks.3.hook_resid_pre") == "resid.3"
    assert read("blocks.3.hook_resid_post") == "resid.4"
    assert read("blocks.3.hook_resid_post", 4) == "resid_final"
    assert read("blocks.3.hook_mlp_in") == read("blocks.3.hook_resid_mid")


def test_a_normed_value_is_what_the_mlp_reads_only_without_a_scale():
    name = "blocks.3.ln2.hook_normalized"
    with pytest.raises(ValueError, match="before its norm's scale"):
        sites.from_transformer_lens(name)
    assert sites.from_transformer_lens(name, folded=True) == "mlp_in.3"


def test_names_of_neither_are_left_and_theirs_that_we_have_not_are_refused():
    for name in ("resid.4", "resid_final", "value", "my_site.3"):
        assert sites.from_transformer_lens(name, BLOCKS) == name
    for name in ("hook_embed", "blocks.1.attn.hook_q", "blocks.x.hook_resid_pre"):
        with pytest.raises(ValueError, match="no site here"):
            sites.from_transformer_lens(name)
    assert sites.to_transformer_lens("resid_final") is None
    assert sites.to_transformer_lens("value.0", BLOCKS) is None
