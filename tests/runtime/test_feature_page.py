"""The page of a dictionary shows what its cards say, as text, and so do its exports."""

import gzip
import json
import math
import re
import zlib
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from influence.interpret.card import Album, Band, Card, Cause, Example
from influence.runtime.report import feature_exports, features

HOSTILE = '</script><img src=x onerror="alert(1)"> \u2028\x00'
DIGITS = 1e-3
"""Numbers on the page have four digits."""


def example(rng, text):
    activations = np.where(rng.random(6) < 0.3, rng.gamma(2.0, size=6), 0.0)
    tokens = (text, " the", "\n", "\ud800", "", " ")
    return Example(f"{text}:{rng.integers(99)}", 12, tokens, tuple(activations))


def card(index, rng, text, *, causes=True):
    examples = tuple(example(rng, text) for _ in range(3))
    edges = tuple(np.linspace(0.0, 4.0, 6))
    return Card(
        index,
        density=float(rng.uniform(0.001, 0.1)),
        maximum=4.0,
        counts=tuple(rng.integers(0, 99, 5)),
        edges=edges,
        bands=(Band("top", examples[:2]), Band(f"40–60 % {text}", examples[2:])),
        promoted=((text, 1.25), (" on", 0.5)),
        suppressed=((" off", -0.75),),
        nearest=((index + 1, 0.875),),
        causes=(Cause(text, -1.5, text), Cause("b", 0.25, "b")) if causes else None,
    )


def dead(index):
    return Card(index, 0.0, 0.0, (), (), (), (), (), (), ())


def album(text=HOSTILE, number=300, **options):
    rng = np.random.default_rng(0)
    cards = [card(2 * i, rng, text, **options) for i in range(number)]
    return Album([("corpus", text)], f"blocks {text}", text, [*cards, dead(2 * number)])


class Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.blocks, self.inside = [], {}, None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(k for k, _ in attrs)))
        self.inside = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data):
        if self.inside:
            self.blocks[self.inside] = self.blocks.get(self.inside, "") + data

    def handle_endtag(self, tag):
        self.inside = None

    def unpacked(self, name):
        return json.loads(zlib.decompress(b64decode(self.blocks[name])))


def same(shown, given):
    assert shown["index"] == given.index
    for key in ("density", "maximum"):
        assert shown[key] == pytest.approx(getattr(given, key), rel=DIGITS)
    assert tuple(shown["counts"]) == given.counts
    assert shown["edges"] == pytest.approx(given.edges, rel=DIGITS)
    for key in ("promoted", "suppressed", "nearest"):
        assert tuple(map(tuple, shown[key])) == getattr(given, key)
    assert [x["name"] for x in shown["bands"]] == [x.name for x in given.bands]
    pairs = zip(
        [x for band in shown["bands"] for x in band["examples"]],
        [x for band in given.bands for x in band.examples],
        strict=True,
    )
    for told, one in pairs:
        assert (told["id"], told["first"]) == (one.id, one.first)
        assert tuple(told["tokens"]) == one.tokens
        assert told["activations"] == pytest.approx(one.activations, rel=DIGITS)
    if given.causes is None:
        assert shown["causes"] is None
    else:
        assert tuple(Cause(**x) for x in shown["causes"]) == given.causes


def test_the_blocks_hold_the_cards():
    given = album()
    html = features.render(given)
    # Half a character, as a tokenizer may return it, does not keep a page off the disk.
    page = Elements(html.encode().decode())
    blocks = -(-len(given.cards) // features.EACH)
    shown = [x for i in range(blocks) for x in page.unpacked(f"block{i}")]
    assert f"block{blocks}" not in page.blocks
    for told, one in zip(shown, given.cards, strict=True):
        same(told, one)


def test_the_list_says_what_a_card_is_found_by():
    given = album("word")
    listing = Elements(features.render(given)).unpacked("listing")
    assert listing["index"] == [x.index for x in given.cards]
    assert listing["promoted"][0] == ["word", " on"]
    # The strongest of either sign; a dead feature has none.
    assert listing["cause"] == [-1.5] * 300 + [None]
    for fires, one in zip(listing["fires"], given.cards, strict=True):
        assert fires == list(one.fires)
    without = Elements(features.render(album(causes=False))).unpacked("listing")
    assert set(without["cause"]) == {None}


def test_training_text_is_shown_as_text():
    html = features.render(album())
    assert "<img" not in html
    assert "onerror=&#34;alert(1)&#34;" in html
    assert Elements(html).tags == Elements(features.render(album("plain"))).tags


def test_the_script_makes_no_markup():
    script = Elements(features.render(album())).blocks["program"]
    assert not re.search(r"HTML|document\.write|eval|new Function", script)


def test_a_page_needs_nothing_from_elsewhere():
    html = features.render(album("plain"))
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html.split("<body>")[0])
    assert "http://" not in html
    assert "https://" not in html
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1]
    assert "unsafe" not in policy[1]


def test_an_album_may_be_empty():
    listing = Elements(features.render(Album([], "a", "b", []))).unpacked("listing")
    assert listing["index"] == []


def test_records_of_neuronpedia(tmp_path):
    given = album(number=1100)
    paths = feature_exports.neuronpedia(given, tmp_path / "new")
    assert [x.name for x in paths] == ["batch-0.json", "batch-1.json"]
    assert sorted(x.name for x in (tmp_path / "new").iterdir()) == [
        x.name for x in paths
    ]
    batches = [json.loads(x.read_text()) for x in paths]
    records = [x for batch in batches for x in batch["features"]]
    assert [int(x["index"]) for x in records] == [x.index for x in given.cards]
    first, one = records[3], given.cards[3]
    assert first["maxActApprox"] == one.maximum
    assert first["frac_nonzero"] == one.density
    assert first["freq_hist_data_bar_values"] == pytest.approx([0.4, 1.2, 2, 2.8, 3.6])
    assert tuple(first["freq_hist_data_bar_heights"]) == one.counts
    assert (
        tuple(zip(first["pos_str"], first["pos_values"], strict=True)) == one.promoted
    )
    assert first["neg_str"] == [" off"]
    assert (first["topkCosSimIndices"], first["topkCosSimValues"]) == ([7], [0.875])
    for told in first["activations"]:
        assert len(told["values"]) == len(told["tokens"])
        assert told["values"][told["maxValueTokenIndex"]] == told["maxValue"]
        assert told["minValue"] == min(told["values"])
    assert first["influential"][0] == {"id": HOSTILE, "score": -1.5, "text": HOSTILE}
    assert records[-1]["activations"] == []


def feature(folder, layer, index):
    """Returns a record as circuit-tracer's page finds it, `None` if it has no bytes."""
    listing = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    entry = listing[str(layer)]
    first, last = entry["offsets"][index : index + 2]
    chunk = (folder / entry["filename"]).read_bytes()[first:last]
    if not chunk:
        return None
    assert int.from_bytes(chunk[:4], "little") == len(chunk) - 4
    return json.loads(gzip.decompress(chunk[4:]))


def test_features_of_circuit_tracer(tmp_path):
    given = album()
    path = feature_exports.circuit_tracer(given, tmp_path, 3)
    assert path.name == "layer_3.bin"
    for one in given.cards:
        told = feature(path.parent, 3, one.index)
        assert told is not None
        assert told["index"] == one.index
        assert told["act_max"] == one.maximum
        assert len(told["examples_quantiles"]) == len(one.bands)
        for band, quantile in zip(one.bands, told["examples_quantiles"], strict=True):
            assert quantile["quantile_name"] == band.name
            for x, y in zip(band.examples, quantile["examples"], strict=True):
                assert tuple(y["tokens"]) == x.tokens
                assert tuple(y["tokens_acts_list"]) == x.activations
                assert y["train_token_ind"] == x.peak
    # The album has every other feature; the rest have no bytes.
    assert feature(path.parent, 3, 1) is None
    assert path.stat().st_size == feature_end(path.parent, 3)


def feature_end(folder, layer):
    listing = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    return listing[str(layer)]["offsets"][-1]


def test_layers_of_circuit_tracer_share_an_index(tmp_path):
    feature_exports.circuit_tracer(album("a", 3), tmp_path, 0)
    path = feature_exports.circuit_tracer(album("b", 5, causes=False), tmp_path, 1)
    first, second = (feature(path.parent, i, 4) for i in (0, 1))
    assert first is not None
    assert second is not None
    assert (first["top_logits"][0], second["top_logits"][0]) == ("a", "b")
    assert "influential" in first
    assert "influential" not in second
    names = sorted(x.name for x in path.parent.iterdir())
    assert names == ["index.json.gz", "layer_0.bin", "layer_1.bin"]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: {"density": x},
        lambda x: {"promoted": ((" on", x),)},
        lambda x: {"nearest": ((1, x),)},
        lambda x: {"causes": (Cause("a", x, "a"),)},
    ],
)
def test_numbers_are_finite(change, wrong):
    with pytest.raises(ValueError, match=f"Feature 8 has the number {wrong}"):
        replace(card(8, np.random.default_rng(0), "a"), **change(wrong))
    with pytest.raises(ValueError, match=f"the number {wrong}"):
        Example("a", 0, ("a",), (wrong,))


def test_cards_that_do_not_fit_are_refused():
    one = card(8, np.random.default_rng(0), "a")
    with pytest.raises(ValueError, match="5 bins and 5 edges"):
        replace(one, edges=one.edges[1:])
    with pytest.raises(ValueError, match="2 tokens and 1 activations"):
        Example("a", 0, ("a", "b"), (1.0,))
    with pytest.raises(ValueError, match="feature 8 comes after that of 8"):
        Album([], "a", "b", [one, one])
