"""Batches and groups of layers are as large as there is room for."""

import time

import jax
import pytest

from influence.runtime.run.batching import (
    factor_bytes,
    fastest,
    groups,
    halving,
    sizes,
)
from tests import cases


def full(size):
    raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {size}")


def test_sizes_double_up_to_what_there_is():
    assert list(sizes(context=256, most=13)) == [2, 4, 8, 13]
    assert list(sizes(context=4096, most=3)) == [1, 2, 3]


def test_the_fastest_batch_for_which_there_is_room_is_taken():
    waits = {1: 0.02, 2: 0.02, 4: 0.08}  # two take as long as one, four as four
    found = fastest(lambda size: lambda: time.sleep(waits[size]), iter([1, 2, 4]))
    assert found.size == 2

    def work(size):
        return (lambda: full(size)) if size > 2 else (lambda: time.sleep(0.02 / size))

    assert fastest(work, iter([1, 2, 4])).size == 2


def test_no_room_for_the_smallest_batch_is_said():
    with pytest.raises(MemoryError, match="no room for a batch of 1 sequences"):
        fastest(lambda size: lambda: full(size), iter([3]))


def test_work_is_done_in_smaller_batches_if_memory_is_full():
    said = []
    assert halving(lambda n: full(n) if n > 3 else n, 13, said.append) == 3
    assert said == [6, 3]
    with pytest.raises(MemoryError, match="no room for a batch of 1 sequences"):
        halving(full, 2, said.append)


def test_a_batch_that_is_asked_for_is_halved_until_there_is_room():
    found = fastest(lambda n: lambda: full(n) if n > 3 else None, iter([13]))
    assert found.size == 3


def test_another_error_is_no_lack_of_memory():
    def broken(size):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        halving(broken, 8, lambda size: None)


def test_groups_keep_to_the_limit_and_to_what_reads_one_activation():
    task, params, examples = cases.case(cases.MAKERS["raw-loop"], bias=True)
    from influence.model.trace import select, trace

    batch = next(iter(examples.batches(2)))
    layers = select(trace(task.outputs, params, batch.inputs), "*")
    limit = 3 * max(map(factor_bytes, layers))
    found = groups(layers, limit)
    assert [x for group in found for x in group] == list(layers)
    assert all(sum(map(factor_bytes, group)) <= limit for group in found)
    assert len(found) > 1
    for group in found:
        names = {x.name for x in group}
        assert {x.reads for x in group} <= names
