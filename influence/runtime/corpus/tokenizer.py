"""A model's tokenizer, as its folder has it, with what its files say of it compared."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from influence.runtime.corpus.chat import Template

TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
"""The special tokens a template may name."""


@dataclass(frozen=True)
class ModelTokenizer:
    """A tokenizer and what its model's folder says of it.

    Attributes:
      tokenizer: turns text into token ids; whole, whatever its file says of cutting
        and filling up.
      bos: the id a text begins with, if there is one.
      eos: the id that ends a text, if there is one.
      pad: the id that fills up, if there is one. None is needed: padding is masked.
      template: makes conversations text, if there is one.
      sha256: of `tokenizer.json` and the template.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from influence.runtime.corpus.tokenizer import read_tokenizer
      >>> model = folder / "letters"
      >>> model.mkdir()
      >>> _ = (model / "tokenizer_config.json").write_text('{"eos_token": "."}')
      >>> letters = Tokenizer(models.BPE({"a": 0, "b": 1, ".": 2}, []))
      >>> letters.save(str(model / "tokenizer.json"))
      >>> tokenizer = read_tokenizer(model)
      >>> tokenizer.encode(["abba"])[0].ids, tokenizer.separator, tokenizer.size
      ([0, 1, 1, 0], 2, 3)
    """

    tokenizer: Tokenizer
    bos: int | None
    eos: int | None
    pad: int | None
    template: Template | None
    sha256: str

    @cached_property
    def size(self) -> int:
        """Returns the largest token id and one: as many logits a model needs."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def separator(self) -> int:
        """Returns the id that ends every document of a packed corpus: that of `eos`.

        Raises:
          ValueError: if there is none.
        """
        if self.eos is None:
            raise ValueError(
                "The tokenizer has no end-of-text token to put between documents. Name "
                "an id of its vocabulary as the separator, or None for nothing."
            )
        return self.eos

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[Encoding]:
        """Returns texts as tokens; with the special tokens around them if asked for."""
        return self.tokenizer.encode_batch(list(texts), add_special_tokens=special)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Returns a conversation as the text the model was trained on.

        Raises:
          ValueError: if there is no template, or it refuses the conversation.
        """
        if self.template is None:
            raise ValueError(
                "is a conversation, but the tokenizer has no chat template. Give it "
                "one (chat_template.jinja beside tokenizer.json), or render the text."
            )
        return self.template(messages)


def read_tokenizer(
    path: str | Path, *, bos: int | None = None, eos: int | None = None
) -> ModelTokenizer:
    """Returns a tokenizer from a model's folder, or from its `tokenizer.json` alone.

    Beside it are read, as far as they are there: `tokenizer_config.json` and
    `special_tokens_map.json`, `chat_template.jinja`, and of the model `config.json` and
    `generation_config.json`.

    Args:
      path: the folder or file.
      bos: the id that begins a text, whatever the files say.
      eos: the id that ends a text, whatever the files say.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it can't be read, or tokenizer and model say different ids.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {file}. A folder with a tokenizer has a tokenizer.json; an "
            "older one gets it when it is saved anew as a fast tokenizer."
        )
    data = file.read_bytes()
    tokenizer = _parsed(file, data)
    about = _read(file, "special_tokens_map.json") | _read(
        file, "tokenizer_config.json"
    )
    models = [_read(file, x) for x in ("config.json", "generation_config.json")]
    template = _template(file, about)
    source = "" if template is None else template.source
    given = {"bos": bos, "eos": eos, "pad": None}
    ids = {k: _id(tokenizer, about, models, k, x) for k, x in given.items()}
    return ModelTokenizer(
        tokenizer,
        **ids,
        template=template,
        sha256=hashlib.sha256(data + source.encode()).hexdigest(),
    )


def check_tokenizer(
    tokenizer: ModelTokenizer, vocabulary: int, config: Mapping[str, Any] | None = None
) -> None:
    """Raises if a tokenizer is not the model's.

    Args:
      tokenizer: the tokenizer.
      vocabulary: how many logits the model has. More than the tokenizer's ids are fine:
        models are often padded.
      config: what the model's `config.json` holds, with `bos_token_id` and
        `eos_token_id`.

    Raises:
      ValueError: naming the ids.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from influence.runtime.corpus.tokenizer import check_tokenizer, read_tokenizer
      >>> two = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
      >>> two.save(str(folder / "two.json"))
      >>> check_tokenizer(read_tokenizer(folder / "two.json"), vocabulary=1)
      Traceback (most recent call last):
      ValueError: The tokenizer has 2 token ids, up to 1 ('b'), but the model has ...
    """
    if tokenizer.size > vocabulary:
        last = tokenizer.tokenizer.id_to_token(tokenizer.size - 1)
        raise ValueError(
            f"The tokenizer has {tokenizer.size} token ids, up to "
            f"{tokenizer.size - 1} ({last!r}), but the model has {vocabulary} logits. "
            "Are tokenizer and model from the same place?"
        )
    for name in ("bos", "eos"):
        own, said = getattr(tokenizer, name), _ids(config or {}, name)
        if own is not None and said and own not in said:
            raise ValueError(_disagreement(tokenizer.tokenizer, name, own, said))


def _parsed(file: Path, data: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # noqa: BLE001  tokenizers raises nothing narrower
        raise ValueError(
            f"{file} is no tokenizer that can be read ({error}). Was it downloaded "
            "whole?"
        ) from error
    # A file may say to cut texts short or to fill them up: here that would be silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read(file: Path, name: str) -> dict[str, Any]:
    """Returns what a JSON file beside the tokenizer holds, or nothing."""
    path = file.with_name(name)
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Get it again.") from error
    return found if isinstance(found, dict) else {}


def _token(about: Mapping[str, Any], name: str) -> str | None:
    """Returns a special token as text; files have it plain or within a record."""
    value = about.get(name)
    return value.get("content") if isinstance(value, Mapping) else value


def _template(file: Path, about: Mapping[str, Any]) -> Template | None:
    path = file.with_name("chat_template.jinja")
    source = about.get("chat_template")
    if path.is_file():
        source = path.read_text(encoding="utf-8")
    elif isinstance(source, list):
        named = {x["name"]: x["template"] for x in source}
        source = named.get("default")
    if source is None:
        return None
    tokens = {name: _token(about, name) for name in TOKENS}
    return Template(source, {k: x for k, x in tokens.items() if x is not None})


def _ids(config: Mapping[str, Any], name: str) -> list[int]:
    """Returns the ids a model's configuration allows for a special token."""
    value = config.get(f"{name}_token_id")
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _id(
    tokenizer: Tokenizer,
    about: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    name: str,
    given: int | None,
) -> int | None:
    """Returns a special token's id, which tokenizer and model must agree on."""
    if given is not None:
        return given
    said = [x for config in models for x in _ids(config, name)]
    token = _token(about, f"{name}_token")
    if token is None:
        return said[0] if said and name != "pad" else None
    own = tokenizer.token_to_id(token)
    if own is None:
        raise ValueError(
            f"The tokenizer's {name} token {token!r} is not in its vocabulary. Are "
            "tokenizer.json and tokenizer_config.json from the same place?"
        )
    # Of padding models say this and that; it is masked, so it does not matter.
    if said and own not in said and name != "pad":
        raise ValueError(_disagreement(tokenizer, name, own, said))
    return own


def _disagreement(
    tokenizer: Tokenizer, name: str, own: int, said: Sequence[int]
) -> str:
    token, others = tokenizer.id_to_token(own), sorted(set(said))
    return (
        f"The tokenizer's {name} token is {own} ({token!r}), the model's configuration "
        f"says {', '.join(map(str, others))}. Are they from the same place? If they "
        f"are, say which: `read_tokenizer(…, {name}={others[0]})`."
    )
