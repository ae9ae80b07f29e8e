"""Who sends to whom is read from every way in which the compiler says it."""

import pytest

from experiments.collectives import Collective, collectives, groups

WAYS = {
    "replica_groups={{0,1},{2,3}}, use_global": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[4], dimensions": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[2,2]T(1,0), use": [[0, 2], [1, 3]],
    "replica_groups=mesh['a'=2,'b'=1,'c'=2] {'c'}, use": [[0, 1], [2, 3]],
    "replica_groups=mesh['a'=2,'b'=2] {'a'}, use": [[0, 2], [1, 3]],
    "replica_groups=mesh['a'=2,'b'=2] {'a','b'}, use": [[0, 1, 2, 3]],
    "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}": [
        [0, 2],
        [1, 3],
    ],
    "replica_groups={}, use": [[0, 1, 2, 3]],
    "source_target_pairs={{1,0},{3,2}}, metadata": [[1, 0], [3, 2]],
}


@pytest.mark.parametrize("text", WAYS)
def test_groups_are_read(text):
    assert groups(text, 4) == WAYS[text]


def test_what_is_not_understood_is_an_error():
    with pytest.raises(ValueError, match="not known who sends"):
        groups("replica_groups=anew", 4)


def test_axes_follow_from_groups():
    text = "\n".join(
        [
            "%a = f32[2,3]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to=%f",
            "%b = (f32[4]{0}, s32[]) all-gather-start(%y), replica_groups=[2,2]<=[2,2]"
            "T(1,0), dimensions={0}",
            "%c = f32[8]{0} add(%x, %y)",
        ]
    )
    assert collectives(text, rows=2, columns=2) == [
        Collective("all-reduce", "f32[2,3]", data=False, model=True),
        Collective("all-gather", "f32[4] s32[]", data=True, model=False),
    ]
