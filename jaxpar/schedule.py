"""Pipeline schedules as plain lists of tasks, and a simulator of how long each stage idles and what it holds.

F is a forward pass of a stage over one microbatch, B a backward pass; each takes one tick.
"""

import collections
import difflib
import fractions
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxpar.integers import is_integer

SCHEDULES = ("gpipe", "1f1b")


class ScheduleError(ValueError):
    """A schedule that can't be: the message names the task and what it waits for."""


class Task(NamedTuple):
    """What a stage does in one tick: `kind` is "F" or "B".

    >>> simulate([Task(0, 0, 0, "F"), Task(1, 0, 0, "B")]).ticks
    2
    """

    tick: int
    stage: int
    microbatch: int
    kind: str


class Simulation(NamedTuple):
    """What a schedule costs.

    Attributes:
      ticks: how long it takes.
      bubble: the part of all stages' ticks that is idle.
      peak: for each stage, the most microbatches whose activations it holds at once.

    >>> simulate(make_schedule("1f1b", stages=2, microbatches=6)).bubble
    Fraction(1, 7)
    """

    ticks: int
    bubble: fractions.Fraction
    peak: tuple[int, ...]


def make_schedule(name: str, stages: int, microbatches: int) -> list[Task]:
    """Returns the tasks of a schedule, in the order of their ticks.

    `"gpipe"` runs all forward passes, then all backward passes (Huang et al. 2018, https://arxiv.org/abs/1811.06965).
    `"1f1b"` alternates them as soon as it can: PipeDream-flush (Narayanan et al. 2021,
    https://arxiv.org/abs/2104.04473). Both idle for (stages - 1) / (microbatches + stages - 1) of the time; the second
    holds the activations of no more microbatches than there are stages.

    Raises:
      ScheduleError: an unknown name, or a number below 1.

    >>> print(format_timeline(make_schedule("1f1b", 2, 3)))
    stage 0  F0 F1 .  B0 F2 B1 .  B2
    stage 1  .  F0 B0 F1 B1 F2 B2 .
    """
    _check_counts(stages, microbatches)
    check_name(name)
    warmups = [microbatches if name == "gpipe" else min(stages - stage, microbatches) for stage in range(stages)]
    return _place([_order(warmup, microbatches) for warmup in warmups])


def check_name(name: str) -> None:
    """Raises ScheduleError unless a schedule of this name is known."""
    if name not in SCHEDULES:
        close = difflib.get_close_matches(str(name), SCHEDULES, n=1)
        aside = f" (nearest: {close[0]!r})" if close else ""
        raise ScheduleError(f"Schedule {name!r} is unknown{aside}; the schedules are {', '.join(SCHEDULES)}.")


def executed_tasks(stages: int, microbatches: int) -> list[Task]:
    """Returns the tasks of `jaxpar.pipeline_loss`'s 1F1B as they run, in ticks of one pass.

    Every device runs one program, whose rounds have a forward half and a backward half: stage i runs microbatch m
    forward in round m + i, and backward in round m + 2 x stages - 2 - i. It holds up to 2 x stages - 1 inputs, about
    twice those of PipeDream-flush, and takes `microbatches + 2 x stages - 2` rounds. Of these the first `stages - 1`
    have no backward half and the last ones no forward half, and a half that nobody runs takes no time: what is idle is
    what PipeDream-flush leaves idle. The last stage's forward pass is part of its backward half.

    Raises:
      ScheduleError: a number below 1.

    >>> simulate(executed_tasks(2, 3)).peak
    (3, 1)
    """
    _check_counts(stages, microbatches)
    tasks = []
    for stage in range(stages):
        for number in range(microbatches):
            tasks.append(Task(2 * (number + stage), stage, number, "F"))
            tasks.append(Task(2 * (number + 2 * stages - 2 - stage) + 1, stage, number, "B"))
    return sorted(tasks)


def check_schedule(tasks: Iterable[Task]) -> None:
    """Raises ScheduleError unless each task comes once, after what it needs, and no stage does two in one tick.

    Without any task it raises too.

    >>> check_schedule([Task(1, 0, 0, "F"), Task(0, 0, 0, "B")])
    Traceback (most recent call last):
    jaxpar.schedule.ScheduleError: Task(tick=0, stage=0, microbatch=0, kind='B') needs F0 of stage 0 before it, which \
comes at tick 1; give that an earlier tick.
    """
    tasks = _read_tasks(tasks)
    ticks: dict[tuple[int, int, str], int] = {}
    busy: dict[tuple[int, int], Task] = {}
    for task in tasks:
        if busy.setdefault((task.stage, task.tick), task) != task or task[1:] in ticks:
            other = busy[task.stage, task.tick]
            raise ScheduleError(f"{task} comes at the same tick as {other}, or twice; give a stage one task a tick.")
        ticks[task[1:]] = task.tick
    stages = {task.stage for task in tasks}
    for task in tasks:
        for needed in _needs(task, max(stages)):
            if needed not in ticks or ticks[needed] >= task.tick:
                when = f"at tick {ticks[needed]}" if needed in ticks else "never"
                stage, microbatch, kind = needed
                raise ScheduleError(
                    f"{task} needs {kind}{microbatch} of stage {stage} before it, which comes {when}; give that an "
                    "earlier tick."
                )


def simulate(tasks: Sequence[Task]) -> Simulation:
    """Returns how long a schedule takes, its idle part, and the activations that each stage holds at most.

    Raises:
      ScheduleError: a task comes before what it needs.

    >>> simulate(make_schedule("gpipe", stages=4, microbatches=8))
    Simulation(ticks=22, bubble=Fraction(3, 11), peak=(8, 8, 8, 8))
    >>> simulate(make_schedule("1f1b", stages=4, microbatches=8))
    Simulation(ticks=22, bubble=Fraction(3, 11), peak=(4, 3, 2, 1))
    """
    check_schedule(tasks)
    stages = 1 + max(task.stage for task in tasks)
    ticks = 1 + max(task.tick for task in tasks)
    peaks = []
    for stage in range(stages):
        held = peak = 0
        for task in sorted(task for task in tasks if task.stage == stage):
            held += 1 if task.kind == "F" else -1
            peak = max(peak, held)
        peaks.append(peak)
    return Simulation(ticks, 1 - fractions.Fraction(len(tasks), stages * ticks), tuple(peaks))


def format_timeline(tasks: Sequence[Task]) -> str:
    """Returns a schedule as text: a line a stage, a column a tick, `F3` for the forward pass of microbatch 3.

    >>> print(format_timeline([Task(0, 0, 0, "F"), Task(1, 0, 0, "B")]))
    stage 0  F0 B0
    """
    tasks = _read_tasks(tasks)
    cells = {(task.stage, task.tick): f"{task.kind}{task.microbatch}" for task in tasks}
    width = max(map(len, cells.values()))
    lines = []
    for stage in range(1 + max(task.stage for task in tasks)):
        row = [cells.get((stage, tick), ".").ljust(width) for tick in range(1 + max(task.tick for task in tasks))]
        lines.append(f"stage {stage}  {' '.join(row)}".rstrip())
    return "\n".join(lines)


def _check_counts(stages: Any, microbatches: Any) -> None:
    for what, count in (("stages", stages), ("microbatches", microbatches)):
        if not is_integer(count):
            raise ScheduleError(f"{what} is {count!r}; give a whole number, 1 or more.")


def _read_tasks(tasks: Any) -> list[Task]:
    """The tasks as a list; raises ScheduleError where there is none, or what can't be one."""
    listed = list(tasks) if isinstance(tasks, Iterable) else []
    if not listed:
        raise ScheduleError(f"The tasks are {tasks!r}; give at least one, as make_schedule('1f1b', 2, 4) returns them.")
    for task in listed:
        if (
            not isinstance(task, Task)
            or not all(is_integer(number, least=0) for number in task[:3])
            or task.kind not in ("F", "B")
        ):
            raise ScheduleError(
                f"{task!r} is no task; give jaxpar.schedule.Task(tick, stage, microbatch, kind): whole numbers from 0 "
                "on, and 'F' or 'B'."
            )
    return listed


def _order(warmup: int, microbatches: int) -> list[tuple[int, str]]:
    """One stage's tasks: so many forward passes, then a backward and a forward one in turn, then what is left."""
    order = [(number, "F") for number in range(warmup)]
    for number in range(microbatches):
        order.append((number, "B"))
        if warmup + number < microbatches:
            order.append((warmup + number, "F"))
    return order


def _place(orders: list[list[tuple[int, str]]]) -> list[Task]:
    """Each stage's tasks in their order, each at the first tick at which what it needs is done."""
    queues = [collections.deque(order) for order in orders]
    done: dict[tuple[int, int, str], int] = {}
    tasks: list[Task] = []
    tick = 0
    while any(queues):
        for stage, queue in enumerate(queues):
            if not queue:
                continue
            task = Task(tick, stage, *queue[0])
            if all(done.get(needed, tick) < tick for needed in _needs(task, len(orders) - 1)):
                tasks.append(task)
                queue.popleft()
        done |= {task[1:]: task.tick for task in tasks if task.tick == tick}
        tick += 1
    return tasks


def _needs(task: Task, last: int) -> list[tuple[int, int, str]]:
    """The tasks, as (stage, microbatch, kind), that must be done before."""
    if task.kind == "F":
        return [(task.stage - 1, task.microbatch, "F")] if task.stage else []
    after = [] if task.stage == last else [(task.stage + 1, task.microbatch, "B")]
    return [(task.stage, task.microbatch, "F"), *after]
