"""sparsify's folders: one for each hookpoint, `sae.safetensors` and `cfg.json`.

A folder is called what it is of: `layers.5` is what block 5 puts out, `layers.5.mlp`
its MLP.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from influence.runtime.dictionaries.arrays import (
    assembled,
    centred,
    checked,
    read_safetensors,
    top,
)
from influence.runtime.dictionaries.stored import About, Stored
from influence.runtime.huggingface.folders import read_json

WEIGHTS, CONFIG, RUN = "sae.safetensors", "cfg.json", "config.json"

NAMES = {
    "encoder.weight": ("W_enc", "FD"),
    "encoder.bias": ("b_enc", "F"),
    "W_dec": ("W_dec", "FD"),
    "b_dec": ("b_dec", "D"),
}
"""Ours by theirs, and their axes."""

REFUSED = ("embed_skip", "gram_lookup", "signed")
"""Options that make an output of more than what is read, or negative activations."""

HOOKPOINT = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(\w+))?")


def read(folder: str | Path) -> Stored:
    """Returns the dictionary of a hookpoint's folder.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if one is damaged, or has options that are not read here.
    """
    path = Path(folder)
    words = read_json(path / CONFIG)
    transcodes, skips = bool(words.get("transcode")), bool(words.get("skip_connection"))
    _check_words(path / CONFIG, words)
    site, writes = _sites(path, transcodes)
    wanted = {theirs: axes for theirs, (_, axes) in NAMES.items()}
    wanted |= {"W_skip": "DD"} if skips else {}
    found = read_safetensors(path / WEIGHTS)
    found = checked(path / WEIGHTS, found, wanted, _sizes(words))
    arrays = {ours: found[theirs] for theirs, (ours, _) in NAMES.items()}
    arrays["W_enc"] = arrays["W_enc"].T
    if skips:
        arrays["W_skip"] = found["W_skip"]
    activation = top(path / CONFIG, words.get("k"), arrays["W_enc"].shape[1])
    # A transcoder's decoder bias is of its output: it is not taken off the input.
    arrays = arrays if transcodes else centred(arrays)
    run = read_json(path.parent / RUN) if (path.parent / RUN).exists() else {}
    about = About(
        site,
        writes,
        model=str(run.get("model") or path.resolve().parent.name),
        kind="topk",
        context=run.get("ctx_len"),
        facts={**{k: x for k, x in words.items() if k != "d_in"}},
    )
    return Stored(assembled(arrays, activation), about)


def _sizes(words: Mapping[str, Any]) -> dict[str, int | None]:
    width, each = words.get("d_in"), words.get("expansion_factor")
    times = width * each if width and each else None
    return {"D": width, "F": words.get("num_latents") or times}


def _check_words(path: Path, words: Mapping[str, Any]) -> None:
    odd = [x for x in REFUSED if words.get(x)]
    if words.get("activation", "topk") != "topk":
        odd.append(f"activation {words['activation']}")
    if odd:
        raise ValueError(
            f"{path} says {', '.join(odd)}, which no dictionary here does. Choose one "
            "trained without."
        )


def _sites(path: Path, transcodes: bool) -> tuple[str, str | None]:
    """Returns what a dictionary reads and, if it is a transcoder, what it writes."""
    name = path.resolve().name
    match = HOOKPOINT.fullmatch(name)
    block, part = (int(match[1]), match[2]) if match else (0, name)
    if transcodes and part == "mlp":
        return f"mlp_in.{block}", f"mlp_out.{block}"
    if not transcodes and match and part in (None, "mlp", "attn", "self_attn"):
        if part is None:
            return f"resid.{block + 1}", None
        return f"{'mlp_out' if part == 'mlp' else 'attention_out'}.{block}", None
    raise ValueError(
        f"{path} is called {name!r}, which says no site of a "
        f"{'transcoder' if transcodes else 'dictionary'}. Name the folder after its "
        "hookpoint: layers.5.mlp"
        f"{'' if transcodes else ', layers.5 or layers.5.self_attn'}."
    )
