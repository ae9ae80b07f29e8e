"""The page of steering: what a model says as it is, and with features edited."""

from collections.abc import Sequence
from os.path import commonprefix
from typing import NamedTuple

from markupsafe import Markup

from influence.runtime.report.templates import templates


class Said(NamedTuple):
    """How a model goes on under an edit.

    Attributes:
      name: of the edit.
      text: what it says.
      kl: what the edit costs, nats a token.
      cost: by how much what it says as it is becomes less likely, nats a token.
    """

    name: str
    text: str
    kl: float
    cost: float


class Trial(NamedTuple):
    """A prompt, and how the model goes on.

    Attributes:
      prompt: its text.
      plain: what the model says as it is.
      edited: what it says with edits.
    """

    prompt: str
    plain: str
    edited: Sequence[Said]

    def same(self, said: Said) -> int:
        """Returns how many characters the model says as it would without the edit."""
        return len(commonprefix([self.plain, said.text]))


def render(
    model: str, facts: Sequence[tuple[str, str]], trials: Sequence[Trial]
) -> str:
    """Returns the page.

    Args:
      model: its name.
      facts: `(what, value)`.
      trials: one for each prompt.
    """
    pages = templates()
    style = Markup(pages.get_template("page.css").render())
    return pages.get_template("steering.html").render(
        style=style, model=model, facts=facts, trials=trials
    )
