"""Work in groups: what a kill costs, what a damaged file costs, and in which order results come."""

import numpy as np
import pytest

from tda.runtime import groups, preemption
from tda.runtime.groups import ONE_GROUP, GroupError, Groups


class Work:
    """Work that counts what it is called for, and is killed at one group."""

    def __init__(self, killed_at=None):
        self.computed, self._killed_at = [], killed_at

    def __call__(self, rows):
        if rows.start == self._killed_at:
            raise KeyboardInterrupt
        self.computed.append(rows.start)
        return {"sum": np.float64(sum(rows)), "first": np.array([rows.start])}


def firsts(results):
    return [int(r["first"][0]) for r in results]


def test_groups_are_as_large_as_bytes_and_results_ask(tmp_path):
    by_bytes = Groups(tmp_path, group_bytes=100)
    # 100 bytes are 10 rows of 10 bytes, and 16 is the next power of two.
    assert by_bytes.ranges(40, 10) == [range(0, 16), range(16, 32), range(32, 40)]
    # A result of 30 bytes asks for 16 times as many, 48 rows.
    assert by_bytes.ranges(70, 10, result_bytes=30) == [range(0, 64), range(64, 70)]
    assert ONE_GROUP.ranges(70, 10, 30) == [range(70)]
    assert by_bytes.ranges(0, 10) == [range(0)]


def test_a_killed_call_keeps_its_groups_and_results_come_in_order(tmp_path):
    kept, reported = Groups(tmp_path / "groups", 2), []
    ranges = kept.ranges(8, 1)
    with pytest.raises(KeyboardInterrupt):
        kept.reduce("work", ranges, Work(killed_at=4), firsts)
    work = Work()
    assert kept.reduce("work", ranges, work, firsts, reported.append) == [0, 2, 4, 6]
    assert work.computed == [4, 6] and reported == [2, 2]
    again = Work()
    assert kept.reduce("work", ranges, again, firsts) == [0, 2, 4, 6] and not again.computed
    # Other work under another name does not read these.
    other = Work()
    kept.reduce("other", ranges, other, firsts)
    assert other.computed == [0, 2, 4, 6]


def test_a_notice_of_preemption_ends_the_work_within_a_group(tmp_path, monkeypatch):
    kept, work, again = Groups(tmp_path, 2), Work(), Work()
    ranges = kept.ranges(8, 1)
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "is_noticed", lambda: len(work.computed) == 2)
        with pytest.raises(preemption.Preempted):
            kept.reduce("work", ranges, work, firsts)
    assert kept.reduce("work", ranges, again, firsts) == [0, 2, 4, 6]
    assert (work.computed, again.computed) == ([0, 2], [4, 6])


def test_a_flipped_bit_costs_one_group(tmp_path):
    kept = Groups(tmp_path, 2)
    ranges = kept.ranges(8, 1)
    kept.reduce("work", ranges, Work(), firsts)
    for offset in (0, 40, -1):  # the archive's header, an array, the archive's directory
        (path,) = (tmp_path / "work").glob("000002-*.npz")
        content = bytearray(path.read_bytes())
        content[offset] ^= 4
        path.write_bytes(content)
        work = Work()
        assert kept.reduce("work", ranges, work, firsts) == [0, 2, 4, 6]
        assert work.computed == [4]


def test_damage_after_the_check_is_told(tmp_path, monkeypatch):
    kept = Groups(tmp_path, 2)
    ranges = kept.ranges(4, 1)
    kept.reduce("work", ranges, Work(), firsts)
    (path,) = (tmp_path / "work").glob("000001-*.npz")

    def damage(folder, ranges):
        path.write_bytes(path.read_bytes()[:-1])
        return []

    monkeypatch.setattr(groups, "_missing", damage)
    with pytest.raises(GroupError, match=r"000001-.*damaged; repeat the command"):
        kept.reduce("work", ranges, Work(), firsts)


def test_nothing_is_kept_without_a_directory():
    work = Work()
    assert ONE_GROUP.reduce("work", [range(5)], work, firsts) == [0] and work.computed == [0]
