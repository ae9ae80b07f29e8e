"""What a page shows of a run, or of a search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from influence.model.continuation import Continuation, continuations
from influence.model.examples import prompted
from influence.runtime.corpus.packed import Packed
from influence.runtime.corpus.tokenizer import ModelTokenizer
from influence.runtime.models import Model, parameters
from influence.runtime.report import page
from influence.runtime.run.asking import Question, question_tokens
from influence.runtime.run.found import Found, sequence_tokens
from influence.runtime.run.job import MODEL


@dataclass(frozen=True)
class Pages:
    """What there is to show on a page.

    Attributes:
      results: the corpora that were scored, and their run.
      model: the run's.
      asked: the questions.
      features: what goes through features, by question, if it was looked for.
    """

    results: Found
    model: Model
    asked: Sequence[Question]
    features: Mapping[str, xr.DataArray] = field(default_factory=dict)

    def findings(
        self, total: xr.DataArray, layers: xr.DataArray, shares: xr.DataArray
    ) -> page.Findings:
        """Returns a page's findings.

        Args:
          total: `(query, train)`, of all that was scored.
          layers: `(query, train, layer)`, of those shown at least.
          shares: `(query, train, token)`, of those shown.
        """
        shown = page.shown(total)
        return page.Findings(
            facts=self._facts(total),
            questions=self._questions(),
            total=total,
            layers=layers,
            pieces={x: _pieces(self.results, x, self.model.tokenizer) for x in shown},
            # What no ranking has of its own may be shown, split over nothing.
            shares=shares.reindex(train=shown).fillna(0.0),
            check=None,
            features=self.features,
        )

    def _facts(self, total: xr.DataArray) -> list[tuple[str, str]]:
        job, attrs = self.results.job, total.attrs
        options = job.options
        facts = [
            ("model", options.model if MODEL not in job.given else "given"),
            ("parameters", f"{parameters(self.model.params):,}"),
            ("corpora", ", ".join(self.results.corpora)),
            ("sequences", f"{total.sizes['train']:,} scored"),
            ("layers", " ".join(options.layers)),
            (
                "curvature",
                f"{attrs['curvature']}, {attrs['curvature_sequences']:,} seq.",
            ),
            ("damping", str(attrs["damping"])),
            ("solver", str(attrs["solver"])),
        ]
        if "of" in attrs:
            facts.append(("scores", str(attrs["of"])))
        return facts

    def _questions(self) -> Mapping[str, page.Question]:
        model = self.model
        tokens = {x.name: question_tokens(model, x, x.completion) for x in self.asked}
        counts = np.zeros(model.vocabulary, np.int64)
        for corpus in self.results.corpora.values():
            counts += _frequencies(corpus.packed, model.vocabulary)
        said = continuations(model.task, model.params, prompted(tokens), counts)
        return {
            x.name: _question(x, continuation)
            for x, continuation in zip(self.asked, said, strict=True)
        }


def _pieces(results: Found, id_: str, tokenizer: ModelTokenizer | None) -> list[str]:
    """Returns a sequence's text, token by token."""
    ids = sequence_tokens(results.corpora[id_.rsplit(":", 2)[0]].packed, id_)
    if tokenizer is None:
        return [f"{x} " for x in ids]
    said, reached = [], ""
    for stop in range(1, len(ids) + 1):
        text = tokenizer.tokenizer.decode(ids[:stop], skip_special_tokens=False)
        # Half a character decodes to a mark that the next token takes back.
        whole = text.rstrip("\ufffd") if stop < len(ids) else text
        said.append(whole[len(reached) :])
        reached = whole if len(whole) >= len(reached) else reached
    return said


def _question(one: Question, continuation: Continuation) -> page.Question:
    kind = "asked" if one.instead is None else f"rather than {one.instead!r}"
    prompt, completion = (
        x if isinstance(x, str) else " ".join(map(str, x))
        for x in (one.prompt, one.completion)
    )
    return page.Question(kind, prompt, completion, continuation)


def _frequencies(packed: Packed, vocabulary: int) -> np.ndarray:
    """Returns how often each token occurs in a corpus, `[V]`, a part at a time."""
    counts, step = np.zeros(vocabulary, np.int64), 1 << 22
    for start in range(0, packed.length, step):
        stop = min(start + step, packed.length)
        counts += np.bincount(packed.tokens[start:stop], minlength=vocabulary)
    return counts
