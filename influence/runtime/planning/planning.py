"""What an analysis would take, printed: the command `influence plan`."""

import re
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from influence.attribution.cost import (
    Subject,
    Work,
    layer_shapes,
    parameter_bytes,
    passes,
    query_bytes,
    sides,
    subject,
)
from influence.attribution.plan import Cost, Device, Mesh, arranged, fullest, longest
from influence.attribution.query_cost import is_streamed
from influence.attribution.stages import eigendecomposition, stages
from influence.curvature.covariance import PerToken
from influence.model.config import Config
from influence.model.task import LanguageModel
from influence.model.transformer import Apply, shapes
from influence.runtime.huggingface import folders
from influence.runtime.huggingface.configs import config_of
from influence.runtime.models import BLOCKS
from influence.runtime.planning.kinds import device, measured_on
from influence.runtime.planning.options import Plan
from influence.runtime.run.options import check_numbers

LONG = 512
"""The longest sequence if none is said: what runs take as well."""

MOST = 64
"""The most blocks that are proposed."""

YEAR, DAY, HOUR, MINUTE = 365 * 86400, 86400, 3600, 60


def plan(options: Plan, console: Console) -> None:
    """Prints what each stage takes, what does not fit, and what was assumed.

    Raises:
      FileNotFoundError: if there is no config.
      ValueError: if an option makes no sense, or the config is not understood.

    Example:
      >>> import json
      >>> from rich.console import Console
      >>> from influence.runtime.huggingface.configs import llama_words
      >>> from influence.runtime.planning.options import Plan
      >>> from influence.runtime.planning.planning import plan
      >>> path = folder / "config.json"
      >>> _ = path.write_text(json.dumps(llama_words(config)))
      >>> quiet = Console(record=True, quiet=True)
      >>> plan(Plan(path, tokens=10_000, devices="H100×2"), quiet)
    """
    check_numbers(options)
    if options.queries < 1:
        raise ValueError(f"--queries {options.queries} makes no sense. Ask 1 at least.")
    kind, many = parsed(options.devices)
    config = read_config(options.model)
    context = _context(options, config)
    own = device(kind, options.dtype)
    of = _subject(options, config)
    work = _work(options, context)
    at = passes(of, context)

    def staged(batch: int) -> list:
        return stages(of, work._replace(batch=batch), at(batch))

    mesh, batch, costs = arranged(staged, own, many, options.batch)
    work = work._replace(batch=batch)
    console.print(_heading(options, of, work, own, mesh), markup=False)
    console.print(_table(costs, own))
    for line in (*_troubles(options, of, work, costs, own), *_assumed(own, mesh)):
        console.print(line, highlight=False, markup=False)


def parsed(devices: str) -> tuple[str, int]:
    """Returns the kind and the number in `KIND×COUNT`.

    Raises:
      ValueError: if it is not that.

    Example:
      >>> from influence.runtime.planning.planning import parsed
      >>> parsed("A100-80×16"), parsed("cpux1")
      (('A100-80', 16), ('cpu', 1))
    """
    found = re.fullmatch(r"(.+?)[×x*](\d+)", devices.strip())
    if found is None or int(found[2]) < 1:
        raise ValueError(
            f"--devices {devices!r} makes no sense. Give a kind and a number of one at "
            "least, such as H100×8."
        )
    return found[1], int(found[2])


def read_config(path: Path) -> Config:
    """Returns the facts of a model from its `config.json`, or a folder with one.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not understood.
    """
    path = path.expanduser()
    return config_of(folders.read_json(path / "config.json" if path.is_dir() else path))


def _context(options: Plan, config: Config) -> int:
    context = options.context or min(config.context, LONG)
    if context > config.context:
        raise ValueError(
            f"--context {context} is longer than the model's {config.context}. Give "
            "that at most."
        )
    return context


def _subject(options: Plan, config: Config, blocks: int | None = None) -> Subject:
    words = [y for x in options.layers for y in BLOCKS.get(x, (x,))]
    task = LanguageModel(Apply(config, options.remat), config.context)
    params = shapes(config, jnp.dtype(options.dtype))
    return subject(task, params, words, PerToken(blocks or options.blocks))


def _work(options: Plan, context: int) -> Work:
    sequences = ceil(options.tokens / context)
    return Work(
        context=context,
        batch=options.batch or 1,
        samples=min(options.samples, sequences),
        sequences=sequences,
        queries=options.queries,
        rank=options.rank,
        token_sequences=min(options.per_token, sequences),
    )


def _heading(options: Plan, of: Subject, work: Work, own: Device, mesh: Mesh) -> str:
    numbers = sum(x.copies * x.outputs * x.inputs for x in layer_shapes(of))
    asked = "matrices" if options.rank is None else f"factors of rank {options.rank}"
    return (
        f"{options.model}: {parameter_bytes(of.params) / 1e9:,.2f} GB of "
        f"{options.dtype}, curvature of {numbers / 1e6:,.1f}M weights\n"
        f"{work.sequences:,} sequences of {work.context} tokens, fitted to "
        f"{work.samples:,}, {work.token_sequences:,} of them per token; "
        f"{work.queries} queries as {asked}\n"
        f"{mesh.devices} × {own.kind}: {mesh.data} data × {mesh.model} model, "
        f"batches of {work.batch} on each group"
    )


def _table(costs: Sequence[Cost], own: Device) -> Table:
    found = Table(title_justify="left")
    heads = ("GB a device", "mostly", "TFLOP", "GB sent", "computing", "sending")
    for head in ("stage", *heads):
        left = head in ("stage", "mostly")
        found.add_column(head, justify="left" if left else "right", no_wrap=True)
    for x in costs:
        full = " !" if x.bytes > own.memory else ""
        found.add_row(
            x.stage,
            f"{x.bytes / 1e9:,.2f}{full}",
            x.largest,
            f"{x.flops / 1e12:,.4g}",
            f"{x.sent / 1e9:,.4g}",
            lasting(x.computing),
            lasting(x.sending),
        )
    total = sum(x.seconds for x in costs)
    found.add_section()
    flops, sent = sum(x.flops for x in costs), sum(x.sent for x in costs)
    whole = (f"{flops / 1e12:,.4g}", f"{sent / 1e9:,.4g}", lasting(total))
    found.add_row("all", f"{fullest(costs).bytes / 1e9:,.2f}", "", *whole, "")
    return found


def lasting(seconds: float) -> str:
    """Returns a time in the largest unit of which it has one.

    Example:
      >>> from influence.runtime.planning.planning import lasting
      >>> lasting(0.5), lasting(90), lasting(3 * 86400)
      ('0.50 s', '1.5 min', '3.0 days')
    """
    units = {"years": YEAR, "days": DAY, "h": HOUR, "min": MINUTE}
    for name, length in units.items():
        if seconds >= length:
            return f"{seconds / length:,.1f} {name}"
    return f"{seconds:.2f} s"


def _troubles(
    options: Plan, of: Subject, work: Work, costs: Sequence[Cost], own: Device
) -> list[str]:
    """Returns what breaks first, and what can be done where something does not fit."""
    most, slowest = fullest(costs), longest(costs)
    share = most.bytes / own.memory
    lines = [
        f"Breaks first: {most.stage}, {most.bytes / 1e9:,.1f} of "
        f"{own.memory / 1e9:,.1f} GB a device ({share:.0%}), mostly {most.largest}. "
        f"Longest: {slowest.stage}, {lasting(slowest.seconds)}."
    ]
    if share <= 1:
        return lines
    return lines + [
        f"Does not fit: {x.stage} takes {x.bytes / 1e9:,.1f} GB a device, mostly "
        f"{x.largest}. {_remedy(options, of, work, x, own)}"
        for x in costs
        if x.bytes > own.memory
    ]


def _remedy(options: Plan, of: Subject, work: Work, x: Cost, own: Device) -> str:
    """Returns what to do about a stage that does not fit."""
    more = x.times_as_many(own.memory)
    wider = "More devices do not help"
    if more is not None:
        wider = f"Share it among {more} times as many devices"
    if x.largest == "parameters":
        narrow = ", or --dtype bfloat16" if options.dtype == "float32" else ""
        return f"{wider}{narrow}."
    layers = layer_shapes(of)
    each = work.queries * query_bytes(layers, 32) / 1e9
    small = "" if options.rank else f"; or --rank 32 ({each:,.1f} GB in all)"
    if x.stage == "query":
        # Together they are whole before any of them is small.
        small = small if is_streamed(layers, work.queries) else ""
        return f"{wider}; {_fewer(work.queries, x, own)}{small}."
    if x.largest == "queries":
        return f"{wider}; or ask fewer questions at a time{small}."
    if x.largest == "activations":
        return f"{wider}; --remat computes blocks again; or a shorter --context."
    if x.stage == "scan, per token":
        return f"{wider}; or --per-token for fewer sequences."
    cut = 2 * options.blocks
    while cut < MOST and _cut(of, cut, x) > own.memory:
        cut *= 2
    if _cut(of, cut, x) > own.memory:
        return f"{wider}; or fewer layers."
    less = _covariances(_less(of, cut)) / 1e9
    return f"{wider}; --blocks {cut} does: {less:,.1f} GB of covariances in all."


def _fewer(asked: int, x: Cost, own: Device) -> str:
    """Returns how many questions can be solved at a time."""
    each = sum(x.held.get(k, 0.0) for k in ("queries", "copies", "working")) / asked
    room = own.memory - (x.bytes - asked * each)
    if room < each:
        return "not even one question has room beside the rest: fewer layers do"
    some = "1 question" if room < 2 * each else f"{int(room / each)} questions"
    return f"or solve for at most {some} at a time"


def _less(of: Subject, blocks: int) -> Subject:
    return of._replace(factors=PerToken(blocks))


def _cut(of: Subject, blocks: int, x: Cost) -> float:
    """Returns what a stage would take with covariances in so many blocks."""
    less = _less(of, blocks)
    saved = x.held.get("curvature", 0.0) * (1 - _covariances(less) / _covariances(of))
    if x.stage == "eigendecomposition":
        saved += _decomposed(of) - _decomposed(less)
    return x.bytes - saved


def _covariances(of: Subject) -> float:
    return sum(x.covariance for x in sides(layer_shapes(of)))


def _decomposed(of: Subject) -> float:
    return eigendecomposition(layer_shapes(of)).memory["working"]


def _assumed(own: Device, mesh: Mesh) -> list[str]:
    if own.kind == "cpu":
        told = (
            f"Rates of {measured_on()}, measured now: {own.flops / 1e9:,.0f} GFLOP/s "
            f"in products of float32, {own.eigen / 1e9:,.0f} in eigendecompositions, "
            f"{own.bandwidth / 1e9:,.1f} GB/s copied, {own.memory / 1e9:,.1f} GB free; "
            f"{own.base / 1e9:.2f} GB are Python, JAX and compiled programs."
        )
    else:
        told = (
            f"Rates of one {own.kind} as published: {own.flops / 1e12:,.0f} TFLOP/s, "
            f"{own.bandwidth / 1e12:,.2f} TB/s, {own.memory / 1e9:,.0f} GB, "
            f"{own.link / 1e9:,.0f} GB/s to others; of the rates {own.efficiency:.0%} "
            f"are planned with, and {own.eigen / 1e12:.2g} TFLOP/s for "
            "eigendecompositions. Both shares are assumptions."
        )
    return [
        f"Assumed: {told}",
        "Assumed: batches split over data; parameters, curvature and queries over "
        "model, in equal parts; activations whole on each device; statistics added up "
        "once a pass; whole sides dealt out to be decomposed; exchange not overlapped.",
    ][: 2 if mesh.devices > 1 else 1]
