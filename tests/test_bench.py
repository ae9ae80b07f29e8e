"""Every stage of the benchmark runs, on a model too small to say anything."""

import json

import pytest

from experiments.alone import prepared
from experiments.bench_engine import (
    FITTING,
    OURS,
    UNIT,
    Timed,
    needs,
    report,
    table,
    timed,
    typical,
    whole,
    with_queries,
    without_queries,
)
from experiments.contender import Cost, Job, data, measured
from experiments.contender_influence import stages
from experiments.equal_fidelity import (
    PEER,
    Row,
    Saving,
    savings,
    stages_in,
)

JOB = Job(
    folder=None, blocks=1, width=4, hidden=6, heads=2, context=5, vocabulary=7,
    layers="mlp", sequences=3, token_sequences=2, queries=3, rank=2, damping=0.1,
    batch={OURS: {"": 2}}, threads=1,
)  # fmt: skip


def test_queries_of_low_rank_are_made_up_in_their_shapes():
    engine, _ = prepared(JOB, "scan, rank 2")
    for x in engine.layers:
        left, right = engine.asking.forms[x.name]
        assert left.shape == (JOB.queries, x.outputs, JOB.rank)
        assert right.shape == (JOB.queries, x.columns, JOB.rank)


@pytest.mark.slow
def test_every_stage_runs_and_is_reported():
    ours = {}
    for name, stage in stages(JOB, data(JOB)).items():
        first = measured(stage.begin)
        ours[name] = Timed(stage.tokens, first, measured(stage.work))
    # A peer that is twice as fast has to be named.
    faster = {
        k: x._replace(cost=Cost(x.cost.seconds / 2, x.cost.cpu_seconds / 2, 0.0))
        for k, x in ours.items()
    }
    found = report({OURS: ours, "peer": faster})
    assert found["scan"]["tokens"] == 3 * 5
    assert found[UNIT]["times_unit"] == 1
    assert all(x["peers"]["peer"]["ratio"] == 0.5 for x in found.values())
    verdicts = list(table("tiny", found, ["peer"]).columns[-1].cells)
    assert verdicts == ["peer is ahead"] * len(found)


def test_what_a_stage_needs_is_done_as_well():
    every = list(stages(JOB, data(JOB)))
    for stage in every:
        needed = needs(stage, ", rank 2")
        assert [x for x in every if x in needed] == list(needed)
        assert not needed or every.index(needed[-1]) < every.index(stage)
    assert needs("eigenvalues", ", rank 2") == FITTING[:2]
    assert needs("scan, per token, rank 2", ", rank 2") == (*FITTING, "query, rank 2")
    assert needs("scan, per layer", ", rank 2") == (*FITTING, "query")


@pytest.mark.slow
def test_only_what_is_chosen_is_reported():
    modules = {OURS: "experiments.contender_influence"}
    done = []
    found = timed(JOB, modules, 1, done.append, ["scan"])
    assert done == [UNIT, *FITTING, "query", "scan"]
    assert found[OURS].keys() == {UNIT, "query", "scan"}
    with pytest.raises(ValueError, match="No stage is called scam. They are: forward"):
        timed(JOB, modules, 1, done.append, ["scam"])


def test_a_peer_s_scans_are_timed_without_its_queries():
    def took(seconds):
        return Timed(8, Cost(seconds, seconds, 0.0), Cost(seconds, seconds, 0.0))

    stages = {"query": took(1.0), "query, rank 2": took(2.0)}
    stages |= {"scan": took(5.0), "scan, rank 2": took(5.0), "covariance": took(3.0)}
    left = without_queries(stages, ", rank 2")
    seconds = {k: x.cost.seconds for k, x in left.items()}
    assert seconds == {**seconds, "scan": 4.0, "scan, rank 2": 3.0, "covariance": 3.0}
    assert seconds["query + scan"] == 5.0

    # Of a scan no dearer than its queries nothing is said but that.
    none = without_queries({"query": took(1.0), "scan": took(1.0)}, ", rank 2")
    assert none.keys() == {"query", "query + scan"}

    # A contender whose scans are without their queries, told as a whole.
    own = {"query": took(1.0), "scan": took(4.0)}
    own |= {"covariance": took(3.0), "eigenvalues": took(2.0)}
    own |= {"eigendecomposition": took(0.5)}
    found = whole(with_queries(own, ", rank 2"))
    assert found["query + scan"].cost.seconds == 5.0
    assert found["pipeline"].cost.seconds == 10.5


def test_the_typical_cost_is_the_median_and_the_highest_peak():
    costs = [Cost(3.0, 1.0, 5.0), Cost(1.0, 9.0, 7.0), Cost(2.0, 2.0, 6.0)]
    assert typical(costs) == Cost(2.0, 2.0, 7.0)


def test_what_fewer_sequences_and_an_index_save():
    def at(rate, **more):
        return {"tokens_per_cpu_second": rate, **more}

    decomposed = {"cpu_seconds": 3.0, "tokens_per_cpu_second": None}
    ours = {"covariance": 10.0, "eigenvalues": 5.0, "query": 2.0, "scan": 10.0}
    stages = {k: at(x, peers={PEER: at(x / 2)}) for k, x in ours.items()}
    stages["eigendecomposition"] = {**decomposed, "peers": {PEER: decomposed}}
    rows = [
        Row(100, 8, "both", 0.995, 0.9, indexing=50.0, lookup=0.25),
        Row(50, None, None, 0.999, 0.9),
        Row(50, 8, "both", 0.991, 0.9, indexing=50.0, lookup=0.25),
        Row(50, 8, "leading", 0.991, 0.9, indexing=25.0, lookup=0.25),
        Row(25, None, None, 0.5, 0.1),
    ]
    found = list(savings(rows, stages, context=2, train=100, asked=3))
    # 20 + 40 + 3 to fit to all, 3 a set of queries, 20 a scan, 50 or 25 to index.
    assert found == [
        Saving(PEER, 100, None, None, 169.0, 215.0),
        Saving(PEER, 50, None, None, 109.0, 155.0),
        Saving(OURS, 100, None, None, 86.0, 109.0),
        Saving(OURS, 50, None, None, 56.0, 79.0),
        Saving(OURS, 100, 8, "both", 116.25, 119.5),
        Saving(OURS, 50, 8, "both", 86.25, 89.5),
        Saving(OURS, 50, 8, "leading", 61.25, 64.5),
    ]


def test_stages_that_were_not_timed_are_said_before_anything_is_measured(tmp_path):
    path = tmp_path / "timed.json"
    with pytest.raises(FileNotFoundError, match="which says what stages take"):
        stages_in(path)
    names = (*FITTING, "query", "scan")
    stages = {x: {"peers": {PEER: {}}} for x in names}
    path.write_text(json.dumps({"stages": stages}))
    assert stages_in(path) == stages
    lacking = {k: x for k, x in stages.items() if k != "eigenvalues"}
    path.write_text(json.dumps({"stages": lacking}))
    with pytest.raises(ValueError, match="what eigenvalues takes"):
        stages_in(path)
    path.write_text(json.dumps({"stages": {**stages, "scan": {"peers": {}}}}))
    with pytest.raises(ValueError, match=f"what {PEER} takes"):
        stages_in(path)
