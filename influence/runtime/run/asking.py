"""`influence query`: from questions to what is scanned for."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from influence.attribution.forms import Whitened
from influence.attribution.measurements import Measurement, completions, contrast
from influence.attribution.query import query as solve
from influence.curvature.operator import Curvature
from influence.runtime import formats
from influence.runtime.data import divides, split
from influence.runtime.mesh import laid_out
from influence.runtime.models import Model
from influence.runtime.processes import check_alone
from influence.runtime.run import featuring, solving
from influence.runtime.run.featuring import Feature
from influence.runtime.run.fitting import curvature_of, fitted
from influence.runtime.run.job import GB, MODEL, Job, Models, clock, opened_job
from influence.runtime.run.ledger import Ledger, Stage, locked, opened
from influence.runtime.run.options import Query, check_numbers
from influence.runtime.run.packing import Corpus


class Question(NamedTuple):
    """What is asked: why does the model say this?

    Attributes:
      name: what it is called.
      prompt: what comes before, as text or token ids.
      completion: what the model says then.
      instead: what it might have said; None to ask about the completion alone.
      feature: a feature that is measured at the completion, or at places of its own,
        instead of asking about what is said.
    """

    name: str
    prompt: Any
    completion: Any
    instead: Any = None
    feature: Feature | None = None

    def __str__(self) -> str:
        """Returns the question as it is listed."""
        instead = "" if self.instead is None else f", not {self.instead!r}"
        return f"{self.name}: {self.prompt!r} → {self.completion!r}{instead}"


def query(
    options: Query, console: Console | None = None, given: Models | None = None
) -> Ledger:
    """Solves for a run's questions, under all of its models.

    Args:
      options: what is asked, and how it is solved for.
      console: where to show what happens; the terminal if left out.
      given: models by role instead of opening them, as for `fit`.

    Raises:
      ValueError: if a question is not good enough, or the model changed since the fit.
      FileNotFoundError: if the run has no curvature yet.

    Example:
      >>> from influence.runtime.run.asking import query
      >>> from influence.runtime.run.options import Query
      >>> ledger = query(Query(done, queries=questions), quiet, own)
      >>> ledger.stages["queries of model"]["finished"]
      True
    """
    check_numbers(options)
    with locked(options.run):
        ledger = opened(options.run)
        job = opened_job(ledger, console, given, laid_out(options.mesh))
        solving.check_solver(options, job)
        asked = questions(options)
        own = job.model(MODEL)
        corpus = job.corpus(own)
        if options.feature:
            check_alone("Asking about features")
            asked = _featured(options, job, own, corpus, asked)
        for role in job.roles:
            model = own if role == MODEL else job.model(role)
            files = fitted(job, role, model, corpus)
            _Asking(job, role, model, corpus, files, options).all(asked)
    return ledger


def asked(job: Job) -> list[Question]:
    """Returns what was asked of a run.

    Raises:
      FileNotFoundError: if nothing was, or it was not solved for.
    """
    said = job.ledger.needed(f"queries of {MODEL}", "query")["inputs"]["questions"]
    return [Question(**x) for x in json.loads(said)]


def chosen(known: Sequence[Question], word: str | None) -> list[Question]:
    """Returns one question by number or name, or all.

    Raises:
      ValueError: if there is none.
    """
    if word is None:
        return list(known)
    named = [x for x in known if x.name == word]
    if not named and word.isdecimal() and 0 < int(word) <= len(known):
        named = [known[int(word) - 1]]
    if not named:
        raise ValueError(
            f"There is no question {word!r}. They are: "
            f"{', '.join(f'{i} {x.name!r}' for i, x in enumerate(known, 1))}."
        )
    return named


def questions(options: Query) -> list[Question]:
    """Returns what is asked, from the command line and from a file.

    Raises:
      ValueError: if nothing is, or something is not good enough, naming it.
    """
    if len(options.prompt) != len(options.completion):
        raise ValueError(
            f"{len(options.prompt)} prompts and {len(options.completion)} completions "
            "were given. Give each prompt its completion."
        )
    pairs = zip(options.prompt, options.completion, strict=True)
    rows: list[Mapping[str, Any]] = [{"prompt": x, "completion": y} for x, y in pairs]
    rows += _rows(options.queries) if options.queries else []
    if bool(options.feature) != (options.sae is not None):
        raise ValueError(
            "A feature is asked about with both --sae, its dictionary, and --feature, "
            "its number."
        )
    if not rows and not options.feature:
        raise ValueError(
            "Nothing is asked. Give --prompt and --completion, a file of --queries, or "
            "--sae and --feature."
        )
    found = [_question(i, row) for i, row in enumerate(rows, 1)]
    names = [x.name for x in found]
    if len(set(names)) < len(names):
        twice = next(x for x in names if names.count(x) > 1)
        raise ValueError(f"Two questions are called {twice!r}. Name them apart.")
    return found


def _featured(
    options: Query, job: Job, model: Model, corpus: Corpus, asked: list[Question]
) -> list[Question]:
    """Returns questions about features: at completions, or where they are on most.

    Raises:
      ValueError: if the run has a base, or a feature can't be measured.
    """
    assert options.sae is not None
    if len(job.roles) > 1:
        raise ValueError(
            "The run has a base, and a dictionary is of one model. Ask about features "
            "in a run without --base."
        )
    if asked:
        return [
            x._replace(
                name=f"feature {i} at {x.name}",
                feature=featuring.at_tokens(
                    options.sae, i, *question_tokens(model, x, x.completion)
                ),
            )
            for x in asked
            for i in options.feature
        ]
    found = featuring.at_peaks(job, model, corpus, options.sae, options.feature)
    return [
        Question(f"feature {x['index']}", *_shown_at(model, x), feature=x)
        for x in found
    ]


def _shown_at(model: Model, feature: Feature) -> tuple[Any, Any]:
    """Returns the text before the token at which a feature is on most, and the token.

    Token ids, if the text can't be cut there or is cut elsewhere when it is read again.
    """
    tokens, _ = max(feature["places"], key=lambda x: len(x[0]) > 1)
    before, last = tokens[:-1] or tokens, tokens[-1:]
    if model.tokenizer is None:
        return before, last
    decode = model.tokenizer.tokenizer.decode
    whole = decode(tokens, skip_special_tokens=False)
    prompt = decode(before, skip_special_tokens=False)
    rest = whole.removeprefix(prompt)
    if rest in ("", whole) or not divides(model.tokenizer.tokenizer, prompt, rest):
        return before, last
    return prompt, rest


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of queries at {path}.")
    # Not `splitlines`: what else ends a line is allowed within a JSON string.
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is no JSON: {error}.") from error
        if not isinstance(row, dict) or not {"prompt", "completion"} <= row.keys():
            raise ValueError(
                f"{path}, line {number}, has no `prompt` and `completion`: {line[:80]}"
            )
        known = [x for x in Question._fields if x != "feature"]
        if odd := row.keys() - {*known}:
            raise ValueError(
                f"{path}, line {number}, says {', '.join(sorted(odd))}, which means "
                f"nothing here. Known are {', '.join(known)}."
            )
        yield row


def _question(number: int, row: Mapping[str, Any]) -> Question:
    asked = Question(
        str(row.get("name") or number),
        row["prompt"],
        row["completion"],
        row.get("instead"),
    )
    parts = {
        "prompt": asked.prompt,
        "completion": asked.completion,
        "instead": asked.prompt if asked.instead is None else asked.instead,
    }
    for part, said in parts.items():
        ids = isinstance(said, list) and all(type(x) is int for x in said)
        alike = type(said) is type(asked.prompt)
        if not alike or not (ids or isinstance(said, str)):
            raise ValueError(
                f"The {part} of question {asked.name!r} is {said!r}. A question is all "
                "text, or all lists of token ids."
            )
        if not said:
            raise ValueError(
                f"The {part} of question {asked.name!r} is empty. A completion is "
                "predicted from at least one token before it."
            )
    return asked


@dataclass(frozen=True)
class _Asking:
    """A run's questions under one of its models."""

    job: Job
    role: str
    model: Model
    corpus: Corpus
    files: list[str]
    options: Query

    def all(self, asked: list[Question]) -> None:
        """Solves for all questions, unless that was done."""
        stage, file = self.stage(asked), queries_file(self.role)
        if self.job.ledger.finished(stage, self.job.folder / file):
            return
        curvature = curvature_of(self.job, self.files)
        measured = measurements(self.model, asked)
        self.job.show(f"query {self.role}", self._plan(len(asked), curvature))
        rank = self.options.rank
        about = self.job, self.role, self.model, self.corpus
        with self.job.driver.stage(stage.name):
            found = solve(
                curvature,
                self.model.params,
                measured,
                solver=solving.solver_of(*about, curvature, self.options),
                compress=None if rank is None else Whitened(rank),
            )
        # Begun only now: what was solved before is lost to nothing that fails.
        self.job.begin(stage)
        self.job.write(file, found, formats.write_query)
        self.job.ledger.finish(stage)

    def stage(self, asked: list[Question]) -> Stage:
        """Returns the stage of the questions."""
        artifacts = self.job.ledger.run.manifest["artifacts"]
        tokenizer = self.model.tokenizer
        inputs = {
            **self.job.common(self.model.digest),
            "curvature": " ".join(artifacts[x]["sha256"] for x in self.files),
            "tokenizer": tokenizer.sha256 if tokenizer else "none",
            "questions": json.dumps([x._asdict() for x in asked]),
            **solving.inputs(self.options),
        }
        if solving.effort(self.options)[0]:
            inputs |= {
                "corpus": self.corpus.digest,
                "seed": str(self.job.options.seed),
                "batch": str(self.job.noted(f"batch of {self.role}")["size"]),
            }
        about = {"role": self.role, "corpus": self.corpus.source.name}
        return Stage(f"queries of {self.role}", inputs, about)

    def _plan(self, count: int, curvature: Curvature) -> dict[str, str]:
        """Returns what will be done and what it will cost, in words."""
        options, timed = self.options, self.job.noted(f"batch of {self.role}")
        entries = sum(
            x.columns * x.outputs * math.prod(x.stack) for x in curvature.layers
        )
        # A batch that was timed is a forward and a backward pass, three forwards; a
        # product with the curvature is four, for every question.
        batches = count / timed["size"]
        (sequences, steps), kept = solving.effort(options), solving.kept(options)
        batches += steps * count * sequences / timed["size"] * 4 / 3
        rank = "" if options.rank is None else f", kept to rank {options.rank}"
        return {
            "questions": f"{count}",
            "layers": f"{len(curvature.layers)}",
            "solver": solving.described(options),
            "memory": f"{4 * kept * count * entries / GB:.2f} GB for gradients and "
            f"solutions{rank}",
            "time": f"about {clock(batches * timed['seconds'])}, from a timed batch, "
            "and compiling",
        }


def measurements(model: Model, asked: list[Question]) -> dict[str, Measurement]:
    """Returns what was asked as functions of parameters, by name.

    Raises:
      ValueError: if a question is not in the model's tokens.
    """
    texts = [x for x in asked if x.feature is None]
    whole = {x.name: question_tokens(model, x, x.completion) for x in texts}
    others = {x.name: question_tokens(model, x, x.instead) for x in texts if x.instead}
    found: dict[str, Measurement] = {}
    if whole:
        found |= completions(model.task, whole)
    if others:
        other = completions(model.task, others)
        found |= {name: contrast(found[name], x) for name, x in other.items()}
    about = {x.name: x.feature for x in asked if x.feature is not None}
    found |= {name: featuring.measured(model, x) for name, x in about.items()}
    return {x.name: found[x.name] for x in asked}


def question_tokens(
    model: Model, question: Question, completion: Any
) -> tuple[list[int], list[int]]:
    """Returns the token ids of a question's prompt and of a completion.

    Raises:
      ValueError: if there is no tokenizer and they are text, or a token reaches across
        the end of the prompt.
    """
    if not isinstance(question.prompt, str):
        return list(question.prompt), list(completion)
    if model.tokenizer is None:
        raise ValueError(
            f"The model has no tokenizer, and question {question.name!r} is text. Ask "
            "with lists of token ids, or put a tokenizer.json into the model's folder."
        )
    return split(model.tokenizer.tokenizer, question.prompt, completion)


def queries_file(role: str) -> str:
    """Returns the name of the artifact with a role's queries."""
    return f"{role}/queries.safetensors"
