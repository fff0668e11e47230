"""The line that shows on a terminal how a run goes; changes with what a user wants to watch."""

import collections
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from jaxpar.work import Work

Show = Callable[[int, dict[str, float], Work | None], None]
# The time that is left follows from the last so many seconds, saves and evaluations included.
_PERIOD_SECONDS = 300
# A step's own time is the median of the last so many: a save, an evaluation or a compile between two is no step's.
_STEPS = 1000
# Each refresh takes a millisecond or two of a core, which on a small machine is the step's.
_REFRESHES_A_SECOND = 1
# A step of milliseconds isn't told each time: nobody sees more of them than the line shows.
_TELLS_A_SECOND = 4


def is_live() -> bool:
    """Returns whether the line shows: where errors go to a terminal. TTY_COMPATIBLE=0, rich's own, turns it off."""
    return Console(stderr=True).is_terminal


@contextlib.contextmanager
def show_steps(steps: int, estimated: float | None = None, console: Console | None = None) -> Iterator[Show | None]:
    """Yields what shows a step, its metrics and its work on one live line; None where the output is no terminal.

    Args:
      steps: how many in all.
      estimated: a step's seconds, to stand beside what is measured.
      console: where to; by default where errors go.

    >>> import io
    >>> console = Console(force_terminal=True, file=io.StringIO(), width=120)
    >>> with show_steps(3, 0.01, console) as show:
    ...     show(1, {"loss": 0.5}, Work(512, "tokens"))
    >>> "loss 0.5" in console.file.getvalue()
    True
    """
    console = Console(stderr=True) if console is None else console
    if not console.is_terminal:
        yield None
        return
    columns = (
        BarColumn(12),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        _Speed(estimated),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(
        *columns,
        console=console,
        speed_estimate_period=_PERIOD_SECONDS,
        refresh_per_second=_REFRESHES_A_SECOND,
    ) as progress:
        task = progress.add_task("compiling", total=steps, work=None, seconds=None)
        told: dict[str, float] = {}
        latest: tuple[Any, ...] = ()
        due = 0.0
        reached: float | None = None
        seconds: collections.deque[float] = collections.deque(maxlen=_STEPS)

        def show(number: int, metrics: dict[str, float], work: Work | None) -> None:
            nonlocal latest, reached
            latest = number, metrics, work
            if work is not None:
                before, reached = reached, time.monotonic()
                if before is not None:
                    seconds.append(reached - before)
            # What comes between steps, as an evaluation, comes once.
            if work is None or time.monotonic() >= due:
                put()

        def put() -> None:
            nonlocal latest, due
            number, metrics, work = latest
            latest, due = (), time.monotonic() + 1 / _TELLS_A_SECOND
            kept = {name: value for name, value in metrics.items() if name == "loss" or name.startswith("eval")}
            told.update(kept or dict(list(metrics.items())[:1]))
            line = "  ".join(f"{name} {value:.4g}" for name, value in list(told.items())[:3])
            # An evaluation has no work of its own to tell.
            work = work or progress.tasks[0].fields["work"]
            typical = statistics.median(seconds) if seconds else None
            progress.update(task, completed=number, description=line, work=work, seconds=typical)

        try:
            yield show
        finally:
            if latest:
                put()


class _Speed(ProgressColumn):
    """What follows from a step's time, and that time; rich has a column for bytes a second alone."""

    def __init__(self, estimated: float | None):
        super().__init__()
        self._estimated = estimated

    def render(self, task: Task) -> Text:
        """Returns tokens/s, step time and MFU; nothing before there are two steps to measure between."""
        seconds, work = task.fields["seconds"], task.fields["work"]
        if not seconds:
            return Text("")
        told = [] if work is None else [f"{work.count / seconds:,.0f} {work.unit}/s"]
        told.append(_in_ms(seconds) + (f" (estimated {_in_ms(self._estimated)})" if self._estimated else ""))
        if work is not None and work.peak_seconds:
            told.append(f"MFU {work.peak_seconds / seconds:.1%}")
        return Text("  ".join(told))


def _in_ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
