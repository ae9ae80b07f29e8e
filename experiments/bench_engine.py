"""What does each stage cost, in multiples of training on the same tokens?

    python -m experiments.bench_engine --reference DIR [--config small|medium] [--peers]

Times the engine's stages over the reference model (`DIR/small`) or a random one of 14M
parameters, and prints tokens a second, tokens a second of processor time, how many
times a plain forward and backward pass over the same tokens that is, and peak memory.
With `--peers` kronfluence and bergson do the same stages, as far as they have them, in
the same run, turn by turn, and the table says where they are ahead.

* Each contender is a process of its own (`contender.py`); compiling is timed apart.
* Figures are the medians of `--repetitions`, and the highest peak. On a machine that
  others use, believe those of processor time; ratios are of these.
* kronfluence solves for its queries anew in every scan. What that takes is measured by
  a scan of one sequence (its "query") and taken off its scans, a difference that errs
  the more the fewer sequences there are. The rows "query + scan" have all of it, on
  both sides, and "pipeline" what one set of queries takes from the covariances on.
* Labels are sampled, damping is 0.1 of the mean eigenvalue, numbers are float32.
  Every contender is given the batch sizes that a sweep found fastest for it (bergson's
  on SMALL are within a tenth of that, on MEDIUM they were not swept), the engine
  smaller ones on MEDIUM, as fast and with less memory; and all the same allocator.
"""

import argparse
import json
import math
import platform
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from experiments.contender import Contender, Cost, Job, vocabulary

OURS, UNIT = "influence", "forward+backward"

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "blocks": 4, "width": 128, "hidden": 512, "heads": 4, "context": 128,
        "queries": 64, "sequences": 256, "token_sequences": 64,
        "batch": {
            OURS: {"": 16, "eigenvalues": 8, "low rank": 64},
            "kronfluence": {
                "": 16, "unit": 32, "covariance": 32, "tokens": 4, "low rank": 64,
            },
            "bergson": {"": 16},
        },
    },
    "medium": {
        "blocks": 8, "width": 384, "hidden": 1536, "heads": 6, "context": 256,
        "queries": 32, "sequences": 64, "token_sequences": 4,
        "batch": {
            OURS: {"": 4, "low rank": 8},
            "kronfluence": {"": 4, "unit": 16, "scan": 8, "tokens": 2, "low rank": 8},
            "bergson": {"": 8},
        },
    },
}  # fmt: skip
"""What is measured, by the name of the configuration."""

PEERS = {
    "kronfluence": "experiments.contender_kronfluence",
    "bergson": "experiments.contender_bergson",
}
"""The modules of those timed beside the engine."""

FITTING = ("covariance", "eigendecomposition", "eigenvalues")
"""What it takes to fit the curvature."""

WHOLE = (*FITTING, "query + scan")
"""What it takes to have the scores of a first set of queries."""

ANEW = ("kronfluence",)
"""Those that solve for their queries in every scan."""


class Timed(NamedTuple):
    """A contender's stage, measured.

    Attributes:
      tokens: how many it passed through the model; None if it passes none.
      first: a little of it, compiling included.
      cost: the median time on the clock and of processor time, and the highest peak.
    """

    tokens: int | None
    first: Cost
    cost: Cost


Results = Mapping[str, Mapping[str, Timed]]
"""By contender and stage."""


def timed(
    job: Job,
    modules: Mapping[str, str],
    repetitions: int,
    say: Any,
    chosen: Collection[str] = (),
) -> Results:
    """Returns what every contender took for every stage, done turn by turn.

    Only for those chosen, if any are, and the queries of scans among them; what else
    these need is done once, untimed.

    Raises:
      ValueError: if a stage that is chosen is none of the engine's.
    """
    found: dict[str, dict[str, Timed]] = {name: {} for name in modules}
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(Contender(module, job))
            for name, module in modules.items()
        }
        every = list(contenders[OURS].tokens)
        wanted = {UNIT, *chosen} if chosen else set(every)
        if unknown := wanted.difference(every):
            raise ValueError(
                f"No stage is called {', '.join(sorted(unknown))}. They are: "
                f"{', '.join(every)}."
            )
        needed = {x for stage in wanted for x in needs(stage, f", rank {job.rank}")}
        wanted |= needed.difference(FITTING)
        for stage in (x for x in every if x in wanted | needed):
            say(stage)
            taking_part = {k: x for k, x in contenders.items() if stage in x.tokens}
            first = {name: x.begin(stage) for name, x in taking_part.items()}
            costs: dict[str, list[Cost]] = {name: [] for name in taking_part}
            for _ in range(repetitions if stage in wanted else 1):
                for name, contender in taking_part.items():
                    costs[name].append(contender.work(stage))
            if stage not in wanted:
                continue
            for name, each in costs.items():
                tokens = contenders[name].tokens[stage]
                found[name][stage] = Timed(tokens, first[name], typical(each))
    return found


def needs(stage: str, low: str) -> tuple[str, ...]:
    """Returns the stages that leave what one works on."""
    if stage == UNIT:
        return ()
    if stage in FITTING:
        return FITTING[: FITTING.index(stage)]
    if stage.startswith("scan"):
        return (*FITTING, query_of(stage, low))
    return FITTING


def typical(costs: list[Cost]) -> Cost:
    """Returns the median time of each kind, and the most memory."""
    walls, cpus, peaks = zip(*costs, strict=True)
    return Cost(median(walls), median(cpus), max(peaks))


def without_queries(stages: Mapping[str, Timed], low: str) -> dict[str, Timed]:
    """Returns the stages, that of solving for the queries taken off every scan.

    What they were with it are rows of their own.
    """
    found = {}
    for name, x in stages.items():
        found[name] = x
        solving = stages.get(query_of(name, low))
        if name.startswith("scan") and solving is not None:
            wall = x.cost.seconds - solving.cost.seconds
            cpu = x.cost.cpu_seconds - solving.cost.cpu_seconds
            found[f"query + {name}"] = x
            if min(wall, cpu) > 0:
                left = Cost(wall, cpu, x.cost.peak_mb)
                found[name] = x._replace(cost=left)
            else:
                # No dearer than its queries: nothing can be said of the scan alone.
                del found[name]
    return found


def with_queries(stages: Mapping[str, Timed], low: str) -> dict[str, Timed]:
    """Returns the stages, every scan also together with solving for its queries."""
    found = dict(stages)
    for name, x in stages.items():
        solving = stages.get(query_of(name, low))
        if name.startswith("scan") and solving is not None:
            found[f"query + {name}"] = together(x.tokens, [solving, x])
    return found


def query_of(scan: str, low: str) -> str:
    """Returns the stage that solves for a scan's queries."""
    return f"query{low}" if scan.endswith(low) else "query"


def whole(stages: Mapping[str, Timed]) -> dict[str, Timed]:
    """Returns the stages, and all for a first set of queries as one, if it is there."""
    if not stages.keys() >= set(WHOLE):
        return dict(stages)
    parts = [stages[name] for name in WHOLE]
    return {**stages, "pipeline": together(parts[-1].tokens, parts)}


def together(tokens: int | None, parts: list[Timed]) -> Timed:
    """Returns stages done one after the other as one."""

    def total(costs: list[Cost]) -> Cost:
        walls, cpus, peaks = zip(*costs, strict=True)
        return Cost(sum(walls), sum(cpus), max(peaks))

    return Timed(
        tokens, total([x.first for x in parts]), total([x.cost for x in parts])
    )


def report(results: Results) -> dict[str, Any]:
    """Returns, for each stage, every contender's figures and how we compare."""
    found: dict[str, Any] = {}
    for stage, x in results[OURS].items():
        entry: dict[str, Any] = {**figures(x, results[OURS][UNIT])}
        entry["peers"] = {
            name: figures(stages[stage], stages[UNIT])
            | {"ratio": stages[stage].cost.cpu_seconds / x.cost.cpu_seconds}
            for name, stages in results.items()
            if name != OURS and stage in stages
        }
        found[stage] = entry
    return found


def figures(x: Timed, unit: Timed) -> dict[str, float | None]:
    """Returns a stage's figures; None where there is none.

    Of two contenders that pass the same tokens, the ratio of their processor times is
    that of their tokens a second.
    """
    cost = x.cost
    found: dict[str, float | None] = {
        "seconds": cost.seconds,
        "cpu_seconds": cost.cpu_seconds,
        "first_seconds": x.first.seconds,
        "peak_mb": None if math.isnan(cost.peak_mb) else cost.peak_mb,
        "tokens": x.tokens,
        "tokens_per_second": None,
        "tokens_per_cpu_second": None,
        "times_unit": None,
    }
    if x.tokens is not None and unit.tokens is not None:
        each = cost.cpu_seconds / x.tokens
        found["tokens_per_second"] = x.tokens / cost.seconds
        found["tokens_per_cpu_second"] = 1 / each
        found["times_unit"] = each * unit.tokens / unit.cost.cpu_seconds
    return found


def table(title: str, found: Mapping[str, Any], peers: list[str]) -> Table:
    """Returns the figures as a table, ours beside those of peers."""
    shown = Table(title=title, caption="U: one forward and backward pass over a token")
    shown.add_column("stage")
    for name in ("first s", "tokens/s", "tokens/CPU-s", "× U", "peak MB"):
        shown.add_column(name, justify="right")
    for peer in peers:
        for name in (f"{peer} tokens/CPU-s", "× U", "peak MB", "ratio"):
            shown.add_column(name, justify="right")
        shown.add_column("")
    for stage, x in found.items():
        cells = [f"{x['first_seconds']:.1f}", *_speed(x, "tokens_per_second")]
        cells += [*_speed(x, "tokens_per_cpu_second"), *_share(x)]
        for peer in peers:
            y = x["peers"].get(peer)
            if y is None:
                cells += [""] * 5
                continue
            cells += [*_speed(y, "tokens_per_cpu_second"), *_share(y)]
            cells += [f"{y['ratio']:.2f}", _verdict(peer, y["ratio"])]
        shown.add_row(stage, *cells)
    return shown


def _verdict(peer: str, ratio: float) -> str:
    return f"{peer} is ahead" if ratio < 1 else ""


def _speed(x: Mapping[str, Any], kind: str) -> list[str]:
    """Returns tokens a second; seconds for what passes no tokens."""
    seconds = x["seconds" if kind == "tokens_per_second" else "cpu_seconds"]
    return [f"{seconds:.2f} s" if x[kind] is None else f"{x[kind]:,.0f}"]


def _share(x: Mapping[str, Any]) -> list[str]:
    unit, peak = x["times_unit"], x["peak_mb"]
    return [
        "" if unit is None else f"{unit:.2f}",
        "" if peak is None else f"{peak:,.0f}",
    ]


def cpu() -> str:
    """Returns what the processor calls itself, and of which family it is."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    pairs = (x.partition(":") for x in path.read_text().splitlines())
    said = {k.strip(): x.strip() for k, _, x in pairs}
    numbers = [f"{k} {said[k]}" for k in ("cpu family", "model") if k in said]
    return ", ".join([said.get("model name", platform.machine()), *numbers])


def job(
    reference: Path,
    config: str,
    *,
    layers: str = "mlp",
    sequences: int | None = None,
    queries: int | None = None,
    threads: int = 1,
) -> Job:
    """Returns what contenders work on; the configuration's own numbers where None."""
    folder = reference / "small"
    sizes = SIZES[config] | {
        "folder": folder if config == "small" else None,
        "vocabulary": vocabulary(folder),
        "layers": layers,
        "rank": 32,
        "damping": 0.1,
        "threads": threads,
    }
    given = {"sequences": sequences, "queries": queries}
    sizes |= {k: x for k, x in given.items() if x is not None}
    sizes["token_sequences"] = min(sizes["token_sequences"], sizes["sequences"])
    return Job(**sizes)


def main() -> None:
    """Prints the table, and with `--json` all figures as a last line."""
    about, _, notes = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about,
        epilog=notes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--reference", type=Path, required=True, help="the reference folder")
    add("--config", choices=SIZES, default="small")
    add("--layers", choices=["mlp", "all"], default="mlp", help="of every block")
    add("--sequences", type=int, help="how many to fit to and to scan")
    add("--queries", type=int, help="how many to ask about")
    add("--stages", nargs="*", default=[], help="only these, by name; all if left out")
    add("--repetitions", type=int, default=3)
    add("--threads", type=int, default=1, help="of each contender")
    add(
        "--peers",
        nargs="*",
        choices=PEERS,
        help="time these as well; all of them if none is named",
    )
    add("--json", action="store_true", help="print all figures, in one last line")
    given, console = parser.parse_args(), Console()
    if given.peers == []:
        given.peers = list(PEERS)
    peers = {name: PEERS[name] for name in given.peers or ()}
    if not console.is_terminal:
        console = Console(width=100 + 60 * len(peers))  # A file has room for all.
    modules = {OURS: "experiments.contender_influence", **peers}
    work = job(
        given.reference,
        given.config,
        layers=given.layers,
        sequences=given.sequences,
        queries=given.queries,
        threads=given.threads,
    )
    progress = Console(stderr=True)
    low = f", rank {work.rank}"
    found = timed(work, modules, given.repetitions, progress.print, given.stages)
    results = {OURS: whole(with_queries(found[OURS], low))}
    for name in peers:
        apart = without_queries if name in ANEW else with_queries
        results[name] = whole(apart(found[name], low))
    stages = report(results)
    title = f"{given.config}, layers {given.layers}, {given.threads} thread(s)"
    console.print(table(title, stages, list(peers)))
    if given.json:
        settings = {**vars(given), "reference": given.reference.name}
        said = json.dumps({"cpu": cpu(), "settings": settings, "stages": stages})
        console.print(said, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    main()
