"""What is planned is what the passes allocate and multiply."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.contender import Job, data
from experiments.contender_influence import Engine
from influence.attribution import scan, streamed, tokens
from influence.attribution.cost import (
    Stage,
    Work,
    layer_shapes,
    parameter_bytes,
    passes,
    query_bytes,
    sides,
    subject,
)
from influence.attribution.forms import Plain
from influence.attribution.plan import Device, Mesh, arranged, cost
from influence.attribution.query_cost import is_streamed
from influence.attribution.stages import stages
from influence.curvature import covariance, eigenvalues
from influence.curvature.covariance import PerToken
from influence.curvature.solvers import Eigenbasis
from influence.model.examples import Examples
from influence.model.passes import Pass, count
from influence.model.task import losses
from tests.cases import thinned

# Products are counted exactly. XLA counts an operation for each entry of everything
# else too, after merging some and doing others twice; here that is a tenth of all.
BESIDE = 0.15

B, RANK = 3, 4

JOB = Job(
    folder=None, blocks=2, width=32, hidden=96, heads=2, context=24, vocabulary=19,
    layers="all", sequences=B, token_sequences=B, queries=5, rank=RANK, damping=0.1,
    batch={"influence": {"": B}}, threads=1,
)  # fmt: skip


@cache
def engine(rank=None):
    """Returns the bench's engine after every stage, its parameters float32."""
    found = Engine(JOB, data(JOB))
    every = found.train.batches(B)
    found.covariance(every)
    found.decompose()
    found.eigenvalues(every)
    made = found.moments, found.bases  # the engine lets go of them
    found.query(found.asked, rank and Plain(rank))
    found.moments, found.bases = made
    return found


@cache
def planned(rank=None):
    of = engine(rank)
    patterns = [f"{name}.weight" for name in JOB.names()]
    model = subject(of.task, of.params, patterns)
    work = Work(JOB.context, B, B, B, JOB.queries, rank, B)
    return {x.name: x for x in stages(model, work, passes(model, JOB.context)(B))}


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def flops(lowered):
    return lowered.compile().cost_analysis()["flops"]


def counted(stage):
    """Returns a stage's operations as XLA counts them: an entry made is one, too."""
    assert stage.batches == 1
    return sum(x.flops + x.made / 4 for x in stage.parts.values())


def test_the_covariance_pass_multiplies_as_planned():
    of = engine()
    fold = covariance.fold(of.task, of.params, of.layers, of.labels)
    (batch,) = of.train.batches(B)
    about = (of.task, of.layers, of.factors, of.labels, of.params, fold.init(), batch)
    found = flops(covariance._update.lower(*about))
    assert counted(planned()["covariances"]) == pytest.approx(found, rel=BESIDE)


def test_the_eigenvalue_pass_multiplies_as_planned():
    of = engine()
    fold = eigenvalues.fold(of.task, of.params, of.layers, of.labels, of.bases)
    (batch,) = of.train.batches(B)
    about = (of.task, of.layers, of.labels, of.params, of.bases, fold.init(), batch)
    found = flops(eigenvalues._update.lower(*about))
    assert counted(planned()["eigenvalues"]) == pytest.approx(found, rel=BESIDE)


@pytest.mark.parametrize("rank", thinned([None, RANK], [RANK]))
def test_the_scan_multiplies_as_planned(rank):
    of = engine(rank)
    (batch,) = of.train.batches(B)
    about = (of.task, of.layers, scan.CHEAPEST, of.params, of.asking.forms, batch)
    found = flops(scan._read.lower(*about))
    assert counted(planned(rank)["scan"]) == pytest.approx(found, rel=BESIDE)


def test_the_scan_per_token_multiplies_as_planned():
    # XLA counts the loop over queries once: so does a plan for one query.
    of = engine()
    (batch,) = of.train.batches(B)
    forms = jax.tree.map(lambda x: x[:1], of.asking.forms)
    about = (of.task, of.layers, tokens.READING, of.params, forms, batch)
    found = flops(scan._read.lower(*about))
    model = subject(of.task, of.params, [f"{x}.weight" for x in JOB.names()])
    work = Work(JOB.context, B, B, B, 1, None, B)
    one = stages(model, work, passes(model, JOB.context)(B))[-1]
    assert counted(one) == pytest.approx(found, rel=BESIDE)


def test_queries_are_read_in_the_eigenbasis_as_planned():
    of = engine()
    one, blocks = next(iter(of.asked.values())), dict(of.curvature.blocks)
    asked = of.layers, Eigenbasis(), None, one, of.params, blocks
    found = flops(streamed._kept.lower(*asked))
    model = subject(of.task, of.params, [f"{x}.weight" for x in JOB.names()])
    queries = 40  # so many that they are read so
    work = Work(JOB.context, B, B, B, queries, None, B)
    found_for = stages(model, work, passes(model, JOB.context)(B))
    parts = {x.name: x for x in found_for}["query"].parts
    each = sum(x.flops + x.made / 4 for x in parts.values())
    assert each / queries == pytest.approx(found, rel=BESIDE)


def test_memory_is_that_of_the_arrays():
    of, found = engine(), planned()
    assert found["covariances"].memory["parameters"] == nbytes(of.params)
    state, _ = covariance.fold(of.task, of.params, of.layers, of.labels).init()
    counters = nbytes({k: x["positions"] for k, x in state.items()})
    assert found["covariances"].memory["curvature"] == nbytes(state) - counters
    decomposed = nbytes(of.bases) + nbytes((of.moments.inputs, of.moments.gradients))
    assert found["eigendecomposition"].memory["curvature"] == decomposed
    assert found["eigenvalues"].memory["curvature"] == nbytes(dict(of.curvature.blocks))
    assert found["scan"].memory["queries"] == nbytes(of.asking.forms)


def test_factors_take_what_their_arrays_take():
    of = engine(RANK)
    layers = layer_shapes(subject(of.task, of.params, [x.name for x in of.layers]))
    assert JOB.queries * query_bytes(layers, RANK) == nbytes(of.asking.forms)


def test_blocks_and_long_sides_take_what_their_arrays_take():
    of = engine()
    names = [x.name for x in of.layers]
    factors = PerToken(blocks=3, widest=16)
    model = subject(of.task, of.params, names, factors)
    fold = covariance.fold(of.task, of.params, model.layers, of.labels, factors)
    state, _ = fold.init()
    counters = nbytes({k: x["positions"] for k, x in state.items()})
    total = sum(x.covariance for x in sides(layer_shapes(model)))
    assert total == nbytes(state) - counters


def test_queries_of_low_rank_are_multiplied_out_some_at_a_time():
    of = engine(RANK)
    (batch,) = of.train.batches(B)
    model = subject(of.task, of.params, [f"{x}.weight" for x in JOB.names()])
    at = passes(model, JOB.context)(B)

    def held(queries):
        forms = {
            k: jax.tree.map(lambda x: jnp.tile(x, (queries, 1, 1))[:queries], form)
            for k, form in of.asking.forms.items()
        }
        about = (of.task, of.layers, scan.CHEAPEST, of.params, forms, batch)
        memory = scan._read.lower(*about).compile().memory_analysis()
        assert memory is not None
        work = Work(JOB.context, B, B, B, queries, RANK, B)
        plan = {x.name: x for x in stages(model, work, at)}["scan"]
        return memory.temp_size_in_bytes, plan.memory["copies"]

    (few, planned_few), (many, planned_many) = held(32), held(256)
    largest = max(x.matrix for x in layer_shapes(model))
    assert planned_few == planned_many == scan.EXPANDED * largest
    # 224 queries more, and not even the few that are out at a time.
    assert many - few < planned_few


def test_nothing_but_shapes_is_needed():
    of = engine()
    shapes = jax.eval_shape(lambda x: x, of.params)
    model = subject(of.task, shapes, "blocks.0.mlp.fc1.weight")
    assert parameter_bytes(shapes) == nbytes(of.params)
    assert (
        passes(model, 8)(2).step
        == passes(subject(of.task, of.params, "blocks.0.mlp.fc1.weight"), 8)(2).step
    )


def test_passes_grow_with_the_batch_as_if_counted_at_that_size():
    of = engine()
    model = subject(of.task, of.params)
    at = passes(model, 8)
    batch = Examples(
        {k: jnp.repeat(x[:1, :8], 7, 0) for k, x in of.train.inputs.items()},
        tuple("abcdefg"),
    )
    (seven,) = batch.batches(7)

    def loss(params):
        outputs = of.task.outputs(params, seven.inputs)
        labels = of.task.labels(seven.inputs)
        return losses(of.task, outputs, labels, seven).sum()

    counted_at = count(jax.value_and_grad(loss), of.params)
    assert at(7).step.flops == pytest.approx(counted_at.flops, rel=1e-12)
    # What is held is the most at any one time: of small batches perhaps at another.
    assert at(7).step.held == pytest.approx(counted_at.held, rel=0.05)


DEVICE = Device("even", 1e12, 1e12, 1e12, 1e12, memory=100.0)


def stage(**rest):
    memory = {"parameters": 60.0, "curvature": 60.0, "activations": 10.0}
    parts = {"model": Pass(flops=1e12)}
    about = {"name": "one", "batches": 8, "parts": parts, "memory": memory}
    return Stage(**{**about, **rest})


def test_devices_share_work_and_what_can_be_split():
    alone, both = (cost(stage(), DEVICE, x) for x in (Mesh(), Mesh(2, 2)))
    assert (alone.bytes, both.bytes) == (130, 70)
    assert (alone.seconds, both.seconds) == (8, 2)
    assert alone.sent == both.sent == 0


def test_statistics_are_added_up_once_a_pass():
    few, many = (
        cost(stage(summed=1e6, batches=n), DEVICE, Mesh(data=4)) for n in (8, 80)
    )
    assert few.sent == many.sent == 2 * 3 / 4 * 1e6


def test_what_is_exchanged_grows_with_the_batches_of_each_group():
    one = cost(stage(exchanged=1e6), DEVICE, Mesh(2, 4))
    assert one.sent == 3 / 4 * 1e6 * 8 / 2


def test_the_largest_side_is_decomposed_by_one_device():
    one = stage(parts={}, batches=0, eigen=8e12, largest=4e12)
    assert cost(one, DEVICE, Mesh(8, 1)).seconds == 4
    assert cost(one, DEVICE, Mesh(1, 1)).seconds == 8


def test_queries_are_solved_by_one_group_of_devices_truncated_or_not():
    one = stage(batches=0, eigen=4e12, largest=4e12)
    assert cost(one, DEVICE, Mesh(2, 2)).seconds == 1 / 2 + 4


def test_queries_of_embeddings_are_not_planned_to_be_read_one_by_one():
    of = engine()
    model = subject(of.task, of.params, [f"{x}.weight" for x in JOB.names()])
    layers = layer_shapes(model)
    assert is_streamed(layers, 40)
    looked_up = layers[0]._replace(kind="embedding", diagonal=(False, True))
    assert not is_streamed([looked_up, *layers[1:]], 40)


def test_the_quickest_that_fits_is_chosen():
    def at(batch):
        parts = {"model": Pass(flops=1e12 * batch)}
        memory = {"parameters": 120.0, "activations": 20.0 * batch}
        # Larger batches are a little better.
        each = stage(parts=parts, memory=memory, batches=8 / batch - batch / 100)
        return [each]

    mesh, batch, (found,) = arranged(at, DEVICE, 4, None)
    assert found.bytes <= DEVICE.memory
    assert (mesh, batch) == (Mesh(2, 2), 2) or (mesh, batch) == (Mesh(1, 4), 2)
    assert arranged(at, DEVICE, 4, 1)[1] == 1


def test_if_nothing_fits_as_few_stages_as_can_be_do_not():
    small = stage(memory={"parameters": 16.0})
    small_device = DEVICE._replace(memory=9)
    mesh, _, found = arranged(lambda _: [stage(), small], small_device, 2, 1)
    assert mesh == Mesh(1, 2)
    assert [x.bytes > 9 for x in found] == [True, False]


def test_how_many_devices_would_do_or_that_none_would():
    found = cost(stage(), DEVICE, Mesh())
    assert found.times_as_many(100.0) == 2
    assert found.times_as_many(10.0) is None
    assert np.isclose(found.bytes, 130)
