"""The page of a dictionary: every feature of it in one HTML file, offline.

A page of ten thousand features opens at once: it holds them compressed, some dozens to
a block, and unpacks a block when one of its features is looked at. What the list needs
of every feature is a block of its own. A feature with twenty examples and eight causes
takes about five kilobytes.

Training text is somebody else's. It is in the compressed blocks only, as JSON in
base64, and the page's script makes text of it and never markup. The page's own policy
forbids any other script, and any connection.
"""

import json
import zlib
from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

from markupsafe import Markup

from influence.interpret.card import Album, Card, Example
from influence.runtime.report.templates import templates

EACH = 64
"""How many features share a block: what is unpacked to show one."""

SEARCHED = 6
"""How many tokens of each kind the list can be searched for at once."""


def render(album: Album) -> str:
    """Returns the page."""
    pages = templates()
    style = pages.get_template("features.css").render()
    script = pages.get_template("features.js").render()
    cards = album.cards
    blocks = [cards[i : i + EACH] for i in range(0, len(cards), EACH)]
    return pages.get_template("features.html").render(
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
        f"script-src {_hash(script)}",
        style=Markup(style),
        script=Markup(script),
        album=album,
        each=EACH,
        listing=Markup(_packed(_listing(cards))),
        blocks=[Markup(_packed([_card(x) for x in block])) for block in blocks],
    )


def _hash(text: str) -> str:
    """Returns the name by which a policy allows an inline style or script."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _packed(value: Any) -> str:
    """Returns JSON, deflated, in base64: nothing in it can end the element it is in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return b64encode(zlib.compress(text.encode())).decode()


def _listing(cards: Sequence[Card]) -> dict[str, list]:
    """Returns what the list shows, sorts by and is searched for, by column."""
    return {
        "index": [int(x.index) for x in cards],
        "density": [_short(x.density) for x in cards],
        "maximum": [_short(x.maximum) for x in cards],
        "cause": [_strongest(x) for x in cards],
        "fires": [x.fires[:SEARCHED] for x in cards],
        "promoted": [[text for text, _ in x.promoted[:SEARCHED]] for x in cards],
    }


def _strongest(card: Card) -> float | None:
    scores = [x.score for x in card.causes or ()]
    return _short(max(scores, key=abs)) if scores else None


def _card(card: Card) -> dict[str, Any]:
    return {
        "index": int(card.index),
        "density": _short(card.density),
        "maximum": _short(card.maximum),
        "counts": [int(x) for x in card.counts],
        "edges": [_short(x) for x in card.edges],
        "bands": [
            {"name": x.name, "examples": [_example(y) for y in x.examples]}
            for x in card.bands
        ],
        "promoted": _pairs(card.promoted),
        "suppressed": _pairs(card.suppressed),
        "nearest": [(int(i), _short(x)) for i, x in card.nearest],
        "causes": None
        if card.causes is None
        else [
            {"id": x.id, "score": _short(x.score), "text": x.text} for x in card.causes
        ],
    }


def _example(example: Example) -> dict[str, Any]:
    return {
        "id": example.id,
        "first": int(example.first),
        "tokens": example.tokens,
        "activations": [_short(x) for x in example.activations],
    }


def _pairs(tokens: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(text, _short(x)) for text, x in tokens]


def _short(number: float) -> float:
    """Returns a number with as many digits as a reader could want."""
    return float(f"{number:.4g}") if number else 0
