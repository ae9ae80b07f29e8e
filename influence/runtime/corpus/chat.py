"""Conversations as the text a model was trained on, by its tokenizer's own template.

A template is a program that came with a file, so it is rendered in jinja2's immutable
sandbox, which reaches nothing but the messages. The library that published templates
are written for does the same; its names are offered here, so that nothing else need be
installed for them. One is not: today's date. A corpus is the same on every day.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """Lets through what a template marks as the model's own words."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Returns what is between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _json(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes what has a meaning in HTML; here it is plain text.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    found.filters["tojson"] = _json
    found.globals["raise_exception"] = _refuse
    return found


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template.

    Attributes:
      source: in jinja2's language.
      tokens: the special tokens it may name, such as `bos_token`.
    """

    source: str
    tokens: Mapping[str, str]

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Returns a conversation as text.

        Raises:
          ValueError: if the template refuses it, or is none.
        """
        try:
            template = _environment().from_string(self.source)
            return template.render(
                messages=messages, add_generation_prompt=False, **self.tokens
            )
        except (TemplateError, TypeError, ArithmeticError, LookupError) as error:
            raise ValueError(
                f"can't be rendered by the tokenizer's chat template: {error}"
            ) from error
