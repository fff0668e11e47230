"""Schedules: what each stage does when, against the formulas of the papers they come from."""

from fractions import Fraction

import pytest

from jaxpar import schedule
from jaxpar.schedule import Task, check_schedule, executed_tasks, format_timeline, make_schedule, simulate

SIZES = [(1, 1), (1, 5), (2, 2), (2, 8), (4, 4), (4, 16), (8, 8), (8, 32), (3, 7)]


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_the_bubble_is_what_the_papers_say(name, stages, microbatches):
    found = simulate(make_schedule(name, stages, microbatches))
    assert found.bubble == Fraction(stages - 1, microbatches + stages - 1)
    assert found.ticks == 2 * (microbatches + stages - 1)


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_gpipe_holds_every_microbatch_and_1f1b_no_more_than_the_stages_to_come(stages, microbatches):
    assert simulate(make_schedule("gpipe", stages, microbatches)).peak == (microbatches,) * stages
    expected = tuple(min(microbatches, stages - stage) for stage in range(stages))
    assert simulate(make_schedule("1f1b", stages, microbatches)).peak == expected


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_what_runs_holds_at_most_twice_the_stages_and_no_more_for_more_microbatches(stages, microbatches):
    found = simulate(executed_tasks(stages, microbatches))
    assert found.ticks == 2 * (microbatches + 2 * stages - 2)
    assert found.peak == tuple(min(microbatches, 2 * (stages - stage) - 1) for stage in range(stages))


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
@pytest.mark.parametrize("make", [executed_tasks, lambda *sizes: make_schedule("1f1b", *sizes)])
def test_every_stage_does_every_microbatch_once_each_way(make, stages, microbatches):
    tasks = make(stages, microbatches)
    assert len(tasks) == 2 * stages * microbatches == len({task[1:] for task in tasks})


GOOD = make_schedule("1f1b", 2, 2)
WRONG = {
    "forward before the stage before it": (
        [task._replace(tick=0) if task[1:] == (1, 0, "F") else task for task in GOOD],
        r"needs F0 of stage 0 before it, which comes at tick 0; give that an earlier tick",
    ),
    "backward before the stage after it": (
        [task._replace(tick=2) if task[1:] == (0, 0, "B") else task for task in GOOD],
        r"needs B0 of stage 1 before it, which comes at tick 2; give that an earlier tick",
    ),
    "two at once": ([*GOOD, Task(0, 0, 9, "F")], r"comes at the same tick as Task\(tick=0, stage=0, microbatch=0"),
    "one twice": ([*GOOD, Task(9, 0, 0, "F")], r"or twice; give a stage one task a tick"),
    "one forgotten": ([task for task in GOOD if task[1:] != (0, 1, "F")], r"needs F1 of stage 0 .* comes never"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_schedule_that_can_not_be_is_named(case):
    tasks, text = WRONG[case]
    check_schedule(GOOD)
    with pytest.raises(schedule.ScheduleError, match=text):
        check_schedule(tasks)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("1f1", 2, 2), r"Schedule '1f1' is unknown \(nearest: '1f1b'\); the schedules are gpipe, 1f1b"),
        (("gpipe", 0, 2), "stages is 0; give a whole number, 1 or more"),
        (("gpipe", 2, 2.0), r"microbatches is 2\.0; give a whole number, 1 or more"),
    ],
)
def test_bad_arguments_are_named(arguments, text):
    with pytest.raises(schedule.ScheduleError, match=text):
        make_schedule(*arguments)


@pytest.mark.parametrize(
    ("stages", "microbatches", "text"), [(0, 2, "stages is 0; give"), (2, "4", "microbatches is '4'; give")]
)
def test_tasks_of_no_stages_or_microbatches_are_named(stages, microbatches, text):
    with pytest.raises(schedule.ScheduleError, match=text):
        executed_tasks(stages, microbatches)


@pytest.mark.parametrize("read", [simulate, check_schedule, format_timeline])
@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        ([], r"The tasks are \[\]; give at least one, as make_schedule\('1f1b', 2, 4\)"),
        (None, "The tasks are None; give at least one"),
        (
            [(0, 0, 0, "F")],
            r"\(0, 0, 0, 'F'\) is no task; give jaxpar\.schedule\.Task\(tick, stage, microbatch, kind\)",
        ),
        ([Task(0, -1, 0, "F")], r"stage=-1.* is no task; .* whole numbers from 0 on"),
        ([Task(0, 0, 0, "X")], r"kind='X'\) is no task; .* and 'F' or 'B'"),
    ],
)
def test_what_is_no_task_is_named(read, tasks, text):
    with pytest.raises(schedule.ScheduleError, match=text):
        read(tasks)


def test_a_timeline_shows_each_stage_in_a_line():
    assert format_timeline(make_schedule("gpipe", 2, 2)).splitlines() == [
        "stage 0  F0 F1 .  .  B0 B1",
        "stage 1  .  F0 F1 B0 B1 .",
    ]
