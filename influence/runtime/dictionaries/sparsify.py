"""sparsify's folders: `cfg.json` and `sae.safetensors`, one for each hook point."""

from pathlib import Path

from influence.interpret.activations import TopK
from influence.runtime.dictionaries.arrays import Arrays, check_k
from influence.runtime.dictionaries.stored import About, Stored
from influence.runtime.dictionaries.tensors import needed, read_tensors
from influence.runtime.huggingface.folders import read_json

WEIGHTS = "sae.safetensors"


def read(folder: Path) -> Stored:
    """Returns the dictionary in a folder, whose name is that of its hook point.

    An autoencoder's decoder bias is taken off what it reads, a transcoder's is not.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged, or files do not fit each other.
    """
    config, path = read_json(folder / "cfg.json"), folder / WEIGHTS
    arrays = read_tensors(path)
    encoder, bias, decoder, base = needed(
        arrays, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), path
    )
    transcoder = bool(config.get("transcode"))
    k = check_k(config.get("k"), len(encoder), folder / "cfg.json")
    parts = Arrays(encoder.T, bias, decoder, base, arrays.get("W_skip"), not transcoder)
    site, writes = _sites(folder.name, transcoder)
    about = About(site, writes, kind="topk", facts=config)
    return Stored(parts.dictionary(TopK(k), path), about)


def _sites(hook_point: str, transcoder: bool) -> tuple[str, str | None]:
    """Returns what a hook point is here: `layers.3` is the output of the fourth block.

    Raises:
      ValueError: if it is nothing that has a site.
    """
    words = hook_point.split(".")
    places = [int(x) for x in words if x.isdecimal()]
    if len(places) == 1 and words[-1] == "mlp":
        reads, out = f"mlp_in.{places[0]}", f"mlp_out.{places[0]}"
        return (reads, out) if transcoder else (out, None)
    if len(places) == 1 and words[-1] == str(places[0]) and not transcoder:
        return f"resid.{places[0] + 1}", None
    raise ValueError(
        f"The folder's name, {hook_point!r}, is its hook point, and has no site here. "
        "Known are layers.N and layers.N.mlp, with any words before them."
    )
