import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity import Phase, PhaseSchedule

PAPER = "dense 10, (sparse 5, dense 5) x6, sparse 5, dense 10, sparse 15"


def test_papers_imagenet_schedule():
    schedule = PhaseSchedule.parse(PAPER)
    assert schedule.num_epochs == 100
    assert schedule.compressions == (10, 20, 30, 40, 50, 60, 70, 85)
    assert schedule.decompressions == (15, 25, 35, 45, 55, 65, 75)
    assert schedule.last("dense") == Phase("dense", 75, 85)
    assert schedule.last("sparse") == Phase("sparse", 85, 100)
    assert (schedule.num_sparse, schedule.time_share(0.5)) == (50, 0.75)
    assert str(schedule) == PAPER


def test_phase_at_is_half_open():
    schedule = PhaseSchedule.parse("dense 2, sparse 3")
    assert [schedule.phase_at(epoch).kind for epoch in range(5)] == ["dense"] * 2 + ["sparse"] * 3
    for outside in (-1, 5):
        with pytest.raises(ValueError, match="outside the schedule's epochs 0-4"):
            schedule.phase_at(outside)


def test_neighbours_of_one_kind_are_one_phase():
    assert PhaseSchedule.parse("dense 2, dense 3, sparse 1") == PhaseSchedule.parse("dense 5, sparse 1")
    assert PhaseSchedule.parse("(dense 1, sparse 1, dense 1) x2").decompressions == (2, 5)


def test_a_dense_schedule_never_switches():
    schedule = PhaseSchedule.parse("dense 7")
    assert (schedule.compressions, schedule.decompressions, schedule.last("sparse")) == ((), (), None)


spans = st.lists(st.tuples(st.sampled_from(["dense", "sparse"]), st.integers(1, 30)), min_size=1, max_size=24)


@given(spans)
def test_text_form_round_trips(spans):
    schedule = PhaseSchedule(tuple(spans))
    assert PhaseSchedule.parse(str(schedule)) == schedule
    assert schedule.num_epochs == sum(length for _, length in spans)


@given(spans)
def test_phases_tile_the_epochs_and_alternate(spans):
    phases = PhaseSchedule(tuple(spans)).phases
    assert phases[0].start == 0
    for before, after in itertools.pairwise(phases):
        assert before.end == after.start
        assert before.kind != after.kind


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("", "'dense', 'sparse' or '\\(' expected, the end found", 0),
        ("dense", "whole number of 1 or more expected, the end found", 5),
        ("dense 0", "whole number of 1 or more expected, '0' found", 6),
        ("dense 1.5", "whole number of 1 or more expected, '1.5' found", 6),
        ("dense 2 sparse 3", "',' expected, 'sparse' found", 8),
        ("dense 2, prune 3", "expected, 'prune' found", 9),
        ("(dense 2, sparse 1", "'\\)' expected, the end found", 18),
        ("(dense 2) 3", "'x' expected, '3' found", 10),
        ("dense 2; sparse 3", "unexpected ';'", 7),
        ("dense 2)", "',' expected, '\\)' found", 7),
        ("(sparse 1, dense 1) x999999", "at most 10000 phases", 21),
        ("(" * 5000, "expected, '\\(' found", 20),
    ],
)
def test_errors_show_the_place(text, message, column):
    with pytest.raises(ValueError, match=message) as caught:
        PhaseSchedule.parse(text)
    assert str(caught.value).splitlines()[2] == "    " + " " * column + "^"


@pytest.mark.parametrize(
    ("epochs", "scaled"),
    [
        (100, "dense 10, (sparse 5, dense 5) x6, sparse 5, dense 10, sparse 15"),
        (200, "dense 20, (sparse 10, dense 10) x6, sparse 10, dense 20, sparse 30"),
        (20, None),
        (250, None),
        (2, "dense 1, sparse 1"),
        (3, "dense 1, sparse 2"),
        (1, "sparse 1"),
    ],
)
def test_a_schedule_over_other_epochs(epochs, scaled):
    schedule = PhaseSchedule.parse("dense 10, (sparse 5, dense 5) x6, sparse 5, dense 10, sparse 15")
    found = schedule.scaled(epochs)
    assert found.num_epochs == epochs
    if epochs >= len(schedule.spans):
        assert [kind for kind, _ in found.spans] == [kind for kind, _ in schedule.spans]
        assert abs(found.num_sparse / epochs - 0.5) < 0.1
    assert scaled is None or str(found) == scaled
