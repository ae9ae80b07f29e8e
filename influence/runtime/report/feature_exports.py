"""A dictionary's cards in the layouts that other people's pages read.

Both readers ignore keys they do not know: what only we have, the training sequences
that influenced a feature, is under `"influential"` in either.
"""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from influence.interpret.card import Album, Card, Example
from influence.runtime.store import atomic

EACH = 1024
"""How many records a batch file of Neuronpedia's holds."""


def neuronpedia(album: Album, folder: Path) -> list[Path]:
    """Writes the cards as neuron records, in batches, and returns the files.

    Each `batch-{i}.json` is an object: `modelId`, `layer` and `features`, the records.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, len(album.cards), EACH):
        records = [_neuron(album, x) for x in album.cards[start : start + EACH]]
        batch = {"modelId": album.model, "layer": album.site, "features": records}
        paths.append(folder / f"batch-{start // EACH}.json")
        _write(paths[-1], _json(batch))
    return paths


def _neuron(album: Album, card: Card) -> dict[str, Any]:
    return {
        "modelId": album.model,
        "layer": album.site,
        "index": str(card.index),
        "maxActApprox": float(card.maximum),
        "frac_nonzero": float(card.density),
        "freq_hist_data_bar_heights": [int(x) for x in card.counts],
        # One value to a bar, its middle: the reader indexes the one by the other.
        "freq_hist_data_bar_values": [
            float(a + b) / 2 for a, b in pairwise(card.edges)
        ],
        "pos_str": [text for text, _ in card.promoted],
        "pos_values": [float(x) for _, x in card.promoted],
        "neg_str": [text for text, _ in card.suppressed],
        "neg_values": [float(x) for _, x in card.suppressed],
        "topkCosSimIndices": [int(i) for i, _ in card.nearest],
        "topkCosSimValues": [float(x) for _, x in card.nearest],
        "activations": [_activation(x) for band in card.bands for x in band.examples],
        **_influential(card),
    }


def _activation(example: Example) -> dict[str, Any]:
    values = [float(x) for x in example.activations]
    return {
        "tokens": example.tokens,
        "values": values,
        "maxValue": values[example.peak],
        "maxValueTokenIndex": example.peak,
        "minValue": min(values),
        "dataIndex": f"{example.id}:{example.first}",
        "dataSource": None,
        "lossValues": [],
        "logitContributions": None,
    }


def circuit_tracer(album: Album, folder: Path, layer: int) -> Path:
    """Writes the cards as a layer's feature file of circuit-tracer's.

    `features/layer_{layer}.bin` holds for each feature the length of what follows, four
    bytes, the least first, and gzipped JSON; `features/index.json.gz` says where each
    begins, and where the last one ends. Features that have no card have no bytes.
    Layers that were written before stay in the index.

    Args:
      album: the cards.
      folder: of the dictionaries; the files go into its folder `features`.
      layer: of the site.

    Returns:
      The feature file.
    """
    place = folder / "features"
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"layer_{layer}.bin"
    offsets = [0]
    with atomic(path) as temporary, temporary.open("wb") as stream:
        for card in album.cards:
            offsets += [offsets[-1]] * (card.index + 1 - len(offsets))
            offsets.append(offsets[-1] + stream.write(_chunk(card, layer)))
    listing = place / "index.json.gz"
    known = (
        json.loads(gzip.decompress(listing.read_bytes())) if listing.exists() else {}
    )
    known[str(layer)] = {"filename": path.name, "offsets": offsets}
    _write(listing, gzip.compress(_json(known), mtime=0))
    return path


def _chunk(card: Card, layer: int) -> bytes:
    packed = gzip.compress(_json(_feature(card, layer)), mtime=0)
    return len(packed).to_bytes(4, "little") + packed


def _feature(card: Card, layer: int) -> dict[str, Any]:
    return {
        "transcoder_id": f"layer_{layer}",
        "index": int(card.index),
        "examples_quantiles": [
            {
                "quantile_name": band.name,
                "examples": [_quantile_example(x) for x in band.examples],
            }
            for band in card.bands
        ],
        "top_logits": [text for text, _ in card.promoted],
        "bottom_logits": [text for text, _ in card.suppressed],
        "act_min": 0.0,
        "act_max": float(card.maximum),
        "histogram": [int(x) for x in card.counts],
        "activation_frequency": float(card.density),
        **_influential(card),
    }


def _quantile_example(example: Example) -> dict[str, Any]:
    return {
        "tokens": example.tokens,
        "tokens_acts_list": [float(x) for x in example.activations],
        "train_token_ind": example.peak,
        "is_repeated_datapoint": False,
    }


def _influential(card: Card) -> dict[str, Any]:
    """Returns what is known of a feature's causes: nothing, if nothing was computed."""
    if card.causes is None:
        return {}
    return {
        "influential": [
            {"id": x.id, "score": float(x.score), "text": x.text} for x in card.causes
        ]
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _write(path: Path, content: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content)
