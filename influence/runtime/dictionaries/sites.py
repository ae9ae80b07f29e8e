"""Names of sites: ours, and TransformerLens', which other people's files use.

| ours | TransformerLens |
|---|---|
| `resid.0` | `blocks.0.hook_resid_pre` |
| `resid.l` | `blocks.{l-1}.hook_resid_post`, which is `blocks.l.hook_resid_pre` |
| `resid_final` | `hook_resid_post` of the last block |
| `resid_mid.l` | `blocks.l.hook_resid_mid`, `hook_mlp_in` |
| `attention_out.l` | `blocks.l.hook_attn_out` |
| `attention_heads.l` | `blocks.l.attn.hook_z`, its heads side by side |
| `attention_pattern.l` | `blocks.l.attn.hook_pattern` |
| `mlp_in.l` | `blocks.l.mlp.hook_in` |
| `mlp_out.l` | `blocks.l.hook_mlp_out` |

`hook_mlp_in` is a copy of the residual stream before the norm, whatever its name says.
"""

import re

from influence.model.sites import Address

HOOK = re.compile(r"blocks\.(\d+)\.([\w.]*hook_\w+)")
"""What the names of values in a block look like there."""

READ = {
    "hook_resid_pre": "resid",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_in": "resid_mid",
    "hook_attn_out": "attention_out",
    "attn.hook_z": "attention_heads",
    "attn.hook_pattern": "attention_pattern",
    "mlp.hook_in": "mlp_in",
    "hook_mlp_out": "mlp_out",
}
"""Ours by theirs, of the same block."""

WRITTEN = {ours: theirs for theirs, ours in READ.items() if theirs != "hook_mlp_in"}
"""Theirs by ours."""


def from_transformer_lens(
    text: str, blocks: int | None = None, *, folded: bool = False
) -> str:
    """Returns the address of a site by TransformerLens' name; other names as they are.

    Args:
      text: the name.
      blocks: how many the model has; the stream after the last one is `resid_final`.
        `resid.blocks` stands for it if that is not known.
      folded: whether the scales of the model's norms are in the weights after them.
        `ln2.hook_normalized` is then what the MLP reads.

    Raises:
      ValueError: if we have no such site.

    Example:
      >>> from influence.runtime.dictionaries import sites
      >>> sites.from_transformer_lens("blocks.3.hook_resid_post")
      'resid.4'
      >>> sites.from_transformer_lens("blocks.3.hook_resid_post", blocks=4)
      'resid_final'
    """
    match = HOOK.fullmatch(text)
    if match is None:
        if "hook_" in text:
            raise ValueError(_unknown(text))
        return text
    block, name = int(match[1]), match[2]
    if name == "hook_resid_post":
        return "resid_final" if block + 1 == blocks else f"resid.{block + 1}"
    if name == "ln2.hook_normalized":
        if folded:
            return f"mlp_in.{block}"
        raise ValueError(
            f"{text} is a value before its norm's scale, and what the MLP reads here "
            "has the scale in it. Say that norms are folded if the model's scales are "
            "all one, or use a dictionary of mlp.hook_in or hook_resid_mid."
        )
    if name not in READ:
        raise ValueError(_unknown(text))
    return f"{READ[name]}.{block}"


def to_transformer_lens(text: str, blocks: int | None = None) -> str | None:
    """Returns TransformerLens' name of a site; None if it has none.

    Args:
      text: our address.
      blocks: how many the model has: `resid_final` has no name without.

    Example:
      >>> from influence.runtime.dictionaries import sites
      >>> sites.to_transformer_lens("resid.4")
      'blocks.3.hook_resid_post'
    """
    name, place = Address.parse(text)
    if name == "resid_final" and blocks is not None:
        return f"blocks.{blocks - 1}.hook_resid_post"
    if name == "resid" and place > 0:
        return f"blocks.{place - 1}.hook_resid_post"
    return f"blocks.{place}.{WRITTEN[name]}" if name in WRITTEN else None


def _unknown(text: str) -> str:
    known = ", ".join(["hook_resid_post", *READ])
    return (
        f"There is no site here for TransformerLens' {text!r}. Use one of a block's: "
        f"{known}."
    )
